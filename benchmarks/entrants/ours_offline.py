"""IQL of this package from rows that are there, eager or compiled."""

from __future__ import annotations

import numpy as np
import torch

import fastrl_pipes
from fastrl_pipes.agents.iql import IQLLearner
from fastrl_pipes.core import SimpleStep, seed_everything
from fastrl_pipes.learner.bench_ours import compiled
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.memory.offline import OfflineReplay
from fastrl_pipes.networks.ensemble import Critics, Value
from fastrl_pipes.networks.policies import GaussianActor


def memory_of(data):
    "The rows as a replay"
    n, memory = len(data["reward"]), ReplayMemory(len(data["reward"]))
    flag = {k: data[k][:, None].astype(bool) for k in ("terminated", "truncated")}
    memory.write(SimpleStep(state=data["state"], action=data["action"], next_state=data["next_state"], reward=data["reward"][:, None], **flag, step_n=np.ones((n, 1), np.int64),
                            episode_n=(np.arange(n) // 1000)[:, None], env_id=np.zeros((n, 1), np.int64)))
    return memory


def learn(job, data, tick):
    torch.set_num_threads(job["threads"])
    seed_everything(job["seed"])
    s, a, hidden = data["state"].shape[1], data["action"].shape[1], tuple(job["hidden"])
    actor = GaussianActor(s, a, hidden=hidden, squash=False, log_std_bounds=(-5.0, 2.0), free_std=True)
    learner = IQLLearner(actor, Critics(s, a, 2, hidden), Value(s, hidden), OfflineReplay(memory_of(data), job["bs"], job["seed"]), [], job["lr"], job["lr"], job["lr"], target_update_tau=job["tau"],
                         temperature=1 / job["temperature"], expectile=job["expectile"], max_exp_advantage=job["max_weight"], discount=job["discount"])
    learner = compiled(learner, job)
    learner.start()
    for _ in range(job["total"]):
        tick()
        learner.next()
    return job["total"]


def about():
    return f"fastrl_pipes {fastrl_pipes.__version__}, torch {torch.__version__}"
