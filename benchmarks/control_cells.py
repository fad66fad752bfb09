"""The cells of `learning_control.py` and `learning_peers.py`: what is learned, for how long, how it is judged, and where the rows go. Imports neither us nor a peer.

A cell is `ALGORITHM-ENVIRONMENT`, with settings behind a colon where they are to differ: `sac-pendulum`, `td3-cheetah`, `sac-pendulum:tau=0.01,bs=64`.
`control.csv` has a row for each run that has ended, `control_curves.csv` its evaluations on the way. Several processes may write at once.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "nbs" / "results"
FINAL_SEED, CURVE_SEED = 10_000, 20_000  # first reset seeds of the last evaluation, and of those on the way
ROW = ["cell", "seed", "env_steps", "mean", "std", "episodes", "seconds", "cpu_seconds", "version", "settings"]
CURVE = ["cell", "seed", "env_steps", "mean"]


@dataclass(frozen=True)
class Task:
    "An environment, a budget, and how a policy is judged, always without exploration"
    env: str  # id
    env_steps: int  # the budget, random steps of the warm-up included
    episodes: int  # of the last evaluation
    every: int  # environment steps from one point of the curve to the next
    curve_episodes: int  # of a point of the curve


TASKS = {
    "pendulum": Task("Pendulum-v1", 10_000, 200, 1_000, 20),
    "mountaincar": Task("MountainCarContinuous-v0", 50_000, 100, 5_000, 10),
    "cheetah": Task("HalfCheetah-v5", 100_000, 10, 10_000, 5),
    "hopper": Task("Hopper-v5", 100_000, 10, 10_000, 5),
    "walker": Task("Walker2d-v5", 100_000, 10, 10_000, 5),
    "ant": Task("Ant-v5", 100_000, 10, 10_000, 5),
}


@dataclass(frozen=True)
class Cell:
    "What one run is"
    name: str
    algorithm: str
    task: Task
    settings: dict[str, Any]  # beyond the preset


def cell_of(
    name: str,  # for example 'sac-pendulum' or 'sac-pendulum:tau=0.01'
) -> Cell:
    "The cell of that name. Raises ValueError where there is no such environment"
    import yaml
    base, _, rest = name.partition(":")
    algorithm, _, task = base.rpartition("-")
    if not algorithm or task not in TASKS:
        raise ValueError(f"{name}: expected ALGORITHM-ENVIRONMENT with an environment of {list(TASKS)}, for example sac-pendulum")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    if wrong := [k for k, equals, _ in pairs if not equals]:
        raise ValueError(f"{name}: {wrong[0]!r} has no value, expected NAME=VALUE")
    return Cell(name, algorithm, TASKS[task], {k: _number(yaml.safe_load(v)) for k, _, v in pairs})


def _number(value):
    "YAML takes 1e-3 for text"
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


# Rows
@contextlib.contextmanager
def alone_in(
    folder: Path,  # made if it does not exist
) -> Iterator[None]:
    "One process at a time"
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def read_rows(path: Path) -> list[dict[str, str]]:
    "The rows of a CSV file; none where there is no file"
    if not path.exists():
        return []
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def write_rows(
    path: Path,  # CSV
    columns: list[str],  # its header
    rows: list[dict[str, Any]],  # of one cell and seed: they take the place of those that are there
) -> None:
    "Enter the rows of a run, at once and for all processes"
    mine = rows[0]["cell"], str(rows[0]["seed"])
    with alone_in(path.parent):
        kept = [r for r in read_rows(path) if (r["cell"], r["seed"]) != mine]
        beside = path.with_suffix(".tmp")
        with beside.open("w", newline="") as f:
            writer = csv.DictWriter(f, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept + rows)
        os.replace(beside, path)


def is_there(out: Path, name: str, seed: int, env_steps: int) -> bool:
    "Has this run ended before, with this budget?"
    return any(r["cell"] == name and r["seed"] == str(seed) and int(r["env_steps"]) >= env_steps for r in read_rows(out / "control.csv"))


def version_of(module: Any) -> str:
    "Version, and the commit of this folder; + where files have changed since"
    git = subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return f"{module.__version__} {git.stdout.strip()}".strip()


# Runs
def learn(
    cell: Cell,
    name: str,  # in the rows
    seed: int,
    out: Path,
    train: Callable[[int], int],  # so many environment steps more -> all so far
    evaluate: Callable[[int, int], tuple[float, float]],  # (episodes, first reset seed) -> mean and standard deviation of the returns
    about: dict[str, Any],  # version, settings
    budget: int,  # environment steps
) -> None:
    "Learn and evaluate by turns, and write the rows at the end. Evaluations are in neither time"
    done, seconds, cpu, task, curve = 0, 0.0, 0.0, cell.task, []
    while True:
        mean, _ = evaluate(task.curve_episodes, CURVE_SEED)
        curve.append({"cell": name, "seed": seed, "env_steps": done, "mean": round(mean, 2)})
        print(f"{name}, seed {seed}: {mean:.1f} after {done} steps, {seconds:.0f} s", flush=True)
        if done >= budget:
            break
        wall_began, cpu_began = time.perf_counter(), time.process_time()
        done = train(min(task.every, budget - done))
        seconds, cpu = seconds + time.perf_counter() - wall_began, cpu + time.process_time() - cpu_began
    mean, std = evaluate(task.episodes, FINAL_SEED)
    write_rows(out / "control_curves.csv", CURVE, curve)
    write_rows(out / "control.csv", ROW, [{"cell": name, "seed": seed, "env_steps": done, "mean": round(mean, 2), "std": round(std, 2), "episodes": task.episodes,
                                           "seconds": round(seconds), "cpu_seconds": round(cpu), **about}])
    print(f"{name}, seed {seed}: mean {mean:.1f} over {task.episodes} starts after {done} steps, {seconds:.0f} s ({cpu:.0f} s of CPU)", flush=True)


def main(
    run: Callable[[Cell, int, Path, int], None],  # (cell, seed, out, budget)
    doc: str,  # of the script
    script: str,  # its file
    prefix: str = "",  # of the names in the rows
) -> int:
    "The command line; 1 where a run has failed, and the others have gone on"
    import argparse
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", help=f"ALGORITHM-ENVIRONMENT[:NAME=VALUE,...], environments: {', '.join(TASKS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, a process each")
    parser.add_argument("--again", action="store_true", help="also those runs that have their row")
    parser.add_argument("--cut", type=int, help="a trial with so many environment steps; its rows go to a temporary folder")
    parser.add_argument("--out", type=Path, help=f"folder of the rows; default: {RESULTS.parent.name}/{RESULTS.name}")
    args = parser.parse_args()
    try:
        cells = [cell_of(name) for name in args.cells]
    except ValueError as e:
        parser.error(str(e))
    out = args.out or (RESULTS if args.cut is None else Path(tempfile.gettempdir()) / "fastrl_pipes_trial")

    def one(todo):
        cell, seed = todo
        budget = cell.task.env_steps if args.cut is None else args.cut
        if not args.again and is_there(out, prefix + cell.name, seed, budget):
            print(f"{prefix}{cell.name}, seed {seed}: is there", flush=True)
            return 0
        if args.jobs > 1:
            cut = [] if args.cut is None else ["--cut", str(args.cut)]
            return subprocess.run([sys.executable, script, cell.name, "--seeds", str(seed), "--again", "--out", str(out), *cut], check=False).returncode
        try:
            run(cell, seed, out, budget)
        except Exception:
            traceback.print_exc()
            return 1
        return 0

    todo = [(cell, seed) for seed in args.seeds for cell in cells]
    if args.jobs > 1:
        with ThreadPoolExecutor(args.jobs) as pool:
            codes = list(pool.map(one, todo))
    else:
        codes = [one(t) for t in todo]
    if failed := [f"{c.name}, seed {s}" for (c, s), code in zip(todo, codes) if code]:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if any(codes) else 0
