"""What Stable-Baselines3 reaches in the cells of `learning_control.py`, with the same budgets, starts and evaluations; its rows begin with `sb3-`.

    python benchmarks/learning_peers.py sac-pendulum td3-cheetah --seeds 0 1 2

Run it where `stable_baselines3` is installed; fastrl_pipes does not need it, and need not be there. Its settings are those of Stable-Baselines3, which are those of the papers (batch 256, networks
256-256, Adam with 3e-4 for SAC and 1e-3 for TD3 and DDPG, tau .005, one update per environment step, replay of 10^6 or the budget), written out below so that they hold for every version; TD3 and DDPG act with normal
noise of .1, as in Fujimoto 2018. `learning_starts` is our preset's `warmup`. Settings behind a colon are those of the peer's constructor: `sac-pendulum:gamma=0.98`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import copy
import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import yaml
from control_cells import learn, main, version_of

PRESETS = Path(__file__).parent.parent / "fastrl_pipes" / "presets"
WARMUP = 1000  # where our preset says nothing, as in the builders
COMMON = {"batch_size": 256, "tau": 0.005, "gamma": 0.99, "train_freq": 1, "gradient_steps": 1, "policy_kwargs": {"net_arch": [256, 256]}}
SETTINGS = {
    "sac": {"learning_rate": 3e-4, "ent_coef": "auto"},
    "td3": {"learning_rate": 1e-3, "policy_delay": 2, "target_policy_noise": 0.2, "target_noise_clip": 0.5},
    "ddpg": {"learning_rate": 1e-3},
}


def warmup_of(algorithm, env):
    "Of our preset"
    path = PRESETS / f"{algorithm}.yaml"
    presets = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return ((presets or {}).get(env) or {}).get("warmup", WARMUP)


def play(model, env, episodes, first):
    "Mean and standard deviation of the returns: episode i from reset seed first + i, without exploration"
    returns = []
    for episode in range(episodes):
        observation, _ = env.reset(seed=first + episode)
        total, over = 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(model.predict(observation, deterministic=True)[0])
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    return float(np.mean(returns)), float(np.std(returns))


def run(cell, seed, out, budget):
    import stable_baselines3
    from stable_baselines3.common.noise import NormalActionNoise
    if cell.algorithm not in SETTINGS:
        raise ValueError(f"{cell.name}: expected an algorithm of {list(SETTINGS)}")
    env, judge = gym.make(cell.task.env), gym.make(cell.task.env)
    settings = COMMON | SETTINGS[cell.algorithm] | {"learning_starts": warmup_of(cell.algorithm, cell.task.env), "buffer_size": min(10**6, budget)} | cell.settings
    size = env.action_space.shape
    noise = {} if cell.algorithm == "sac" else {"action_noise": NormalActionNoise(np.zeros(size), np.full(size, 0.1))}
    model = getattr(stable_baselines3, cell.algorithm.upper())("MlpPolicy", env, seed=seed, device="cpu", **noise, **copy.deepcopy(settings))  # it writes into policy_kwargs

    def train(env_steps):
        model.learn(env_steps, reset_num_timesteps=False)
        return model.num_timesteps

    about = {"version": f"stable_baselines3 {version_of(stable_baselines3)}", "settings": json.dumps(settings)}
    learn(cell, f"sb3-{cell.name}", seed, out, train, lambda episodes, first: play(model, judge, episodes, first), about, budget)
    env.close()
    judge.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(run, __doc__, __file__, "sb3-"))
