"""Training speed as one thing grows at a time: environments, batch, width of the networks, replay, threads. Ours eager and compiled, and what cannot be left out.

    python benchmarks/scaling.py                       # rows go to benchmarks/results/scaling.csv, one by one; about 25 minutes on two quiet cores
    python benchmarks/scaling.py batch width --rounds 1
    python benchmarks/scaling.py --profile             # what each pipe takes at the base point, to the same file
    python benchmarks/scaling.py --report              # the table of what is there, as markdown

The base point is W4: SAC on HalfCheetah, networks 256-256, batch 256, replay of 100,000, one environment, one thread. One setting leaves it at a time; the numbers of environments are varied on Pendulum (W3), whose step is cheap.
A process for each entrant, point and round: eager, compiled, limit, then the next point; the rounds one behind the other. As in `benchmarks/speed.py` the clock is in the environment, so that imports, compilation, random steps and
the first updates are outside, and a run that is in the CSV is not repeated. A row is named by its point, `batch 1024`, or `base`; its rates are updates per second, and one update follows one step of all environments.
`limit`: the bare steps of the environments, one by one, and the matrix products of an update, each timed alone at its own shape with its operands hot (`entrants/limit.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from fastrl_pipes.learner.bench import append_rows, read_bench, rounds, summary
from fastrl_pipes.learner.workloads import OURS, Entrant, Workload, get_workload

HERE = Path(__file__).resolve().parent
FILES = HERE/"entrants"
LIMIT = Entrant("limit", str(FILES/"limit.py"))
FILLED = [Entrant(name, str(FILES/"ours_filled.py")) for name in OURS]
MEMORY = Entrant("memory", str(FILES/"replay_ours.py"))
PROFILED = [Entrant(name, str(FILES/"ours_profile.py")) for name in OURS]
LEAD = 30  # updates that do not count; the first of them compiles


@dataclasses.dataclass(frozen=True)
class Point:
    "One setting of the picture: who runs what, for how long"
    axis: str  # base, n, batch, width, replay or threads
    workload: Workload
    steps: int  # updates that count; about two seconds of them, eager
    threads: int = 1

    def runs(self):
        "(entrants, workload, steps): the limit repeats each product for a tenth of its steps, so it is told more of them"
        if self.axis == "profile":
            return [(PROFILED, self.workload, self.steps)]
        if self.axis == "replay":
            plain = dataclasses.replace(get_workload("W9"), name=self.workload.name, max_sz=self.workload.max_sz)
            return [(FILLED, self.workload, self.steps), ([MEMORY], plain, 500)]
        return [(list(OURS.values()), self.workload, self.steps), ([LIMIT], self.workload, max(20 * self.steps, 400))]


def point(axis, value, steps, base="W4", threads=1, **changes):
    start = dataclasses.replace(get_workload(base), episodes=0, **changes)
    warmup = -(-start.bs // start.n)  # steps that fill one batch
    return Point(axis, dataclasses.replace(start, name=f"{axis} {value}".strip(), title=f"{axis} {value}", warmup=warmup), steps, threads)


def points():
    "The whole picture"
    yield point("base", "", 200)
    yield from (point("n", n, steps, "W3", n=n) for n, steps in ((1, 200), (4, 200), (16, 200), (64, 150), (256, 100), (1024, 50)))
    yield from (point("batch", bs, steps, bs=bs) for bs, steps in ((32, 500), (64, 400), (128, 300), (1024, 60), (4096, 16)))
    yield from (point("width", h, steps, hidden=(h, h)) for h, steps in ((32, 500), (64, 400), (128, 300), (512, 80), (1024, 20)))
    yield from (point("replay", size, 200, max_sz=size) for size in (1_000, 10_000, 100_000, 1_000_000))
    yield from (point("threads", name, steps, threads=2, **changes) for name, steps, changes in (("2", 200, {}), ("2, batch 1024", 60, {"bs": 1024}), ("2, width 1024", 20, {"hidden": (1024, 1024)})))


def report(rows):
    "What is there, a line for each point and entrant"
    lines = ["| point | entrant | what | threads | per CPU second | lowest to highest | per wall second | of the limit | rounds |", "|---|---|---|--:|--:|--:|--:|--:|--:|"]
    for s in summary(rows):
        share = "" if s["efficiency"] is None else f"{s['efficiency']:.2f}"
        lines.append(f"| {s['workload']} | {s['entrant']} | {s['what']} | {s['threads']} | {s['cpu']:,.1f} | {s['cpu_low']:,.1f} to {s['cpu_high']:,.1f} | {s['wall']:,.1f} | {share} | {s['rounds']} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axes", nargs="*", metavar="axis", help="base, n, batch, width, replay, threads; default: all of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE/"results"/"scaling.csv")
    parser.add_argument("--profile", action="store_true", help="the pipes of the base point, instead of the picture")
    parser.add_argument("--report", action="store_true", help="print the table of the CSV, and do nothing else")
    args = parser.parse_args()
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    grid = list(points())
    if unknown := set(args.axes) - {p.axis for p in grid}:
        parser.error(f"unknown axes {sorted(unknown)}; there are {list(dict.fromkeys(p.axis for p in grid))}")
    chosen = [p for p in grid if not args.axes or p.axis in args.axes]
    if args.profile:
        chosen = [point("profile", "", 300)]

    def told(new):
        append_rows(args.out, new)
        for r in new:
            say(f"{r['workload']:24s} round {r['round'] + 1} {r['entrant']:14s} {r['what']:30s} {r['cpu_rate']:11.1f} per CPU second {r['wall_rate']:11.1f} per wall second")
            if r["threads"] > 1 and r["cores"] < 0.9 * r["threads"]:
                say(f"  which had {r['cores']:.2f} of {r['threads']} cores: threads wait for each other at every product, and the row says nothing where other work runs; take it out and run again")
    for i in range(0 if args.report else args.rounds):
        for p in chosen:
            for entrants, workload, steps in p.runs():
                rounds(entrants, [workload], i + 1, steps, LEAD, p.threads, read_bench(args.out), told, lambda text: say(f"left out: {text}"))
    print(report(read_bench(args.out)))


if __name__ == "__main__":
    sys.exit(main())
