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


def rates(job, **calls):
    "Column -> (per CPU second, per wall second); each call is (function, what one call counts as). A third of the steps warm up"
    found = {}
    for name, (call, each) in calls.items():
        n = max(5 * job["steps"] // each, 200)
        for _ in range(max(n // 3, 10)):
            call()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(n):
            call()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        found[name.replace("_", " ")] = (n * each / max(cpu, 1e-9), n * each / max(wall, 1e-9))
    return found
