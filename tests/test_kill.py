"""A run that is killed at a random moment, most often while it writes a checkpoint, goes on from its last checkpoint: each time that loads, nothing
older than one interval is lost, and after all the kills the run is, to the bit, the one that was never killed."""
from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from contract_table import difference
from test_resume import strip

from fastrl_pipes.agents.ddpg import ddpg
from fastrl_pipes.core import SimpleStep
from fastrl_pipes.learner.checkpoint import kept_checkpoints, read_manifest
from fastrl_pipes.learner.resume import run_state
from fastrl_pipes.pipes.core import Stage

EVERY = 12  # environment steps from one checkpoint to the next
HERE = Path(__file__).parent


class Progress(Stage):
    "Writes down, where a kill does not reach it, how far the run is"
    where: mmap.mmap | None = None

    def forward(self, item):
        if self.where is not None and isinstance(item, SimpleStep):
            self.where[:8] = struct.pack("<q", self.context.recorder.env_steps)
        return item


def made():
    learner = ddpg("Pendulum-v1", seed=1, hidden1=9, hidden2=7, bs=8, max_sz=100, warmup=20, nsteps=2, batches=40)
    progress = Progress(learner.source)
    learner.stand_on(progress)
    progress.context = learner.context
    learner.progress = progress
    return learner


def life(folder: Path, where: mmap.mmap) -> None:
    "Go on from the last checkpoint, for ever"
    learner = made()
    learner.progress.where = where
    if (folder / "manifest.json").exists():
        learner.load(folder)
    learner.fit(env_steps=10**9, checkpoint_every=EVERY, folder=folder, keep=2)


def nursery(folder: str, kills: int, seed: int) -> None:
    "Fork a life and kill it, again and again. Prints a line for each: where it was, where its checkpoint is, what had been written in part"
    torch.set_num_threads(1)
    rng, path, came = random.Random(seed), Path(folder), []
    where = mmap.mmap(-1, 8)
    made().close()  # what is imported late, is imported now
    while len(came) < kills:
        pid = os.fork()
        if pid == 0:
            os.setpgrp()
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
            life(path, where)
            os._exit(1)
        before = read_manifest(path)["env_steps"] if (path / "manifest.json").exists() else -1
        patience = time.monotonic() + 60
        while not (path / "manifest.json").exists() or (not came and read_manifest(path)["env_steps"] == before):
            time.sleep(0.01)
            if time.monotonic() > patience:
                raise RuntimeError("no first checkpoint")
        time.sleep(rng.uniform(0.02, 0.4))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "it had ended by itself"
        was, = struct.unpack("<q", where[:8])
        manifest = read_manifest(path)
        known = {name for n in ("manifest.json", *(f"manifest-{k:012d}.json" for k in kept_checkpoints(path))) for name in names(read_manifest(path, n))}
        learner = made().load(path)
        next(learner)
        learner.close()
        came.append({"was": was, "checkpoint": manifest["env_steps"], "parts": len([p for p in path.iterdir() if p.suffix != ".json" or p.name[:5] == "state"]) - len(known)})
    print(json.dumps(came))


def names(manifest):
    return [*manifest["files"].values(), *(s["name"] for listing in manifest["rows"].values() for s in listing)]


def killed(tmp_path, kills, seed):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", f"import test_kill as t\nt.nursery({str(tmp_path)!r}, {kills}, {seed})"], cwd=HERE, capture_output=True, text=True,
                          timeout=1500, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])})
    assert done.returncode == 0, done.stderr[-3000:]
    came = json.loads(done.stdout.splitlines()[-1])
    assert len(came) == kills
    for life in came:
        assert 0 <= life["was"] - life["checkpoint"] <= EVERY, life
    torch.set_num_threads(1)
    learner, straight = made().load(tmp_path), made()
    assert learner.env_steps == came[-1]["checkpoint"]
    straight.fit(env_steps=learner.env_steps + 30)
    learner.fit(env_steps=30)
    assert not (found := difference(strip(run_state(learner)), strip(run_state(straight)), "state")), found
    return came


def test_five_kills(tmp_path):
    killed(tmp_path, 5, seed=0)


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    came = killed(tmp_path, 50, seed=1)
    assert sum(life["parts"] > 0 for life in came) >= 5, "many of them came while a checkpoint was being written"
