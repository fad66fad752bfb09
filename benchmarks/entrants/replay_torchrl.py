"""TorchRL's replays, uniform and prioritised, over preallocated storage. It imports nothing of fastrl_pipes."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer, TensorDictReplayBuffer

sys.path.insert(0, str(Path(__file__).parent))
from replay_rate import BS, MANY, columns, errors, rates  # noqa: E402


def batch(rows):
    c = {k: torch.from_numpy(v) for k, v in columns(rows).items()}
    return TensorDict({"observation": c["state"], "action": c["action"], "next": {"observation": c["next_state"], "reward": c["reward"][:, None], "terminated": c["terminated"][:, None]}}, [rows])


def measure(job):
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    size, error = job["max_sz"], torch.from_numpy(errors(job["max_sz"]))
    full, one, many = batch(size), batch(1), batch(MANY)
    plain = TensorDictReplayBuffer(storage=LazyTensorStorage(size), batch_size=BS)
    plain.extend(full)
    found = rates(job, add_one=(lambda: plain.extend(one), 1), add_64=(lambda: plain.extend(many), MANY), sample_256=(plain.sample, 1))
    try:
        ranked = TensorDictPrioritizedReplayBuffer(alpha=0.6, beta=0.4, storage=LazyTensorStorage(size), batch_size=BS, priority_key="td_error")
    except RuntimeError as e:  # its extension is not there for every version of torch
        print(f"torchrl has no prioritised replay here: {e}", file=sys.stderr)
        return found
    full["td_error"] = error
    ranked.extend(full)

    def prioritised():
        drawn = ranked.sample()
        drawn["td_error"] = error[drawn["index"].reshape(-1)]
        ranked.update_tensordict_priority(drawn)
    return found | rates(job, prioritised_sample_and_update=(prioritised, 1))


def about():
    return f"torchrl {version('torchrl')}, torch {torch.__version__}"
