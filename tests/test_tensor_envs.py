"""Environments that are tensors: the same Pendulum as gymnasium's, true transitions, learners that never look at their
device between two epochs, and runs that resume to the bit."""
from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from contract_table import difference
from gymnasium import spaces
from host_reads import HostRead, no_host_reads
from torch import nn

from fastrl_pipes.agents.core import ActionClip, ActionScaler, AgentHead, NumpyConverter, SimpleModelRunner
from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner
from fastrl_pipes.agents.hddpg import HDDPGAgent, HDDPGLearner
from fastrl_pipes.agents.sac import SACAgent, SACLearner
from fastrl_pipes.agents.sacv import SACVAgent, SACVLearner
from fastrl_pipes.agents.td3 import TD3Agent, TD3Learner
from fastrl_pipes.core import copied, seed_everything
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.envs.tensor_envs import TensorEnvs, TorchPendulum
from fastrl_pipes.envs.tensor_stepper import TensorStepper
from fastrl_pipes.errors import CheckpointError
from fastrl_pipes.exploration.noise import OrnsteinUhlenbeck
from fastrl_pipes.learner.flatten import flatten
from fastrl_pipes.memory.experience_replay import ExperienceReplay, ReplayWriter
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.memory.hindsight import HindsightReplay
from fastrl_pipes.memory.offline import MixedReplay
from fastrl_pipes.memory.prioritized import PrioritizedReplay
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.networks.ensemble import Critics, Value
from fastrl_pipes.networks.policies import GaussianActor
from fastrl_pipes.pipes.control import Inlet
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.walk import bind, snapshot
from fastrl_pipes.pipes.graph import find_pipe, find_pipes
from fastrl_pipes.pipes.nstep import NSkipper

SHORT = partial(TorchPendulum, max_steps=7)


# --- Pendulum --------------------------------------------------------------------------------------------------------
def side_by_side(n=5, steps=450):
    "gymnasium's environments and ours, from the same states with the same torques; what differs most, relatively"
    ours, theirs = TorchPendulum(n, dtype=torch.float64, seed=3), [gymnasium.make("Pendulum-v1", disable_env_checker=True) for _ in range(n)]
    torques, worst = np.random.default_rng(0), 0.0
    for env in theirs:
        env.reset(seed=0)
    for _ in range(steps):
        seen = ours.observe()
        for i, env in enumerate(theirs):
            if ours.first[i, 0]:
                env.reset()
                env.unwrapped.state = np.array([x[i, 0].item() for x in ours._state])
        u = torques.uniform(-3, 3, (n, 1))
        after, reward, terminated, truncated, valid = ours.step(torch.from_numpy(u))
        assert valid is None and seen.dtype == torch.float64
        for i, env in enumerate(theirs):
            obs, r, ended, cut, _ = env.step(u[i])
            mine = np.array([*(x[i, 0].item() for x in ours._state), reward[i, 0].item()])
            other = np.array([*env.unwrapped.state, r])
            worst = max(worst, np.abs(mine - other).max() / max(np.abs(other).min(), 1e-3))
            assert np.allclose(mine, other, rtol=1e-12, atol=1e-12) and np.allclose(after[i], obs, atol=1e-6)
            assert (terminated[i, 0].item(), truncated[i, 0].item()) == (ended, cut)
    return worst


def test_pendulum_is_gymnasiums():
    assert side_by_side() < 1e-9


@pytest.mark.parametrize("wrong", [{"g": 9.81}, {"max_steps": 199}])
def test_another_pendulum_is_noticed(wrong, monkeypatch):
    monkeypatch.setattr("test_tensor_envs.TorchPendulum", partial(TorchPendulum, **wrong))
    with pytest.raises(AssertionError):
        side_by_side(2, 250)


def test_pendulums_spaces_are_gymnasiums():
    env = gymnasium.make("Pendulum-v1")
    assert (TorchPendulum(1).observation_space, TorchPendulum(1).action_space) == (env.observation_space, env.action_space)


def test_episodes_begin_as_gymnasiums():
    n = 200_000
    angle, speed = TorchPendulum(n, seed=0).begin(torch.Generator().manual_seed(0))
    for x, high in ((angle, np.pi), (speed, 1.0)):
        x = np.sort(x[:, 0].numpy() / high / 2 + 0.5)
        assert np.abs(x - (np.arange(n) + 0.5) / n).max() < 1.63 / np.sqrt(n)  # Kolmogorov and Smirnov, 1 in 100
    assert abs(np.corrcoef(angle[:, 0], speed[:, 0])[0, 1]) < 0.01
    env = gymnasium.make("Pendulum-v1").unwrapped
    theirs = np.array([(env.reset(seed=i), env.state)[1] for i in range(2000)])
    assert np.allclose(theirs.min(0), [-np.pi, -1], atol=0.02) and np.allclose(theirs.max(0), [np.pi, 1], atol=0.02)


# --- time ------------------------------------------------------------------------------------------------------------
class Lengths(TensorEnvs):
    "Shows [an episode's number, its length, steps so far]; terminates at its length, or is cut after six steps"

    def __init__(self, n, device=None, seed=None):
        super().__init__(n, spaces.Box(0, 1e9, (3,)), spaces.Box(-1, 1, (1,)), 6, device, seed)

    def begin(self, generator):
        return {"id": torch.rand(self.n, 1, generator=generator, device=self.device), "length": torch.randint(1, 10, (self.n, 1), generator=generator, device=self.device),
                "t": torch.zeros(self.n, 1, device=self.device)}

    def look(self, state):
        return torch.cat((state["id"], state["length"], state["t"]), 1)

    def move(self, state, action):
        after = {**state, "t": state["t"] + 1}
        return after, state["length"].float(), after["t"] == state["length"]


def check_truth(steps):
    "What one row shows is one story"
    before = None
    total, count, episode = np.zeros(len(steps[0])), np.zeros(len(steps[0]), int), np.zeros(len(steps[0]), int)
    for step in steps:
        s, after = step.state.numpy(), step.next_state.numpy()
        ended, cut = step.terminated.numpy()[:, 0], step.truncated.numpy()[:, 0]
        assert (after[:, :2] == s[:, :2]).all() and (after[:, 2] == s[:, 2] + 1).all(), "the true successor is of the same episode"
        assert (ended == (after[:, 2] == s[:, 1])).all() and (cut == (after[:, 2] >= 6)).all()
        if before is not None:
            over = before.done.numpy()[:, 0]
            assert (s[~over] == before.next_state.numpy()[~over]).all() and (s[over, 2] == 0).all() and (s[over, 0] != before.state.numpy()[over, 0]).all()
            total, count, episode = np.where(over, 0, total), np.where(over, 0, count), episode + over
        total, count = total + step.reward.numpy()[:, 0], count + 1
        assert (step.total_reward.numpy()[:, 0] == total).all() and (step.step_n.numpy()[:, 0] == count).all() and (step.episode_n.numpy()[:, 0] == episode).all()
        before = step


def test_every_row_is_a_true_transition():
    pipe = TensorStepper(Lengths, n=50, seed=0)
    steps = [next(pipe) for _ in range(60)]
    check_truth(steps)
    done = torch.stack([s.done for s in steps])
    assert 0.05 < done.float().mean() < 0.5 and done.any(0).all() and torch.stack([s.terminated & s.truncated for s in steps]).any()
    assert pipe.env_steps == 50 * 60


def after_the_reset(self, actions, real=TensorEnvs.step):
    _, *rest = real(self, actions)
    return self.observe(), *rest


def a_step_late(self, real=TensorEnvs.observe):
    seen, begun = real(self), self.first
    self.first = getattr(self, "before", begun)
    self.before = begun
    return seen


def all_at_once(self, real=TensorEnvs.observe):
    if self._over is not None and self._over.any():
        self._over = torch.ones_like(self._over)
    return real(self)


@pytest.mark.parametrize("method, mistake", [("step", after_the_reset), ("observe", a_step_late), ("observe", all_at_once)])
def test_a_mistake_in_time_is_noticed(method, mistake, monkeypatch):
    monkeypatch.setattr(TensorEnvs, method, mistake)
    pipe = TensorStepper(Lengths, n=50, seed=0)
    with pytest.raises(AssertionError):
        check_truth([next(pipe) for _ in range(20)])


class Nest(TensorEnvs):
    "A nest is seen, and whole numbers are taken"

    def __init__(self, n):
        super().__init__(n, spaces.Dict(place=spaces.Box(0, 1, (2, 2)), parts=spaces.Tuple((spaces.Discrete(9), spaces.Box(0, 255, (3,), np.uint8)))), spaces.MultiDiscrete([2, 5], start=[0, 3]), 3)

    def begin(self, generator):
        return {"place": torch.rand(self.n, 2, 2, generator=generator), "taken": torch.zeros(self.n, 2, dtype=torch.int64)}

    def look(self, state):
        return {"place": state["place"], "parts": (state["taken"].sum(1) % 9, state["taken"][:, :1].expand(-1, 3).to(torch.uint8))}

    def move(self, state, action):
        return {**state, "taken": action}, action.sum(1, keepdim=True).float(), torch.zeros(self.n, 1, dtype=torch.bool)


def test_nests_and_whole_numbers():
    pipe = ReplayWriter(TensorStepper(Nest, n=30, seed=0), memory := ReplayMemory(300))
    steps = [next(pipe) for _ in range(10)]
    for step in steps:
        assert step.action.dtype == torch.int64 and step.raw_action.shape == (30, 2) and torch.equal(step.raw_action, step.action + torch.tensor([0, 3]))
        assert torch.equal(step.next_state["parts"][0], step.raw_action.sum(1) % 9) and torch.equal(step.next_state["place"], step.state["place"])
    assert {tuple(a) for s in steps for a in s.action.tolist()} == {(i, j) for i in range(2) for j in range(5)}
    kept = memory.gather(torch.arange(300))
    for path in (lambda s: s.state["place"], lambda s: s.next_state["parts"][0], lambda s: s.next_state["parts"][1], lambda s: s.action):
        assert torch.equal(path(kept), torch.cat([path(s) for s in steps])) and path(kept).dtype == path(steps[0]).dtype


class Mirror(TensorEnvs):
    "Shows a number; the reward is minus the distance of the action from it"

    def __init__(self, n):
        super().__init__(n, spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,)), 3)

    def begin(self, generator):
        return torch.rand(self.n, 1, generator=generator), torch.zeros(self.n, 1)

    def look(self, state):
        return state[0]

    def move(self, state, action):
        return (torch.cos(state[0] * 90 + state[1]), state[1] + 1), -(action - state[0]).abs(), torch.zeros(self.n, 1, dtype=torch.bool)


def test_the_agent_acts_on_the_current_observation():
    chain = ActionScaler(ActionClip(SimpleModelRunner(Inlet(), nn.Identity())))
    pipe = TensorStepper(Mirror, AgentHead(chain), n=20, seed=0)
    assert all(not next(pipe).reward.any() for _ in range(10))
    assert next(TensorStepper(Mirror, n=20, seed=0)).reward.all(), "at random it is otherwise"


def test_seeds():
    def first(**more):
        return next(TensorStepper(TorchPendulum, n=9, **more))
    assert torch.equal(first(seed=1).state, first(seed=1).state) and not torch.equal(first(seed=1).state, first(seed=2).state)
    assert not torch.equal(first().state, first().state) and not torch.equal(first(seed=1).action, first(seed=2).action)
    pipe = TensorStepper(TorchPendulum(9, seed=4))
    assert torch.equal(next(pipe).state, TorchPendulum(9, seed=4).reset()), "a live one has a seed of its own, where the stepper has none"
    pipe.reset(None)
    assert not torch.equal(next(pipe).state, TorchPendulum(9, seed=4).reset()), "and goes on from there"


def test_noise_begins_anew_with_its_episode():
    agent = AgentHead(ActionScaler(ActionClip(OrnsteinUhlenbeck(SimpleModelRunner(Inlet(), nn.Linear(3, 1)), sigma=0.0, max_epsilon=1.0, min_epsilon=1.0))))
    pipe = TensorStepper(Lengths, agent, n=40, seed=0)
    noise, step = find_pipe(agent, OrnsteinUhlenbeck), next(pipe)
    assert isinstance(noise._x, torch.Tensor)
    for _ in range(10):
        noise._x.fill_(1.0)
        over = step.done
        step = next(pipe)
        assert torch.equal(noise._x, torch.where(over, 0.0, 0.85)) and over.any() and not over.all()


# --- what is kept, and what is counted -------------------------------------------------------------------------------
def test_the_replay_keeps_the_steps_that_passed():
    pipe = ReplayWriter(TensorStepper(Lengths, n=7, seed=0), memory := ReplayMemory(20))
    rows = []
    for _ in range(9):
        step = next(pipe)
        rows += list(zip(*[getattr(step, f) for f in ("state", "action", "next_state", "reward", "terminated", "truncated")]))
        kept = memory.gather(torch.arange(memory.size))
        numbers = np.arange(memory.written - memory.size, memory.written)
        for number in numbers:
            at = number % 20
            assert all(torch.equal(a, b) for a, b in zip(rows[number], (kept.state[at], kept.action[at], kept.next_state[at], kept.reward[at], kept.terminated[at], kept.truncated[at])))
    assert memory.size == 20 and memory.written == 63


def test_the_replay_follows_the_environments_unless_told():
    told, free = ReplayMemory(9, device="cpu"), ReplayMemory(9)
    for memory in (told, free):
        bind(ReplayWriter([], memory), Context(acting_device=torch.device("meta")))
    assert (told.device.type, free.device.type, told.anew()._follows, free.anew()._follows) == ("cpu", "meta", False, True)
    data = ReplayMemory(9)
    data.write(next(TensorStepper(Lengths, n=4, seed=0)))
    with pytest.raises(ValueError, match="MixedReplay: field 'data' lives on cpu, expected a memory on meta"):
        bind(MixedReplay([], data, bs=4), Context(acting_device=torch.device("meta")))
    memory = ReplayMemory(9)
    memory.write(next(TensorStepper(Lengths, n=4, seed=0)))
    memory.follow("meta")
    assert memory.rows.is_meta and memory.size == 4, "what it keeps goes along"


def test_episodes_are_counted_as_by_looking():
    learner = sac(Lengths, 20)
    looked, steps = [], []
    stepper = find_pipe(learner, TensorStepper)
    real = stepper._advance
    stepper._advance = lambda: steps.append(real()) or steps[-1]
    stepper.wire()
    for epoch in range(3):
        row = learner.fit(1)[0]
        for step, _ in steps:
            looked += [(step.total_reward[i, 0].item(), step.step_n[i, 0].item()) for i in np.flatnonzero(step.done.numpy()[:, 0])]
        steps.clear()
        totals, recorder = [total for total, _ in looked], learner.recorder
        assert row["episode"] == recorder.episodes == len(looked) > 20 and recorder.lengths == sum(length for _, length in looked)
        assert row["rolling_reward"] == pytest.approx(np.mean(totals[-20:]), rel=1e-12) and list(recorder.rewards) == totals[-20:]
        assert (recorder.reward_min, recorder.reward_max) == (min(totals), max(totals)) and row["env_steps"] == learner.env_steps == stepper.env_steps


# --- learners --------------------------------------------------------------------------------------------------------
def sac(envs=SHORT, n=16, hidden=(16, 16), more=(), valid=None, **settings):
    seed_everything(0)
    space = envs(1).observation_space
    actor, critic = GaussianActor(*space.shape, 1, hidden), Critics(*space.shape, 1, hidden=hidden)
    pipe = TensorStepper(envs, SACAgent(actor, sigma=0.1), n, seed=0, random_steps=5 * n)
    for build in more:
        pipe = build(pipe)
    return SACLearner(actor, critic, pipe if valid is None else (pipe, valid(actor)), [], **{"bs": 32, "max_sz": 200, "batches": 10, **settings})


def ddpg(**more):
    seed_everything(0)
    actor, critic = Actor(3, 1, 16, 16), Critic(3, 1, 16, 16)
    return DDPGLearner(actor, critic, TensorStepper(SHORT, DDPGAgent(actor, max_steps=500), 16, seed=0, random_steps=80), [], bs=32, max_sz=200, batches=10, **more)


def hddpg(**more):
    seed_everything(0)
    actor, critic = Actor(3, 1, 16, 16), Critic(3, 1, 16, 16)
    return HDDPGLearner(actor, critic, TensorStepper(SHORT, HDDPGAgent(actor), 16, seed=0, random_steps=80), [], bs=32, max_sz=200, batches=10, **more)


def td3(**more):
    seed_everything(0)
    actor, critic = Actor(3, 1, 16, 16), Critics(3, 1, hidden=(16, 16))
    return TD3Learner(actor, critic, TensorStepper(SHORT, TD3Agent(actor), 16, seed=0, random_steps=80), [], bs=32, max_sz=200, batches=10, **more)


def sacv(**more):
    seed_everything(0)
    actor, critic, value = GaussianActor(3, 1, (16, 16)), Critics(3, 1, hidden=(16, 16)), Value(3, (16, 16))
    return SACVLearner(actor, critic, value, TensorStepper(SHORT, SACVAgent(actor), 16, seed=0, random_steps=80), [], bs=32, max_sz=200, warmup=80, batches=10, **more)


LEARNERS = {"sac": sac, "ddpg": ddpg, "td3": td3, "hddpg": hddpg, "sacv": sacv}
each = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)


@each
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_nothing_is_read_between_two_epochs(make, compiled):
    learner = make()
    if compiled:
        learner.compile(backend="eager")
    for _ in range(6):  # a random step, and the networks' first ones
        next(learner)
    with no_host_reads():
        for _ in range(40):  # past the end of the ring, and of several episodes
            next(learner)
    row = learner.recorder.read()
    assert row["episode"] >= 16 * 6 and np.isfinite(row["rolling_reward"]) and np.isfinite(row["critic_loss"])


@pytest.mark.parametrize("make", [partial(sac, alpha=0.2), ddpg], ids=["sac", "ddpg"])
def test_no_kernel_reads_a_number_either(make):
    "What C++ does inside of an operator only the profiler sees. Fused Adam's kernel for the CPU reads its own counters, so it is left out"
    learner = make(actor_opt=torch.optim.SGD, critic_opt=torch.optim.SGD)
    for _ in range(6):
        next(learner)
    with torch.profiler.profile() as seen:
        for _ in range(20):
            next(learner)
    names = {e.key for e in seen.key_averages()}
    assert "aten::scatter_" in names and not names & {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select"}


PLANTS = {
    "item": lambda s: s.reward.mean().item(), "bool": lambda s: bool((s.reward > 9).any()), "float": lambda s: float(s.reward[0, 0]), "numpy": lambda s: s.state.numpy(),
    "array": lambda s: np.asarray(s.state), "into an array": lambda s: np.zeros(s.state.shape).__setitem__(slice(None), s.state), "list": lambda s: s.reward.tolist(), "mask": lambda s: s.reward[s.done],
    "into a mask": lambda s: s.reward.clone().__setitem__(s.done, 0.0), "nonzero": lambda s: s.done.nonzero(), "select": lambda s: s.reward.masked_select(s.done), "cpu": lambda s: s.reward.cpu(),
    "another device": lambda s: s.reward.to("meta"), "from a list": lambda s: torch.tensor([1.0, 2.0]), "from numpy": lambda s: torch.as_tensor(np.ones(3)), "equal": lambda s: torch.equal(s.reward, s.reward),
    "unique": lambda s: s.env_id.unique(), "a range": lambda s: range(s.step_n[0, 0]),
}


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_a_planted_read_is_noticed(plant):
    learner = sac()
    for _ in range(6):  # until the optimizers have taken over their counts
        next(learner)
    stepper, planted = find_pipe(learner, TensorStepper), []
    real = stepper._advance

    def advance():
        step, valid = real()
        if len(planted) == 3:
            plant(step)
        planted.append(step)
        return step, valid
    stepper._advance = advance
    with no_host_reads():
        for _ in range(3):
            next(learner)
        with pytest.raises(HostRead):
            next(learner)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of CUDA")
@each
def test_nobody_waits_for_the_gpu(make):
    learner = make(device="cuda")
    assert find_pipe(learner, TensorStepper).backend.device.type == "cuda" and find_pipe(learner, ReplayWriter).memory.device.type == "cuda"
    for _ in range(6):
        next(learner)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(20):
            next(learner)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(learner.recorder.read()["critic_loss"])


# --- resuming --------------------------------------------------------------------------------------------------------
@each
def test_a_run_continues_to_the_bit(make, tmp_path):
    one = make()
    one.fit(2)
    next(one)
    one.save(tmp_path)
    rows = one.fit(1)
    other = make()
    other.load(tmp_path)
    again = other.fit(1)
    assert not difference(snapshot(one), snapshot(other)) and not difference(one.recorder.get_state()["rewards"], other.recorder.get_state()["rewards"])
    clock = ("seconds", "steps_per_second")
    assert [{k: v for k, v in r.items() if k not in clock} for r in rows] == [{k: v for k, v in r.items() if k not in clock} for r in again]


def test_saving_changes_nothing(tmp_path):
    one, other = sac(), sac()
    for i in range(30):
        next(one), next(other)
        if i in (7, 20):
            one.save(tmp_path)
    assert not difference(snapshot(one), snapshot(other))


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    one = sac()
    next(one)
    one.save(tmp_path)
    with pytest.raises(CheckpointError, match="TensorStepper"):
        sac(n=8).load(tmp_path)
    envs, other = TorchPendulum(4, seed=0), TorchPendulum(4, dtype=torch.float64)
    envs.reset()
    state = copied(envs.snapshot())
    for broken in (state, {}, {**state, "t": None}, {**state, "generator": torch.zeros(3, dtype=torch.uint8)}, {**state, "steps": "many"}):
        with pytest.raises(CheckpointError, match="TorchPendulum.*snapshot"):
            (other if broken is state else envs).restore(broken)
    assert envs.observe().isfinite().all(), "and begins anew"


def test_without_its_environments_a_run_begins_new_episodes(tmp_path):
    one, other = sac(), sac()
    for _ in range(9):
        next(one)
    one.save(tmp_path)
    other.load(tmp_path, environments=False)
    next(other)
    step = find_pipe(other, TensorStepper)
    assert step.env_steps == find_pipe(one, TensorStepper).env_steps + 16 and set(step._step_n[:, 0].tolist()) == {1}


# --- validation, and what is refused ---------------------------------------------------------------------------------
def test_a_pair_validates_in_gymnasium():
    alone = sac(TorchPendulum)
    learner = sac(TorchPendulum, valid=lambda actor: GymStepper("Pendulum-v1", SACAgent(actor)))
    for _ in range(8):
        next(learner), next(alone)
        found = learner.validate(2) if learner.recorder.batch == 4 else None
        if found:
            assert found["lengths"].tolist() == [200, 200] and found["mean"] < 0
    assert not difference(snapshot(learner), snapshot(alone)), "training is the same with and without it"
    assert -2 <= learner.predict(np.zeros(3, np.float32))[0] <= 2
    with pytest.raises(TypeError, match="TorchPendulum.*to validate.*dls=\\(train, GymStepper"):
        alone.validate(2)
    with pytest.raises(TypeError, match="observation_space"):
        sac(Lengths, valid=lambda actor: GymStepper("Pendulum-v1", SACAgent(actor)))


REFUSED = {
    "priorities": (lambda: sac(replay=PrioritizedReplay), "PrioritizedReplay: field 'steps' are tensors on cpu.*ExperienceReplay"),
    "windows": (lambda: sac(nsteps=3), "NStepper: field 'steps' are tensors.*nsteps=1"),
    "skips": (lambda: sac(more=[lambda p: NSkipper(p, 2)]), "NSkipper: field 'steps' are tensors"),
    "hindsight": (lambda: sac(replay=partial(HindsightReplay, k=0)), "EpisodeWriter: field 'steps' are tensors"),
    "arrays": (lambda: DDPGLearner(actor := Actor(3, 1, 8, 8), Critic(3, 1, 8, 8), TensorStepper(SHORT, DDPGAgent(actor, dp_augmentation_fns=[NumpyConverter]), 4), []), "NumpyConverter"),
    "a script": (lambda: flatten(sac(), weights="unused"), "flatten: field 'envs' of TensorStepper are TorchPendulum"),
    "a name": (lambda: TensorStepper("Pendulum-v1"), "TensorStepper: field 'envs' is 'Pendulum-v1'"),
    "another's": (lambda: TensorStepper(lambda n: gymnasium.make("Pendulum-v1")), "TensorStepper: field 'envs' made"),
    "rows": (lambda: TensorStepper(TorchPendulum(3), n=4), "TensorStepper: field 'n' is 4, expected 3"),
    "keywords": (lambda: TensorStepper(TorchPendulum(3), env_kwargs={"g": 9.0}), "TensorStepper: field 'env_kwargs'"),
    "no rows": (lambda: TorchPendulum(0), "TorchPendulum: field 'n'"),
    "no steps": (lambda: TorchPendulum(2, max_steps=0), "TorchPendulum: field 'max_steps'"),
    "half": (lambda: TorchPendulum(2, dtype=torch.float16), "TorchPendulum: field 'dtype'"),
    "no agent": (lambda: TensorStepper(TorchPendulum, agent=3), "TensorStepper: field 'agent'"),
    "in the wrong order": (lambda: TorchPendulum(2).step(torch.zeros(2, 1)), "TorchPendulum: field 'step'.*observe"),
    "gymnasium's stepper": (lambda: GymStepper(TorchPendulum(2)), "make_backend.*TensorStepper"),
}


@pytest.mark.parametrize("make, text", REFUSED.values(), ids=REFUSED)
def test_is_refused_by_name(make, text):
    with pytest.raises((ValueError, TypeError, LookupError), match=text):
        make()


def test_a_malformed_step_is_refused_by_name():
    for method, answer, text in (("move", lambda s, a: (s, s[0][:, 0], s[0] > 9), "reward.*\\[4\\].*\\[4, 1\\]"), ("move", lambda s, a: (s, s[0], s[0]), "terminated.*bool"),
                                 ("move", lambda s, a: (s, s[0], (s[0] > 9)[:, 0]), "terminated.*\\[4, 1\\]")):
        envs = TorchPendulum(4)
        setattr(envs, method, answer)
        with pytest.raises(ValueError, match=f"TorchPendulum.move: field '{text.split('.')[0]}' .*{text.split('.*', 1)[1]}"):
            next(TensorStepper(envs))


def test_environments_and_networks_share_a_device():
    stepper = TensorStepper(TorchPendulum(3), SACAgent(GaussianActor(3, 1)))
    with pytest.raises(ValueError, match="TensorStepper: field 'device' of the environments is cpu, expected meta"):
        bind(stepper, Context(device=torch.device("meta")))


def test_a_learners_device_is_the_environments(monkeypatch):
    learner = sac()
    moved = []
    monkeypatch.setattr(TorchPendulum, "to", lambda self, device: moved.append(device))
    from fastrl_pipes.pipes.graph import pipe_to_device
    pipe_to_device(learner, "cpu")
    assert [d.type for d in moved] == ["cpu"] and find_pipes(learner, ExperienceReplay)


def test_the_benchmark_of_devices_runs(tmp_path):
    script = Path(__file__).resolve().parents[1]/"benchmarks"/"device_pendulum.py"
    done = subprocess.run([sys.executable, script, "--device", "cpu", "--envs", "4", "--hidden", "8", "--seconds", "0.05", "--rounds", "1", "--lead", "2", "--entrants", "ours", "plain", "--out", tmp_path/"rows.csv",
                           "W1", "W2", "W3", "W4"], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith(("ours", "plain"))] == ["ours", "plain"] * 4 and len((tmp_path/"rows.csv").read_text().splitlines()) == 9


# --- learning --------------------------------------------------------------------------------------------------------
def swings_up(pulls, n=64, **more):
    seed_everything(0)
    actor, critic = GaussianActor(3, 1, (32, 32)), Critics(3, 1, hidden=(32, 32))
    train = TensorStepper(TorchPendulum, SACAgent(actor), n, seed=0, random_steps=20 * n)
    rate = {"actor_lr": 3e-3, "critic_lr": 3e-3, "alpha_lr": 3e-3, "initial_alpha": 0.2, "discount": 0.95, "tau": 0.02}
    learner = SACLearner(actor, critic, (train, GymStepper("Pendulum-v1")), [], warmup=20 * n, batches=pulls, **{**rate, "bs": 128, "max_sz": 100_000, **more})
    return learner, learner.fit(1)[-1]


def test_sac_learns_from_64_pendulums():
    assert swings_up(1400)[1]["rolling_reward"] > -700, "random torques give about -1220"


@pytest.mark.slow
@pytest.mark.parametrize("n, settings", [(64, {}), (4096, {"repeat": 8, "bs": 256, "max_sz": 2**20})], ids=["64", "4096"])
def test_sac_swings_the_pendulum_up(n, settings):
    assert swings_up(3200, n, **settings)[0].validate(20)["mean"] > -250
