"""Tianshou's replays, uniform and prioritised. Its `add` takes one row per environment, so 64 rows are those of 64 environments. It imports nothing of fastrl_pipes."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tianshou.data import Batch, PrioritizedReplayBuffer, ReplayBuffer, VectorReplayBuffer

sys.path.insert(0, str(Path(__file__).parent))
from replay_rate import BS, MANY, columns, errors, rates  # noqa: E402


def batch(rows):
    c = columns(rows)
    return Batch(obs=c["state"], act=c["action"], rew=c["reward"], terminated=c["terminated"], truncated=np.zeros(rows, bool), obs_next=c["next_state"], info={})


def measure(job):
    np.random.seed(job["seed"])
    size, single = job["max_sz"], batch(1)
    row = single[0]
    plain, many, ranked = ReplayBuffer(size), VectorReplayBuffer(size, MANY), PrioritizedReplayBuffer(size, alpha=0.6, beta=0.4)
    rows, ids, error = batch(MANY), np.arange(MANY), errors(size)
    found = rates(job, add_one=(lambda: plain.add(row), 1), add_64=(lambda: many.add(rows, buffer_ids=ids), MANY))
    for _ in range(size):
        ranked.add(row)
    ranked.update_weight(np.arange(size), error)

    def prioritised():
        _, index = ranked.sample(BS)
        ranked.update_weight(index, error[index])
    for _ in range(size - len(plain)):
        plain.add(row)
    return found | rates(job, sample_256=(lambda: plain.sample(BS), 1), prioritised_sample_and_update=(prioritised, 1))


def about():
    return f"tianshou {version('tianshou')}"
