"""Does learning from data learn? The runs that the notebooks `agents.iql` and `agents.bc` show are made by this script; a run's rows are written when it ends.

    python benchmarks/learning_offline.py data-pendulum data-cheetah        # a few minutes, and about half an hour
    python benchmarks/learning_offline.py iql-pendulum bc-pendulum --seeds 0 1 2 3 4
    python benchmarks/learning_offline.py iql-cheetah bc-cheetah --seeds 0 1 2 3 4
    python benchmarks/learning_offline.py online-cheetah --seeds 0 1 2 3 4  # from where `iql-cheetah` left its checkpoint

Both data sets come from SAC with the preset of its environment, made here and kept below --data (Minari, HDF5):

- `data-pendulum`: SAC on Pendulum-v1 learns until its mean return without exploration over 20 episodes (reset seeds from 20000; asked every 250 environment steps) first passes -500. It is stopped there, and
  10,000 transitions are recorded while it acts as it learned: it samples.
- `data-cheetah`: the first 50,000 environment steps of SAC on HalfCheetah-v5, every one of them, from random actions to what it can at the end.

Returns are without exploration. Curves come from other starts (reset seeds from 20000) than the final returns (from 10000). One thread a run. Runs that have their row are not made again, unless with --again.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import csv
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from control_cells import RESULTS, alone_in, read_rows, version_of

import fastrl_pipes
from fastrl_pipes.agents.bc import bc
from fastrl_pipes.agents.iql import iql
from fastrl_pipes.agents.sac import SACAgent, SACLearner
from fastrl_pipes.core import seed_everything
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.learner.compose import sizes_of
from fastrl_pipes.learner.dataset_writer import DatasetWriter
from fastrl_pipes.learner.registry import load_presets
from fastrl_pipes.memory.dataset import Episodes
from fastrl_pipes.networks.ensemble import Critics
from fastrl_pipes.networks.policies import GaussianActor

FINAL_SEED, CURVE_SEED, DATA_SEED = 10_000, 20_000, 100
ROW = ["cell", "seed", "updates", "env_steps", "mean", "std", "episodes", "seconds", "version", "settings"]
CURVE = ["cell", "seed", "updates", "env_steps", "mean", "lowest", "highest"]
ENVS = {"pendulum": "Pendulum-v1", "cheetah": "HalfCheetah-v5"}
EPISODES = {"pendulum": (200, 20), "cheetah": (10, 10)}  # of the last evaluation, of a point of the curve
ONLINE_STEPS = 10_000


# Data
def data_folder(args, task):
    return args.data / {"pendulum": "pendulum-sac-half", "cheetah": "cheetah-sac-replay"}[task]


def sac_of(task, writer=None):
    "SAC as `fastrl_pipes train sac` builds it, perhaps with a writer behind its environment"
    env = ENVS[task]
    preset = {k: v for k, v in load_presets("sac")[env].items() if k != "env_steps"}
    seed_everything(DATA_SEED)
    sizes = sizes_of("sac", env)
    actor, critic = GaussianActor(*sizes), Critics(*sizes)
    warmup = preset.pop("warmup", 1000)
    stepper = GymStepper(env, SACAgent(actor), seed=DATA_SEED, random_steps=warmup)
    return SACLearner(actor, critic, stepper if writer is None else writer(stepper), [], warmup=warmup, max_sz=100_000, **preset), actor


def make_pendulum(folder):
    (learner, actor), mean = sac_of("pendulum"), -np.inf
    while mean < -500:
        learner.fit(env_steps=250)
        mean = learner.validate(20, seed=CURVE_SEED)["mean"]
        print(f"SAC, {learner.env_steps} steps: {mean:.1f}", flush=True)
    final = learner.validate(200, seed=FINAL_SEED)["mean"]
    about = {"algorithm_name": f"SAC, stopped after {learner.env_steps} steps: {mean:.1f} over 20 episodes, {final:.1f} over 200 without exploration"}
    writer = DatasetWriter(GymStepper("Pendulum-v1", SACAgent(actor), seed=DATA_SEED + 1), folder, about=about)
    for _ in range(10_000):
        next(writer)
    writer.close()


def make_cheetah(folder):
    about = {"algorithm_name": "SAC, its first 50,000 environment steps"}
    learner, _ = sac_of("cheetah", partial(DatasetWriter, dataset=folder, about=about))
    while learner.env_steps < 50_000:
        learner.fit(env_steps=10_000)
        print(f"SAC, {learner.env_steps} steps: {learner.validate(5, seed=CURVE_SEED)['mean']:.1f}", flush=True)
    learner.close()


def data(args, task):
    folder = data_folder(args, task)
    if not (folder / "data").exists():
        {"pendulum": make_pendulum, "cheetah": make_cheetah}[task](folder)
    episodes = Episodes(folder)
    returns = [float(e.reward.sum()) for e in episodes]
    print(f"{folder}: {episodes.dataset.total_steps} transitions in {len(returns)} episodes, mean return {np.mean(returns):.1f} ({min(returns):.1f} to {max(returns):.1f}); sha256 {episodes.sha256[:16]}", flush=True)


# Rows
def write(path, columns, rows):
    "Enter the rows of a run, in place of those that are there"
    mine = rows[0]["cell"], str(rows[0]["seed"])
    with alone_in(path.parent):
        kept = [r for r in read_rows(path) if (r["cell"], r["seed"]) != mine]
        beside = path.with_suffix(".tmp")
        with beside.open("w", newline="") as f:
            writer = csv.DictWriter(f, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept + rows)
        os.replace(beside, path)


def settings_of_cell(algorithm, task, given):
    preset = dict(load_presets(algorithm).get(ENVS[task], {})) | given
    return preset.pop("epochs", 100), {k: v for k, v in preset.items() if k != "env_steps"}


def checkpoint(args, task, seed):
    return args.data / "checkpoints" / f"iql-{task}-{seed}"


# Runs
def run(args, algorithm, task, seed):
    "Learn and evaluate by turns; the rows are written at the end"
    name, online = f"{algorithm}-{task}", algorithm == "online"
    epochs, settings = settings_of_cell("iql" if online else algorithm, task, args.settings)
    if online:
        settings = {"online": True, "start_from": str(checkpoint(args, task, seed)), **settings}
    learner = (bc if algorithm == "bc" else iql)(ENVS[task], str(data_folder(args, task)), seed, **settings)
    final, on_the_way = EPISODES[task]
    curve, seconds, points = [], 0.0, 10 if online else min(epochs, 20)
    for point in range(points + 1):
        found = learner.validate(on_the_way, seed=CURVE_SEED)
        returns = found["returns"]
        curve.append({"cell": name, "seed": seed, "updates": learner.batches_seen, "env_steps": learner.env_steps, "mean": round(found["mean"], 2),
                      "lowest": round(float(returns.min()), 2), "highest": round(float(returns.max()), 2)})
        print(f"{name}, seed {seed}: {found['mean']:.1f} after {learner.batches_seen} updates and {learner.env_steps} steps, {seconds:.0f} s", flush=True)
        if point == points:
            break
        began = time.perf_counter()
        learner.fit(env_steps=ONLINE_STEPS // points) if online else learner.fit(epochs=(point + 1) * epochs // points - point * epochs // points)
        seconds += time.perf_counter() - began
    found = learner.validate(final, seed=FINAL_SEED)
    if algorithm == "iql":
        learner.save(checkpoint(args, task, seed))
    settings = {k: v for k, v in settings.items() if k != "start_from"}
    write(args.out / "offline_curves.csv", CURVE, curve)
    write(args.out / "offline.csv", ROW, [{"cell": name, "seed": seed, "updates": learner.batches_seen, "env_steps": learner.env_steps, "mean": round(found["mean"], 2),
                                           "std": round(found["std"], 2), "episodes": final, "seconds": round(seconds), "version": version_of(fastrl_pipes), "settings": json.dumps(settings)}])
    print(f"{name}, seed {seed}: mean {found['mean']:.1f} over {final} starts, {seconds:.0f} s", flush=True)
    learner.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", help="data-TASK, iql-TASK, bc-TASK or online-TASK, with TASK one of " + ", ".join(ENVS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets and checkpoints")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--again", action="store_true", help="also those runs that have their row")
    parser.add_argument("--settings", type=json.loads, default={}, help='for trials, JSON: {"temperature": 3.0}')
    args = parser.parse_args()
    args.data = args.data.absolute()
    torch.set_num_threads(1)
    for cell in args.cells:
        algorithm, _, task = cell.partition("-")
        if algorithm not in ("data", "iql", "bc", "online") or task not in ENVS:
            parser.error(f"{cell}: expected data-, iql-, bc- or online- and one of {list(ENVS)}")
        if algorithm == "data":
            data(args, task)
            continue
        for seed in args.seeds:
            there = any(r["cell"] == cell and r["seed"] == str(seed) for r in read_rows(args.out / "offline.csv"))
            if args.again or not there:
                run(args, algorithm, task, seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
