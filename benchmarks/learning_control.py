"""Do the algorithms for continuous control learn? Every run that their notebooks' tables and curves show is made by this script; a run's rows are written when it ends.

    python benchmarks/learning_control.py sac-pendulum td3-pendulum --seeds 0 1 2 3 4
    python benchmarks/learning_control.py sac-cheetah --jobs 2
    python benchmarks/learning_control.py sac-pendulum:tau=0.01 --cut 3000

A cell builds its learner as `fastrl_pipes train` does, with the preset of the environment, so the presets are what is measured; settings behind a colon replace some of it. Budgets and
evaluations are in `control_cells.py`: Pendulum 10,000 environment steps and 200 fixed starts (reset seeds from 10000), MountainCarContinuous 50,000 and 100, MuJoCo 100,000 and 10. Returns are
without exploration. Curves come from other starts (reset seeds from 20000). One thread a run. Runs that have their row are not made again, unless with --again.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import json
import sys

import torch
from control_cells import learn, main, version_of

import fastrl_pipes
from fastrl_pipes.learner.registry import get_algorithm


def run(cell, seed, out, budget):
    algorithm = get_algorithm(cell.algorithm)
    preset = {k: v for k, v in algorithm.presets.get(cell.task.env, {}).items() if k in algorithm.settings}
    settings = preset | cell.settings
    learner = algorithm.build(env=cell.task.env, seed=seed, **settings)

    def train(env_steps):
        learner.fit(env_steps=env_steps)
        if learner.interrupted:
            sys.exit(130)
        return learner.env_steps

    def evaluate(episodes, first):
        found = learner.validate(episodes=episodes, seed=first)
        return found["mean"], found["std"]

    learn(cell, cell.name, seed, out, train, evaluate, {"version": version_of(fastrl_pipes), "settings": json.dumps(settings)}, budget)
    learner.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(run, __doc__, __file__))
