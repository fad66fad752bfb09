"""How fast the replays are: rows the size of HalfCheetah's (17 observations, 6 actions), batches of 256, one thread.

    python benchmarks/replay_speed.py [--rounds 7] [--sizes 100000 1000000] [--out benchmarks/results/replay_speed.csv]

Operations per CPU second, medians over interleaved rounds in one process:

- `add one`: rows per second, written one by one by a `ReplayWriter`, as one environment gives them; `add 64`: rows per second, in steps of 64.
- `sample`: batches per second that a `ReplaySampler` draws uniformly.
- `prioritised`: batches per second that a `PrioritizedSampler` draws, each followed by an update of its 256 priorities with the errors of these rows.
- `prioritised, fed`: the same, with one row written before each batch, which gets its priority, too: what one step of training asks of a replay.
- `tree`: of these, what the sum tree does: draw 256 places and set their weights.

Memories are full. Every row has an error of its own, the absolute value of a normal number, cubed: as uneven as those of a critic that learns.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import numpy as np
import torch

from report import report

from fastrl_pipes.core import SimpleStep
from fastrl_pipes.memory.experience_replay import ReplaySampler, ReplayWriter
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.memory.prioritized import PrioritizedSampler
from fastrl_pipes.memory.sumtree import SumTree
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.walk import bind

BS, STATE, ACTION = 256, 17, 6


def step(rows):
    rng = np.random.default_rng(0)
    state, after = rng.standard_normal((2, rows, STATE)).astype(np.float32)
    return SimpleStep(state=state, action=rng.uniform(-1, 1, (rows, ACTION)).astype(np.float32), next_state=after, reward=rng.standard_normal((rows, 1)).astype(np.float32),
                      terminated=np.zeros((rows, 1), bool), truncated=np.zeros((rows, 1), bool), step_n=np.ones((rows, 1), np.int64),
                      episode_n=np.zeros((rows, 1), np.int64), env_id=np.arange(rows)[:, None])


def errors(size):
    "Of every row, as a critic's loss would find them"
    return torch.randn(size).pow(3).abs()


def started(pipe):
    bind(pipe, Context(seed=0, device=torch.device("cpu"), dtype=torch.float32))
    pipe.start()
    return pipe


def filled(size):
    memory, rows = ReplayMemory(size), step(1000)
    for _ in range(size // 1000):
        memory.write(rows)
    return memory


def adds(size, rows):
    writer, item = started(ReplayWriter([], ReplayMemory(size))), step(rows)
    return lambda: writer.forward(item), rows, 20_000 // rows + 500


def uniform(size):
    sampler, item = started(ReplaySampler([], filled(size), BS)), step(1)
    return lambda: sampler.forward(item), 1, 5000


def prioritised(size, fed):
    memory, item, error = filled(size), step(1), errors(size)
    sampler = started(PrioritizedSampler([], memory, BS))
    sampler.update(torch.arange(size), error)

    def go():
        if fed:
            memory.write(item)
        (batch,) = sampler.forward(item)
        sampler.update(batch.index, error.index_select(0, batch.index))
    return go, 1, 2000


def tree(size):
    rng, sums, weights = np.random.default_rng(0), SumTree(size), errors(size).double().numpy() ** 0.6
    sums.fill(0, size, weights)

    def go():
        index, _ = sums.sample(BS, rng)
        sums.put(index, weights[index])
    return go, 1, 2000


def rate(call, each, n):
    gc.disable()
    start = time.process_time()
    for _ in range(n):
        call()
    took = time.process_time() - start
    gc.enable()
    return n * each / took


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    calls = {}
    for size in args.sizes:
        name = f"{size:.0e}".replace("e+0", "e")
        calls |= {f"add one, {name}": adds(size, 1), f"add 64, {name}": adds(size, 64), f"sample, {name}": uniform(size), f"prioritised, {name}": prioritised(size, False),
                  f"prioritised, fed, {name}": prioritised(size, True), f"tree, {name}": tree(size)}
    for call, each, n in calls.values():
        rate(call, each, n)
    rates = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, how in calls.items():
            rates[name].append(rate(*how))
    report(f"per CPU second, median of {args.rounds} interleaved rounds (lowest to highest), one thread, batches of {BS}", rates, args.out)


if __name__ == "__main__":
    main()
