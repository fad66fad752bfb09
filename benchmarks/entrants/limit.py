"""The limit: what cannot be left out. A bare environment step, and the matrix products of one update, each timed alone at its own shape with its operands hot. It imports nothing of fastrl_pipes.

A product's time is that of the faster of the two libraries that PyTorch brings, its BLAS and oneDNN: on a processor that is not Intel's, the BLAS can take twice as long.

`limit-cold` touches 8 MB of other memory before each product and leaves that time out: this is how an update meets its operands, because moments, targets and activations pass between two uses of a weight.
No activation, no optimizer, no replay, no acting, nothing between two products. The critics of a pair are two products each. What a loss needs no gradient of is not counted: the critics' weights in the actor's loss, a first layer's input.
"""

from __future__ import annotations

import time

import gymnasium
import torch


def products(algorithm, s, a, hidden, bs, delay=2):
    "Of one update: shapes (m, k, n) of [m, k] @ [k, n] -> how often"
    found = {}

    def net(inputs, outputs):
        widths = (inputs, *hidden, outputs)
        return list(zip(widths, widths[1:]))

    def count(shapes, times):
        for shape in shapes:
            found[shape] = found.get(shape, 0) + times

    def forward(net, times=1.0):
        count([(bs, i, o) for i, o in net], times)

    def weights(net, times=1.0):
        count([(i, bs, o) for i, o in net], times)

    def inputs(net, times=1.0, first=False):
        count([(bs, o, i) for i, o in net[0 if first else 1:]], times)

    def learned(net, times=1.0):
        forward(net, times), weights(net, times), inputs(net, times)

    critic, actor, twin = net(s + a, 1), net(s, 2 * a if algorithm == "sac" else a), 1 if algorithm == "ddpg" else 2
    forward(critic, twin)  # targets
    learned(critic, twin)
    if algorithm == "iql":
        value = net(s, 1)
        forward(value)  # of the next states
        learned(value), learned(actor)
        return found
    forward(actor)  # the target's action
    part, judges = (1 / delay, 1) if algorithm == "td3" else (1, twin)  # DDPG and TD3 ask one critic, SAC both
    learned(actor, part), forward(critic, judges * part), inputs(critic, judges * part, first=True)
    return found


def timed(call, n):
    "Seconds of CPU and on the wall of one call"
    for _ in range(max(n // 10, 5)):
        call()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(n):
        call()
    return (time.process_time() - cpu) / n, (time.perf_counter() - wall) / n


def product(m, k, n, repeats, cold=False):
    "The faster library, by the CPU's clock"
    left, right, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
    calls = [lambda: torch.mm(left, right, out=out)]
    if torch.backends.mkldnn.is_available():
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(left, right.mT, None, "none", [], ""))
    return min(seconds_of(call, repeats, cold) for call in calls)


def seconds_of(call, repeats, cold):
    if not cold:
        return timed(call, repeats)
    other, cpu, wall = torch.zeros(2_000_000), 0.0, 0.0
    call()
    for _ in range(repeats):
        other.add_(1.0)
        began, at = time.perf_counter(), time.process_time()
        call()
        cpu, wall = cpu + time.process_time() - at, wall + time.perf_counter() - began
    return cpu / repeats, wall / repeats


def env_step(env_id, repeats):
    env = gymnasium.make(env_id, disable_env_checker=True)
    env.reset(seed=0)
    actions = iter([env.action_space.sample() for _ in range(2 * repeats + 20)])

    def step():
        if any(env.step(next(actions))[2:4]):
            env.reset()
    return timed(step, repeats)


def measure(job):
    torch.set_num_threads(job["threads"])
    repeats = max(job["steps"] // 10, 20)
    env = gymnasium.make(job["env"])
    s, a = env.observation_space.shape[0], env.action_space.shape[0]
    found = [(times, product(*shape, repeats, job["entrant"].endswith("cold"))) for shape, times in products(job["algorithm"], s, a, job["hidden"], job["bs"], job["policy_delay"]).items()]
    if job["kind"] == "online":
        found.append((job["n"], env_step(job["env"], repeats)))
    cpu, wall = (sum(times * seconds[i] for times, seconds in found) for i in (0, 1))
    return {"steps": (1 / cpu, 1 / wall)}


def about():
    return f"torch {torch.__version__}"
