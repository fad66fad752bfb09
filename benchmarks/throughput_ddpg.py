"""Training throughput of DDPG on Pendulum-v1: 400-300 networks, batch 128, one update per environment step, one thread.

    python benchmarks/throughput_ddpg.py [--rounds 5] [--out benchmarks/results/throughput_ddpg.csv]

Interleaved in one process: `ours` is `DDPGLearner` as a user makes it; `plain` is a loop in the manner of CleanRL's single-file scripts (a vector
environment of one, a replay of separate arrays, `backward()` on every network, Polyak by a loop over parameters), written here; `plain, flushed` is the same loop with denormal
numbers taken for zero, as ours takes them. `limit` is the bare environment step plus the matrix products of the update, each at its own shape, one after the other with nothing in between; `limit, cold`
times each product after 8 MB of other memory were touched (that time is left out), which is how an update meets its operands: optimizer moments, targets and activations pass between two uses of a
weight. Printed are steps per CPU second, medians over the rounds, and ratios of the rounds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F

from report import report

from fastrl_pipes.agents.ddpg import Actor, Critic, DDPGAgent, DDPGLearner, GymStepper
from fastrl_pipes.networks.targets import target_of

BS, TAU, DISCOUNT, SIZE = 128, 0.005, 0.99, 100_000


def ours():
    torch.manual_seed(0)
    actor, critic = Actor(3, 1), Critic(3, 1)
    learner = DDPGLearner(actor, critic, GymStepper("Pendulum-v1", DDPGAgent(actor), seed=0), [], critic_lr=1e-3, tau=TAU, bs=BS, max_sz=SIZE)
    learner.start()
    return learner.next


def plain():
    "In the manner of a single-file script"
    torch.manual_seed(0)
    actor, critic = Actor(3, 1), Critic(3, 1)
    t_actor, t_critic = target_of(actor), target_of(critic)
    actor_opt, critic_opt = torch.optim.Adam(actor.parameters(), lr=1e-3), torch.optim.Adam(critic.parameters(), lr=1e-3)
    envs = gym.vector.SyncVectorEnv([lambda: gym.wrappers.RecordEpisodeStatistics(gym.make("Pendulum-v1"))], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    low, high = envs.single_action_space.low, envs.single_action_space.high
    scale, bias = torch.tensor((high - low) / 2), torch.tensor((high + low) / 2)
    store = {"obs": np.zeros((SIZE, 1, 3), np.float32), "next_obs": np.zeros((SIZE, 1, 3), np.float32), "actions": np.zeros((SIZE, 1, 1), np.float32),
             "rewards": np.zeros((SIZE, 1), np.float32), "dones": np.zeros((SIZE, 1), np.float32)}
    state = {"obs": envs.reset(seed=0)[0], "at": 0, "full": 0}

    def pull():
        obs = state["obs"]
        with torch.no_grad():
            actions = actor(torch.Tensor(obs)) * scale + bias
            actions += torch.normal(0, scale * 0.1)
            actions = actions.cpu().numpy().clip(low, high)
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        real_next_obs = next_obs.copy()
        for i, trunc in enumerate(truncations):
            if trunc:
                real_next_obs[i] = infos["final_obs"][i]
        at = state["at"]
        store["obs"][at], store["next_obs"][at], store["actions"][at] = obs, real_next_obs, actions
        store["rewards"][at], store["dones"][at] = rewards, terminations
        state["at"], state["full"], state["obs"] = (at + 1) % SIZE, min(state["full"] + 1, SIZE), next_obs
        if state["full"] < BS:
            return
        rows = np.random.randint(0, state["full"], size=BS)
        data = {k: torch.tensor(v[rows, 0]) for k, v in store.items()}
        with torch.no_grad():
            next_actions = t_actor(data["next_obs"])
            target = data["rewards"] + (1 - data["dones"]) * DISCOUNT * t_critic(data["next_obs"], next_actions).view(-1)
        q = critic(data["obs"], data["actions"]).view(-1)
        critic_loss = F.mse_loss(q, target)
        critic_opt.zero_grad()
        critic_loss.backward()
        critic_opt.step()
        actor_loss = -critic(data["obs"], actor(data["obs"])).mean()
        actor_opt.zero_grad()
        actor_loss.backward()
        actor_opt.step()
        for net, target_net in ((actor, t_actor), (critic, t_critic)):
            for param, target_param in zip(net.parameters(), target_net.parameters()):
                target_param.data.copy_(TAU * param.data + (1 - TAU) * target_param.data)
    return pull


def products():
    "The matrix products of one update, as pairs of operands"
    actor, critic, out = [(3, 400), (400, 300), (300, 1)], [(4, 400), (400, 300), (300, 1)], []

    def forward(net):
        out.extend(((BS, i), (i, o)) for i, o in net)

    def weights(net):
        out.extend(((i, BS), (BS, o)) for i, o in net)

    def inputs(net, first):
        out.extend(((BS, o), (o, i)) for i, o in net[0 if first else 1:])
    forward(actor), forward(critic)  # targets
    forward(critic), weights(critic), inputs(critic, first=False)  # the critic's loss
    forward(actor), forward(critic), inputs(critic, first=True), weights(actor), inputs(actor, first=False)  # the actor's
    return [(torch.randn(a), torch.randn(b)) for a, b in out]


def limit():
    env = gym.make("Pendulum-v1", disable_env_checker=True)
    env.reset(seed=0)
    pairs, action = products(), np.zeros(1, np.float32)
    results = [a @ b for a, b in pairs]

    def pull():
        if env.step(action)[3]:
            env.reset()
        for (a, b), out in zip(pairs, results):
            torch.mm(a, b, out=out)
    return pull


def cold():
    "The same, each product after other memory has passed; returns the seconds of the products and the step"
    env = gym.make("Pendulum-v1", disable_env_checker=True)
    env.reset(seed=0)
    pairs, action, other = products(), np.zeros(1, np.float32), torch.zeros(2_000_000)
    results = [a @ b for a, b in pairs]

    def pull():
        start = time.process_time()
        if env.step(action)[3]:
            env.reset()
        seconds = time.process_time() - start
        for (a, b), out in zip(pairs, results):
            other.add_(1.0)
            start = time.process_time()
            torch.mm(a, b, out=out)
            seconds += time.process_time() - start
        return seconds
    return pull


def rate(name, pull, n):
    torch.set_flush_denormal(name != "plain")
    if name == "limit, cold":
        return n / sum(pull() for _ in range(n))
    start = time.process_time()
    for _ in range(n):
        pull()
    return n / (time.process_time() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--warmup", type=int, default=1000, help="pulls before the first round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pulls = {"ours": ours(), "plain": plain(), "plain, flushed": plain(), "limit": limit(), "limit, cold": cold()}
    for name, pull in pulls.items():
        rate(name, pull, args.warmup)
    rates = {name: [] for name in pulls}
    for _ in range(args.rounds):
        for name, pull in pulls.items():
            rates[name].append(rate(name, pull, args.steps))
    ratios = [(f"ours / {other}", [a / b for a, b in zip(rates["ours"], rates[other])]) for other in list(pulls)[1:]]
    report(f"steps per CPU second, median of {args.rounds} interleaved rounds (lowest to highest), one thread", rates | dict(ratios), args.out)


if __name__ == "__main__":
    main()
