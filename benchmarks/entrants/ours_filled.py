"""The learners of this package with a replay that is full: a batch then comes from the whole of it, and no longer from the first rows, which a cache holds."""

from __future__ import annotations

import torch

from fastrl_pipes.learner.bench_ours import about, built  # noqa: F401
from fastrl_pipes.memory.experience_replay import ReplayWriter
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.pipes.graph import find_pipes


def fill(memory: ReplayMemory) -> None:
    "Rows of a memory that has some, drawn again and again until it is full"
    state = memory.state_dict()
    rows = state["rows"][torch.randint(len(memory), (memory.max_sz,))]
    memory.load_state_dict(state | {"rows": rows, "cursor": 0, "written": memory.max_sz})


def train(job, env_id, steps):
    learner = built(job, env_id)
    learner.fit(env_steps=job["warmup"])
    (writer,) = find_pipes(learner, ReplayWriter)
    fill(writer.memory)
    learner.fit(env_steps=steps - job["warmup"])
    return learner.agent.predict, learner.batches_seen
