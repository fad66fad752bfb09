"""skrl's DDPG, TD3 and SAC with its sequential trainer, without its progress bar and its logs. It imports nothing of fastrl_pipes."""

from __future__ import annotations

import importlib
from importlib.metadata import version

import gymnasium
import numpy as np
import torch
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
from skrl.resources.noises.torch import GaussianNoise
from skrl.trainers.torch import SequentialTrainer
from skrl.utils import set_seed
from torch import nn


class Scaled(gymnasium.Wrapper):
    "Actions in [-1, 1], as skrl's policies give them"

    def __init__(self, env):
        super().__init__(env)
        self.low, self.high = env.action_space.low, env.action_space.high
        self.action_space = gymnasium.spaces.Box(-1, 1, env.action_space.shape, np.float32)

    def step(self, action):
        return self.env.step(self.low + (np.asarray(action) + 1) / 2 * (self.high - self.low))


def mlp(inputs, hidden, outputs, *last):
    widths = (inputs, *hidden)
    return nn.Sequential(*(m for i, o in zip(widths, widths[1:]) for m in (nn.Linear(i, o), nn.ReLU())), nn.Linear(widths[-1], outputs), *last)


class Policy(DeterministicMixin, Model):
    def __init__(self, spaces, hidden):
        Model.__init__(self, observation_space=spaces[0], action_space=spaces[1], device="cpu")
        DeterministicMixin.__init__(self)
        self.net = mlp(self.num_observations, hidden, self.num_actions, nn.Tanh())

    def compute(self, inputs, role=""):
        return self.net(inputs["observations"]), {}


class Stochastic(GaussianMixin, Model):
    "skrl clips its samples; it has no squashed Gaussian with the exact log-probability"

    def __init__(self, spaces, hidden):
        Model.__init__(self, observation_space=spaces[0], action_space=spaces[1], device="cpu")
        GaussianMixin.__init__(self, clip_actions=True)
        self.net = mlp(self.num_observations, hidden, 2 * self.num_actions)

    def compute(self, inputs, role=""):
        mean, log_std = self.net(inputs["observations"]).chunk(2, 1)
        return torch.tanh(mean), {"log_std": log_std}


class Critic(DeterministicMixin, Model):
    def __init__(self, spaces, hidden):
        Model.__init__(self, observation_space=spaces[0], action_space=spaces[1], device="cpu")
        DeterministicMixin.__init__(self)
        self.net = mlp(self.num_observations + self.num_actions, hidden, 1)

    def compute(self, inputs, role=""):
        return self.net(torch.cat([inputs["observations"], inputs["taken_actions"]], 1)), {}


def train(job, env_id, steps):
    torch.set_num_threads(job["threads"])
    set_seed(job["seed"])
    env = wrap_env(Scaled(gymnasium.make(env_id)), wrapper="gymnasium", verbose=False)
    spaces, name, hidden = (env.observation_space, env.action_space), job["algorithm"], job["hidden"]
    models = {"policy": (Stochastic if name == "sac" else Policy)(spaces, hidden)}
    if name != "sac":
        models["target_policy"] = Policy(spaces, hidden)
    for key in ("critic",) if name == "ddpg" else ("critic_1", "critic_2"):
        models |= {key: Critic(spaces, hidden), f"target_{key}": Critic(spaces, hidden)}
    cfg = {"batch_size": job["bs"], "discount_factor": job["discount"], "polyak": job["tau"], "random_timesteps": job["warmup"], "learning_starts": job["warmup"],
           "learning_rate": (job["lr"],) * (3 if name == "sac" else 2), "experiment": {"write_interval": 0, "checkpoint_interval": 0}}
    if name == "sac":
        cfg |= {"initial_entropy_value": 1.0}
    else:
        cfg |= {"exploration_noise": GaussianNoise, "exploration_noise_kwargs": {"mean": 0.0, "std": job["sigma"], "device": "cpu"}}
    if name == "td3":
        cfg |= {"policy_delay": job["policy_delay"], "smooth_regularization_noise": GaussianNoise, "smooth_regularization_noise_kwargs": {"mean": 0.0, "std": job["policy_noise"], "device": "cpu"},
                "smooth_regularization_clip": job["noise_clip"]}
    agents = importlib.import_module(f"skrl.agents.torch.{name}")
    config = getattr(agents, f"{name.upper()}_CFG")(**cfg)
    agent = getattr(agents, name.upper())(models=models, memory=RandomMemory(memory_size=job["max_sz"], num_envs=1, device="cpu"), cfg=config, observation_space=spaces[0], action_space=spaces[1], device="cpu")
    updates, once = [0], agent.update

    def counted(**kwargs):
        updates[0] += 1
        return once(**kwargs)
    agent.update = counted
    SequentialTrainer(env=env, agents=agent, cfg={"timesteps": steps, "headless": True, "disable_progressbar": True, "close_environment_at_exit": False}).train()
    low, high = Scaled(gymnasium.make(job["env"])).low, Scaled(gymnasium.make(job["env"])).high

    @torch.no_grad()
    def policy(x):
        out = models["policy"].compute({"observations": torch.as_tensor(x, dtype=torch.float32)[None]})[0][0]
        return low + (out.numpy().clip(-1, 1) + 1) / 2 * (high - low)
    return policy, updates[0]


def about():
    return f"skrl {version('skrl')}, torch {torch.__version__}"
