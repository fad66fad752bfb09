"""d3rlpy's IQL from rows that are there: `update` with batches of its own replay, without its loggers. It imports nothing of fastrl_pipes."""

from __future__ import annotations

from importlib.metadata import version

import d3rlpy as library
import torch


def learn(job, data, tick):
    torch.set_num_threads(job["threads"])
    library.seed(job["seed"])
    dataset = library.dataset.MDPDataset(data["state"], data["action"], data["reward"], data["terminated"], timeouts=data["truncated"] * (1 - data["terminated"]))
    encoder = library.models.encoders.VectorEncoderFactory(list(job["hidden"]))
    config = library.algos.IQLConfig(actor_learning_rate=job["lr"], critic_learning_rate=job["lr"], actor_encoder_factory=encoder, critic_encoder_factory=encoder, value_encoder_factory=encoder, batch_size=job["bs"],
                                     gamma=job["discount"], tau=job["tau"], n_critics=2, expectile=job["expectile"], weight_temp=job["temperature"], max_weight=job["max_weight"])
    algo = config.create(device=False)
    algo.build_with_dataset(dataset)
    for _ in range(job["total"]):
        tick()
        algo.update(dataset.sample_transition_batch(job["bs"]))
    return job["total"]


def about():
    return f"d3rlpy {version('d3rlpy')}, torch {torch.__version__}"
