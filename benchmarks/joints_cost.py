"""What it costs to look into a stack: DDPG's pull with nobody looking, with a guard, with clocks, and with a tap.

    python benchmarks/joints_cost.py [--rounds 7] [--pulls 300]

One learner per row, same seed, one thread, interleaved; CPU time of this process, the median of the rounds, in microseconds a pull. The row `off again` is a
learner that was guarded, profiled and tapped before, and no longer is: nothing of it may be left. `profile says` is the cost that the profile states itself.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch

from fastrl_pipes.agents.ddpg import ddpg
from fastrl_pipes.pipes.guards import guard
from fastrl_pipes.pipes.tape import put_tap, remove_tap


def learner(hidden):
    made = ddpg(hidden1=hidden[0], hidden2=hidden[1], warmup=200, seed=0)
    next(made)
    return made


def looked_at(hidden):
    made = learner(hidden)
    tap = put_tap(made, "ExperienceReplay")
    with guard(made):
        made.next()
    made.profile(5)
    remove_tap(made, tap)
    return made


def cpu_time(pull, n):
    start = time.process_time()
    for _ in range(n):
        pull()
    return (time.process_time() - start) / n * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pulls", type=int, default=300)
    parser.add_argument("--hidden", type=int, nargs=2, default=(400, 300))
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory()
    made = {name: learner(args.hidden) for name in ("off", "guard", "profile", "tap, memory", "tap, disk")} | {"off again": looked_at(args.hidden)}
    many = args.rounds * args.pulls + 10
    put_tap(made["tap, memory"], "ExperienceReplay", limit=many)
    put_tap(made["tap, disk"], "ExperienceReplay", f"{folder.name}/tape", limit=many)
    made["guard"].guard()
    rows, stated = {name: [] for name in made}, []
    for _ in range(args.rounds):
        for name, run in made.items():
            if name == "profile":
                start = time.process_time()
                found = run.profile(args.pulls)
                rows[name].append((time.process_time() - start) / (args.pulls + 1) * 1e6)
                stated.append(found.cost)
            else:
                rows[name].append(cpu_time(run.next, args.pulls))
    for name, times in rows.items():
        ratio = statistics.median(t / off for t, off in zip(times, rows["off"]))
        print(f"{name:12} {statistics.median(times):8.0f} us   {100 * (ratio - 1):+6.1f}%")
    print(f"profile says {100 * statistics.median(stated):.1f}%")
    for run in made.values():
        run.close()
    folder.cleanup()


if __name__ == "__main__":
    main()
