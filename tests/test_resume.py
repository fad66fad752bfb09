"""A run that is stopped and continued by another process is the run that was never stopped, to the bit: 2n pulls against n pulls, a checkpoint, a
new process, and n pulls, at ten random n for each of the stacks in `CASES`."""
from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from contract_table import batches, difference, networks

from fastrl_pipes.agents.ddpg import ddpg
from fastrl_pipes.core import SimpleStep, copied
from fastrl_pipes.envs.debug import Echo, Goal
from fastrl_pipes.envs.doubles import CountingVector
from fastrl_pipes.envs.snapshots import Replayed, why_inexact
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.errors import CheckpointError
from fastrl_pipes.learner.checkpoint import kept_checkpoints, read_manifest, to_plain
from fastrl_pipes.learner.head import LearnerHead
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.learner.resume import global_generators, load_run, run_state
from fastrl_pipes.learner.stacks import with_collectors
from fastrl_pipes.loggers.collectors import BatchCollector
from fastrl_pipes.memory.experience_replay import ExperienceReplay
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.pipes.core import Stage
from fastrl_pipes.pipes.walk import named_modules
from fastrl_pipes.pipes.nstep import FirstLastMerger, NStepper
from fastrl_pipes.processors.dpg import CriticLossProcessor
from fastrl_pipes.processors.targets import SoftTargetUpdater

HAS_ALE = "ale_py" in sys.modules or __import__("importlib.util").util.find_spec("ale_py") is not None
HAS_MUJOCO = __import__("importlib.util").util.find_spec("mujoco") is not None


# --- stacks ----------------------------------------------------------------------------------------------------------
class Disturbed(Stage):
    "Draws from the generators that belong to nobody"

    def forward(self, item):
        if isinstance(item, SimpleStep):
            return item.replace(reward=(item.reward + random.random() + np.random.rand() + float(torch.rand(()))).astype(np.float32))
        return item


def tiny(env, n=1, **settings):
    return ddpg(env, n=n, seed=3, hidden1=9, hidden2=7, bs=16, max_sz=150, nsteps=3, warmup=40, noise_steps=100, batches=50, mode="single" if n == 1 else "sync", **settings)


def stack(env, n=1, mode="auto", max_sz=90, **env_kwargs):
    "Random agent, three-step windows and a replay"
    if env.startswith("ALE/"):
        import ale_py
        gymnasium.register_envs(ale_py)
    stepper = GymStepper(env, n=n, mode=mode, seed=5, env_kwargs=env_kwargs or None)
    pipe = FirstLastMerger(NStepper(Disturbed(with_collectors(stepper)), 3), 0.9)
    return LearnerHead(BatchCollector(ExperienceReplay(pipe, 8, max_sz)), batches=30)


CASES = {
    "Pendulum": partial(tiny, "Pendulum-v1"), "Pendulum, 4": partial(tiny, "Pendulum-v1", 4),
    "HalfCheetah": partial(tiny, "HalfCheetah-v5"), "HalfCheetah, 4": partial(tiny, "HalfCheetah-v5", 4, batch_norm=True),
    "FrozenLake": partial(stack, "FrozenLake-v1"), "FrozenLake, 4": partial(stack, "FrozenLake-v1", 4),
    "CartPole": partial(stack, "CartPole-v1"), "CartPole, 4": partial(stack, "CartPole-v1", 4, "sync"), "CartPole, 4 at once": partial(stack, "CartPole-v1", 4, "native"),
    "ALE": partial(stack, "ALE/Breakout-v5", obs_type="ram"), "ALE, 4": partial(stack, "ALE/Breakout-v5", 4, "sync", obs_type="ram"),
    "Goal, 4 in 2 processes": partial(stack, "fastrl/Goal-v0", 4, "workers"),
}


def possible(name):
    return (HAS_ALE or not name.startswith("ALE")) and (HAS_MUJOCO or not name.startswith("HalfCheetah"))


def cuts(name):
    "Ten random n"
    return sorted(random.Random(name).sample(range(1, 130), 10))


# --- comparing -------------------------------------------------------------------------------------------------------
def parts(learner) -> dict[str, str]:
    "A sum for each network, optimizer, replay, pipe, metric and generator"
    state = run_state(learner)
    state["recorder"]["rows"] = [{k: v for k, v in row.items() if k not in ("seconds", "steps_per_second")} for row in state["recorder"]["rows"]]
    return {f"{kind} {name}": digest(value) for kind, inside in state.items() for name, value in inside.items()}


def digest(value) -> str:
    tensors: dict = {}
    h = hashlib.sha256(json.dumps(to_plain(value, tensors)).encode())
    for key, t in tensors.items():
        h.update(key.encode() + t.numpy().tobytes())
    return h.hexdigest()[:16]


def pull(learner, n):
    for _ in range(n):
        next(learner)


def child(folder: str, name: str) -> None:
    "In another process: load each checkpoint, go on, print what became of it"
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    found = []
    for n in cuts(name):
        learner = CASES[name]()
        learner.load(Path(folder) / str(n))
        pull(learner, n)
        found.append(parts(learner))
        learner.close()
    print(json.dumps(found))


def in_a_new_process(code: str, **kwargs) -> subprocess.CompletedProcess:
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], cwd=here, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])}, **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("name", CASES)
def test_stopped_and_continued_it_is_the_run_that_was_never_stopped(name, tmp_path):
    if not possible(name):
        pytest.skip("its simulator is not installed")
    learner, at, straight, ends = CASES[name](), 0, {}, {2 * n for n in cuts(name)}
    for stop in sorted({*cuts(name), *ends}):
        pull(learner, stop - at)
        at = stop
        if stop in ends:
            straight[stop] = parts(learner)
        if stop in cuts(name):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                learner.save(tmp_path / str(stop))
    learner.close()
    code = f"import test_resume as t\nif __name__ == '__main__': t.child({str(tmp_path)!r}, {name!r})"
    found = json.loads(in_a_new_process(code).stdout.splitlines()[-1])
    assert len(found) == len(cuts(name)) == 10
    for n, continued in zip(cuts(name), found):
        manifest = read_manifest(tmp_path / str(n))
        assert manifest["environments"] == "exact" and manifest["because"] == ""
        assert continued.keys() == straight[2 * n].keys()
        differ = [part for part in continued if continued[part] != straight[2 * n][part]]
        assert not differ, f"n = {n}: {differ}"


def test_the_cuts_are_in_the_middle_of_things():
    "Otherwise the test above would say little"
    learner = CASES["FrozenLake"]()
    seen = set()
    for _ in range(130):
        next(learner)
        own = run_state(learner)["pipes"]
        seen.add((bool(own["GymStepper"]["ended"]), int(own["NStepper"]["held"][0])))
    assert {(False, 3), (False, 5), (True, 0)} <= seen, "windows that are full, and ends of episodes"


# --- in the same process ---------------------------------------------------------------------------------------------
def same(a, b, what=""):
    assert not (found := difference(a, b, "state")), f"{what} {found}"


class Remembering(gymnasium.Wrapper):
    "Keeps something that nobody knows"

    def __init__(self, env):
        super().__init__(env)
        self.secret = object()


@pytest.mark.parametrize(("make", "because"), [(lambda: GymStepper(lambda: Remembering(Echo()), seed=1), "Remembering.secret is a builtins.object"),
                                               (lambda: GymStepper("CartPole-v1", n=2, mode="async", seed=1), "AsyncVectorEnv")])
def test_where_the_environments_cannot_be_kept_the_run_says_so(make, because, tmp_path):
    learner, other = (LearnerHead(BatchCollector(ExperienceReplay(make(), 4, 50)), batches=5) for _ in range(2))
    pull(learner, 7)
    with pytest.warns(UserWarning, match=f"begin new episodes.*{because}") as said:
        learner.save(tmp_path)
    assert len(said) == 1 and (read_manifest(tmp_path)["environments"], because in read_manifest(tmp_path)["because"]) == ("boundary", True)
    with pytest.warns(UserWarning, match=because):
        other.load(tmp_path)
    memory, twin = (next(m for m in named_modules(x).values() if isinstance(m, ReplayMemory)) for x in (learner, other))
    same(twin.state_dict(), memory.state_dict())
    assert (next(other).reward == next(learner).reward).all() and other.env_steps == learner.env_steps
    for x in (learner, other):
        x.close()


def test_an_environment_of_plain_attributes_in_a_script_of_ones_own_is_exact():
    class Mine(Goal):
        def step(self, action):
            self.last = [np.array(action), {"t": self.t}]
            return super().step(action)
    assert why_inexact(Mine()) == "" and why_inexact(Replayed(Remembering(Echo()))) == ""


def test_a_state_from_this_process_is_taken_to_several_and_back():
    "Rows in one process, in two, and in one again: the state is the same kind"
    steppers = [GymStepper("fastrl/Goal-v0", n=4, mode=mode, seed=2) for mode in ("sync", "workers", "sync")]
    pull(steppers[0], 33)
    for a, b in zip(steppers, steppers[1:]):
        b.start()
        b.set_own(copied(a.get_own()))
        steps = [[copied(next(x)) for _ in range(30)] for x in (a, b)]
        same(*steps)
    for s in steppers:
        s.close()


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
def test_a_vector_environment_in_each_autoreset_mode(mode):
    from gymnasium.vector import AutoresetMode
    for cut in range(12):
        a, b = (GymStepper(CountingVector(3, AutoresetMode[mode.upper()]), seed=0) for _ in range(2))
        a.start()
        pull(a, cut)
        b.start()
        b.set_own(copied(a.get_own()))
        same(*[[copied(next(x)) for _ in range(15)] for x in (a, b)])


def test_a_run_is_built_again_from_its_folder(tmp_path):
    learner = tiny("Pendulum-v1", 2)
    pull(learner, 30)
    learner.save(tmp_path)
    assert read_manifest(tmp_path)["run"]["settings"]["hidden1"] == 9
    code = f"import test_resume as t\nt.torch.set_num_threads(1)\nx = t.load_run({str(tmp_path)!r})\nt.pull(x, 30)\nprint(t.json.dumps(t.parts(x)))"
    pull(learner, 30)
    assert json.loads(in_a_new_process(code).stdout.splitlines()[-1]) == parts(learner)


def test_what_no_registered_builder_made_cannot_be_built_again(tmp_path):
    learner = stack("CartPole-v1")
    learner.save(tmp_path)
    with pytest.raises(CheckpointError, match="load_run.*load\\(folder\\)"):
        load_run(tmp_path)


# --- in the course of a fit ------------------------------------------------------------------------------------------
def test_checkpoints_are_written_where_they_are_due_and_the_latest_stay(tmp_path):
    learner, twin = tiny("Pendulum-v1"), tiny("Pendulum-v1")
    learner.fit(env_steps=130, checkpoint_every=25, folder=tmp_path, keep=3)
    twin.fit(env_steps=130)
    assert kept_checkpoints(tmp_path) == [100, 125, 130], "25 is in the warm-up, where a pull does not return"
    same(strip(run_state(learner)), strip(run_state(twin)), "writing them changed the run:")
    for cut in (100, 125):
        other = tiny("Pendulum-v1").load(tmp_path, cut)
        assert other.env_steps == cut
        other.fit(env_steps=130 - cut)
        same(strip(run_state(other)), strip(run_state(learner)), f"from {cut}:")
    assert len({p.name.split("-")[1] for p in tmp_path.glob("state-*")}) == 3, "what no checkpoint needs is gone"


def test_a_checkpoint_in_the_warm_up(tmp_path):
    learner = tiny("Pendulum-v1")
    learner.fit(env_steps=60, checkpoint_every=10, folder=tmp_path, keep=20)
    assert kept_checkpoints(tmp_path) == [10, 20, 30, 40, 50, 60]
    other = tiny("Pendulum-v1").load(tmp_path, 20)
    assert other.recorder.batch == 0
    other.fit(env_steps=40)
    same(strip(run_state(other)), strip(run_state(learner)))


def test_an_epoch_that_was_begun_is_finished(tmp_path):
    learner, twin = tiny("Pendulum-v1"), tiny("Pendulum-v1")
    learner.fit(epochs=3, checkpoint_every=130, folder=tmp_path, keep=9)
    other = twin.load(tmp_path, 130)
    assert 0 < other.batches_seen % 50 and len(other.recorder.rows) == 1
    other.fit(epochs=2)
    same(strip(run_state(other)), strip(run_state(learner)))


def test_the_best_checkpoint_stays(tmp_path):
    learner = tiny("Pendulum-v1")
    learner.fit(env_steps=240, checkpoint_every=60, folder=tmp_path, keep=1, best_episodes=2)
    best = read_manifest(tmp_path, "manifest-best.json")
    assert kept_checkpoints(tmp_path) == ["best"] and best["env_steps"] in (60, 120, 180, 240)
    other = tiny("Pendulum-v1").load(tmp_path, "best")
    assert float(other.validate(episodes=2, seed=30_000)["mean"]) == best["validation"]
    other.fit(env_steps=60, checkpoint_every=60, folder=tmp_path, best_episodes=2)
    assert read_manifest(tmp_path, "manifest-best.json")["validation"] >= best["validation"]


def test_offline_learning_counts_batches(tmp_path):
    def made():
        p = networks()
        pipe = BasicOptStepper(CriticLossProcessor(batches(24), p.critic, p.t_actor, p.t_critic), p.critic, 1e-2)
        return LearnerHead(BatchCollector(SoftTargetUpdater(pipe, p.critic, tau=0.1, target_model=p.t_critic)), batches=6)
    learner, other = made(), made()
    learner.fit(epochs=3, checkpoint_every=4, folder=tmp_path)
    other.load(tmp_path)
    assert other.batches_seen == 18
    for x in (learner, other):
        x.fit(epochs=1)
    same(strip(run_state(other)), strip(run_state(learner)))


def test_only_new_rows_are_written(tmp_path):
    learner = stack("CartPole-v1", max_sz=500)
    written = []
    for _ in range(4):
        pull(learner, 60)
        learner.save(tmp_path)
        written.append({p.name for p in tmp_path.glob("rows-*")})
    assert [len(w) for w in written] == [1, 2, 3, 4] and all(a < b for a, b in zip(written, written[1:]))
    other = stack("CartPole-v1", max_sz=500).load(tmp_path)
    same(strip(run_state(other)), strip(run_state(learner)))
    pull(other, 400)
    other.save(tmp_path)
    assert not written[0] & {p.name for p in tmp_path.glob("rows-*")}, "rows that were overwritten are listed no more"


def test_a_mapped_replay_is_kept_as_it_was_at_the_checkpoint(tmp_path):
    "The ring in its file goes on being written; the checkpoint does not point into it"
    def made(i):
        memory = ReplayMemory(50, path=tmp_path / f"ring-{i}.bin")
        return LearnerHead(BatchCollector(ExperienceReplay(GymStepper("CartPole-v1", seed=1), 8, memory=memory)), batches=5)
    learner, other = made(0), made(1)
    pull(learner, 70)
    learner.save(tmp_path / "c")
    before = copied(strip(run_state(learner)))
    pull(learner, 45)
    other.load(tmp_path / "c")
    same(strip(run_state(other)), before)


def strip(state):
    "Without clocks"
    recorder = {**state["recorder"], "rows": [{k: v for k, v in row.items() if k not in ("seconds", "steps_per_second")} for row in state["recorder"]["rows"]]}
    return {**state, "recorder": recorder, "generators": None}


def test_the_generators_that_belong_to_nobody_come_back(tmp_path):
    learner = stack("FrozenLake-v1")
    pull(learner, 10)
    learner.save(tmp_path)
    drawn = [float(torch.rand(())), np.random.rand(), random.random()]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    learner.load(tmp_path)
    assert [float(torch.rand(())), np.random.rand(), random.random()] == drawn
    assert global_generators()["device"] is None
