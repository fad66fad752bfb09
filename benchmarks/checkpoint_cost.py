"""What it costs to save and to load a learner with a large replay, against copying the replay's bytes.

    python benchmarks/checkpoint_cost.py [--rows 1000000] [--rounds 5] [--out benchmarks/results/checkpoint_cost.csv]

The learner is DDPG on HalfCheetah-v5 (400-300 networks); its replay is filled with synthetic transitions of that size. `copy out` writes the replay's bytes to a file with one
`write` and an fsync; `save` is `learner.save` into an empty folder; `save again` is a second one after 10,000 further rows. `copy in` reads the file into memory that is new; `load` is `learner.load` into a
learner that is new; `load in place` replaces a replay that is full, whose rows are looked at twice, so that a damaged file changes nothing. All are interleaved, in one process and one thread. Files are in the page cache when they are read. Printed are
seconds, medians over the rounds, and the median of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fastrl_pipes.agents.ddpg import ddpg
from fastrl_pipes.core import SimpleStep
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.pipes.walk import named_modules


def made(rows):
    learner = ddpg("HalfCheetah-v5", max_sz=rows, warmup=0)
    learner.start()
    return learner, next(m for m in named_modules(learner).values() if isinstance(m, ReplayMemory))


def fill(memory, rows, rng):
    "Synthetic transitions, ten thousand at a time"
    for _ in range(rows // 10_000):
        n = 10_000
        state = rng.standard_normal((n, 17), dtype=np.float32)
        flag = np.zeros((n, 1), bool)
        memory.write(SimpleStep(state=state, action=state[:, :6], next_state=state, reward=state[:, :1], terminated=flag, truncated=flag))


def timed(fn):
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def copy_out(memory, path):
    with open(path, "wb", buffering=0) as f:
        view = memoryview(memory.rows.numpy().reshape(-1).view(np.uint8))
        while len(view):
            view = view[f.write(view):]
        os.fsync(f.fileno())


def copy_in(path, nbytes):
    target = np.zeros(nbytes, np.uint8)
    with open(path, "rb", buffering=0) as f:
        view, done = memoryview(target), 0
        while done < nbytes:
            done += f.readinto(view[done:])
    return target


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    learner, memory = made(args.rows)
    fill(memory, args.rows, rng)
    where = Path(tempfile.mkdtemp(dir=args.folder))
    rows = {name: [] for name in ("copy out", "save", "save again", "copy in", "load", "load in place")}
    for i in range(args.rounds):
        checkpoint, file = where / f"c{i}", where / f"f{i}"
        both = {"copy out": lambda: copy_out(memory, file), "save": lambda: learner.save(checkpoint)}
        for name in sorted(both, reverse=bool(i % 2)):  # each is first in every other round
            rows[name].append(timed(both[name]))
        fill(memory, 10_000, rng)
        rows["save again"].append(timed(lambda: learner.save(checkpoint)))
        rows["copy in"].append(timed(lambda: copy_in(file, memory.nbytes)))
        fresh, twin = made(args.rows)
        rows["load"].append(timed(lambda: fresh.load(checkpoint)))
        assert torch.equal(twin.rows, memory.rows)
        rows["load in place"].append(timed(lambda: fresh.load(checkpoint)))
        fresh.close()
        fresh = twin = None  # their memory, before the next round
        shutil.rmtree(checkpoint), file.unlink()
    shutil.rmtree(where)
    print(f"{args.rows:,} rows, {memory.nbytes / 1e6:.0f} MB; seconds, median of {args.rounds} rounds (lowest to highest)")
    table = []
    for name, values in rows.items():
        base = "copy out" if "save" in name or name == "copy out" else "copy in"
        ratio = statistics.median(a / b for a, b in zip(values, rows[base]))
        table.append([name, round(statistics.median(values), 4), round(min(values), 4), round(max(values), 4), round(ratio, 2)])
        print(f"  {name:14s} {table[-1][1]:8.3f}   ({table[-1][2]:.3f} to {table[-1][3]:.3f})   {ratio:5.2f} times {base}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(["row", "median_s", "low_s", "high_s", "ratio_to_copy"])
            writer.writerows(table)


if __name__ == "__main__":
    main()
