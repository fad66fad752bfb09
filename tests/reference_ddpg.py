"""DDPG as one plain loop, with nothing of the package in it: Lillicrap 2016, Algorithm 1, one comment per line of the box.

The stack of pipes must give the same parameters, targets and Adam moments on the same batches (`test_ddpg_equality`).
Kept slow on purpose: standard `backward`, `zero_grad`, no fused or foreach kernels, Polyak averaging written out.
"""
import copy

import torch
from torch import nn


class Batch:
    "What a replay hands to the loop; `discount` is None for single steps, [B, 1] for merged ones"

    def __init__(self, state, action, next_state, reward, terminated, discount=None):
        self.state, self.action, self.next_state = state, action, next_state
        self.reward, self.terminated, self.discount = reward, terminated, discount


class PlainDDPG:
    "Both networks, both targets, both optimizers; `update` is the inner part of the box"

    def __init__(self, actor, critic, actor_lr=1e-3, critic_lr=1e-2, discount=0.99, nsteps=1, tau=0.001,
                 critic_sync=1, actor_sync=1, clip_critic_grad=None, eps=1e-8):
        self.actor, self.critic = actor, critic
        # l. 1, 2: targets begin as copies
        self.t_actor, self.t_critic = copy.deepcopy(actor).eval(), copy.deepcopy(critic).eval()
        self.actor_opt = torch.optim.Adam(actor.parameters(), lr=actor_lr, eps=eps, foreach=False, fused=False)
        self.critic_opt = torch.optim.Adam(critic.parameters(), lr=critic_lr, eps=eps, foreach=False, fused=False)
        self.discount, self.nsteps, self.tau = discount, nsteps, tau
        self.critic_sync, self.actor_sync = critic_sync, actor_sync
        self.clip_critic_grad = clip_critic_grad
        self.updates = 0

    def update(self, batch):
        "l. 11 to 15 of the box for one batch"
        # l. 12: y = r + gamma^n (1 - terminated) Q'(s', mu'(s'))
        with torch.no_grad():
            next_action = self.t_actor(batch.next_state)
            next_value = self.t_critic(batch.next_state, next_action)
            weight = self.discount ** self.nsteps if batch.discount is None else batch.discount
            y = batch.reward + weight * (1 - batch.terminated.to(batch.reward.dtype)) * next_value

        # l. 13: the critic descends the mean squared error
        q = self.critic(batch.state, batch.action)
        critic_loss = ((q - y) ** 2).mean()
        self.critic_opt.zero_grad()
        critic_loss.backward()
        self.critic_opt.step()

        # l. 14: the actor ascends Q(s, mu(s)) of the critic as it is now; only the actor's statistics may move
        was_training = self.critic.training
        self.critic.eval()
        actor_loss = self.actor_loss(batch.state)
        self.actor_opt.zero_grad()
        actor_loss.backward()
        self.actor_opt.step()
        self.critic.train(was_training)

        # l. 15: the targets follow
        self.updates += 1
        if self.updates % self.critic_sync == 0:
            self.follow(self.critic, self.t_critic)
        if self.updates % self.actor_sync == 0:
            self.follow(self.actor, self.t_actor)
        return critic_loss.item(), actor_loss.item()

    def actor_loss(self, state):
        "-mean Q(s, mu(s)); where dQ/da is clipped, the surrogate whose gradient is the clipped one"
        action = self.actor(state)
        q = self.critic(state, action)
        if self.clip_critic_grad is None:
            return -q.mean()
        slope, = torch.autograd.grad(q.sum(), action)
        slope = slope.clamp(-self.clip_critic_grad, self.clip_critic_grad)
        return -(slope * action).sum() / len(action)

    @torch.no_grad()
    def follow(self, model, target):
        "theta' <- tau theta + (1 - tau) theta', running statistics included; counters are copied"
        here, there = tensors(model), tensors(target)
        for name in here:
            if here[name].is_floating_point():
                there[name].copy_(self.tau * here[name] + (1 - self.tau) * there[name])
            else:
                there[name].copy_(here[name])


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    "Parameters and buffers by name"
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def moments(opt: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    "Adam's two moments and its step count, by the parameter's name"
    return {f"{name}.{key}": opt.state[p][key] for name, p in model.named_parameters() for key in ("exp_avg", "exp_avg_sq", "step")}
