"""cpprb's replays, uniform and prioritised, which are C++ behind Cython. It imports nothing of fastrl_pipes, and hands out NumPy arrays."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from cpprb import PrioritizedReplayBuffer, ReplayBuffer

sys.path.insert(0, str(Path(__file__).parent))
from replay_rate import BS, MANY, columns, errors, rates  # noqa: E402


def measure(job):
    np.random.seed(job["seed"])
    size, one, many = job["max_sz"], columns(1), columns(MANY)
    fields = {name: {"shape": column.shape[1:] or 1, "dtype": column.dtype} for name, column in one.items()}
    plain, ranked, error = ReplayBuffer(size, fields), PrioritizedReplayBuffer(size, fields, alpha=0.6), errors(size)
    ranked.add(**columns(size), priorities=error)

    def prioritised():
        index = ranked.sample(BS, beta=0.4)["indexes"]
        ranked.update_priorities(index, error[index])
    return rates(job, add_one=(lambda: plain.add(**one), 1), add_64=(lambda: plain.add(**many), MANY), sample_256=(lambda: plain.sample(BS), 1), prioritised_sample_and_update=(prioritised, 1))


def about():
    return f"cpprb {version('cpprb')}"
