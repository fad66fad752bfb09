"""SAC with a state-value network as one plain loop, with nothing of the package in it: Haarnoja 2018a (arXiv 1801.01290), Algorithm 1.

Two (or k) critics apart, a policy with two heads, V and its target; the temperature is 1, and rewards are scaled. The order is policy, V, Q, target:
one draw of actions serves the policy and V, and both see the critics as they were. The paper's factors of 1/2 before the squares are left out: they move
nothing but Adam's epsilon."""
import copy

import torch
from reference_sac import smallest
from reference_td3 import descend, follow, plain_adam
from torch import nn


class VNetwork(nn.Module):
    "V_psi(s)"

    def __init__(self, state_sz, hidden1, hidden2):
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(state_sz, hidden1), nn.Linear(hidden1, hidden2), nn.Linear(hidden2, 1)

    def forward(self, state):
        return self.l3(torch.relu(self.l2(torch.relu(self.l1(state)))))


class PlainSACV:
    "The three kinds of networks, the target of V, the optimizers; `update` is the gradient step of the box"

    def __init__(self, policy, critics, value, noise=None, discount=0.99, reward_scale=1.0, tau=0.005, actor_lr=3e-4, critic_lr=3e-4, value_lr=3e-4):
        self.policy, self.critics, self.value = policy, nn.ModuleList(critics), value
        self.t_value = copy.deepcopy(value)
        self.policy_opt, self.critic_opt, self.value_opt = plain_adam(policy, actor_lr, 1e-8), plain_adam(self.critics, critic_lr, 1e-8), plain_adam(value, value_lr, 1e-8)
        self.noise, self.discount, self.reward_scale, self.tau = noise, discount, reward_scale, tau

    def update(self, batch):
        "One gradient step; gives back the numbers that are to be recorded"
        # eq. 12: J_pi(phi) = E[log pi(f_phi(eps; s)|s) - min_i Q_i(s, f_phi(eps; s))]
        noise = torch.randn(batch.action.shape, generator=self.noise, dtype=batch.action.dtype)
        action, log_prob = self.policy(batch.state, noise)
        q_of_policy = smallest(self.critics, batch.state, action)
        loss = (log_prob - q_of_policy).mean()
        gradient = torch.autograd.grad(loss, list(self.policy.parameters()), retain_graph=True)
        told = {"policy_log_prob": log_prob.mean().item(), "policy_gradient": sum(float((g**2).sum()) for g in gradient) ** 0.5}
        descend(self.policy_opt, loss)

        # eq. 5: J_V(psi) = E[(V(s) - (min_i Q_i(s, a) - log pi(a|s)))^2], a from the policy
        v_target = (q_of_policy - log_prob).detach()
        descend(self.value_opt, ((self.value(batch.state) - v_target) ** 2).mean())
        told["v_target"] = v_target.mean().item()

        # eq. 7 and 8: J_Q(theta) = E[(Q(s, a) - (scale r + gamma V'(s')))^2], for each critic
        with torch.no_grad():
            next_value = self.t_value(batch.next_state)
            discount = self.discount if batch.discount is None else batch.discount
            y = self.reward_scale * batch.reward + discount * (1 - batch.terminated.to(next_value.dtype)) * next_value
        estimates = [critic(batch.state, batch.action) for critic in self.critics]
        descend(self.critic_opt, sum((((q - y) ** 2) * (1.0 if batch.weight is None else batch.weight)).mean() for q in estimates))
        for i, q in enumerate(estimates):
            told |= {f"q{i + 1}": q.mean().item(), f"td_error{i + 1}": (q - y).abs().mean().item()}
        told["v_next"] = next_value.mean().item()

        # the target of V follows
        follow(self.value, self.t_value, self.tau)
        return told
