"""Training speed side by side: the same algorithm, networks, batch and environment in every library, one update per environment step.

    python benchmarks/peers.py                                  # once: the other libraries, in environments of their own
    python benchmarks/speed.py W1 W2 W3 W4 W8 W9 --rounds 5     # rows go to benchmarks/results/speed.csv, one by one
    python benchmarks/speed.py --report                         # the table of what is there, as markdown

Interleaved: A B C, A B C, ..., a process for each entrant, workload and round. A wrapper in the environment stamps the clock, so that imports, compilation, random steps and the first `--lead` updates are outside for every library alike.
Both times are taken: steps per CPU second, and per wall second. `--threads` is what each process is told (OMP, MKL, torch, XLA); the column `cores` says what it took. A run that is in the CSV is not repeated: a stopped comparison goes on
where it was. An entrant that fails is named and left out of its workload. W5 to W7 (DQN, PPO) come with their families.

Entrants: `ours`, `ours-compiled`, `plain` (a single-file loop), `packed` and `packed-compiled` (the fastest plain loop that we know), the libraries, and `limit` and `limit-cold`, what cannot be left out (`entrants/limit.py`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import peers

from fastrl_pipes.learner.bench import append_rows, read_bench, rounds, table
from fastrl_pipes.learner.workloads import OURS, RIVALS, Entrant, get_workload

HERE = Path(__file__).resolve().parent
FILES = HERE/"entrants"
LIBRARIES = ("sb3", "sbx", "tianshou", "torchrl", "skrl", "d3rlpy", "cpprb")
ONLINE = ("ours", "ours-compiled", "plain", "packed", "packed-compiled", "sb3", "sbx", "tianshou", "torchrl", "skrl", "limit", "limit-cold")
WHO = {"online": ONLINE, "offline": ("ours", "ours-compiled", "plain", "packed", "packed-compiled", "torchrl", "d3rlpy", "limit", "limit-cold"), "replay": ("ours", "sb3", "tianshou", "torchrl", "skrl", "cpprb")}


def entrant(name, kind, folder):
    "Who, for a kind of workload; a library has the interpreter that `peers.py` made for it"
    python = str(peers.python_of(folder/name)) if name in LIBRARIES else ""
    if kind == "replay":
        return Entrant(name, str(FILES/f"replay_{name}.py"), python=python)
    if name.startswith("ours"):
        return OURS[name] if kind == "online" else Entrant(name, str(FILES/"ours_offline.py"))
    if name in RIVALS:
        return Entrant(name, RIVALS[name].file, python=python)
    return Entrant(name, str(FILES/f"{name.partition('-')[0]}.py"), python=python)


def chosen(names, kind, folder, say):
    "The entrants of a kind of workload that are there"
    found = []
    for name in WHO[kind]:
        if names and name not in names:
            continue
        made = entrant(name, kind, folder)
        if made.python and not (folder/name/"ready").exists():
            say(f"{name} is not in {folder}: `python benchmarks/peers.py {name}` installs it")
            continue
        found.append(made)
    return found


def counts(rows):
    "Updates that differ from the others' of the same workload: somebody learns less, or more"
    by = {}
    for r in rows:
        if r["updates"] is not None:
            by.setdefault((r["workload"], r["steps"]), {}).setdefault(r["entrant"], []).append(r["updates"])
    for (workload, _), them in by.items():
        usual = statistics.median(u for us in them.values() for u in us)
        yield from (f"{workload}: {name} made {us[0]} updates, the others {usual:.0f}" for name, us in them.items() if abs(us[0] - usual) > 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", help="W1 to W4, W8, W9; default: all of these")
    parser.add_argument("--entrants", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3000, help="that count, of each run")
    parser.add_argument("--lead", type=int, default=500, help="that learn before, and do not count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", type=Path, default=HERE/".peers", help="where peers.py installed the libraries")
    parser.add_argument("--out", type=Path, default=HERE/"results"/"speed.csv")
    parser.add_argument("--report", action="store_true", help="print the table of the CSV, and do nothing else")
    args = parser.parse_args()
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    if not args.report:
        known = {name for names in WHO.values() for name in names}
        if unknown := set(args.entrants or ()) - known:
            parser.error(f"unknown entrants {sorted(unknown)}; there are {sorted(known)}")

        def told(new):
            append_rows(args.out, new)
            for r in new:
                say(f"{r['workload']} round {r['round'] + 1} {r['entrant']:16s} {r['what']:20s} {r['cpu_rate']:11.1f} per CPU second {r['wall_rate']:11.1f} per wall second")
        for name in args.workloads or ("W1", "W2", "W3", "W4", "W8", "W9"):
            workload = get_workload(name)
            rounds(chosen(args.entrants, workload.kind, args.peers.resolve(), say), [workload], args.rounds, args.steps, args.lead, args.threads, read_bench(args.out), told, lambda text: say(f"left out: {text}"))
    found = read_bench(args.out)
    print(table(found, "sb3"))
    for line in counts(found):
        print(f"\n{line}")


if __name__ == "__main__":
    sys.exit(main())
