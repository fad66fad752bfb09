"""TorchRL's losses, collector and replay: DDPG, TD3 and SAC with one step collected and one update made in turns; IQL from rows that are there. It imports nothing of fastrl_pipes."""

from __future__ import annotations

from importlib.metadata import version

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import DoubleToFloat, GymWrapper, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, AdditiveGaussianModule, IndependentNormal, ProbabilisticActor, TanhModule, TanhNormal, ValueOperator
from torchrl.objectives import DDPGLoss, IQLLoss, SACLoss, SoftUpdate, TD3Loss

try:
    from torchrl.collectors import Collector
except ImportError:
    from torchrl.collectors import SyncDataCollector as Collector


def mlp(inputs, hidden, outputs):
    return MLP(in_features=inputs, out_features=outputs, num_cells=list(hidden), activation_class=nn.ReLU)


def critic(s, a, hidden):
    return ValueOperator(mlp(s + a, hidden, 1), in_keys=["observation", "action"])


def gaussian(s, a, hidden, spec, kind, **kwargs):
    net = TensorDictModule(nn.Sequential(mlp(s, hidden, 2 * a), NormalParamExtractor()), in_keys=["observation"], out_keys=["loc", "scale"])
    return ProbabilisticActor(net, in_keys=["loc", "scale"], spec=spec, distribution_class=kind, distribution_kwargs=kwargs, return_log_prob=False, default_interaction_type=ExplorationType.RANDOM)


def adams(job, *groups):
    return [torch.optim.Adam(list(g), lr=job["lr"]) for g in groups]


def stepped(pairs):
    "Each loss, and the optimizer of its parameters"
    for loss, optimizer in pairs:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def made(job, s, a, spec):
    "The acting policy, the policy without exploration, and `update(batch, n)`"
    name, hidden = job["algorithm"], job["hidden"]
    if name == "sac":
        actor = gaussian(s, a, hidden, spec, TanhNormal, low=spec.space.low, high=spec.space.high, tanh_loc=False)
        loss = SACLoss(actor, critic(s, a, hidden), num_qvalue_nets=2, loss_function="l2", alpha_init=1.0, target_entropy=-float(a), action_spec=spec)
        loss.make_value_estimator(gamma=job["discount"])
        target, (actor_opt, q_opt, alpha_opt) = SoftUpdate(loss, tau=job["tau"]), adams(job, loss.actor_network_params.flatten_keys().values(), loss.qvalue_network_params.flatten_keys().values(), [loss.log_alpha])

        def update(batch, n):
            found = loss(batch)
            total = found["loss_actor"] + found["loss_qvalue"] + found["loss_alpha"]
            for o in (actor_opt, q_opt, alpha_opt):
                o.zero_grad()
            total.backward()
            for o in (actor_opt, q_opt, alpha_opt):
                o.step()
            target.step()
        return actor, actor, update
    actor = TensorDictSequential(TensorDictModule(mlp(s, hidden, a), in_keys=["observation"], out_keys=["raw"]), TanhModule(in_keys=["raw"], out_keys=["action"], spec=spec))
    half = float((spec.space.high - spec.space.low).max() / 2)
    noisy = TensorDictSequential(actor, AdditiveGaussianModule(spec=spec, sigma_init=job["sigma"] * half, sigma_end=job["sigma"] * half, annealing_num_steps=1))
    if name == "ddpg":
        loss = DDPGLoss(actor, critic(s, a, hidden), loss_function="l2", delay_actor=True, delay_value=True)
        critics = loss.value_network_params
    else:
        loss = TD3Loss(actor, critic(s, a, hidden), num_qvalue_nets=2, loss_function="l2", delay_actor=True, delay_qvalue=True, action_spec=spec, policy_noise=job["policy_noise"], noise_clip=job["noise_clip"])
        critics = loss.qvalue_network_params
    loss.make_value_estimator(gamma=job["discount"])
    target, (actor_opt, q_opt) = SoftUpdate(loss, tau=job["tau"]), adams(job, loss.actor_network_params.flatten_keys().values(), critics.flatten_keys().values())

    def update(batch, n):
        value = (loss.loss_value if name == "ddpg" else loss.value_loss)(batch)[0]
        stepped([(value, q_opt)])
        if name == "ddpg" or n % job["policy_delay"] == 0:
            stepped([((loss.loss_actor if name == "ddpg" else loss.actor_loss)(batch)[0], actor_opt)])
            target.step()
    return noisy, actor, update


def train(job, env_id, steps):
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    np.random.seed(job["seed"])
    env = TransformedEnv(GymWrapper(gymnasium.make(env_id)), DoubleToFloat())
    spec = env.action_spec
    acting, mode, update = made(job, env.observation_spec["observation"].shape[-1], spec.shape[-1], spec)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(job["max_sz"]), batch_size=job["bs"])
    collector, seen, updates = Collector(env, acting, frames_per_batch=1, total_frames=steps, init_random_frames=job["warmup"]), 0, 0
    for data in collector:
        replay.extend(data.reshape(-1))
        seen += 1
        if seen > job["warmup"]:
            updates += 1
            update(replay.sample(), updates)

    @torch.no_grad()
    def act(x):
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            return mode(TensorDict({"observation": torch.as_tensor(x, dtype=torch.float32)[None]}, [1]))["action"][0].numpy()
    return act, updates


def learn(job, data, tick):
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    s, a, hidden = data["state"].shape[1], data["action"].shape[1], job["hidden"]
    spec = Bounded(-torch.ones(a), torch.ones(a))
    actor, value = gaussian(s, a, hidden, spec, IndependentNormal), ValueOperator(mlp(s, hidden, 1), in_keys=["observation"])
    loss = IQLLoss(actor, critic(s, a, hidden), value, num_qvalue_nets=2, loss_function="l2", temperature=job["temperature"], expectile=job["expectile"])
    loss.make_value_estimator(gamma=job["discount"])
    target = SoftUpdate(loss, tau=job["tau"])
    opts = adams(job, loss.actor_network_params.flatten_keys().values(), loss.qvalue_network_params.flatten_keys().values(), loss.value_network_params.flatten_keys().values())
    rows = {k: torch.from_numpy(v) for k, v in data.items()}
    flag = {k: rows[k][:, None].bool() for k in ("terminated", "truncated")}
    n = len(rows["reward"])
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(n), batch_size=job["bs"])
    replay.extend(TensorDict({"observation": rows["state"], "action": rows["action"], "next": {"observation": rows["next_state"], "reward": rows["reward"][:, None], "terminated": flag["terminated"],
                                                                                             "done": flag["terminated"] | flag["truncated"]}}, [n]))
    for _ in range(job["total"]):
        tick()
        found = loss(replay.sample())
        for o in opts:
            o.zero_grad()
        (found["loss_actor"] + found["loss_qvalue"] + found["loss_value"]).backward()
        for o in opts:
            o.step()
        target.step()
    return job["total"]


def about():
    return f"torchrl {version('torchrl')}, torch {torch.__version__}"
