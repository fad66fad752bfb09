"""What the pipes themselves cost: one pull of the whole DDPG stack with everything that is not a pipe taken out.

    python benchmarks/pipeline_cost.py [--rounds 5] [--out benchmarks/results/pipeline_cost.csv]

The environment returns the same arrays at every step, the networks return a stored tensor, the losses are a stored number with stored gradients, and the
optimizer does nothing. What is left is the stepper, the acting chain, writing a transition, drawing a batch of 128, the target updaters' counting, the
collectors, and the hops between them. The row `kernels` puts losses and their gradients back (on the stored outputs). The row `loop` does the same work as
`pull nsteps=1` in a plain loop over preallocated arrays. All rows are interleaved, in one process and one thread; the median of the rounds is printed, in microseconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from report import report

from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner
from fastrl_pipes.core import SimpleStep
from fastrl_pipes.envs.doubles import NoOp
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.pipes.core import Stage
from fastrl_pipes.processors.dpg import ActorLossProcessor, CriticLossProcessor

BS = 128


class StoredActor(nn.Module):
    "Returns its parameter"

    def __init__(self):
        super().__init__()
        self.out = nn.Parameter(torch.zeros(BS, 1))

    def forward(self, state):
        return self.out if len(state) == BS else self.out[:len(state)]


class StoredCritic(StoredActor):
    "Returns its parameter; the action joins by one sum, so that the actor's loss has a gradient"

    def forward(self, state, action):
        out = super().forward(state)
        return out + action if action.requires_grad else out


class NoOptimizer(torch.optim.Optimizer):
    "Steps nothing"

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.step = lambda: None


class Nothing(Stage):
    "Hands on what comes"

    def forward(self, item):
        return item


def learner(nsteps=1, kernels=False):
    actor, critic = StoredActor(), StoredCritic()
    stepper = GymStepper(lambda: NoOp(), DDPGAgent(actor), seed=0)
    made = DDPGLearner(actor, critic, stepper, [], critic_opt=NoOptimizer, actor_opt=NoOptimizer, bs=BS, max_sz=20000, nsteps=nsteps)
    if not kernels:
        stored = {p.stepped: (torch.zeros(()), [torch.zeros_like(q) for q in p.stepped.parameters()]) for p in _losses(made)}
        for p in _losses(made):
            loss, grads = stored[p.stepped]
            p.forward = lambda item, p=p, loss=loss, grads=grads: ({"loss": loss, "model": p.stepped, "grads": grads}, item)
    return made


def _losses(made):
    from fastrl_pipes.pipes.graph import find_pipes
    return find_pipes(made, (CriticLossProcessor, ActorLossProcessor))


def plain_loop():
    "The same work without pipes: act, step, write five columns, draw a batch"
    env, actor, size = NoOp(), StoredActor(), 20000
    obs, _ = env.reset()
    cols = [np.zeros((size, w), np.float32) for w in (len(obs), 1, len(obs), 1, 1)]
    views, rng, g, state = [torch.from_numpy(c) for c in cols], np.random.default_rng(0), torch.Generator(), {"at": 0, "obs": obs, "x": np.zeros(1)}

    def pull():
        with torch.inference_mode():
            action = actor(torch.from_numpy(state["obs"])[None]).numpy()[0]
        state["x"] += 0.15 * -state["x"] + 0.2 * rng.standard_normal(1)
        action = np.clip(action + state["x"], -1, 1).astype(np.float32)
        after, reward, terminated, truncated, _ = env.step(action * 2)
        i = state["at"] % size
        for col, value in zip(cols, (state["obs"], action, after, reward, terminated)):
            col[i] = value
        state["at"] += 1
        state["obs"] = env.reset()[0] if terminated or truncated else after
        index = torch.randint(0, min(state["at"], size), (BS,), generator=g)
        return [v[index] for v in views]
    return pull


def hop():
    "What one Stage adds, from a stack of a hundred"
    step = SimpleStep()
    short, long = Nothing(_Endless(step)), Nothing(_Endless(step))
    for _ in range(100):
        long = Nothing(long)
    return short, long


class _Endless:
    def __init__(self, item):
        self.item = item

    def __iter__(self):
        return self

    def __next__(self):
        return self.item


def timed(pull, n):
    start = time.perf_counter()
    for _ in range(n):
        pull()
    return (time.perf_counter() - start) / n * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pulls", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stacks = {"pull nsteps=1": learner(1), "pull nsteps=3": learner(3), "pull nsteps=1, kernels": learner(1, kernels=True)}
    for made in stacks.values():
        made.start()
    pulls = {name: made.next for name, made in stacks.items()} | {"loop nsteps=1": plain_loop()}
    short, long = hop()
    short.start(), long.start()
    for pull in pulls.values():
        timed(pull, 500)
    rows = {name: [] for name in (*pulls, "hop")}
    for _ in range(args.rounds):
        for name, pull in pulls.items():
            rows[name].append(timed(pull, args.pulls))
        rows["hop"].append((timed(long.next, args.pulls) - timed(short.next, args.pulls)) / 100)
    report(f"microseconds, median of {args.rounds} rounds (lowest to highest), one thread", rows, args.out, "_us")


if __name__ == "__main__":
    main()
