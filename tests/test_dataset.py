"""Offline data: what is recorded is what is read, in every format and of every space; batches of it, alone and beside online ones; the same run to
the bit after a checkpoint, and a refusal where the data is other data; what a kill leaves; and what is said where there is no data."""
from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import time
import warnings
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from contract_table import batches as learning_batches
from contract_table import difference
from gymnasium import spaces

minari = pytest.importorskip("minari")
from minari.data_collector import EpisodeBuffer  # noqa: E402

import fastrl_pipes.memory.dataset_files as reading  # noqa: E402
import fastrl_pipes.memory.growing as growing_dataset  # noqa: E402
import fastrl_pipes.memory.linked_parts as linked_parts  # noqa: E402
from fastrl_pipes.agents.core import ActionClip, ActionScaler, AgentHead, SimpleModelRunner  # noqa: E402
from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner  # noqa: E402
from fastrl_pipes.core import SimpleStep, copied, leaves, map_leaves  # noqa: E402
from fastrl_pipes.envs.debug import Goal, WideBox  # noqa: E402
from fastrl_pipes.envs.doubles import Counting, CountingVector, Nested  # noqa: E402
from fastrl_pipes.envs.spaces import action_map  # noqa: E402
from fastrl_pipes.envs.stepper import GymStepper  # noqa: E402
from fastrl_pipes.errors import CheckpointError  # noqa: E402
from fastrl_pipes.learner.dataset_envs import dataset_stepper, spec_of  # noqa: E402
from fastrl_pipes.learner.dataset_writer import DatasetWriter  # noqa: E402
from fastrl_pipes.learner.flatten import flatten  # noqa: E402
from fastrl_pipes.learner.head import LearnerHead  # noqa: E402
from fastrl_pipes.learner.optimizers import BasicOptStepper  # noqa: E402
from fastrl_pipes.memory.dataset import DatasetSteps, Episodes, memory_from_dataset, policy_units  # noqa: E402
from fastrl_pipes.memory.dataset_files import open_dataset  # noqa: E402
from fastrl_pipes.memory.experience_replay import ExperienceReplay, ReplayWriter  # noqa: E402
from fastrl_pipes.memory.replay_memory import ReplayMemory  # noqa: E402
from fastrl_pipes.memory.growing import FORMATS, GrowingDataset  # noqa: E402
from fastrl_pipes.memory.offline import MixedReplay, OfflineReplay  # noqa: E402
from fastrl_pipes.memory.scores import normalized_score  # noqa: E402
from fastrl_pipes.networks.actor_critic import Actor, Critic  # noqa: E402
from fastrl_pipes.networks.targets import target_of  # noqa: E402
from fastrl_pipes.pipes.control import Inlet  # noqa: E402
from fastrl_pipes.pipes.context import Context  # noqa: E402
from fastrl_pipes.pipes.core import Stage  # noqa: E402
from fastrl_pipes.pipes.walk import bind, named_modules, snapshot, traverse  # noqa: E402
from fastrl_pipes.pipes.graph import find_pipe  # noqa: E402
from fastrl_pipes.pipes.nstep import FirstLastMerger, NSkipper, NStepper  # noqa: E402
from fastrl_pipes.processors.dpg import ActorLossProcessor, CriticLossProcessor  # noqa: E402
from fastrl_pipes.processors.targets import SoftTargetUpdater  # noqa: E402

GOAL = partial(Goal, length=10)  # observation [2], action [1], truncated after ten steps
FIELDS = ("state", "action", "next_state", "reward", "terminated", "truncated", "total_reward", "step_n", "raw_action")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    "Data sets live in a folder of the test's own, and nobody's home is touched"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a power cut is not tested, and waiting for the disk takes most of the time
    yield tmp_path / "datasets"
    assert not (tmp_path / "home").exists()


# --- making data -----------------------------------------------------------------------------------------------------
def sampled(space, rows, rng):
    "A nest of [rows, ...] inside of a space"
    if isinstance(space, spaces.Dict):
        return {k: sampled(s, rows, rng) for k, s in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(sampled(s, rows, rng) for s in space)
    if isinstance(space, spaces.Box):
        low, high = np.where(np.isfinite(space.low), space.low, -5), np.where(np.isfinite(space.high), space.high, 5)
        return rng.uniform(low, high, (rows, *space.shape)).astype(space.dtype)
    if isinstance(space, spaces.MultiBinary):
        return rng.integers(0, 2, (rows, *space.shape)).astype(np.int8)
    n, start = getattr(space, "nvec", getattr(space, "n", None)), np.asarray(getattr(space, "start", 0))
    return (rng.integers(0, n, (rows, *space.shape)) + start).astype(space.dtype)


def buffers(observation_space, action_space, lengths, seed=0, width=None, ends=("terminated", "truncated", "neither")):
    rng, made = np.random.default_rng(seed), []
    for i, t in enumerate(lengths):
        over, end = np.arange(1, t + 1) == t, ends[i % len(ends)]
        made.append(EpisodeBuffer(observations=sampled(observation_space, t + 1, rng), actions=sampled(action_space, t, rng),
                                  rewards=rng.standard_normal(t if width is None else (t, width)).astype(np.float32),
                                  terminations=over & (end == "terminated"), truncations=over & (end == "truncated")))
    return made


def data_of(name="some/data-v0", observation_space=spaces.Box(-1, 1, (3,)), action_space=spaces.Box(-2, 2, (2,)), lengths=(4, 1, 6, 5), form="hdf5", about=None, **more):
    growing = GrowingDataset(name, observation_space, action_space, None, form, about)
    growing.add(buffers(observation_space, action_space, lengths, **more))
    return open_dataset(name)


def recorded(name="goal/random-v0", steps=200, env=GOAL, n=1, seed=0, **more):
    "Steps of a running stack, and the data set that was written from it"
    writer = DatasetWriter(GymStepper(env, n=n, mode="sync" if n > 1 else "auto", seed=seed), name, **more)
    came = [copied(next(writer)) for _ in range(steps)]
    writer.close()
    return came, open_dataset(writer.folder)


def by_environment(steps):
    "Episodes of steps, in the order of their ends, as the writer has them"
    open_rows, done = {}, []
    for step in steps:
        for row, env in enumerate(step.env_id[:, 0].tolist()):
            one = step.map(lambda a: a[row:row + 1])
            open_rows.setdefault(env, []).append(one)
            if one.terminated[0, 0] or one.truncated[0, 0]:
                done.append(open_rows.pop(env))
    return done + [open_rows[env] for env in sorted(open_rows)]


def one_field(steps, field):
    values = [getattr(s, field) for s in steps]
    return [np.concatenate(v) for v in zip(*([a for _, a in leaves({field: x})] for x in values))]


# --- reading ---------------------------------------------------------------------------------------------------------
NESTED = spaces.Dict(z=spaces.Box(-1, 1, (3,), np.float64), a=spaces.Discrete(5, start=2), t=spaces.Tuple((spaces.MultiBinary(3), spaces.Box(0, 255, (33, 34, 3), np.uint8))),
                     m=spaces.MultiDiscrete([3, 4]))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (3,)), spaces.Box(-np.inf, np.inf, (), np.float64), spaces.Discrete(4), NESTED, spaces.Tuple((NESTED, spaces.Box(-1, 1, (2, 2))))],
                         ids=["box", "number", "discrete", "dict", "tuple"])
def test_reads_observations_of_every_space(form, space):
    "Also images: what Minari makes of them by default, JPEG, would not be what came in"
    data, box = data_of(observation_space=space, form=form), spaces.Box(-2, 2, (2,))
    for i, (step, e) in enumerate(zip(Episodes(data), buffers(space, box, (4, 1, 6, 5)))):
        assert len(step.reward) == len(e.rewards) and (step.episode_n == i).all() and step.step_n[:, 0].tolist() == list(range(1, len(e.rewards) + 1))
        for field, rows in (("state", slice(0, -1)), ("next_state", slice(1, None))):
            assert not difference(dict(sorted(leaves(getattr(step, field)))), dict(sorted(leaves(map_leaves(lambda a: a[rows], e.observations)))))
        assert not difference(step.reward[:, 0], e.rewards) and not difference(step.total_reward[:, 0], np.cumsum(e.rewards, dtype=np.float64))
        assert not difference(step.terminated[:, 0], e.terminations)
    memory = memory_from_dataset(data)
    assert memory.size == 16 and {path.split(".")[0] for path, *_ in memory.layout.columns} == {"state", "next_state", "action", "reward", "terminated", "truncated"}
    batch = memory.gather(torch.arange(16))
    kept, step = dict(leaves(batch.state)), Episodes(data)[0]
    for path, a in leaves(step.state):
        assert not difference(kept.pop(path)[:4].numpy(), a.astype(np.float32) if a.dtype.kind == "f" else a)
    assert not kept
    assert all(a.dtype == torch.float32 for _, a in leaves(batch) if a.is_floating_point())


ACTIONS = {"box": spaces.Box(np.float32([-3, 100]), np.float32([11, 101])), "matrix": spaces.Box(-0.3, 0.7, (2, 3), np.float64), "unbounded": spaces.Box(np.float32([-np.inf, -2]), np.float32([1, 2])),
           "whole box": spaces.Box(-3, 12, (2,), np.int32), "discrete": spaces.Discrete(4, start=-1), "multidiscrete": spaces.MultiDiscrete([3, 4]), "multibinary": spaces.MultiBinary(3),
           "several boxes": spaces.Tuple((spaces.Box(-1, 3, (2,)), spaces.Dict(a=spaces.Box(0, 1, (1,)), b=spaces.Box(-2, 2, (1, 2), np.float64))))}


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("form", ["hdf5", "arrow"])
def test_actions_come_in_policy_units(name, form):
    "As the maps of `envs.spaces` have them, and back in the environment's units what they were"
    space = ACTIONS[name]
    data = data_of(action_space=space, lengths=(40, 3), form=form)
    for step, e in zip(Episodes(data), buffers(spaces.Box(-1, 1, (3,)), space, (40, 3))):
        assert not difference(step.raw_action, e.actions)
        expected = action_map(space).to_policy(e.actions)
        assert step.action.shape == expected.shape and np.allclose(step.action, expected, rtol=0, atol=2e-6)
        assert step.action.dtype == (np.float32 if expected.dtype.kind == "f" else expected.dtype)
        for back, was in zip(*([a for _, a in leaves([x])] for x in (action_map(space).to_env(step.action), e.actions))):
            assert back.dtype == was.dtype and np.allclose(back, was, rtol=2e-7, atol=1e-6)


def test_actions_at_the_bounds_and_beyond():
    box = spaces.Box(np.float32([-3, 0.1]), np.float32([11, 0.7]))
    at = np.stack([box.low, box.high, np.nextafter(box.high, np.inf), np.nextafter(box.low, -np.inf)])
    action, far = policy_units(box, at)
    assert action.dtype == np.float32 and action.tolist() == [[-1, -1], [1, 1], [1, 1], [-1, -1]] and far < 1e-6
    assert policy_units(spaces.Box(np.float32([1, -1]), np.float32([1, 1])), np.float32([[1, 0.5]]))[0].tolist() == [[0, 0.5]], "equal bounds"
    growing = GrowingDataset("some/far-v0", spaces.Box(-1, 1, (1,)), box)
    growing.add([EpisodeBuffer(observations=np.zeros((3, 1), np.float32), actions=np.float32([[25, 0.4], [0, 0.4]]), rewards=[0, 0], terminations=[False, True], truncations=[False, False])])
    with pytest.warns(UserWarning, match="some/far-v0.*outside of Box.*farthest by 2 in policy units"):
        memory = memory_from_dataset("some/far-v0")
    assert memory.gather(torch.tensor([0])).action.tolist()[0][0] == 1


def test_an_episode_that_ends_by_neither_flag_is_truncated():
    steps = list(Episodes(data_of(lengths=(3, 3, 3, 1))))
    assert [(bool(s.terminated[-1, 0]), bool(s.truncated[-1, 0])) for s in steps] == [(True, False), (False, True), (False, True), (True, False)]
    assert not any(s.truncated[:-1].any() or s.terminated[:-1].any() for s in steps)


def test_vector_rewards():
    data = data_of(width=3)
    step = Episodes(data)[0]
    assert step.reward.shape == (4, 3) and step.total_reward is None
    memory = memory_from_dataset(data, nsteps=2, discount=0.5)
    batch = next(OfflineReplay(memory, 8))
    assert batch.reward.shape == (8, 3) and batch.discount.shape == (8, 1)
    expected = buffers(spaces.Box(-1, 1, (3,)), spaces.Box(-2, 2, (2,)), (4,), width=3)[0].rewards
    assert np.allclose(memory.gather(torch.tensor([0])).reward[0], expected[0] + 0.5 * expected[1])


def test_parts_of_a_data_set():
    data = data_of(lengths=(4, 1, 6, 5))
    some = data.filter_episodes(lambda e: len(e) > 4)
    assert memory_from_dataset(some).size == 11 and len(Episodes(some)) == 2 and Episodes(some)[1].episode_n[0, 0] == 1
    assert Episodes(some).sha256 != Episodes(data).sha256


def test_float_storage_and_room():
    data = data_of(observation_space=spaces.Box(-1, 1, (3,), np.float64))
    memory = memory_from_dataset(data, max_sz=50, float_dtype="float64")
    assert memory.max_sz == 50 and memory.size == 16 and memory.gather(torch.tensor([0])).state.dtype is torch.float64
    assert not difference(memory.gather(torch.arange(4)).state.numpy(), Episodes(data)[0].state)


def broken(change):
    "One episode with something wrong"
    e = buffers(spaces.Box(-1, 1, (3,)), spaces.Box(-2, 2, (2,)), (5,))[0]
    growing = GrowingDataset("some/broken-v0", spaces.Box(-1, 1, (3,)), spaces.Box(-2, 2, (2,)))
    growing.add([e])
    import h5py
    with h5py.File(growing.data / "main_data.hdf5", "r+") as f:
        change(f["episode_0"])
    return "some/broken-v0"


def replaced(key, value):
    def change(group):
        was = group[key][:]
        del group[key]
        group[key] = value(was)
    return change


def with_value(key, row, value):
    def put(a):
        a[row] = value
        return a
    return replaced(key, put)


@pytest.mark.parametrize("change, words", [
    (replaced("observations", lambda a: a[:-1]), r"episode 0: field 'observations' is float32 \[5, 3\], expected float32 \[6, 3\]; an episode of T steps has T \+ 1"),
    (replaced("observations", lambda a: a[:, :2]), r"'observations' is float32 \[6, 2\], expected float32 \[6, 3\]"),
    (replaced("actions", lambda a: a[:-1]), r"'actions' is float32 \[4, 2\], expected float32 \[5, 2\]"),
    (with_value("observations", 2, np.nan), r"episode 0: field 'observations' has NaN or infinity in row 2"),
    (with_value("rewards", 3, np.inf), r"'rewards' has NaN or infinity in row 3"),
    (replaced("rewards", lambda a: a[:-1]), r"'rewards' has 4 steps, expected 5, as its metadata says")])
def test_broken_episodes_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        memory_from_dataset(broken(change))


def test_a_long_episode_is_not_cut_silently():
    "Minari hands out the first piece of an Arrow file alone"
    box, T = spaces.Box(-1, 1, (1,)), 140_000
    column = np.zeros((T + 1, 1), np.float32)
    e = EpisodeBuffer(observations=column, actions=column[1:], rewards=column[1:, 0], terminations=np.zeros(T, bool), truncations=np.zeros(T, bool))
    for form in ("hdf5", "arrow"):
        growing = GrowingDataset(f"long/{form}-v0", box, box, None, form)
        growing.add([e])
    assert memory_from_dataset("long/hdf5-v0").size == T
    with pytest.raises(ValueError, match=r"field 'rewards' has \d+ steps, expected 140000"):
        memory_from_dataset("long/arrow-v0")


def test_refuses_what_it_cannot_keep():
    for kind, space in (("observation_space", spaces.Text(5)), ("action_space", spaces.Tuple((spaces.Box(-1, 1, (1,)), spaces.Discrete(3))))):
        some = {"observation_space": spaces.Box(-1, 1, (1,)), "action_space": spaces.Box(-1, 1, (1,)), kind: space}
        e = EpisodeBuffer(observations=["ab", "c"] if kind == "observation_space" else np.zeros((2, 1), np.float32), actions=np.zeros((1, 1), np.float32) if kind != "action_space" else (np.zeros((1, 1), np.float32), np.zeros(1, int)),
                          rewards=[0.0], terminations=[True], truncations=[False])
        GrowingDataset(f"some/{kind}-v0", **some).add([e])
        with pytest.raises(TypeError, match=f"{kind}.*is "):
            Episodes(f"some/{kind}-v0")
    with pytest.raises(ValueError, match=r"max_sz.* is 15, expected a whole number in \[16"):
        memory_from_dataset(data_of(), max_sz=15)
    with pytest.raises(TypeError, match="dataset.*is 5.*expected a MinariDataset"):
        open_dataset(5)
    with pytest.raises(LookupError, match="episode.*is 4.*one of 4"):
        Episodes("some/data-v0")[4]


# --- finding ---------------------------------------------------------------------------------------------------------
def test_by_identifier_by_path_and_as_it_is(home, tmp_path):
    data = data_of("a/b/c-v3")
    for where in ("a/b/c-v3", home / "a/b/c-v3", str(home / "a/b/c-v3/data"), data):
        assert open_dataset(where).id == "a/b/c-v3"
    here = data_of(tmp_path / "elsewhere")
    assert here.id == "elsewhere-v0" and open_dataset(tmp_path / "elsewhere").total_steps == 16
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    assert Episodes(tmp_path / "moved").sha256 == Episodes("a/b/c-v3").sha256, "the contents are what counts"


def test_a_missing_data_set_is_explained(home):
    data_of("pendulum/sac-v0")
    with pytest.raises(LookupError) as e:
        open_dataset("pendulum/sac-v1")
    text = str(e.value)
    assert all(word in text for word in (str(home / "pendulum/sac-v1"), "['pendulum/sac-v0']", "did you mean 'pendulum/sac-v0'?", "DatasetWriter", "download=True", "MINARI_DATASETS_PATH"))
    with pytest.raises(LookupError, match="/nowhere/at/all holds no data set"):
        OfflineReplay("/nowhere/at/all")


@pytest.mark.parametrize("how", ["refused", "no answer"])
def test_without_a_network_it_says_so_at_once(home, monkeypatch, how):
    def connect(address, timeout=None):
        if how == "refused":
            raise socket.gaierror(-2, "Name or service not known")
        time.sleep(2)
        raise TimeoutError
    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(reading, "PATIENCE", 0.3)
    start = time.perf_counter()
    with pytest.raises(LookupError) as e:
        open_dataset("D4RL/pen/human-v2", download=True)
    assert time.perf_counter() - start < 1.5
    reason = "Name or service not known" if how == "refused" else "did not answer within 0.3 seconds"
    assert all(word in str(e.value) for word in ("D4RL/pen/human-v2", str(home / "D4RL/pen/human-v2"), "hf://farama-minari", "huggingface.co", reason, "DatasetWriter"))


def test_what_the_download_raises_is_said(monkeypatch):
    monkeypatch.setattr(reading, "_unreachable", lambda host: "")
    monkeypatch.setattr(minari, "download_dataset", lambda name: (_ for _ in ()).throw(RuntimeError("no such data set there")))
    with pytest.raises(LookupError, match="some/x-v0.*could not be fetched.*RuntimeError: no such data set there"):
        open_dataset("some/x-v0", download=True)


def test_a_download_is_used(monkeypatch):
    monkeypatch.setattr(reading, "_unreachable", lambda host: "")
    monkeypatch.setattr(minari, "download_dataset", lambda name: data_of(name))
    assert open_dataset("some/x-v0", download=True).total_steps == 16


def test_without_minari_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "minari", None)
    with pytest.raises(ValueError, match=r"needs Minari, which is not installed.*fastrl_pipes\[offline\]"):
        open_dataset("some/x-v0")


def test_a_damaged_data_set(home):
    data_of()
    (home / "some/data-v0/data/metadata.json").write_text("{}")
    with pytest.raises(ValueError, match="data-v0/data cannot be read"):
        open_dataset("some/data-v0")


# --- writing and reading back ----------------------------------------------------------------------------------------
ROUND = {"pendulum": ("Pendulum-v1", 1), "rows": ("Pendulum-v1", 3), "wide box": (WideBox, 2), "dict": (partial(Nested, kind="dict"), 2), "tuple": (partial(Nested, kind="tuple"), 1),
         "next-step resets": (lambda: CountingVector(3), 1), "same-step resets": (lambda: CountingVector(2, "SameStep"), 1), "discrete": ("CartPole-v1", 2)}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", ROUND)
def test_what_is_written_is_what_is_read(form, case):
    "Every transition of a running stack, to the bit; the policy's units to rounding where the box has other bounds than -1 and 1"
    env, n = ROUND[case]
    env = env() if case.endswith("resets") else env
    steps, data = recorded(f"round/{form}-v0", {"Pendulum-v1": 230, "CartPole-v1": 60}.get(env, 40), env, n, data_format=form)
    episodes, expected = list(Episodes(data)), by_environment(steps)
    assert len(episodes) == len(expected) and data.total_steps == sum(len(s.reward) for s in steps)
    for i, (step, parts) in enumerate(zip(episodes, expected)):
        whole = not parts[-1].done.any()
        for field in FIELDS:
            found, was = [a for _, a in leaves({field: getattr(step, field)})], one_field(parts, field)
            for a, b in zip(found, was, strict=True):
                if field == "truncated" and whole:
                    b[-1] = True
                if field == "action" and case == "wide box":
                    assert np.abs(a - b).max() < 1e-5  # a step of 101 in float32 is 7.6e-6
                else:
                    assert not difference(a, b), (i, field)


def test_several_boxes_of_actions():
    class Boxes(Counting):
        def __init__(self):
            super().__init__()
            self.action_space = spaces.Tuple((spaces.Box(-1, 3, (2,)), spaces.Dict(a=spaces.Box(0, 1, (1,)))))
    steps, data = recorded("boxes/x-v0", 40, Boxes)
    for step, parts in zip(Episodes(data), by_environment(steps)):
        assert not difference([a for _, a in leaves(step.raw_action)], one_field(parts, "raw_action"))
        assert np.abs(step.action - one_field(parts, "action")[0]).max() < 1e-6 and step.action.shape[1] == 3


def test_minari_reads_it_and_makes_the_environment():
    steps, data = recorded("pendulum/g-v0", 250, reference=(-1200, -150), about={"algorithm_name": "random", "author": "somebody", "description": "a test"})
    steps, data = recorded("pendulum/heavy-v0", 250, "Pendulum-v1", reference=(-1200, -150), about={"algorithm_name": "random", "author": "somebody"})
    env = data.recover_environment()
    assert env.spec.id == "Pendulum-v1" and env.observation_space == data.observation_space and env.action_space == data.action_space
    assert data.storage.metadata["algorithm_name"] == "random" and data.storage.metadata["author"] == {"somebody"} and "pendulum/heavy-v0" in minari.list_local_datasets()
    assert minari.get_normalized_score(data, -675.0) == pytest.approx(0.5) and normalized_score(-675.0, data) == pytest.approx(50)
    assert list((data.storage.data_path).iterdir()) and not list(data.storage.data_path.glob("part-*"))


@pytest.mark.parametrize("mode, envs", [("single", "Pendulum-v1"), ("sync", "Pendulum-v1"), ("native", "CartPole-v1"), ("list", ["Pendulum-v1"] * 2), ("factory", partial(gymnasium.make, "Pendulum-v1", g=9.0)),
                                        ("live", None)])
def test_the_environment_is_recovered(mode, envs):
    more = {"env_kwargs": {"g": 9.0}} if mode in ("single", "sync") else {}
    if mode == "live":
        envs = gymnasium.make("Pendulum-v1", g=9.0)
    stepper = GymStepper(envs, n=2 if mode in ("sync", "native") else 1, mode=mode if mode in ("single", "sync", "native") else "auto", seed=0, **more)
    writer = DatasetWriter(stepper, "some/env-v0")
    for _ in range(5):
        next(writer)
    writer.close()
    env = open_dataset("some/env-v0").recover_environment()
    assert env.spec.id in ("Pendulum-v1", "CartPole-v1") and ("g" not in env.spec.kwargs or env.unwrapped.g == 9.0)
    assert (env.unwrapped.g == 9.0) if mode in ("single", "sync", "factory", "live") else True
    validation = dataset_stepper("some/env-v0", seed=1)
    assert validation.observation_space == stepper.observation_space and next(validation) is not None
    stepper.close()


def test_an_environment_without_a_name_is_not_recovered():
    recorded("goal/x-v0", 20)
    assert open_dataset("goal/x-v0").env_spec is None and spec_of(GymStepper(GOAL)) is None
    with pytest.raises(ValueError, match="dataset_stepper: field 'env_spec' of 'goal/x-v0' makes no environment.*give the learner an environment to validate in"):
        dataset_stepper("goal/x-v0")
    recorded("goal/y-v0", 20, env="fastrl/Goal-v0" if "fastrl/Goal-v0" in gymnasium.registry else "Pendulum-v1")
    assert open_dataset("goal/y-v0").env_spec is not None


@pytest.mark.parametrize("unfinished, lengths", [("truncate", [10, 10, 5]), ("drop", [10, 10])])
def test_what_becomes_of_unfinished_episodes(unfinished, lengths):
    steps, data = recorded(steps=25, unfinished=unfinished)
    assert [len(e) for e in data] == lengths
    last = data[len(lengths) - 1]
    assert last.truncations[-1] and not last.terminations[-1] and not difference(last.observations[-1:], steps[sum(lengths) - 1].next_state)


def test_put_on_a_running_stack_it_waits_for_an_episode():
    stepper = GymStepper(partial(Counting, lengths=(5, 3, 8, 1)), seed=0)
    for _ in range(3):
        next(stepper)
    writer = DatasetWriter(stepper, "late/x-v0")
    for _ in range(2 + 3 + 8):
        next(writer)
    writer.close()
    assert [e.observations[:, 0].tolist() for e in open_dataset("late/x-v0")] == [[1000, 1001, 1002, 1003], list(range(2000, 2009))]


def test_environments_that_begin_anew_in_between():
    stepper = GymStepper(GOAL, n=2, mode="sync", seed=0)
    writer = DatasetWriter(stepper, "anew/x-v0")
    for _ in range(14):
        next(writer)
    writer.reset(None)
    for _ in range(10):
        next(writer)
    writer.close()
    assert [len(e) for e in open_dataset("anew/x-v0")] == [10, 10, 4, 4, 10, 10]


class Dropping(Stage):
    "Forgets a step"

    def forward(self, item):
        self.n = getattr(self, "n", 0) + 1
        return self.source.next() if self.n == 4 else item


class Noisy(Stage):
    "Changes the states, not the successors"

    def forward(self, item):
        return item.replace(state=item.state + 1)


def test_items_that_are_no_consecutive_steps_are_refused():
    def pull(writer, n=30):
        for _ in range(n):
            next(writer)
    with pytest.raises(ValueError, match=r"DatasetWriter: field 'step_n' of environment 0 is 5, expected step 4, from where step 3 ended; put the writer before"):
        pull(DatasetWriter(Dropping(GymStepper(GOAL, seed=0)), "gaps/a-v0"))
    with pytest.raises(ValueError, match="field 'state' of environment 0 at step 2 is not the successor of step 1"):
        pull(DatasetWriter(Noisy(GymStepper(GOAL, seed=0)), "gaps/b-v0"))
    with pytest.raises(ValueError, match="step_n.*put the writer before what drops"):
        pull(DatasetWriter(NSkipper(GymStepper(GOAL, seed=0), 2), "gaps/c-v0"))
    with pytest.raises(TypeError, match="is a window of 2 steps.*before NStepper"):
        pull(DatasetWriter(NStepper(GymStepper(GOAL, seed=0), 2), "gaps/d-v0"))
    with pytest.raises(ValueError, match="is a MergedStep.*before FirstLastMerger"):
        pull(DatasetWriter(FirstLastMerger(NStepper(GymStepper(GOAL, seed=0), 2)), "gaps/e-v0"))


def learner_on(pipe, seed=0, sizes=(2, 1), batches=50, **more):
    "DDPG over batches that come from `pipe`"
    torch.manual_seed(seed)
    critic, actor = Critic(*sizes, 16, 16), Actor(*sizes, 16, 16)
    t_actor, t_critic = target_of(actor), target_of(critic)
    pipe = CriticLossProcessor(pipe, critic, t_actor, t_critic)
    pipe = BasicOptStepper(pipe, critic, 1e-3, filter=True, name="critic_opt")
    pipe = ActorLossProcessor(pipe, critic, actor)
    pipe = BasicOptStepper(pipe, actor, 1e-3, filter=True, name="actor_opt")
    pipe = SoftTargetUpdater(pipe, critic, tau=0.01, target_model=t_critic, name="critic_target")
    pipe = SoftTargetUpdater(pipe, actor, tau=0.01, target_model=t_actor, name="actor_target")
    valid = more.pop("valid", None)
    return LearnerHead(pipe, batches, valid=None if valid is None else valid(AgentHead(ActionScaler(ActionClip(SimpleModelRunner(Inlet(), actor))))), **more)


def test_misplaced_writers_are_found_by_the_check():
    "Before the first environment step"
    with pytest.raises(ValueError, match="DatasetWriter: field 'item' is a SampledStep, expected a step of an environment"):
        learner_on(DatasetWriter(ExperienceReplay(GymStepper(GOAL, seed=0), 8), "bad/a-v0"))
    with pytest.raises(ValueError, match="DatasetWriter: field 'observation_space' is not known.*stand behind a GymStepper"):
        learner_on(DatasetWriter(learning_batches(), "bad/b-v0"), sizes=(3, 2))
    for wrong, words in ((dict(data_format="csv"), "data_format.*one of"), (dict(unfinished="keep"), "unfinished.*one of"), (dict(about={"autor": "x"}), "did you mean 'author'"), (dict(reference=(1, 1)), "two numbers that differ"),
                         (dict(flush_every=0), "flush_every"), (dict(dataset="no-version"), "with its version"), (dict(env="Pendulm-v1"), "Pendulum-v1"), (dict(datset="x-v0"), "did you mean 'dataset'")):
        with pytest.raises((ValueError, LookupError, TypeError), match=words):
            bind(DatasetWriter(GymStepper(GOAL), **{"dataset": "bad/c-v0", **wrong} if "datset" not in wrong else wrong))


def test_a_data_set_that_is_there_is_not_mixed_with_by_accident():
    recorded(steps=20)
    with pytest.raises(ValueError, match="'goal/random-v0', which is there already, with 2 episodes.*append=True"):
        recorded(steps=1)
    assert len(open_dataset("goal/random-v0")) == 2
    recorded(steps=30, append=True, seed=1)
    data = open_dataset("goal/random-v0")
    assert len(data) == 5 and data.total_steps == 50 and not difference(Episodes(data)[0].state, Episodes(recorded("goal/twin-v0", 20)[1])[0].state)
    with pytest.raises(ValueError, match=r"GrowingDataset: field 'observation_space' is Box.*, expected .*as in the data set that is at"):
        recorded(steps=1, env="Pendulum-v1", append=True)
    with pytest.raises(ValueError, match="data_format.*is arrow, expected hdf5"):
        recorded(steps=1, append=True, data_format="arrow")


def test_two_writers_do_not_share_a_data_set():
    first, second = (DatasetWriter(GymStepper(GOAL, seed=i), "goal/shared-v0") for i in range(2))
    next(first)
    with pytest.raises(ValueError, match="which DatasetWriter of another stack is writing"):
        next(second)
    again = first.rebuilt(*first.sources)
    assert again.folder.name == "shared-2-v0" and first.rebuilt(*first.sources).folder.name == "shared-3-v0"


def test_it_can_be_closed_twice_and_then_takes_no_more():
    writer = DatasetWriter(GymStepper(GOAL, seed=0), "goal/closed-v0")
    next(writer)
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="came after close"):
        next(writer)
    never = DatasetWriter(GymStepper(GOAL, seed=0), "goal/never-v0")
    never.start()
    never.close()
    assert not never.folder.exists(), "nothing came, nothing is written"


def test_vector_rewards_need_hdf5():
    for form in ("arrow", "parquet"):
        with pytest.raises(ValueError, match="rewards.*vectors of 2.*data_format='hdf5'"):
            data_of(f"some/{form}-v0", width=2, form=form)
    assert not GrowingDataset("some/arrow-v0", spaces.Box(-1, 1, (3,)), spaces.Box(-2, 2, (2,)), None, "arrow").exists()


def test_the_end_of_a_fit_and_the_learner_write(home):
    torch.manual_seed(0)
    actor, critic = Actor(2, 1, 8, 8), Critic(2, 1, 8, 8)
    writer = DatasetWriter(GymStepper(GOAL, DDPGAgent(actor), seed=0), "goal/fit-v0")
    learner = DDPGLearner(actor, critic, writer, [], bs=8, batches=30)
    learner.fit(1)
    assert len(open_dataset("goal/fit-v0")) == 3, "37 steps"
    learner.close()
    assert [len(e) for e in open_dataset("goal/fit-v0")] == [10, 10, 10, 7]


# --- crashes ---------------------------------------------------------------------------------------------------------
def lives_until_killed(form, how_long, folder):
    "A process that records, tells how many episodes are written, and is killed at some moment. Returns the last number"
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            writer = DatasetWriter(GymStepper(partial(Counting, lengths=(5, 3)), seed=0), folder, data_format=form, flush_every=1)
            while True:
                next(writer)
                os.write(write, f"{writer.finished}\n".encode())
        finally:
            os._exit(1)
    os.close(write)
    said = b""
    while said.count(b"\n") < 20:  # it is at work
        said += os.read(read, 4096)
    time.sleep(how_long)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while more := os.read(read, 1 << 16):
        said += more
    os.close(read)
    return int(said.splitlines()[-1])


@pytest.mark.parametrize("form", ["hdf5", "arrow"])
def test_a_kill_leaves_what_was_finished(form, tmp_path):
    kills = random.Random(form)
    for i in range(4):
        told = lives_until_killed(form, kills.uniform(0.02, 0.3), tmp_path / f"killed-{i}")
        data = open_dataset(tmp_path / f"killed-{i}")
        assert len(data) >= told > 2, "what was told is there"
        for n, e in enumerate(data):
            steps = (5, 3)[n % 2]
            assert e.observations[:, 0].tolist() == [1000 * n + t for t in range(steps + 1)] and len(e) == steps
        growing = GrowingDataset(tmp_path / f"killed-{i}", data.observation_space, data.action_space, None, form)
        growing.add(buffers(data.observation_space, data.action_space, (2,)))
        growing.join()
        again = open_dataset(tmp_path / f"killed-{i}")
        assert len(again) == len(data) + 1 and again.total_steps == data.total_steps + 2 and len(again[len(data)]) == 2
        assert all(re.fullmatch(r"main_data\.hdf5|metadata\.json|\d+", p.name) for p in growing.data.iterdir()), "and nothing half done is left"


def test_what_takes_a_place_is_on_the_disk_before(tmp_path, monkeypatch):
    "For a power cut: contents first, then the name"
    synced, placed = [], []
    for module in (growing_dataset, linked_parts):
        monkeypatch.setattr(module, "sync_file", lambda path: synced.append(Path(path)))
    for verb in ("replace", "rename"):
        def put(src, dst, real=getattr(os, verb)):
            files = [p for p in Path(src).rglob("*") if p.is_file()] if Path(src).is_dir() else [Path(src)]
            placed.append(Path(dst).name)
            assert set(files) <= set(synced), f"{dst} before its contents"
            real(src, dst)
        monkeypatch.setattr(growing_dataset.os, verb, put)
    box = spaces.Box(-1, 1, (1,))
    for form in FORMATS:
        growing = GrowingDataset(tmp_path / form, box, box, None, form)
        for seed in range(3):
            growing.add(buffers(box, box, (3, 2), seed=seed))
        growing.cut(4)
        growing.join()
    assert placed.count("metadata.json") >= 9 and placed.count("main_data.hdf5") >= 4 and "3" in placed


# --- as a stream -----------------------------------------------------------------------------------------------------
def test_a_stream_of_it_is_what_was_recorded():
    steps, data = recorded(env="Pendulum-v1", steps=450)
    stream = list(DatasetSteps(data))
    assert len(stream) == 450
    for a, b in zip(stream, steps):
        b = b.replace(truncated=b.truncated | (a.truncated & (b is steps[-1])))
        assert not difference(*(SimpleStep(*SimpleStep._values(s)) for s in (a, b)))


@pytest.mark.parametrize("nsteps", [1, 3])
def test_a_replay_of_the_stream_is_that_of_the_running_stack(nsteps):
    "n-step windows included"
    steps, data = recorded(env="Pendulum-v1", steps=400)
    memory, online = memory_from_dataset(data, nsteps=nsteps, discount=0.9), ReplayMemory(400)
    pipe = GymStepper("Pendulum-v1", seed=0)
    pipe = ReplayWriter(pipe if nsteps == 1 else FirstLastMerger(NStepper(pipe, nsteps), 0.9), online)
    while online.size < 400:
        next(pipe)
    assert online.layout == memory.layout and torch.equal(online.rows, memory.rows)
    by_hand = ReplayMemory(400)
    for _ in ReplayWriter(DatasetSteps(data) if nsteps == 1 else FirstLastMerger(NStepper(DatasetSteps(data), nsteps), 0.9), by_hand):
        pass
    assert torch.equal(by_hand.rows, memory.rows), "an ordinary stack fills it, too"


def test_a_stream_goes_on_only_with_the_same_data():
    recorded("goal/a-v0", 40)
    recorded("goal/b-v0", 40, seed=1)
    pipe = NStepper(DatasetSteps("goal/a-v0"), 2)
    for _ in range(7):
        next(pipe)
    state = snapshot(pipe)
    expected = [copied(x) for x in pipe]
    same, other = (NStepper(DatasetSteps(name), 2) for name in ("goal/a-v0", "goal/b-v0"))
    same.reset(state)
    assert not difference([copied(x) for x in same], expected)
    with pytest.raises(CheckpointError, match="'goal/b-v0'.*that of 'goal/a-v0' .*when the checkpoint was written"):
        other.reset(state)


# --- offline learning ------------------------------------------------------------------------------------------------
def validating(envs):
    return lambda agent: GymStepper(envs, agent)


def test_an_offline_learner_fits_validates_and_acts():
    _, data = recorded(env="Pendulum-v1", steps=600)
    learner = learner_on(OfflineReplay("goal/random-v0", 32, seed=1), sizes=(3, 1), valid=partial(dataset_stepper, data))
    rows = learner.fit(2)
    assert len(rows) == 2 and learner.batches_seen == 100 and learner.env_steps == 0 and learner.stepper is None
    found = learner.validate(3)
    assert found["returns"].shape == (3,) and (found["lengths"] == 200).all()
    action = learner.predict(np.float32([0.1, 0.2, 0.3]))
    inside = learner.agent.source.source.source.model(torch.tensor([[0.1, 0.2, 0.3]])).item()
    assert action.shape == (1,) and action[0] == pytest.approx(2 * inside, abs=1e-6), "in the environment's units"
    with pytest.raises(ValueError, match="env_steps.*expected epochs"):
        learner.fit(env_steps=10)


def test_what_is_wrong_is_said_before_the_first_batch():
    recorded(steps=200)
    with pytest.raises(TypeError, match="'observation_space' of the environment to validate in is"):
        learner_on(OfflineReplay("goal/random-v0", 32), valid=validating("Pendulum-v1"))
    with pytest.raises(ValueError, match=r"bs.* is 256.*max_sz=200"):
        OfflineReplay("goal/random-v0")
    with pytest.raises(ValueError, match="empty.*memory_from_dataset"):
        OfflineReplay(ReplayMemory(500))
    with pytest.raises(TypeError, match="did you mean 'data'"):
        OfflineReplay(dta="x")
    with pytest.raises(ValueError, match="action.*CriticLossProcessor|CriticLossProcessor"):
        learner_on(OfflineReplay("goal/random-v0", 32), sizes=(2, 2))
    with pytest.raises(ValueError, match="seed"):
        OfflineReplay("goal/random-v0", 32, seed=-1)


def parameters_of(learner):
    return {k: copied(m.state_dict()) for k, m in named_modules(learner).items() if isinstance(m, torch.nn.Module)}


@pytest.mark.parametrize("source", ["name", "memory", "merged"])
def test_it_resumes_to_the_bit(source, tmp_path):
    _, data = recorded(steps=200)

    def made(seed=0):
        if source == "memory":
            memory = ReplayMemory(200)
            for step in Episodes(data):
                memory.write(step)
            return learner_on(OfflineReplay(memory, 32, seed=1), seed)
        return learner_on(OfflineReplay("goal/random-v0" if source == "name" else memory_from_dataset(data, nsteps=3), 32, seed=1), seed)
    learner = made()
    learner.fit(1)
    learner.save(tmp_path / "checkpoint")
    learner.fit(2)
    other = made(seed=5)
    other.load(tmp_path / "checkpoint")
    other.fit(2)
    assert not difference(parameters_of(learner), parameters_of(other))
    rows = list((tmp_path / "checkpoint").glob("rows-*"))
    assert bool(rows) == (source == "memory"), "data that has a name is not copied into a checkpoint"
    twin = made()
    twin.fit(3)
    assert not difference(parameters_of(learner), parameters_of(twin)), "and the same seed gives the same run"


def test_other_data_is_refused_and_nothing_has_changed(tmp_path, home):
    recorded(steps=200)
    learner = learner_on(OfflineReplay("goal/random-v0", 32, seed=1))
    learner.fit(1)
    learner.save(tmp_path / "checkpoint")
    (home / "goal/random-v0").rename(tmp_path / "first")
    moved = learner_on(OfflineReplay(tmp_path / "first", 32, seed=1))
    moved.load(tmp_path / "checkpoint")  # the same data elsewhere
    recorded(steps=200, seed=9)
    other = learner_on(OfflineReplay("goal/random-v0", 32, seed=1), seed=3)
    before = parameters_of(other)
    with pytest.raises(CheckpointError, match=r"sha256.*of 'goal/random-v0' \(200 transitions\).*when the checkpoint was written.*other data"):
        other.load(tmp_path / "checkpoint")
    assert not difference(parameters_of(other), before)
    merged = learner_on(OfflineReplay(memory_from_dataset(tmp_path / "first", float_dtype="float64"), 32, seed=1))
    with pytest.raises(CheckpointError, match="read with other settings"):
        merged.load(tmp_path / "checkpoint")


def test_the_best_checkpoint_of_an_offline_run(tmp_path):
    _, data = recorded(env="Pendulum-v1", steps=400)
    learner = learner_on(OfflineReplay(data, 32, seed=1), sizes=(3, 1), valid=partial(dataset_stepper, data), batches=20)
    learner.fit(3, checkpoint_every=20, folder=tmp_path / "run", keep=2, best_episodes=2)
    assert json.loads((tmp_path / "run/manifest-best.json").read_text())["validation"] < 0
    learner.load(tmp_path / "run", "best")


def test_batches_are_uniform_and_follow_the_dtype():
    memory = memory_from_dataset(data_of(lengths=(10, 10)))
    pipe = OfflineReplay(memory, 16)
    bind(pipe, Context(seed=3, dtype=torch.float64))
    first = next(pipe)
    assert first.state.dtype is torch.float64 and type(first).__name__ == "SampledStep"
    known, counts = {tuple(r): i for i, r in enumerate(memory.gather(torch.arange(20)).state.tolist())}, np.zeros(20)
    for _ in range(2000):
        for row in next(pipe).state.tolist():
            counts[known[tuple(row)]] += 1
    chi2 = ((counts - 1600) ** 2 / 1600).sum()
    assert chi2 < 43.8, "19 degrees of freedom, p = 0.001"


def test_a_rebuilt_stack_shares_the_data():
    recorded(steps=200)
    pipe = OfflineReplay("goal/random-v0", 32, seed=1)
    again = pipe.rebuilt(bs=16)
    assert again.memory is pipe.memory and len(next(again)) == 16


# --- offline and online ----------------------------------------------------------------------------------------------
def mixed(ratio=0.5, seed=0, data="goal/random-v0", bs=32, nsteps=1, **more):
    pipe = GymStepper(GOAL, seed=seed)
    pipe = pipe if nsteps == 1 else FirstLastMerger(NStepper(pipe, nsteps))
    return MixedReplay(pipe, data, ratio, bs, 100, **more)


@pytest.mark.parametrize("ratio, offline", [(0.0, 0), (0.25, 8), (0.5, 16), (0.51, 16), (1.0, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_batch_has_its_part_of_the_data(ratio, offline, dtype):
    _, data = recorded(steps=200)
    pipe = mixed(ratio, seed=7)
    bind(pipe, Context(dtype=dtype))
    known = {tuple(r) for r in memory_from_dataset(data).gather(torch.arange(200)).state.tolist()}
    for _ in range(50):
        batch = next(pipe)
        theirs = [tuple(np.float32(r).tolist()) in known for r in batch.state.tolist()]
        assert theirs == [False] * (32 - offline) + [True] * offline and batch.state.dtype is dtype
        assert torch.equal(batch.terminated.any(), torch.tensor(False)) and len(batch) == 32
    if ratio == 0.0:
        plain = ExperienceReplay(GymStepper(GOAL, seed=7), 32, 100, name="MixedReplay")
        bind(plain, Context(dtype=dtype))
        again = mixed(ratio, seed=7)
        bind(again, Context(dtype=dtype))
        for _ in range(20):
            assert not difference(next(plain).state, next(again).state), "with nothing of the data it is an ExperienceReplay"


def test_the_warm_up_counts_what_is_met_online():
    recorded(steps=200)
    pipe = mixed(0.75)
    next(pipe)
    assert len(pipe.memory) == 8, "as many as a batch takes"
    pipe = mixed(0.75, warmup=20)
    next(pipe)
    assert len(pipe.memory) == 20
    pipe = mixed(1.0)
    next(pipe)
    assert len(pipe.memory) == 1, "and the data is enough where nothing is taken"


def test_a_mixed_learner_resumes_to_the_bit(tmp_path):
    recorded(steps=200)

    def made():
        torch.manual_seed(0)
        critic, actor = Critic(2, 1, 16, 16), Actor(2, 1, 16, 16)
        pipe = MixedReplay(GymStepper(GOAL, DDPGAgent(actor), seed=4), "goal/random-v0", 0.5, 32, 300)
        pipe = CriticLossProcessor(pipe, critic, target_of(actor), t_critic := target_of(critic))
        pipe = SoftTargetUpdater(BasicOptStepper(pipe, critic, 1e-3, filter=True, name="critic_opt"), critic, tau=0.01, target_model=t_critic)
        return LearnerHead(pipe, 60)
    learner = made()
    learner.fit(1)
    learner.save(tmp_path / "checkpoint")
    memory = find_pipe(learner, MixedReplay).memory
    assert sum(p.stat().st_size for p in (tmp_path / "checkpoint").glob("rows-*")) == len(memory) * memory.layout.itemsize, "online rows alone"
    learner.fit(1)
    other = made()
    other.load(tmp_path / "checkpoint")
    other.fit(1)
    assert not difference(parameters_of(learner), parameters_of(other))


def test_data_of_another_kind_is_refused_before_the_first_step():
    recorded(steps=200)
    recorded("pendulum/x-v0", 200, "Pendulum-v1")
    with pytest.raises(ValueError, match="observation_space.*which another pipe of the stack announced"):
        learner_on(mixed(data="pendulum/x-v0"))
    with pytest.raises(ValueError, match=r"MixedReplay: field 'discount' of the steps is float32 \[1\], expected not there, as in the data; .*memory_from_dataset\(data, nsteps="):
        learner_on(mixed(nsteps=3))
    learner_on(mixed(nsteps=3, data=memory_from_dataset("goal/random-v0", nsteps=3)))
    with pytest.raises(ValueError, match=r"'(next_)?state' of the steps is float32 \[2\], expected float64 \[2\]"):
        learner_on(mixed(data=memory_from_dataset("goal/random-v0", float_dtype="float64")))
    with pytest.raises(ValueError, match=r"ratio.*is 1.5, expected a number in \[0, 1\]"):
        mixed(1.5)
    memory = memory_from_dataset("goal/random-v0")
    with pytest.raises(ValueError, match="is the online memory itself"):
        mixed(data=memory, memory=memory)


def test_an_environment_whose_keys_are_not_sorted():
    "The data has them sorted, so that its rows are packed in another order"
    class Unsorted(Counting):
        def __init__(self):
            super().__init__()
            self.observation_space = spaces.Dict(z=self.observation_space, a=spaces.Box(-2.0**24, 0, (1,)))

        def _show(self):
            count = super()._show()
            return {"z": count, "a": -count}
    _, data = recorded("unsorted/x-v0", 60, Unsorted)
    assert list(data.observation_space) == ["a", "z"] and list(Unsorted().observation_space) == ["z", "a"]
    for dtype in (torch.float32, torch.float64):
        pipe = MixedReplay(GymStepper(partial(Unsorted), seed=1), data, 0.5, 16, 100)
        bind(pipe, Context(dtype=dtype))
        for _ in range(30):
            batch = next(pipe)
            assert torch.equal(batch.state["a"], -batch.state["z"]) and torch.equal(batch.next_state["z"], batch.state["z"] + 1) and torch.equal(batch.reward, batch.next_state["z"])
        assert batch.state["z"].min() >= 0 and pipe.memory.layout != pipe.data.layout


def test_swapping_one_pipe_is_enough():
    "From a plain replay to a mixed one, with the networks as they are"
    recorded(steps=200)
    torch.manual_seed(0)
    actor, critic = Actor(2, 1, 8, 8), Critic(2, 1, 8, 8)
    learner = DDPGLearner(actor, critic, GymStepper(GOAL, DDPGAgent(actor), seed=0), [], bs=8, batches=30)
    plain = find_pipe(learner, ExperienceReplay)
    above = next(p for p in traverse(learner) if p.source is plain)
    above.stand_on(MixedReplay(plain.source.source, "goal/random-v0", 0.5, 8, 500))
    bind(learner, learner.context)
    learner.fit(1)
    assert find_pipe(learner, MixedReplay).memory.size > 30


# --- recording and resuming ------------------------------------------------------------------------------------------
def recording_learner(folder):
    torch.manual_seed(0)
    actor, critic = Actor(2, 1, 8, 8), Critic(2, 1, 8, 8)
    writer = DatasetWriter(GymStepper(GOAL, DDPGAgent(actor), n=2, mode="sync", seed=0), folder, flush_every=25)
    return DDPGLearner(actor, critic, writer, [], bs=8, batches=15), writer


@pytest.mark.parametrize("how", ["resumed", "in place", "from the end"])
def test_a_run_that_resumes_records_what_it_would_have_recorded(how, tmp_path):
    "What was recorded after the checkpoint is forgotten, and unfinished episodes go on"
    learner, writer = recording_learner(tmp_path / "whole")
    learner.fit(4)
    learner.close()
    whole = Episodes(tmp_path / "whole")
    learner, writer = recording_learner(tmp_path / "cut")
    learner.fit(2)
    learner.save(tmp_path / "checkpoint")
    at = writer.finished
    learner.fit(1)
    assert len(open_dataset(tmp_path / "cut")) > at, "it was further"
    if how == "from the end":
        learner.close()
    if how != "in place":
        writer._began = False  # as in a process that has ended
        learner, writer = recording_learner(tmp_path / "cut")
    learner.load(tmp_path / "checkpoint")
    assert writer.finished == at
    learner.fit(2)
    learner.close()
    cut = Episodes(tmp_path / "cut")
    assert len(cut) == len(whole) and cut.sha256 == whole.sha256
    assert cut.dataset.total_steps == whole.dataset.total_steps


def test_a_checkpoint_that_is_only_looked_at_costs_nothing(tmp_path):
    learner, writer = recording_learner(tmp_path / "data")
    learner.fit(1)
    learner.save(tmp_path / "checkpoint")
    learner.fit(2)
    there = len(open_dataset(tmp_path / "data"))
    writer._began = False
    other, _ = recording_learner(tmp_path / "data")
    other.load(tmp_path / "checkpoint")
    other.close()
    assert len(open_dataset(tmp_path / "data")) >= there


def test_the_data_of_another_run_is_not_cut(tmp_path):
    learner, writer = recording_learner(tmp_path / "data")
    learner.fit(2)
    learner.save(tmp_path / "checkpoint")
    (tmp_path / "data").rename(tmp_path / "first")
    writer._began = False  # as in a process that has ended
    steps, data = recorded(tmp_path / "data", 100, seed=8)
    other, _ = recording_learner(tmp_path / "data")
    with pytest.raises(CheckpointError, match="which another run has written"):
        other.load(tmp_path / "checkpoint")
    assert len(open_dataset(tmp_path / "data")) == len(data)


def test_episodes_that_are_not_there_any_more_are_missed_aloud(tmp_path):
    learner, writer = recording_learner(tmp_path / "data")
    learner.fit(2)
    learner.save(tmp_path / "checkpoint")
    (tmp_path / "data").rename(tmp_path / "first")
    other, fresh = recording_learner(tmp_path / "data")
    with pytest.warns(UserWarning, match=f"{writer.finished} episodes that were recorded before this checkpoint are not in"):
        other.load(tmp_path / "checkpoint")
    other.fit(1)
    assert 0 < len(open_dataset(tmp_path / "data")) == fresh.finished - writer.finished


# --- scores ----------------------------------------------------------------------------------------------------------
def test_normalised_scores():
    assert normalized_score(-150, (-1200, -150)) == 100 and normalized_score(-1200.0, [-1200, -150]) == 0
    assert normalized_score(np.array([[-675, 900]]), (-1200, -150)).tolist() == [[50.0, 200.0]]
    data = data_of(about={"ref_min_score": -10.0, "ref_max_score": 30.0})
    for reference in (data, "some/data-v0", Episodes(data), memory_from_dataset(data)):
        assert normalized_score([0.0, 30.0], reference).tolist() == [25.0, 100.0]
    bare = data_of("some/bare-v0")
    with pytest.raises(ValueError, match=r"'some/bare-v0', whose metadata has ref_min_score None.*DatasetWriter\(reference="):
        normalized_score(1.0, bare)
    for wrong, words in (((1, 1), "differ"), ((1, 2, 3), "two"), ((1, "a"), "expert"), ((float("nan"), 1), "random")):
        with pytest.raises((ValueError, TypeError), match=words):
            normalized_score(1.0, wrong)


# --- as a script -----------------------------------------------------------------------------------------------------
def ran(text, updates, names):
    "Parameters after the script"
    space = {"__name__": "script"}
    exec(compile(text, "script", "exec"), space)
    space["train"](updates)
    torch.set_flush_denormal(False)
    return {n: copied(space[n].state_dict()) for n in names}


@pytest.mark.parametrize("kind", ["offline", "offline, wide", "mixed", "recording"])
def test_a_script_learns_the_same_to_the_bit(kind, tmp_path):
    env = WideBox if kind == "offline, wide" else "Pendulum-v1"
    sizes = (1, 2) if kind == "offline, wide" else (3, 1)
    recorded("script/data-v0", 300, env)
    torch.manual_seed(3)
    nets = [Actor, Critic] if kind in ("mixed", "recording") else [Critic, Actor]  # in the order in which the stack has them
    actor, critic = sorted((net(*sizes, 16, 16) for net in nets), key=lambda net: type(net).__name__)
    t_actor, t_critic = target_of(actor), target_of(critic)
    stepper = GymStepper(env, DDPGAgent(actor), seed=5)
    pipe = {"mixed": lambda: MixedReplay(stepper, "script/data-v0", 0.25, 32, 200), "recording": lambda: ExperienceReplay(DatasetWriter(stepper, "script/new-v0"), 32, 200)}.get(
        kind, lambda: OfflineReplay("script/data-v0", 32, seed=1))()
    pipe = CriticLossProcessor(pipe, critic, t_actor, t_critic)
    pipe = BasicOptStepper(pipe, critic, 1e-3, filter=True, name="critic_opt")
    pipe = BasicOptStepper(ActorLossProcessor(pipe, critic, actor), actor, 1e-3, filter=True, name="actor_opt")
    pipe = SoftTargetUpdater(pipe, critic, tau=0.01, target_model=t_critic, name="critic_target")
    learner = LearnerHead(SoftTargetUpdater(pipe, actor, tau=0.01, target_model=t_actor, name="actor_target"), 120)
    text = flatten(learner, seed=3)
    assert "fastrl_pipes.memory" not in text and "DatasetWriter" not in text
    learner.fit(1)
    found = ran(text, 120, ("actor", "critic", "t_actor", "t_critic"))
    for name, net in (("actor", actor), ("critic", critic), ("t_actor", t_actor), ("t_critic", t_critic)):
        assert not difference(dict(found[name]), dict(copied(net.state_dict()))), name


def test_what_a_script_cannot_say_is_refused():
    _, data = recorded(steps=200)
    memory = ReplayMemory(200)
    for step in Episodes(data):
        memory.write(step)
    recorded("nested/x-v0", 100, Nested)
    for source, words in ((memory, "filled by hand has no script"), (memory_from_dataset(data, nsteps=2), "merged steps"), (data.filter_episodes(lambda e: e.id > 3), "draws from 16 of 20 episodes")):
        with pytest.raises(ValueError, match=words):
            flatten(learner_on(OfflineReplay(source, 32, seed=1)), seed=0)


def test_the_warnings_that_come_are_ours():
    "Neither Minari nor gymnasium has anything to say about what is written"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps, data = recorded("quiet/x-v0", 210, "Pendulum-v1")
        memory_from_dataset(data)
        data.recover_environment()


def test_nothing_is_left_behind_by_a_check(tmp_path):
    "A learner that is made and not used writes nothing"
    learner, writer = recording_learner(tmp_path / "unused")
    learner.check()
    assert not Path(writer.folder).exists()
