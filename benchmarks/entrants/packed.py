"""The fastest loop that we know in plain PyTorch: `packed` eager, `packed-compiled` with the whole update as one compiled graph. It imports nothing of fastrl_pipes.

One row per transition and one gather per batch; the critics as one batched product; a gradient for the stepped parameters alone; fused Adam, Polyak by one call. Compiled, the update is a function of
parameters that do not require gradients, under `no_grad`, with `torch.func.grad_and_value` inside: with parameters that do, the graph keeps what a second derivative would need, and is half as fast.
Sources: Lillicrap 2016, Alg. 1; Fujimoto 2018, Alg. 1; Haarnoja 2018b, Alg. 1; Kostrikov 2021, Alg. 1.
"""

from __future__ import annotations

import math

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F


def layers(inputs, hidden, outputs, k=None):
    "Weights and biases in turns, [i, o] and [o]; of k replicas [k, i, o] and [k, 1, o]"
    made, widths = [], (inputs, *hidden, outputs)
    for i, o in zip(widths, widths[1:]):
        shapes = ((i, o), (o,)) if k is None else ((k, i, o), (k, 1, o))
        made += [torch.empty(s).uniform_(-1 / math.sqrt(i), 1 / math.sqrt(i)) for s in shapes]
    return made


def forward(p, x):
    for i in range(0, len(p), 2):
        x = torch.addmm(p[i + 1], x, p[i]) if p[i].ndim == 2 else torch.baddbmm(p[i + 1], x, p[i])
        if i < len(p) - 2:
            x = F.relu(x)
    return x


def q_of(p, state, action):
    "[k, B]"
    x = torch.cat((state, action), 1)
    return forward(p, x.expand(p[0].shape[0], *x.shape)).squeeze(2)


def q_first(p, state, action):
    return forward([x[0] if x.ndim == 3 else x for x in p], torch.cat((state, action), 1)).squeeze(1)


def sampled(p, state, noise):
    mean, log_std = forward(p, state).chunk(2, 1)
    log_std = log_std.clamp(-20, 2)
    raw = mean + log_std.exp() * noise
    log_prob = -0.5 * noise * noise - log_std - 0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - raw - F.softplus(-2 * raw))
    return torch.tanh(raw), log_prob.sum(1)


def fit_to(p, state, action, target):
    return (q_of(p, state, action) - target).square().mean(1).sum(), target


# The losses: (parameters to step, others) -> loss, what is needed later
def dpg(p, critic, state):
    return -q_first(critic, state, torch.tanh(forward(p, state))).mean(), state


def soft(p, critic, alpha, state, noise):
    action, log_prob = sampled(p, state, noise)
    return (alpha * log_prob - q_of(critic, state, action).amin(0)).mean(), log_prob


def tempered(p, log_prob, size):
    return (-p[0].exp() * (log_prob - size)).mean(), log_prob


def expectile(p, state, least, tau):
    advantage = least - forward(p, state).squeeze(1)
    return (torch.where(advantage < 0, 1 - tau, tau) * advantage.square()).mean(), advantage


def weighted(p, state, action, weight):
    *p, log_std = p
    log_std = log_std.clamp(-5, 2)
    z = (action - torch.tanh(forward(p, state))) / log_std.exp()
    return -(weight * (-0.5 * z * z - log_std - 0.5 * math.log(2 * math.pi)).sum(1)).mean(), z


class Learner:
    "Parameters, and one update"

    def __init__(self, job, s, a):
        self.job, self.s, self.a, self.compiled = job, s, a, job["entrant"].endswith("compiled")
        self.name, hidden = job["algorithm"], job["hidden"]
        self.p = {"critic": layers(s + a, hidden, 1, 1 if self.name == "ddpg" else 2), "actor": layers(s, hidden, 2 * a if self.name == "sac" else a)}
        if self.name == "sac":
            self.p["alpha"] = [torch.zeros(1)]
        if self.name == "iql":
            self.p["value"] = layers(s, hidden, 1)
            self.p["actor"].append(torch.zeros(a))
        self.t = {k: [x.clone() for x in self.p[k]] for k in (("critic", "actor") if self.name in ("ddpg", "td3") else ("critic",))}
        if self.compiled:
            self.adam = {k: ([torch.zeros_like(x) for x in v], [torch.zeros_like(x) for x in v], torch.zeros(())) for k, v in self.p.items()}
            self.whole = torch.compile(self.once, options={"cpp_wrapper": True})  # C++ calls the products and loops of the graph: some percent faster than Python
        else:
            for v in self.p.values():
                for x in v:
                    x.requires_grad_()
            self.opt = {k: torch.optim.Adam(v, lr=job["lr"], fused=True) for k, v in self.p.items()}

    def update(self, rows, delayed):
        z = torch.randn(2, len(rows), self.a) if self.name in ("td3", "sac") else None
        if self.compiled:
            with torch.no_grad():
                self.whole(self.p, self.t, self.adam, rows, z, delayed)
        else:
            self.once(self.p, self.t, None, rows, z, delayed)

    def stepped(self, p, adam, name, loss, *more):
        if adam is None:
            value, kept = loss(p[name], *more)
            for x, g in zip(p[name], torch.autograd.grad(value, p[name])):
                x.grad = g
            self.opt[name].step()
            return kept.detach()
        grads, (value, kept) = torch.func.grad_and_value(loss, has_aux=True)(p[name], *more)
        first, second, count = adam[name]
        count.add_(1)
        low, high = 1 - 0.9 ** count, 1 - 0.999 ** count
        for x, g, m, v in zip(p[name], grads, first, second):
            m.lerp_(g, 0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            x.sub_(self.job["lr"] / low * m / ((v / high).sqrt() + 1e-8))
        return kept

    def once(self, p, t, adam, rows, z, delayed):
        s, job = self.s, self.job
        state, action, after, reward, terminated = rows.split((s, self.a, s, 1, 1), 1)
        reward, discount = reward.squeeze(1), job["discount"] * (1 - terminated.squeeze(1))
        moved = ("critic",)
        if self.name == "sac":
            with torch.no_grad():
                alpha = p["alpha"][0].exp()
                made, log_prob = sampled(p["actor"], after, z[0])
                target = reward + discount * (q_of(t["critic"], after, made).amin(0) - alpha * log_prob)
            self.stepped(p, adam, "critic", fit_to, state, action, target)
            log_prob = self.stepped(p, adam, "actor", soft, _still(p["critic"]), alpha, state, z[1])
            self.stepped(p, adam, "alpha", tempered, log_prob, self.a)
        elif self.name == "iql":
            with torch.no_grad():
                least, coming = q_of(t["critic"], state, action).amin(0), forward(p["value"], after).squeeze(1)
            self.stepped(p, adam, "value", expectile, state, least, job["expectile"])
            with torch.no_grad():
                advantage = least - forward(p["value"], state).squeeze(1)  # of the value that has stepped, as in the authors' code
            self.stepped(p, adam, "critic", fit_to, state, action, reward + discount * coming)
            self.stepped(p, adam, "actor", weighted, state, action, (job["temperature"] * advantage).exp().clamp(max=job["max_weight"]))
        else:
            with torch.no_grad():
                made = torch.tanh(forward(t["actor"], after))
                if self.name == "td3":
                    made = (made + (z[0] * job["policy_noise"]).clamp(-job["noise_clip"], job["noise_clip"])).clamp(-1, 1)
                target = reward + discount * q_of(t["critic"], after, made).amin(0)
            self.stepped(p, adam, "critic", fit_to, state, action, target)
            moved = ()
            if delayed:
                self.stepped(p, adam, "actor", dpg, _still(p["critic"]), state)
                moved = ("critic", "actor")
        with torch.no_grad():
            for name in moved:
                torch._foreach_lerp_(t[name], p[name], job["tau"])


def _still(params):
    return [x.detach() for x in params]


def train(job, env_id, steps):
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    rng = np.random.default_rng(job["seed"])
    env = gymnasium.make(env_id)
    low, high, (s,), (a,) = env.action_space.low, env.action_space.high, env.observation_space.shape, env.action_space.shape
    learner, soft_policy, size = Learner(job, s, a), job["algorithm"] == "sac", job["max_sz"]
    array = np.zeros((size, 2 * s + a + 2), np.float32)
    store, actor = torch.from_numpy(array), learner.p["actor"]

    @torch.no_grad()
    def act(x):
        x = torch.from_numpy(np.asarray(x, np.float32))[None]
        return (sampled(actor, x, torch.randn(1, a))[0] if soft_policy else (torch.tanh(forward(actor, x)) + job["sigma"] * torch.randn(1, a)).clamp(-1, 1)).numpy()[0]

    def update(n, delayed):
        learner.update(store.index_select(0, torch.randint(0, n, (job["bs"],))), delayed)

    updates, observation = 0, env.reset(seed=job["seed"])[0]
    for step in range(steps):
        said = act(observation) if step >= job["warmup"] else rng.uniform(-1, 1, a).astype(np.float32)
        after, reward, terminated, truncated, _ = env.step(low + (said + 1) / 2 * (high - low))
        row = array[step % size]
        row[:s], row[s:s + a], row[s + a:2 * s + a], row[-2], row[-1] = observation, said, after, reward, terminated
        observation = env.reset()[0] if terminated or truncated else after
        if step >= job["warmup"]:
            updates += 1
            update(min(step + 1, size), job["algorithm"] != "td3" or updates % job["policy_delay"] == 0)

    @torch.no_grad()
    def policy(x):
        return low + (torch.tanh(forward(actor, torch.as_tensor(x, dtype=torch.float32)[None])[0, :a]).numpy() + 1) / 2 * (high - low)
    return policy, updates


def learn(job, data, tick):
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    store = torch.from_numpy(np.concatenate([data["state"], data["action"], data["next_state"], data["reward"][:, None], data["terminated"][:, None]], 1))
    learner = Learner(job, data["state"].shape[1], data["action"].shape[1])
    for _ in range(job["total"]):
        tick()
        learner.update(store.index_select(0, torch.randint(0, len(store), (job["bs"],))), True)
    return job["total"]


def about():
    return f"torch {torch.__version__}"
