"""skrl's replay: a row per environment, so 64 rows are those of 64 environments; uniform batches, no prioritised ones. It imports nothing of fastrl_pipes."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from skrl.memories.torch import RandomMemory

sys.path.insert(0, str(Path(__file__).parent))
from replay_rate import ACTION, BS, MANY, STATE, columns, rates  # noqa: E402

SIZES = {"state": STATE, "action": ACTION, "next_state": STATE, "reward": 1, "terminated": 1}


def adding(rows, size):
    memory, c = RandomMemory(memory_size=size, num_envs=rows, device="cpu"), {k: torch.from_numpy(v) for k, v in columns(rows).items()}
    for name, width in SIZES.items():
        memory.create_tensor(name=name, size=width, dtype=torch.bool if name == "terminated" else torch.float32)
    c = {k: v.reshape(rows, -1) for k, v in c.items()}
    return memory, lambda: memory.add_samples(**c)


def measure(job):
    torch.set_num_threads(job["threads"])
    (memory, add), (_, many) = adding(1, job["max_sz"]), adding(MANY, job["max_sz"] // MANY)
    found = rates(job, add_one=(add, 1), add_64=(many, MANY))
    for _ in range(job["max_sz"]):
        add()
    return found | rates(job, sample_256=(lambda: memory.sample(list(SIZES), batch_size=BS), 1))


def about():
    return f"skrl {version('skrl')}, torch {torch.__version__}"
