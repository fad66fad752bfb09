"""An algorithm that learns nothing, in no time: it stands in for a learner head where the command line is tested."""
from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastrl_pipes.learner.registry import register_algorithm
from fastrl_pipes.loggers.recorder import Recorder


class FakeLearner:
    "The part of a learner's interface that the command line uses"
    compiled = False
    BATCHES, PAUSE = 10, 0.0

    def __init__(self, env, seed, lr, pause):
        self.env, self.lr, self.pause = env, lr, pause
        self.recorder, self.loggers, self.interrupted = Recorder(), [], False
        self.agent = SimpleNamespace(predict=lambda observation: np.zeros(1, np.float32))
        self.validations = []

    @property
    def batches_seen(self):
        return self.recorder.batch

    def describe(self):
        return f"FakeStack on {self.env}: state [B, 3] -> action [B, 1]"

    def fit(self, epochs=None, env_steps=None, stop=None, checkpoint_every=None, folder=None, keep=1, best_episodes=0):
        self.interrupted, self.folder, r = False, folder, self.recorder
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "interrupted", True))
        target = r.env_steps + (env_steps if env_steps is not None else epochs * self.BATCHES)
        for logger in self.loggers:
            logger.on_fit_start(dict(name="fake", epochs=epochs, batches=self.BATCHES, warm_up=0, recorder=r))
        first = len(r.rows)
        while r.env_steps < target and not self.interrupted:
            for batch in range(self.BATCHES):
                r.record("critic_loss", self.lr / (1 + r.batch))
                r.batch, r.env_steps = r.batch + 1, r.env_steps + 1
                time.sleep(self.pause)
                for logger in self.loggers:
                    logger.on_batch(batch + 1, self.BATCHES)
            r.episode(-1000.0 + r.env_steps, 10)
            row = r.read()
            over = stop is not None and stop(row)
            for logger in self.loggers:
                logger.on_epoch(row)
            if over:
                break
        for logger in self.loggers:
            logger.on_fit_end(r.rows[first:])
        signal.signal(signal.SIGINT, before)
        if self.interrupted or checkpoint_every:
            self.save(self.folder)
        return r.rows[first:]

    def validate(self, episodes, deterministic=True, seed=10_000):
        self.validations.append((episodes, deterministic, seed))
        return {"mean": -200.0 + self.recorder.env_steps, "std": 10.0, "returns": [], "lengths": []}

    def save(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder)/"manifest.json").write_text(json.dumps(self.recorder.get_state()))

    def load(self, folder, environments=True):
        self.recorder.set_state(json.loads((Path(folder)/"manifest.json").read_text()))


BUILT = []  # learners, in order


def build_fake(
    env: str,  # environment id
    seed: int = 0,  # of everything
    lr: float = 1e-3,  # learning rate
    hidden: tuple[int, ...] = (400, 300),  # widths of the layers
    pause: float = 0.0,  # seconds per batch
    env_kwargs: dict[str, Any] | None = None,  # of the environment
):
    "A learner that learns nothing"
    BUILT.append(FakeLearner(env, seed, lr, pause))
    return BUILT[-1]


register_algorithm("fake", build_fake, {"Pendulum-v1": {"lr": 0.01, "env_steps": 40}, "slow": {"pause": 0.05, "env_steps": 1000}})
