"""TD3 as one plain loop, with nothing of the package in it: Fujimoto 2018, Algorithm 1, one comment per step of the box.

The critics are two (or k) networks apart, each with its own layers; no batched product, no fused or
foreach kernels, Polyak averaging written out. The noise of the target is drawn from a generator that is given, so that the
stack of pipes (`test_td3_equality`) sees the same numbers. As in the authors' code, actions and targets' actions are clipped
to the box [-1, 1], which the box of the paper leaves out.
"""
import copy

import torch
from torch import nn


class Batch:
    "What a replay hands to the loop. `discount` [B, 1] comes with merged samples, `weight` [B, 1] with prioritised ones"

    def __init__(self, state, action, next_state, reward, terminated, discount=None, weight=None):
        self.state, self.action, self.next_state = state, action, next_state
        self.reward, self.terminated, self.discount, self.weight = reward, terminated, discount, weight


class Policy(nn.Module):
    "pi_phi(s), in [-1, 1]"

    def __init__(self, state_sz, action_sz, hidden1, hidden2):
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(state_sz, hidden1), nn.Linear(hidden1, hidden2), nn.Linear(hidden2, action_sz)

    def forward(self, state):
        return torch.tanh(self.l3(torch.relu(self.l2(torch.relu(self.l1(state))))))


class QNetwork(nn.Module):
    "Q_theta(s, a), one of the twins"

    def __init__(self, state_sz, action_sz, hidden1, hidden2):
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(state_sz + action_sz, hidden1), nn.Linear(hidden1, hidden2), nn.Linear(hidden2, 1)

    def forward(self, state, action):
        x = torch.cat([state, action], dim=1)
        return self.l3(torch.relu(self.l2(torch.relu(self.l1(x)))))


class PlainTD3:
    "The networks, their targets, their optimizers; `update` is what the box does with a mini-batch"

    def __init__(self, policy, critics, generator=None, policy_noise=0.2, noise_clip=0.5, policy_delay=2, discount=0.99, nsteps=1,
                 tau=0.005, actor_lr=1e-3, critic_lr=1e-3, eps=1e-8):
        self.policy, self.critics = policy, nn.ModuleList(critics)
        # the targets begin as copies
        self.t_policy, self.t_critics = copy.deepcopy(policy), copy.deepcopy(self.critics)
        self.policy_opt = plain_adam(policy, actor_lr, eps)
        self.critic_opt = plain_adam(self.critics, critic_lr, eps)
        self.generator, self.policy_noise, self.noise_clip, self.policy_delay = generator, policy_noise, noise_clip, policy_delay
        self.discount, self.nsteps, self.tau = discount, nsteps, tau
        self.t = 0

    def update(self, batch):
        "The box for one mini-batch; gives back the mean of |TD error| over the critics for each row"
        y = self.target(batch)

        # theta_i <- argmin N^-1 sum (y - Q_i(s, a))^2, each critic for itself
        errors, loss = [], 0
        for critic in self.critics:
            error = y - critic(batch.state, batch.action)
            squares = error**2 if batch.weight is None else batch.weight * error**2
            loss = loss + squares.sum() / len(squares)
            errors.append(error.detach().abs()[:, 0])
        descend(self.critic_opt, loss)

        # if t mod d then
        self.t += 1
        if self.t % self.policy_delay == 0:
            # phi by the deterministic policy gradient: ascend Q_1(s, pi(s)) of the first critic
            descend(self.policy_opt, -self.critics[0](batch.state, self.policy(batch.state)).mean())
            # theta_i' and phi' follow
            follow(self.critics, self.t_critics, self.tau)
            follow(self.policy, self.t_policy, self.tau)
        return sum(errors) / len(errors)

    @torch.no_grad()
    def target(self, batch):
        "y = r + gamma min_i Q'_i(s', a~), where a~ = pi'(s') + clip(N(0, sigma), -c, c)"
        action = self.t_policy(batch.next_state)
        noise = torch.randn(action.shape, generator=self.generator, dtype=action.dtype)
        noise = torch.clip(self.policy_noise * noise, -self.noise_clip, self.noise_clip)
        action = torch.clip(action + noise, -1, 1)
        estimates = [critic(batch.next_state, action) for critic in self.t_critics]
        smallest = torch.cat(estimates, dim=1).min(dim=1, keepdim=True).values
        discount = self.discount**self.nsteps if batch.discount is None else batch.discount
        return batch.reward + discount * (1 - batch.terminated.to(smallest.dtype)) * smallest


def plain_adam(model, lr, eps):
    return torch.optim.Adam(model.parameters(), lr=lr, eps=eps, foreach=False, fused=False)


def descend(opt, loss):
    opt.zero_grad()
    grads = torch.autograd.grad(loss, opt.param_groups[0]["params"])  # what else the loss reaches is not stepped
    for p, g in zip(opt.param_groups[0]["params"], grads):
        p.grad = g
    opt.step()


@torch.no_grad()
def follow(model, target, tau):
    "theta' <- tau theta + (1 - tau) theta'"
    for p, t in zip(model.parameters(), target.parameters()):
        t.copy_(tau * p + (1 - tau) * t)
