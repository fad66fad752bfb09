"""What the entrants of the replay workload share: operations timed in turns, per CPU second and per wall second. It imports nothing of fastrl_pipes."""

from __future__ import annotations

import time

import numpy as np

BS, STATE, ACTION, MANY = 256, 17, 6, 64


def columns(rows, seed=0):
    "state, action, next_state, reward, terminated of so many rows"
    rng = np.random.default_rng(seed)
    state, after = rng.standard_normal((2, rows, STATE)).astype(np.float32)
    return {"state": state, "action": rng.uniform(-1, 1, (rows, ACTION)).astype(np.float32), "next_state": after, "reward": rng.standard_normal(rows).astype(np.float32), "terminated": np.zeros(rows, bool)}


def errors(rows, seed=0):
    "Of each row, positive and uneven"
    return (np.abs(np.random.default_rng(seed).standard_normal(rows)) ** 3).astype(np.float32) + 1e-6


def rates(job, seconds=0.3, **calls):
    """Column -> (per CPU second, per wall second); each call is (function, what one call counts as).

    A memory is filled once before adding to it is timed: the first rows of it also pay for pages that the system has to find. Then as many calls as take about `seconds`."""
    found = {}
    for name, (call, each) in calls.items():
        for _ in range(-(-job["max_sz"] // each) if name.startswith("add") else 20):
            call()
        began = time.perf_counter()
        for _ in range(20):
            call()
        n = max(20, int(20 * seconds / (time.perf_counter() - began)))
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(n):
            call()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        found[name.replace("_", " ")] = (n * each / max(cpu, 1e-9), n * each / max(wall, 1e-9))
    return found
