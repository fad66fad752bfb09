"""The acting path: what one action costs, in several ways of computing it; and what it brings to act while the learner learns.

    python benchmarks/acting_paths.py                                # both parts; rows go to benchmarks/results/acting_paths.csv, one by one
    python benchmarks/acting_paths.py act --rounds 7 --n 1 8 64      # microseconds of one acting step
    python benchmarks/acting_paths.py train --slow none sleep busy   # environment steps per second, two cores
    python benchmarks/acting_paths.py --report                       # the medians of what is in the CSV

`act`: the actor of SAC, 256-256, on states of HalfCheetah-v5, a sample each time; and that of DDPG, 400-300, on states of Pendulum-v1. Arrays in, arrays out. `module` is the network called as it is, `needed` the same layers without
what acting does not ask for (log-probabilities), `pipe` the package's stage around it, `compiled` that stage after `learner.compile()`, `numpy` the layers written out over preallocated arrays, `jit` the needed layers traced and
frozen, `torch.compile` the needed layers compiled by `torch.compile`. All get the same noise at first, and have to give the same actions. In one process and one thread, interleaved.

`train`: a SAC learner, one update per environment step of which the wall clock counts; a process for each stack and round, interleaved. One thread of torch each, so that two cores are enough for a learner and one who acts. Environments as
they are (`none`), or slowed down by `--ms` milliseconds a step, asleep (`sleep`) or at work (`busy`). With `n` environments and a pull that brings r rows there are r updates for each pull. Compilation, random steps and the first
`--lead` steps do not count. `cpu` is the time of the learner's process, without workers, per environment step.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
FIELDS = ("part", "what", "n", "slow", "compiled", "way", "round", "value", "unit", "cpu_ms", "updates", "steps", "threads", "torch", "when")
STACKS = {"single": 1, "single, prefetched": 1, "sync": 0, "sync, prefetched": 0, "workers": 0, "workers, prefetched": 0, "double": 0}  # 1: one environment; 0: `--envs`


# --- one acting step -------------------------------------------------------------------------------------------------
class Sample(nn.Module):
    "What acting needs of a stochastic policy: the squashed sample"

    def __init__(self, policy):
        super().__init__()
        self.layers, self.bounds = policy.layers, policy.log_std_bounds

    def forward(self, state, noise):
        mean, log_std = self.layers(state).chunk(2, 1)
        return torch.tanh(mean + log_std.clamp(*self.bounds).exp() * noise)


class Plain(nn.Module):
    "The same of a deterministic one, which is all of it"

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, state, noise):
        return self.policy(state)


def by_hand(policy, n, noisy):
    "The layers in NumPy, over arrays that are used again"
    layers = [(np.ascontiguousarray(m.weight.detach().numpy().T), m.bias.detach().numpy(), np.zeros((n, m.out_features), np.float32)) for m in policy.modules() if isinstance(m, nn.Linear)]
    low, high = policy.log_std_bounds if noisy else (0, 0)

    def act(state, noise):
        x = state
        for i, (weight, bias, out) in enumerate(layers):
            np.matmul(x, weight, out=out)
            out += bias
            if i < len(layers) - 1:
                np.maximum(out, 0, out=out)
            x = out
        if not noisy:
            return np.tanh(x)
        mean, log_std = x[:, :x.shape[1] // 2], x[:, x.shape[1] // 2:]
        return np.tanh(mean + np.exp(np.minimum(np.maximum(log_std, low), high)) * noise)
    return act


def tensors(fn):
    "A function of tensors as one of arrays"
    def act(state, noise):
        with torch.inference_mode():
            return fn(torch.from_numpy(state), torch.from_numpy(noise)).numpy()
    return act


def staged(policy, space, noisy, compiled):
    "The package's stage; it draws noise itself, unless it is given some"
    from fastrl_pipes.agents.core import PolicyRunner, SimpleModelRunner
    from fastrl_pipes.core import SimpleStep
    from fastrl_pipes.pipes.control import Inlet
    from fastrl_pipes.pipes.context import Context
    from fastrl_pipes.pipes.walk import bind
    stage = (PolicyRunner if noisy else SimpleModelRunner)(Inlet(), policy)
    bind(stage, Context(seed=0, action_space=space))
    stage.start()
    if compiled:
        stage.compile()

    def act(state, noise):
        return stage.forward(SimpleStep(state=state)).action

    def given(state, noise):
        stage.normal = lambda like: torch.from_numpy(noise)
        try:
            return act(state, noise)
        finally:
            del stage.normal
    return act, (act if not noisy or compiled else given)


def ways(policy, space, n, state, noisy):
    "name -> (what is timed, what is compared)"
    needed = (Sample if noisy else Plain)(policy)
    module = tensors(lambda s, e: policy(s, noise=e)[0]) if noisy else tensors(lambda s, e: policy(s))
    noise = np.zeros((n, space.shape[0]), np.float32)
    with torch.no_grad():
        jit = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(needed.eval(), (torch.from_numpy(state), torch.from_numpy(noise)))))
    plain = {"module": module, "needed": tensors(needed), "numpy": by_hand(policy, n, noisy), "jit": tensors(jit), "torch.compile": tensors(torch.compile(needed))}
    found = {name: (fn, fn) for name, fn in plain.items()}
    return {**found, "pipe": staged(policy, space, noisy, False), "compiled": staged(policy, space, noisy, True)}


def act(args, say):
    "Rows of the first part"
    from fastrl_pipes.networks.actor_critic import Actor
    from fastrl_pipes.networks.policies import GaussianActor
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for what, env_id, make in (("sac 256-256", "HalfCheetah-v5", lambda s, a: GaussianActor(s, a, (256, 256))), ("ddpg 400-300", "Pendulum-v1", Actor)):
        env = gymnasium.make(env_id)
        space, noisy = env.action_space, what.startswith("sac")
        policy = make(env.observation_space.shape[0], space.shape[0])
        for n in args.n:
            state = np.stack([env.reset(seed=i)[0] for i in range(n)]).astype(np.float32)
            noise = np.random.default_rng(0).standard_normal((n, space.shape[0])).astype(np.float32)
            made = ways(policy, space, n, state, noisy)
            expected = made["module"][1](state, noise)
            for name, (_, compared) in made.items():
                if not (noisy and name == "compiled"):  # its numbers are drawn before the graph is called
                    assert np.allclose(compared(state, noise), expected, atol=1e-5), f"{name} acts differently"
            for fn, _ in made.values():
                for _ in range(50):
                    fn(state, noise)
            for k in range(args.rounds):
                for name, (fn, _) in made.items():
                    draws = noisy and name not in ("pipe", "compiled")  # which draw in the call
                    rng, taken = np.random.default_rng(1), []
                    for _ in range(args.calls):
                        began = time.perf_counter()
                        fn(state, rng.standard_normal(noise.shape, np.float32) if draws else noise)
                        taken.append(time.perf_counter() - began)
                    say(part="act", what=what, n=n, slow="none", compiled=name in ("compiled", "jit", "torch.compile"), way=name, round=k, value=1e6 * statistics.median(taken), unit="us")
        env.close()


# --- acting while the learner learns ---------------------------------------------------------------------------------
class Slowed(gymnasium.Wrapper):
    "Takes longer for a step"

    def __init__(self, env, kind, seconds):
        super().__init__(env)
        self.kind, self.seconds = kind, seconds

    def step(self, action):
        if self.kind == "sleep":
            time.sleep(self.seconds)
        elif self.kind == "busy":
            until = time.perf_counter() + self.seconds
            while time.perf_counter() < until:
                pass
        return super().step(action)


def slowed(env_id, kind, seconds):
    env = gymnasium.make(env_id, disable_env_checker=True)
    return env if kind == "none" else Slowed(env, kind, seconds)


def train_one(job):
    "Build, compile, learn, and print what it took; in a process of its own"
    from fastrl_pipes.agents.sac import SACAgent, SACLearner
    from fastrl_pipes.core import seed_everything
    from fastrl_pipes.envs.double_buffered import DoubleBufferedStepper
    from fastrl_pipes.envs.stepper import GymStepper
    from fastrl_pipes.networks.ensemble import Critics
    from fastrl_pipes.networks.policies import GaussianActor
    from fastrl_pipes.pipes.prefetch import Prefetcher
    torch.set_num_threads(1)
    seed_everything(job["round"])
    env = gymnasium.make(job["env"])
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    actor, critic = GaussianActor(*sizes, hidden=(256, 256)), Critics(*sizes, k=2, hidden=(256, 256))
    kind, _, prefetched = job["way"].partition(", ")
    make, n, warmup = partial(slowed, job["env"], job["slow"], job["ms"] / 1000), job["n"], 64
    if kind == "double":
        pipe = DoubleBufferedStepper(make, SACAgent(actor), n, seed=0, random_steps=warmup, workers=job["workers"])
    else:
        pipe = GymStepper(make, SACAgent(actor), n, kind, 0, warmup, workers=job["workers"] if kind == "workers" else None)
    rows = n // 2 if kind == "double" else n
    pipe = Prefetcher(pipe) if prefetched else pipe
    learner = SACLearner(actor, critic, pipe, [], bs=256, warmup=256, repeat=rows, batches=10**9)
    if job["compiled"]:
        learner.compile()
    learner.fit(env_steps=256 + job["lead"])
    steps, updates, wall, cpu = learner.env_steps, learner.batches_seen, time.perf_counter(), time.process_time()
    learner.fit(env_steps=job["steps"])
    wall, cpu, steps = time.perf_counter() - wall, time.process_time() - cpu, learner.env_steps - steps
    learner.close()
    print(json.dumps({"value": steps / wall, "cpu_ms": 1000 * cpu / steps, "updates": learner.batches_seen - updates, "steps": steps}), flush=True)


def train(args, say):
    "Rows of the second part"
    for k in range(args.rounds):
        for slow in args.slow:
            for compiled in ([False] if args.eager else [True] if args.compiled else [False, True]):
                for way in args.ways or STACKS:
                    job = {"env": args.env, "n": STACKS[way] or args.envs, "slow": slow, "ms": args.ms, "compiled": compiled, "way": way, "round": k, "lead": args.lead, "steps": args.steps, "workers": args.workers}
                    done = subprocess.run([sys.executable, __file__, "--one", json.dumps(job)], capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
                    if done.returncode:
                        print(f"{way}, {slow}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
                        continue
                    say(part="train", what=f"sac {args.env}", n=job["n"], slow=slow, compiled=compiled, way=way, round=k, unit="env steps/s", **json.loads(done.stdout.splitlines()[-1]))


# --- what comes of it ------------------------------------------------------------------------------------------------
def report(path):
    "Medians and spread of a CSV, as text"
    groups = {}
    with open(path, newline="", encoding="utf-8") as f:
        for r in csv.DictReader(f):
            key = (r["part"], r["what"], int(r["n"]) if r["part"] == "act" else r["slow"], r["compiled"] if r["part"] == "train" else "", r["way"], r["n"], r["unit"])
            groups.setdefault(key, []).append(float(r["value"]))
    lines, above = [], None
    for (part, what, by, compiled, way, n, unit), values in groups.items():
        head = f"{part}: {what}, " + (f"n={by}" if part == "act" else f"slow={by}, {'compiled' if compiled == 'True' else 'eager'}") + f" ({unit})"
        if head != above:
            lines += ["", head]
            above = head
        lines.append(f"  {way:<22} {'n=' + n if part == 'train' else '':<5} {statistics.median(values):9.1f}   {min(values):9.1f} to {max(values):9.1f}   {len(values)} rounds")
    return "\n".join(lines[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="act, train; default: both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8, 64], help="act: environments")
    parser.add_argument("--calls", type=int, default=2000, help="act: calls in a round, of which the median counts")
    parser.add_argument("--env", default="HalfCheetah-v5", help="train: id of the environment")
    parser.add_argument("--envs", type=int, default=8, help="train: environments where there are several; an even number")
    parser.add_argument("--workers", type=int, default=2, help="train: worker processes where there are some")
    parser.add_argument("--slow", nargs="+", default=["none", "sleep", "busy"], choices=["none", "sleep", "busy"], help="train: how environments are slowed down")
    parser.add_argument("--ms", type=float, default=2.0, help="train: by how much a step")
    parser.add_argument("--ways", nargs="+", choices=list(STACKS), help="train: only these stacks")
    parser.add_argument("--steps", type=int, default=2000, help="train: environment steps that count")
    parser.add_argument("--lead", type=int, default=300, help="train: environment steps before, that do not")
    parser.add_argument("--eager", action="store_true", help="train: only eager learners")
    parser.add_argument("--compiled", action="store_true", help="train: only compiled ones")
    parser.add_argument("--out", type=Path, default=HERE/"results"/"acting_paths.csv")
    parser.add_argument("--report", action="store_true", help="print the medians of the CSV, and do nothing else")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return train_one(json.loads(args.one))
    if unknown := set(args.parts) - {"act", "train"}:
        parser.error(f"parts are act and train, not {sorted(unknown)}")
    if args.envs < 2 or args.envs % 2:
        parser.error(f"--envs is {args.envs}, expected an even number")
    if not args.report:
        from fastrl_pipes.learner.bench import append_rows

        def say(**row):
            row = {"threads": 1, "torch": torch.__version__, "when": time.strftime("%Y-%m-%d"), **row}
            row["value"], row["cpu_ms"] = round(row["value"], 3), round(row["cpu_ms"], 4) if "cpu_ms" in row else ""
            append_rows(args.out, [row], FIELDS)
            print(f"{row['part']} {row['what']} n={row['n']} {row['slow']} {'compiled ' if row['compiled'] else ''}{row['way']}: {row['value']:.1f} {row['unit']}", flush=True)
        for part, rows in (("act", act), ("train", train)):
            if not args.parts or part in args.parts:
                rows(args, say)
    print(report(args.out))


if __name__ == "__main__":
    main()
