"""Stable-Baselines3's replay: rows one by one and uniform batches; it has no prioritised one, and takes one row per environment, so 64 rows are those of 64 environments. It imports nothing of fastrl_pipes."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.buffers import ReplayBuffer

sys.path.insert(0, str(Path(__file__).parent))
from replay_rate import ACTION, BS, MANY, STATE, columns, rates  # noqa: E402


def measure(job):
    torch.set_num_threads(job["threads"])
    spaces = gymnasium.spaces.Box(-np.inf, np.inf, (STATE,), np.float32), gymnasium.spaces.Box(-1, 1, (ACTION,), np.float32)

    def adding(rows):
        buffer, c, infos = ReplayBuffer(job["max_sz"], *spaces, device="cpu", n_envs=rows), columns(rows), [{} for _ in range(rows)]
        return buffer, lambda: buffer.add(c["state"], c["next_state"], c["action"], c["reward"], c["terminated"], infos)
    (one, add), (_, many) = adding(1), adding(MANY)
    found = rates(job, add_one=(add, 1), add_64=(many, MANY))
    for _ in range(job["max_sz"]):
        add()
    return found | rates(job, sample_256=(lambda: one.sample(BS), 1))


def about():
    return f"stable-baselines3 {version('stable-baselines3')}, torch {torch.__version__}"
