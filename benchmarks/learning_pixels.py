"""Does DDPG learn from pixels? Every run that nbs/tutorials/30_pixels.ipynb shows is made by this script; rows are written as the runs end.

    python benchmarks/learning_pixels.py --seeds 0 1 2

The environment is `fastrl/PixelReach-v0`, three frames of 32 by 32 bytes, eight side by side; the settings are those of `learner` below. A result is the mean return without
exploration over 100 fixed starts (reset seeds 10000 to 10099); beside it that of random actions and of the environment's good push on the same starts. One thread,
a few minutes a seed. `--stack 1` shows the learner a single frame.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from learning_ddpg import append

from fastrl_pipes.agents.ddpg import Actor, Critic, DDPGAgent, DDPGLearner, GymStepper, ddpg_conv2d_block
from fastrl_pipes.core import seed_everything
from fastrl_pipes.envs.episodes import EpisodeStepper, episode_returns
from fastrl_pipes.envs.pixels import PixelReach

ENV, STARTS, FIRST = "fastrl/PixelReach-v0", 100, 10_000
RESULTS = Path(__file__).parent.parent / "nbs" / "results"


def learner(seed, stack=3):
    seed_everything(seed)
    size = (stack, 32, 32)
    conv = partial(ddpg_conv2d_block, filters=16)
    actor = Actor(size, 2, 200, 200, conv_block=conv, batch_norm=True)
    critic = Critic(size, 2, 200, 200, conv_block=conv)
    agent = DDPGAgent(actor, min_epsilon=0.1, max_steps=16_000, sigma=0.3)
    pipe = GymStepper(ENV, agent, n=8, mode="sync", seed=seed, random_steps=2000, env_kwargs={"stack": stack})
    return DDPGLearner(actor, critic, pipe, logger_bases=[], actor_lr=3e-4, critic_lr=1e-3, tau=0.02, bs=64, max_sz=20_000, discount=0.85, warmup=2000, batches=250)


def at_random():
    return episode_returns(EpisodeStepper(ENV, None, STARTS, FIRST))[0]


def good_push():
    returns = []
    for i in range(STARTS):
        env = PixelReach()
        env.reset(seed=FIRST + i)
        returns.append(sum(env.step(env.best_action())[1] for _ in range(env.length)))
    return np.array(returns)


def run(seed, stack, env_steps, out):
    made = learner(seed, stack)
    setting, start, curve = f"DDPG, {stack} frame" + "s" * (stack > 1), time.process_time(), []

    def look(row):
        curve.append({"setting": setting, "seed": seed, "env_steps": int(row["env_steps"]), "rolling_reward": round(row["rolling_reward"], 2),
                      "validation": round(made.validate(20, seed=20_000)["mean"], 2)})
        print(curve[-1], flush=True)
    made.fit(env_steps=env_steps, stop=look)
    seconds = time.process_time() - start
    returns = made.validate(STARTS, seed=FIRST)["returns"]
    append(out / "pixels.csv", [{"setting": setting, "seed": seed, "env_steps": made.env_steps, "mean_return": round(float(returns.mean()), 2),
                                 "std_of_returns": round(float(returns.std()), 2), "cpu_seconds": round(seconds)}])
    append(out / "pixels_curves.csv", curve)
    print(f"{setting}, seed {seed}: {returns.mean():.1f} after {made.env_steps} steps, {seconds:.0f} CPU seconds", flush=True)
    made.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stack", type=int, default=3)
    parser.add_argument("--env-steps", type=int, default=24_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not (args.out / "pixels.csv").exists():
        for setting, returns in (("random actions", at_random()), ("the good push, which knows the velocity", good_push())):
            append(args.out / "pixels.csv", [{"setting": setting, "seed": "", "env_steps": 0, "mean_return": round(float(returns.mean()), 2),
                                              "std_of_returns": round(float(returns.std()), 2), "cpu_seconds": 0}])
    for seed in args.seeds:
        run(seed, args.stack, args.env_steps, args.out)


if __name__ == "__main__":
    main()
