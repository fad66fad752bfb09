"""Learning that never leaves the device: environments of tensors, the replay, the networks. Ours, eager and compiled, beside a plain loop in the manner of LeanRL.

    python benchmarks/device_pendulum.py --device cuda                  # everything: 4,096 environments, W1 to W4, 256-256 and 1024-1024
    python benchmarks/device_pendulum.py --device cuda W3 --hidden 256  # SAC on Pendulum alone
    python benchmarks/device_pendulum.py --device cpu                   # W3 alone, 64 environments, for a look at the code path

ITS NUMBERS ON A GPU HAVE NOT BEEN MEASURED YET: there was none when it was written, and what only a GPU runs (the captured graphs of the plain loop, `graphs` of ours) has not run. On a CPU it is tested.

W1 to W4 are the algorithms, batches and shapes of `benchmarks/speed.py` (W4: 17 numbers seen, 6 in an action, in a made-up environment of that shape); the hidden layers are those of `--hidden`, in W1 too. One update for each step of all
environments. Entrants, interleaved in one process: `ours`; `ours-compiled`; `ours-graphs`, the same with CUDA graphs; `plain`, the loop of `entrants/packed.py` with its store on the device; `plain-compiled`, its whole
update as one compiled graph; `plain-graphs`, that captured as a CUDA graph and replayed, as LeanRL does it. Both step the same environments. Printed are updates and environment steps per second, medians over the rounds, then what the
profiler saw in 20 steps of each: copies from the device to the host (there must be none), copies to the device, waits (the profiler itself waits once at its end), numbers read, kernels and graphs launched. On a CPU fused Adam reads its
own counters, a number for each parameter; nothing else does.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gymnasium import spaces

sys.path.insert(0, str(Path(__file__).resolve().parent/"entrants"))
import packed

from fastrl_pipes.agents.ddpg import Actor, Critic, DDPGAgent, DDPGLearner
from fastrl_pipes.agents.sac import SACAgent, SACLearner
from fastrl_pipes.agents.td3 import TD3Agent, TD3Learner
from fastrl_pipes.core import seed_everything
from fastrl_pipes.envs.tensor_envs import TensorEnvs, TorchPendulum
from fastrl_pipes.envs.tensor_stepper import TensorStepper
from fastrl_pipes.networks.ensemble import Critics
from fastrl_pipes.networks.policies import GaussianActor

WORKLOADS = {"W1": ("ddpg", 3, 1, 128), "W2": ("td3", 3, 1, 256), "W3": ("sac", 3, 1, 256), "W4": ("sac", 17, 6, 256)}  # algorithm, widths of observation and action, batch
ENTRANTS = ("ours", "ours-compiled", "ours-graphs", "plain", "plain-compiled", "plain-graphs")
SIZE, LR, TAU, DISCOUNT, SIGMA = 2**18, 1e-3, 0.005, 0.99, 0.1
SEEN = ("Memcpy DtoH", "Memcpy HtoD", "cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense", "cudaLaunchKernel", "cudaGraphLaunch")


class Shaped(TensorEnvs):
    "As many numbers as a task of that shape has: a damped linear system that is pushed about"

    def __init__(self, n, state_sz, action_sz, device=None):
        super().__init__(n, spaces.Box(-np.inf, np.inf, (state_sz,)), spaces.Box(-1, 1, (action_sz,)), 1000, device)
        g = torch.Generator().manual_seed(0)
        self.turn, self.push = (torch.randn(k, state_sz, generator=g).to(self.device) / state_sz for k in (state_sz, action_sz))

    def to(self, device):
        super().to(device)
        self.turn, self.push = self.turn.to(device), self.push.to(device)
        return self

    def begin(self, generator):
        return torch.randn(self.n, len(self.turn), generator=generator, device=self.device)

    def look(self, state):
        return state

    def move(self, state, action):
        after = torch.tanh(0.9 * state + state @ self.turn + action @ self.push)
        return after, -after.square().mean(1, keepdim=True), torch.zeros(self.n, 1, dtype=torch.bool, device=self.device)


def environments(s, a):
    "What makes them"
    return TorchPendulum if (s, a) == (3, 1) else partial(Shaped, state_sz=s, action_sz=a)


def ours(workload, hidden, how, n, device):
    "A learner as a user makes it; returns its pull"
    algorithm, s, a, bs = WORKLOADS[workload]
    seed_everything(0)
    random, more = max(n, bs), {"bs": bs, "max_sz": SIZE, "discount": DISCOUNT, "tau": TAU, "device": device}
    if algorithm == "sac":
        actor, critic = GaussianActor(s, a, (hidden, hidden)), Critics(s, a, hidden=(hidden, hidden))
        agent, make = SACAgent(actor), partial(SACLearner, alpha_lr=LR)
    elif algorithm == "td3":
        actor, critic = Actor(s, a, hidden, hidden), Critics(s, a, hidden=(hidden, hidden))
        agent, make = TD3Agent(actor, SIGMA), TD3Learner
    else:
        actor, critic = Actor(s, a, hidden, hidden), Critic(s, a, hidden, hidden)
        agent, make = DDPGAgent(actor, sigma=SIGMA), DDPGLearner
    stepper = TensorStepper(environments(s, a), agent, n, seed=0, random_steps=random)
    learner = make(actor, critic, stepper, [], actor_lr=LR, critic_lr=LR, warmup=random, **more)
    if how:
        learner.compile(**({} if device == "cpu" else {"triton.cudagraphs": how == "graphs"}))
    learner.start()
    return learner.next


class Plain(packed.Learner):
    "The plain update, with its noise drawn where the batch is"

    def update(self, rows, delayed):
        z = torch.randn(2, len(rows), self.a, device=rows.device) if self.name in ("td3", "sac") else None
        if self.compiled:
            with torch.no_grad():
                self.whole(self.p, self.t, self.adam, rows, z, delayed)
        else:
            self.once(self.p, self.t, None, rows, z, delayed)


class Captured:
    "An update as a CUDA graph, one for each kind of update; its batch is copied into the place that the graph reads"

    def __init__(self, update):
        self.update, self.graphs = update, {}

    def __call__(self, rows, delayed):
        if delayed not in self.graphs:
            self.graphs[delayed] = self.capture(rows, delayed)
        place, graph = self.graphs[delayed]
        place.copy_(rows)
        graph.replay()

    def capture(self, rows, delayed):
        place, side, graph = rows.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.update(place, delayed)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            self.update(place, delayed)
        return place, graph


def plain(workload, hidden, how, n, device):
    "The same without pipes; returns one step of the loop"
    algorithm, s, a, bs = WORKLOADS[workload]
    job = {"entrant": "packed-compiled" if how else "packed", "algorithm": algorithm, "hidden": (hidden, hidden), "lr": LR, "discount": DISCOUNT, "tau": TAU, "policy_noise": 0.2, "noise_clip": 0.5}
    seed_everything(0)
    with torch.device(device):
        learner = Plain(job, s, a)
        store = torch.zeros(SIZE // n * n, 2 * s + a + 2)
    envs, update, actor = environments(s, a)(n, device=device), learner.update, learner.p["actor"]
    update = Captured(update) if how == "graphs" else update
    scale, at = float(envs.action_space.high[0]), {"row": 0, "full": 0, "update": 0}

    @torch.no_grad()
    def acted():
        x = envs.observe()
        noise = torch.randn(n, a, device=device)
        said = packed.sampled(actor, x, noise)[0] if algorithm == "sac" else (torch.tanh(packed.forward(actor, x)) + SIGMA * noise).clamp(-1, 1)
        after, reward, terminated, _, _ = envs.step(said * scale)
        store[at["row"]:at["row"] + n] = torch.cat((x, said, after, reward, terminated.float()), 1)
        at["row"], at["full"] = (at["row"] + n) % len(store), min(at["full"] + n, len(store))

    def pull():
        acted()
        while at["full"] < bs:
            acted()
        at["update"] += 1
        update(store.index_select(0, torch.randint(0, at["full"], (bs,), device=device)), algorithm != "td3" or at["update"] % 2 == 0)
    return pull


def timed(pull, device, seconds):
    "Pulls per second; the device is waited for at both ends, and not in between"
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            pull()
        done += 10
        wait()
    return done / (time.perf_counter() - began)


def watched(pull, device, pulls=20):
    "How often the profiler saw what would be a journey to the host, and what was launched"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * device.startswith("cuda")
    with torch.profiler.profile(activities=kinds) as seen:
        for _ in range(pulls):
            pull()
    names = {e.key: e.count for e in seen.key_averages()}
    return {what: sum(count for name, count in names.items() if what in name) for what in SEEN}


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("workloads", nargs="*", choices=[[], *WORKLOADS], help="default: all on a GPU, W3 on a CPU")
    cli.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    cli.add_argument("--envs", type=int, help="environments: 4096 on a GPU, 64 on a CPU")
    cli.add_argument("--hidden", type=int, nargs="+", help="units of both hidden layers: 256 and 1024 on a GPU, 256 on a CPU")
    cli.add_argument("--entrants", nargs="+", choices=ENTRANTS)
    cli.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    cli.add_argument("--rounds", type=int, default=3)
    cli.add_argument("--lead", type=int, default=30, help="steps before the first measurement: compilation, capture, memory")
    cli.add_argument("--out", type=Path, help="a CSV for every measurement")
    args = cli.parse_args()
    on_gpu = args.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        cli.error("--device cuda: torch finds no GPU of CUDA here")
    n, widths = args.envs or (4096 if on_gpu else 64), args.hidden or ([256, 1024] if on_gpu else [256])
    entrants = args.entrants or [e for e in ENTRANTS if on_gpu or not e.endswith("graphs")]
    if not on_gpu:
        torch.set_num_threads(1)
        if any(e.endswith("graphs") for e in entrants):
            cli.error("CUDA graphs need --device cuda")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if on_gpu else 'CPU, one thread'}; {n} environments, one update for each step of all\n")
    rows = []
    for workload in args.workloads or (list(WORKLOADS) if on_gpu else ["W3"]):
        for hidden in widths:
            rows += compared(workload, hidden, entrants, n, args)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def compared(workload, hidden, entrants, n, args):
    "One workload at one width: prints its table, returns a row for each measurement"
    pulls, rows = {}, []
    for entrant in entrants:
        who, _, how = entrant.partition("-")
        pulls[entrant] = (ours if who == "ours" else plain)(workload, hidden, how, n, args.device)
        for _ in range(args.lead):
            pulls[entrant]()
    for number in range(args.rounds):
        for entrant, pull in pulls.items():
            rate = timed(pull, args.device, args.seconds)
            rows.append({"workload": workload, "hidden": hidden, "entrant": entrant, "device": args.device, "envs": n, "round": number, "updates_per_second": round(rate, 2), "env_steps_per_second": round(rate * n)})
    print(f"{workload}, {WORKLOADS[workload][0]}, {hidden}-{hidden}, batch {WORKLOADS[workload][3]}")
    print(f"{'':16}{'updates/s':>12}{'env steps/s':>14}   in 20 steps: " + ", ".join(SEEN))
    for entrant, pull in pulls.items():
        rate = statistics.median(r["updates_per_second"] for r in rows if r["entrant"] == entrant)
        print(f"{entrant:16}{rate:12,.1f}{rate * n:14,.0f}   " + ", ".join(str(count) for count in watched(pull, args.device).values()))
    print(flush=True)
    return rows


if __name__ == "__main__":
    main()
