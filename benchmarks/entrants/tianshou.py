"""Tianshou's DDPG, TD3 and SAC with its off-policy trainer, one step collected and one update made in turns. It imports nothing of fastrl_pipes."""

from __future__ import annotations

from importlib.metadata import version

import gymnasium
import numpy as np
import torch
from tianshou.algorithm import DDPG, SAC, TD3
from tianshou.algorithm.modelfree.ddpg import ContinuousDeterministicPolicy
from tianshou.algorithm.modelfree.sac import AutoAlpha, SACPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Batch, Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.exploration import GaussianNoise
from tianshou.trainer import OffPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ContinuousActorDeterministic, ContinuousActorProbabilistic, ContinuousCritic


def train(job, env_id, steps):
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    np.random.seed(job["seed"])
    look = gymnasium.make(job["env"])
    state, action, hidden, name = look.observation_space.shape, look.action_space.shape, list(job["hidden"]), job["algorithm"]
    adam = AdamOptimizerFactory(lr=job["lr"])

    def critic():
        return ContinuousCritic(preprocess_net=Net(state_shape=state, action_shape=action, hidden_sizes=hidden, concat=True))
    body = Net(state_shape=state, hidden_sizes=hidden)
    common = {"policy_optim": adam, "critic": critic(), "critic_optim": adam, "tau": job["tau"], "gamma": job["discount"]}
    if name == "sac":
        policy = SACPolicy(actor=ContinuousActorProbabilistic(preprocess_net=body, action_shape=action, unbounded=True, conditioned_sigma=True), action_space=look.action_space)
        algorithm = SAC(policy=policy, critic2=critic(), critic2_optim=adam, alpha=AutoAlpha(-float(np.prod(action)), 0.0, adam), **common)
    else:
        policy = ContinuousDeterministicPolicy(actor=ContinuousActorDeterministic(preprocess_net=body, action_shape=action), exploration_noise=GaussianNoise(sigma=job["sigma"]), action_space=look.action_space)
        algorithm = DDPG(policy=policy, **common) if name == "ddpg" else TD3(policy=policy, critic2=critic(), critic2_optim=adam, policy_noise=job["policy_noise"], update_actor_freq=job["policy_delay"],
                                                                             noise_clip=job["noise_clip"], **common)
    collector = Collector(algorithm, DummyVectorEnv([lambda: gymnasium.make(env_id)]), VectorReplayBuffer(job["max_sz"], 1), exploration_noise=True)
    collector.reset()
    collector.collect(n_step=job["warmup"], random=True)
    left = steps - job["warmup"]
    updates, once = [0], algorithm.update

    def counted(*args, **kwargs):
        updates[0] += 1
        return once(*args, **kwargs)
    algorithm.update = counted
    algorithm.run_training(OffPolicyTrainerParams(training_collector=collector, max_epochs=1, epoch_num_steps=left, collection_step_num_env_steps=1, batch_size=job["bs"],
                                                  update_step_num_gradient_steps_per_sample=1.0, verbose=False, show_progress=False))
    policy.eval()

    @torch.no_grad()
    def act(x):
        said = policy(Batch(obs=np.asarray(x, np.float32)[None], info={})).act
        return policy.map_action(said.numpy() if hasattr(said, "numpy") else said)[0]
    return act, updates[0]


def about():
    return f"tianshou {version('tianshou')}, torch {torch.__version__}"
