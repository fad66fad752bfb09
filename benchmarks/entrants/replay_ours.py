"""The replays of this package: `ReplayWriter`, `ReplaySampler`, `PrioritizedSampler`, as `benchmarks/replay_speed.py` measures them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import replay_speed  # noqa: E402
from replay_rate import MANY, rates  # noqa: E402

import fastrl_pipes  # noqa: E402


def measure(job):
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    size = job["max_sz"]
    return rates(job, add_one=(replay_speed.adds(size, 1)[0], 1), add_64=(replay_speed.adds(size, MANY)[0], MANY), sample_256=(replay_speed.uniform(size)[0], 1),
                 prioritised_sample_and_update=(replay_speed.prioritised(size, False)[0], 1))


def about():
    return f"fastrl_pipes {fastrl_pipes.__version__}, torch {torch.__version__}"
