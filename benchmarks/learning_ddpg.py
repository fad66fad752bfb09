"""Does DDPG learn? Every run that the DDPG notebook's table and curves show is made by this script; rows are written as the runs end.

    python benchmarks/learning_ddpg.py preset page mountaincar widebox --seeds 0 1 2 3 4

`preset` is `fastrl_pipes train ddpg --env Pendulum-v1`: the shipped preset, 10,000 environment steps. `page` is `DDPGLearner` with its own defaults, 15,000 steps;
`page-nsteps` the same with the two settings of the page's own run that speak of learning, nsteps 2 and max_sz 20,000.
`mountaincar` is the preset of MountainCarContinuous-v0, stopped once 20 and then 80 validation episodes reach 90, at most 40,000 steps. `widebox` is a bandit
whose action box is wide and not symmetric (best return 0); `widegoal` asks a point to move to a goal, with a box of [-3, 11]. A result is the mean return without exploration over 200 fixed starts (reset seeds 10000 to 10199).
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch

from fastrl_pipes.agents.ddpg import Actor, Critic, DDPGAgent, DDPGLearner, GymStepper, ddpg
from fastrl_pipes.core import seed_everything
from fastrl_pipes.envs.debug import Goal
from fastrl_pipes.learner.registry import load_presets

RESULTS = Path(__file__).parent.parent / "nbs" / "results"


def from_preset(env, seed):
    settings = dict(load_presets("ddpg").get(env, {}))
    return ddpg(env, seed, **{k: v for k, v in settings.items() if k != "env_steps"}), settings.get("env_steps", 10_000)


def page(seed, **settings):
    seed_everything(seed)
    actor, critic = Actor(3, 1), Critic(3, 1)
    return DDPGLearner(actor, critic, GymStepper("Pendulum-v1", DDPGAgent(actor), seed=seed), logger_bases=[], **settings), 15_000


def widebox(seed):
    return ddpg("fastrl/WideBox-v0", seed, hidden1=64, hidden2=64, warmup=500), 3_000


def widegoal(seed):
    seed_everything(seed)
    actor, critic = Actor(2, 1, 64, 64), Critic(2, 1, 64, 64)
    stepper = GymStepper(lambda: Goal(low=-3.0, high=11.0), DDPGAgent(actor, max_steps=3000), seed=seed, random_steps=500)
    return DDPGLearner(actor, critic, stepper, logger_bases=[], critic_lr=1e-3, tau=0.005, warmup=500, discount=0.9), 5_000


CELLS = {
    "preset": ("Pendulum-v1, preset", lambda seed: from_preset("Pendulum-v1", seed), None),
    "page": ("Pendulum-v1, the page's defaults", page, None),
    "page-nsteps": ("Pendulum-v1, the page's defaults, nsteps 2", lambda seed: page(seed, nsteps=2, max_sz=20_000), None),
    "mountaincar": ("MountainCarContinuous-v0, preset", lambda seed: from_preset("MountainCarContinuous-v0", seed), 90.0),
    "widebox": ("fastrl/WideBox-v0, box wide and asymmetric", widebox, None),
    "widegoal": ("reach a goal, box [-3, 11]", widegoal, None),
}


def reached(learner, goal):
    "As `fastrl_pipes train --stop-at` decides"
    def stop(row):
        return all(learner.validate(episodes, seed=seed)["mean"] >= goal for episodes, seed in ((20, 20_000), (80, 20_020)))
    return None if goal is None else stop


def append(path, rows):
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def run(cell, seed, out):
    setting, build, goal = CELLS[cell]
    learner, env_steps = build(seed)
    start = time.perf_counter()
    rows = learner.fit(env_steps=env_steps, stop=reached(learner, goal))
    found = learner.validate(episodes=200)
    append(out / "ddpg.csv", [{"setting": setting, "seed": seed, "env_steps": learner.env_steps, "mean_return": round(found["mean"], 2),
                               "std_of_returns": round(found["std"], 2)}])
    append(out / "ddpg_curves.csv", [{"setting": setting, "seed": seed, "env_steps": int(r["env_steps"]),
                                      "rolling_reward": round(r["rolling_reward"], 2)} for r in rows if r["rolling_reward"] == r["rolling_reward"]])
    print(f"{setting}, seed {seed}: {found['mean']:.1f} after {learner.env_steps} steps, {time.perf_counter() - start:.0f} s", flush=True)
    learner.close()


def picture(out):
    "The curve of the front page, from the rows of `preset`"
    from matplotlib.figure import Figure
    setting = CELLS["preset"][0]
    curves = [r for r in csv.DictReader((out / "ddpg_curves.csv").open()) if r["setting"] == setting]
    returns = [float(r["mean_return"]) for r in csv.DictReader((out / "ddpg.csv").open()) if r["setting"] == setting]
    figure = Figure(figsize=(7.2, 3.2), dpi=150, layout="constrained")
    ax = figure.subplots()
    for seed in sorted({r["seed"] for r in curves}):
        points = [(int(r["env_steps"]), float(r["rolling_reward"])) for r in curves if r["seed"] == seed]
        ax.plot(*zip(*points), linewidth=1.4, label=f"seed {seed}")
    ax.axhline(-138, color="0.4", linewidth=1, linestyle="--")
    ax.annotate("best possible, about -138", (points[0][0], -138), xytext=(0, -11), textcoords="offset points", color="0.35", fontsize=8)
    ax.set(xlabel="environment steps", ylabel="reward of the latest 20 episodes")
    ax.set_title(f"DDPG on Pendulum-v1. After 10,000 steps, without exploration: {min(returns):.0f} to {max(returns):.0f}", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="lower right")
    figure.savefig(out.parent / "images" / "pendulum_ddpg.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", choices=[*CELLS, []], help="which runs to make; none: only the picture, with --picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--picture", action="store_true", help="draw the front page's curve from the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for cell in args.cells:
        for seed in args.seeds:
            run(cell, seed, args.out)
    if args.picture:
        picture(args.out)


if __name__ == "__main__":
    main()
