"""Implicit Q-learning as one plain loop, with nothing of the package in it: Kostrikov 2021, Algorithm 1, one comment per line of the box.

The stack of pipes must give the same parameters, targets and Adam moments on the same batches (`test_iql`).
Kept slow on purpose: a network for each critic, standard `backward`, no fused or foreach kernels, losses row by row where that is the definition, Polyak averaging written out.
"""
import copy
import math

import torch
from torch import nn


def mlp(sizes):
    "Linear layers with ReLU between them"
    layers = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Policy(nn.Module):
    "A Gaussian whose mean is squashed by tanh, and whose log-std is a parameter, between -5 and 2 (appendix B)"

    def __init__(self, states, actions, hidden):
        super().__init__()
        self.layers, self.log_std = mlp((states, *hidden, actions)), nn.Parameter(torch.zeros(actions))

    def log_prob(self, state, action):
        log_std = self.log_std.clamp(-5, 2)
        z = (action - torch.tanh(self.layers(state))) / torch.exp(log_std)
        return (-0.5 * z ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(dim=1)


class PlainIQL:
    "k critics, their targets, a value, a policy, and an optimizer each (or one for all); `update` is the inside of the box's loops"

    def __init__(self, policy, critics, value, lr=3e-4, discount=0.99, tau=0.05, period=1, temperature=1.0, expectile=0.8, max_weight=100.0,
                 weights=(1.0,), joint=False, eps=1e-8):
        self.policy, self.critics, self.value = policy, critics, value
        self.targets = [copy.deepcopy(c) for c in critics]
        self.discount, self.tau, self.period = discount, tau, period
        self.temperature, self.expectile, self.max_weight = temperature, expectile, max_weight
        self.weights, self.joint, self.updates = weights, joint, 0

        def adam(*models):
            return torch.optim.Adam([p for m in models for p in m.parameters()], lr=lr, eps=eps, foreach=False, fused=False)
        self.optimizers = [adam(value, *critics, policy)] if joint else [adam(value), adam(*critics), adam(policy)]

    def update(self, state, action, reward, next_state, terminated, discount=None, weight=None):
        "One batch: value, critics, policy, targets"
        weight = torch.ones(len(state), dtype=state.dtype) if weight is None else weight[:, 0]
        losses = [lambda: self.value_loss(state, action, weight),
                  lambda: self.critic_loss(state, action, reward, next_state, terminated, discount, weight),
                  lambda: self.policy_loss(state, action, weight)]
        if self.joint:
            self.step(self.optimizers[0], sum(loss() for loss in losses))
        else:
            for opt, loss in zip(self.optimizers, losses):
                self.step(opt, loss())
        self.updates += 1
        if self.updates % self.period == 0:
            self.follow()

    def step(self, opt, loss):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = None
        loss.backward()
        opt.step()

    def careful(self, state, action):
        "What the targets say, component by component: the smallest where more is better, the largest where less is"
        with torch.no_grad():
            said = [t(torch.cat([state, action], dim=1)) for t in self.targets]
        columns = []
        for j, w in enumerate(self.weights):
            column = said[0][:, j]
            for other in said[1:]:
                column = torch.maximum(column, other[:, j]) if w < 0 else torch.minimum(column, other[:, j])
            columns.append(column)
        return torch.stack(columns, dim=1)

    def value_loss(self, state, action, weight):
        "Eq. 5: |tau - 1(u < 0)| u^2; for a cost, where less is better, the other side"
        u = self.careful(state, action) - self.value(state)
        total = 0.0
        for j, w in enumerate(self.weights):
            worse = (u[:, j] > 0) if w < 0 else (u[:, j] < 0)
            side = torch.where(worse, 1 - self.expectile, self.expectile)
            total = total + (weight * side * u[:, j] ** 2).mean()
        return total / len(self.weights)

    def critic_loss(self, state, action, reward, next_state, terminated, discount, weight):
        "Eq. 6: (r + gamma (1 - d) V(s') - Q_i)^2, summed over critics"
        with torch.no_grad():
            gamma = self.discount if discount is None else discount
            y = reward + gamma * (1 - terminated.to(reward.dtype)) * self.value(next_state)
        return sum((weight[:, None] * (q(torch.cat([state, action], dim=1)) - y) ** 2).mean() for q in self.critics)

    def policy_loss(self, state, action, weight):
        "Eq. 7: -min(exp(u / beta), w_max) log pi(a|s)"
        with torch.no_grad():
            u = self.careful(state, action) - self.value(state)
            u = sum(w * u[:, j] for j, w in enumerate(self.weights))
            liking = torch.clamp(torch.exp(u / self.temperature), max=self.max_weight)
        return -(weight * liking * self.policy.log_prob(state, action)).mean()

    @torch.no_grad()
    def follow(self):
        "theta' <- tau theta + (1 - tau) theta'"
        for critic, target in zip(self.critics, self.targets):
            for p, t in zip(critic.parameters(), target.parameters()):
                t.copy_(self.tau * p + (1 - self.tau) * t)
