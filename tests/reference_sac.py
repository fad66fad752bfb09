"""SAC as one plain loop, with nothing of the package in it: Haarnoja 2018b (arXiv 1812.05905), Algorithm 1, with a learned or a fixed temperature.

The critics are two (or k) networks apart; the policy has two heads of its own; every equation stands as the paper writes it.
The noise comes from two generators that are given, one for the target's actions and one for the policy's, so that the stack of
pipes (`test_sac_equality`) sees the same numbers. One factor is not the paper's: eq. 5 and 6 have 1/2 before the square, which
moves nothing but Adam's epsilon (`half=True` brings it back, and a test shows it). The temperature is positive because the
optimizer moves its logarithm, as in the authors' code; the objective is that of eq. 18, with alpha itself.
"""
import copy
import math

import torch
from reference_td3 import descend, follow, plain_adam
from torch import nn


class SquashedPolicy(nn.Module):
    "pi_phi(a|s): a = tanh(u), u ~ N(mu(s), sigma(s))"

    def __init__(self, state_sz, action_sz, hidden1, hidden2):
        super().__init__()
        self.l1, self.l2 = nn.Linear(state_sz, hidden1), nn.Linear(hidden1, hidden2)
        self.mu, self.log_sigma = nn.Linear(hidden2, action_sz), nn.Linear(hidden2, action_sz)

    def forward(self, state, noise):
        "f_phi(noise; s) of eq. 8 and its log-probability by eq. 26, for noise ~ N(0, 1)"
        x = torch.relu(self.l2(torch.relu(self.l1(state))))
        mu, sigma = self.mu(x), self.log_sigma(x).clip(-20, 2).exp()
        u = mu + sigma * noise
        # log pi(a|s) = log mu(u|s) - sum_i log(1 - tanh^2(u_i)), where 1 - tanh^2 = 1 / cosh^2
        log_cosh = torch.logaddexp(u, -u) - math.log(2)
        log_prob = torch.distributions.Normal(mu, sigma).log_prob(u) + 2 * log_cosh
        return torch.tanh(u), log_prob.sum(dim=1, keepdim=True)


class LogAlpha(nn.Module):
    "The parameter behind the temperature"

    def __init__(self, alpha, dtype):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(math.log(alpha), dtype=dtype))


class PlainSAC:
    "The networks, the critics' targets, the optimizers; `update` is the gradient step of the box"

    def __init__(self, policy, critics, target_noise=None, policy_noise=None, alpha=None, initial_alpha=1.0, target_entropy=None, discount=0.99, nsteps=1,
                 tau=0.005, actor_lr=3e-4, critic_lr=3e-4, alpha_lr=3e-4, eps=1e-8, half=False):
        self.policy, self.critics = policy, nn.ModuleList(critics)
        self.t_critics = copy.deepcopy(self.critics)
        self.learned, self.target_entropy = alpha is None, target_entropy
        self.temperature = LogAlpha(initial_alpha if alpha is None else alpha, next(policy.parameters()).dtype)
        self.policy_opt, self.critic_opt = plain_adam(policy, actor_lr, eps), plain_adam(self.critics, critic_lr, eps / 2 if half else eps)
        self.alpha_opt = plain_adam(self.temperature, alpha_lr, 1e-8)
        self.target_noise, self.policy_noise = target_noise, policy_noise
        self.discount, self.nsteps, self.tau, self.factor = discount, nsteps, tau, 0.5 if half else 1.0

    def update(self, batch):
        "One gradient step; gives back the mean of |TD error| over the critics for each row"
        alpha = self.temperature.log_alpha.exp().item()

        # eq. 5: J_Q(theta) = E[1/2 (Q(s, a) - (r + gamma V'(s')))^2], for each critic
        y = self.target(batch, alpha)
        errors, loss = [], 0
        for critic in self.critics:
            error = critic(batch.state, batch.action) - y
            squares = self.factor * error**2
            loss = loss + (squares if batch.weight is None else batch.weight * squares).mean()
            errors.append(error.detach().abs()[:, 0])
        descend(self.critic_opt, loss)

        # eq. 7: J_pi(phi) = E[alpha log pi(a|s) - min_i Q_i(s, a)], a = f_phi(noise; s)
        action, log_prob = self.policy(batch.state, self.draw(self.policy_noise, batch.action))
        descend(self.policy_opt, (alpha * log_prob - smallest(self.critics, batch.state, action)).mean())

        # eq. 18: J(alpha) = E[-alpha log pi(a|s) - alpha H]
        if self.learned:
            entropy = -batch.action.shape[1] if self.target_entropy is None else self.target_entropy
            a = torch.exp(self.temperature.log_alpha)
            descend(self.alpha_opt, (-a * log_prob.detach() - a * entropy).mean())

        # the critics' targets follow
        follow(self.critics, self.t_critics, self.tau)
        return sum(errors) / len(errors)

    @torch.no_grad()
    def target(self, batch, alpha):
        "Eq. 2 and 3: r + gamma V(s'), V(s') = min_i Q'_i(s', a') - alpha log pi(a'|s'), a' ~ pi"
        action, log_prob = self.policy(batch.next_state, self.draw(self.target_noise, batch.action))
        value = smallest(self.t_critics, batch.next_state, action) - alpha * log_prob
        discount = self.discount**self.nsteps if batch.discount is None else batch.discount
        return batch.reward + discount * (1 - batch.terminated.to(value.dtype)) * value

    def draw(self, generator, like):
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def smallest(critics, state, action):
    return torch.cat([critic(state, action) for critic in critics], dim=1).min(dim=1, keepdim=True).values
