"""Does hindsight solve what cannot be solved without it? Every run that the notebook of `memory.hindsight` shows is made by this script; rows are written as the runs end.

    python benchmarks/learning_her.py future none --seeds 0 1 2 3 4

The task is `fastrl/Reach2D-v0`: a point with momentum, 50 steps, reward -1 until it is within 0.05 of a goal. The learner is DDPG over `GoalConditioned` networks, 10,000 environment steps, the first 1,000 of them random; all cells
have the same networks, rates, noise and seeds. `future`, `final` and `episode` are the strategies of `HindsightReplay`, four relabelled transitions to one; `none` is the same stack with the `ExperienceReplay` that it came with. A result is the
share of 200 fixed starts (reset seeds 10000 to 10199) after which the point is at its goal in the last step, without exploration; curves come from 50 other starts (reset seeds from 20000).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import csv
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastrl_pipes.agents.core import ActionClip, ActionScaler, AgentHead, SimpleModelRunner
from fastrl_pipes.agents.ddpg import Actor, Critic, DDPGLearner, GymStepper
from fastrl_pipes.core import seed_everything
from fastrl_pipes.exploration.noise import GaussianNoise
from fastrl_pipes.memory.hindsight import STRATEGIES, HindsightReplay
from fastrl_pipes.networks.goals import GoalConditioned, fields_size
from fastrl_pipes.pipes.compare import replace
from fastrl_pipes.pipes.control import Inlet

RESULTS = Path(__file__).parent.parent / "nbs" / "results"
ENV, STEPS, WARMUP, EVERY = "fastrl/Reach2D-v0", 10_000, 1_000, 1_000
REPLAY = dict(bs=128, max_sz=100_000, warmup=WARMUP)


def build(cell, seed):
    seed_everything(seed)
    probe = GymStepper(ENV)
    size = fields_size(probe.observation_space)
    actor, critic = (GoalConditioned(net(size, 2, 128, 128)) for net in (Actor, Critic))
    agent = AgentHead(ActionScaler(ActionClip(GaussianNoise(SimpleModelRunner(Inlet(), actor), sigma=0.2))))
    learner = DDPGLearner(actor, critic, GymStepper(ENV, agent, seed=seed, random_steps=WARMUP), logger_bases=[], actor_lr=1e-3, critic_lr=1e-3, tau=0.01, discount=0.98, **REPLAY)
    if cell == "none":
        return learner
    return replace(learner, "ExperienceReplay", partial(HindsightReplay, **REPLAY, k=4, strategy=cell), show=False)


def success(learner, episodes, first):
    "Share of the episodes that end at their goal"
    steps, found = learner.episodes(episodes, seed=first, n=50), []
    for step in steps:
        found += (step.reward[step.done] == 0).tolist()
    steps.close()
    return float(np.mean(found))


def append(path, rows):
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def run(cell, seed, steps, out):
    learner, start = build(cell, seed), time.process_time()
    curve = [{"cell": cell, "seed": seed, "env_steps": 0, "success": success(learner, 50, 20_000)}]
    while learner.env_steps < steps:
        learner.fit(env_steps=min(EVERY, steps - learner.env_steps))
        if learner.interrupted:
            raise SystemExit(130)
        curve.append({"cell": cell, "seed": seed, "env_steps": learner.env_steps, "success": success(learner, 50, 20_000)})
    seconds = time.process_time() - start
    found = success(learner, 200, 10_000)
    append(out / "her.csv", [{"cell": cell, "seed": seed, "env_steps": learner.env_steps, "success": found, "episodes": 200, "cpu_seconds": round(seconds)}])
    append(out / "her_curves.csv", curve)
    print(f"{cell}, seed {seed}: {found:.1%} of 200 starts after {learner.env_steps} steps, {seconds:.0f} s of CPU", flush=True)
    learner.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", choices=[*STRATEGIES, "none"], help="which replays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=STEPS, help="environment steps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        for cell in args.cells:
            run(cell, seed, args.steps, args.out)


if __name__ == "__main__":
    main()
