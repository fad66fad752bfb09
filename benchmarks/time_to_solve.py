"""Time to solve Pendulum-v1, as a user sees it: from a built learner to a policy whose mean return over 20 fixed starts, without exploration, passes a goal.

    python benchmarks/time_to_solve.py sac ddpg --seeds 0 1 2 3 4      # rows go to benchmarks/results/time_to_solve.csv, one by one
    python benchmarks/time_to_solve.py --report                        # the table of what is there

Ours is `fit` with the preset of the command line, eager (`ours`) and after `learner.compile()` (`ours-compiled`, compilation in the time). Stable-Baselines3 (`sb3`, installed by `peers.py`) has the settings that its zoo tuned for Pendulum-v1,
written out below. Every 250 environment steps the policy is asked, from the first one after the random steps on; what that takes is no part of the time. Runs are interleaved, a process each, one thread: A B C with seed 0, A B C with seed 1.
A run that has not passed after `--budget` steps counts as that long, and is marked. The median is over the seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import peers

HERE = Path(__file__).resolve().parent
FIELDS = ("algorithm", "entrant", "seed", "goal", "solved", "seconds", "cpu_seconds", "env_steps", "return", "threads", "about")
ENTRANTS = ("ours", "ours-compiled", "sb3")
EVERY, EPISODES, ENV = 250, 20, "Pendulum-v1"
ZOO = {  # hyperparams/{sac,ddpg}.yml of rl-baselines3-zoo, Pendulum; what is not set there has the library's default
    "sac": {"learning_rate": 1e-3},
    "ddpg": {"learning_rate": 1e-3, "gamma": 0.98, "buffer_size": 200_000, "learning_starts": 10_000, "gradient_steps": -1, "train_freq": (1, "episode"), "policy_kwargs": {"net_arch": [400, 300]}, "noise_std": 0.1},
}


class Goal:
    "Asks the policy, and keeps the time that asking takes"

    def __init__(self, mean_return, goal):
        self.mean_return, self.goal, self.value, self.asked, self.asked_cpu = mean_return, goal, float("-inf"), 0.0, 0.0
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def __call__(self, act):
        wall, cpu = time.perf_counter(), time.process_time()
        self.value = self.mean_return(act, ENV, EPISODES)
        self.asked, self.asked_cpu = self.asked + time.perf_counter() - wall, self.asked_cpu + time.process_time() - cpu
        return self.value >= self.goal

    def found(self, env_steps, about):
        return {"solved": int(self.value >= self.goal), "seconds": round(time.perf_counter() - self.wall - self.asked, 3), "cpu_seconds": round(time.process_time() - self.cpu - self.asked_cpu, 3),
                "env_steps": env_steps, "return": round(self.value, 2), "about": about}


def ours(job, goal_of):
    "`fit` with the preset"
    import torch

    import fastrl_pipes
    from fastrl_pipes.learner.bench_ours import compiled
    from fastrl_pipes.learner.registry import get_algorithm
    torch.set_num_threads(1)
    algorithm = get_algorithm(job["algorithm"])
    preset = {k: v for k, v in algorithm.presets.get(ENV, {}).items() if k in algorithm.settings}
    goal = goal_of()
    learner = compiled(algorithm.build(env=ENV, seed=job["seed"], batches=EVERY, **preset), job)
    learner.fit(env_steps=job["budget"], stop=lambda row: goal(learner.agent.predict))
    return goal.found(learner.env_steps, f"fastrl_pipes {fastrl_pipes.__version__}, torch {torch.__version__}")


def sb3(job, goal_of):
    "`learn` with the settings of its zoo"
    import gymnasium
    import numpy as np
    import stable_baselines3
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.noise import NormalActionNoise
    torch.set_num_threads(1)
    goal, settings = goal_of(), dict(ZOO[job["algorithm"]])
    env = gymnasium.make(ENV)
    size = env.action_space.shape
    if noise := settings.pop("noise_std", None):
        settings["action_noise"] = NormalActionNoise(np.zeros(size), np.full(size, noise))

    class Ask(BaseCallback):
        def _on_step(self):
            late = self.num_timesteps > self.model.learning_starts and self.num_timesteps % EVERY == 0
            return not (late and goal(lambda observation: self.model.predict(observation, deterministic=True)[0]))
    model = getattr(stable_baselines3, job["algorithm"].upper())("MlpPolicy", env, seed=job["seed"], device="cpu", **settings)
    model.learn(job["budget"], callback=Ask())
    return goal.found(model.num_timesteps, f"stable-baselines3 {stable_baselines3.__version__}, torch {torch.__version__}")


def child(job):
    "One run in this process"
    source = {}
    exec(compile(Path(job["stopwatch"]).read_text(encoding="utf-8"), job["stopwatch"], "exec"), source)  # not imported: fastrl_pipes need not be there
    found = (sb3 if job["entrant"] == "sb3" else ours)(job, lambda: Goal(source["mean_return"], job["goal"]))
    print("found: " + json.dumps(found), flush=True)


def run(job, python):
    from fastrl_pipes.learner.bench import one_thread
    ran = subprocess.run([python, __file__, "--child", json.dumps(job)], capture_output=True, text=True, env=one_thread(1))
    lines = [line.removeprefix("found: ") for line in ran.stdout.splitlines() if line.startswith("found: ")]
    if ran.returncode or not lines:
        sys.exit(f"{job['entrant']} {job['algorithm']} seed {job['seed']} failed:\n" + "\n".join(ran.stderr.splitlines()[-8:]))
    return {k: job[k] for k in ("algorithm", "entrant", "seed", "goal")} | {"threads": 1} | json.loads(lines[-1])


def read(path):
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def table(rows):
    "Markdown: an entrant a line, the median over its seeds"
    lines = ["| algorithm | entrant | seconds, median | lowest to highest | CPU seconds | environment steps | solved | sb3 / this |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    medians = {}
    for r in rows:
        medians.setdefault((r["algorithm"], r["entrant"]), []).append(r)
    for (algorithm, entrant), them in medians.items():
        seconds = [float(r["seconds"]) for r in them]
        other = [float(r["seconds"]) for r in medians.get((algorithm, "sb3"), ())]
        ratio = f"{statistics.median(other) / statistics.median(seconds):.2f}" if other else ""
        lines.append(f"| {algorithm} | {entrant} | {statistics.median(seconds):.1f} | {min(seconds):.1f} to {max(seconds):.1f} | {statistics.median(float(r['cpu_seconds']) for r in them):.1f} | "
                     f"{statistics.median(int(r['env_steps']) for r in them):,.0f} | {sum(int(r['solved']) for r in them)} of {len(them)} | {ratio} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithms", nargs="*", help=f"of {list(ZOO)}; default: both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--entrants", nargs="+", choices=ENTRANTS, default=list(ENTRANTS))
    parser.add_argument("--goal", type=float, default=-200.0, help="mean return over 20 fixed starts")
    parser.add_argument("--budget", type=int, default=20_000, help="environment steps at the most")
    parser.add_argument("--peers", type=Path, default=HERE/".peers", help="where peers.py installed the libraries")
    parser.add_argument("--out", type=Path, default=HERE/"results"/"time_to_solve.csv")
    parser.add_argument("--report", action="store_true", help="print the table of the CSV, and do nothing else")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(json.loads(args.child))
    if unknown := set(args.algorithms) - set(ZOO):
        parser.error(f"unknown: {sorted(unknown)}; there are {list(ZOO)}")
    if not args.report:
        import fastrl_pipes.learner.stopwatch as stopwatch
        from fastrl_pipes.learner.bench import append_rows
        if "sb3" in args.entrants and not (args.peers/"sb3"/"ready").exists():
            parser.error(f"sb3 is not in {args.peers}: `python benchmarks/peers.py sb3` installs it")
        have = {(r["algorithm"], r["entrant"], int(r["seed"]), float(r["goal"])) for r in read(args.out)}
        for algorithm in args.algorithms or ZOO:
            for seed in args.seeds:
                for entrant in args.entrants:
                    if (algorithm, entrant, seed, args.goal) in have:
                        continue
                    job = {"algorithm": algorithm, "entrant": entrant, "seed": seed, "goal": args.goal, "budget": args.budget, "stopwatch": stopwatch.__file__}
                    row = run(job, str(peers.python_of(args.peers.resolve()/"sb3")) if entrant == "sb3" else sys.executable)
                    append_rows(args.out, [row], FIELDS)
                    print(f"{algorithm} {entrant} seed {seed}: {row['seconds']:.1f} s, {row['env_steps']} steps, return {row['return']}", file=sys.stderr, flush=True)
    print(table(read(args.out)))


if __name__ == "__main__":
    sys.exit(main())
