"""How to build every pipe of the package, and what to feed it: the table behind `test_contract.py`.

A pipe that is not here fails the suite. An entry says how the pipe is built over a source (`build`), what comes in
(`feed`), which networks it works with (`parts`), and, where `forward` cannot say it, how many items must have been
pulled for k to come out (`pulls`)."""
from __future__ import annotations

import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from fastrl_pipes.agents.core import ActionClip, ActionScaler, ActionUnbatcher, AgentHead, NumpyConverter, PolicyRunner, SimpleModelRunner, StepFieldSelector
from fastrl_pipes.agents.td3 import SmoothedCriticLossProcessor
from fastrl_pipes.core import MergedStep, SampledStep, SimpleStep, copied, leaves, take_rows, to_tensor
from fastrl_pipes.envs.debug import Goal
from fastrl_pipes.envs.double_buffered import DoubleBufferedStepper
from fastrl_pipes.envs.doubles import CountingVector
from fastrl_pipes.envs.episodes import EpisodeStepper
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.envs.tensor_envs import TorchPendulum
from fastrl_pipes.envs.tensor_stepper import TensorStepper
from fastrl_pipes.exploration.comparison import ExplorationComparisonLogger
from fastrl_pipes.exploration.noise import Exploration, GaussianNoise, OrnsteinUhlenbeck
from fastrl_pipes.learner.datablock import EpochLength
from fastrl_pipes.learner.dataset_writer import DatasetWriter
from fastrl_pipes.learner.head import LearnerHead
from fastrl_pipes.learner.joint import JointOptStepper
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.loggers.collectors import BatchCollector, EpisodeCollector, EpocherCollector, LossCollector, RollingTerminatedRewardCollector
from fastrl_pipes.loggers.video import VideoCollector
from fastrl_pipes.memory.dataset import DatasetSteps
from fastrl_pipes.memory.episodes import EpisodeWriter
from fastrl_pipes.memory.experience_replay import ExperienceReplay, ReplaySampler, ReplayWriter
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.memory.hindsight import HindsightReplay
from fastrl_pipes.memory.offline import MixedReplay, OfflineReplay
from fastrl_pipes.memory.prioritized import PrioritizedReplay, PrioritizedSampler
from fastrl_pipes.networks.ensemble import Critics
from fastrl_pipes.networks.ensemble import Value as StateValue
from fastrl_pipes.networks.policies import GaussianActor
from fastrl_pipes.networks.targets import target_of
from fastrl_pipes.networks.temperature import Temperature
from fastrl_pipes.pipes.batch import StepBatcher
from fastrl_pipes.pipes.control import Every, Inlet, Repeat, Take
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.core import BaseNode, Fan, Foreign, IterableSource, Pipe, Stage
from fastrl_pipes.pipes.walk import bind
from fastrl_pipes.pipes.graph import find_pipe
from fastrl_pipes.pipes.nstep import FirstLastMerger, NSkipper, NStepFlattener, NStepper
from fastrl_pipes.pipes.prefetch import Prefetcher
from fastrl_pipes.pipes.tape import Tap, Tape
from fastrl_pipes.processors.core import LossProcessor
from fastrl_pipes.agents.hddpg import HystereticCriticLossProcessor
from fastrl_pipes.agents.iql import EpsilonPolicyRunner
from fastrl_pipes.loggers.signals import SignalCollector
from fastrl_pipes.processors.dpg import ActorLossProcessor, CriticLossProcessor
from fastrl_pipes.processors.entropy import SoftActorLossProcessor, SoftCriticLossProcessor, SoftValueLossProcessor, TemperatureLossProcessor, ValueCriticLossProcessor
from fastrl_pipes.processors.imitation import CloningLossProcessor
from fastrl_pipes.processors.iql import IQLActorLossProcessor, IQLCriticLossProcessor, IQLValueLossProcessor
from fastrl_pipes.processors.targets import SoftTargetUpdater
from fastrl_pipes.processors.td import TDLossProcessor

S, A, ROWS, BS = 3, 2, 2, 4  # sizes that are all different, environments apart
SEED = 5


# --- what is fed -----------------------------------------------------------------------------------------------------
class Lazy:
    "An item that is made when it is pulled: a loss has to be computed with the parameters of that moment"

    def __init__(self, make: Callable[[], Any]):
        self.make = make


def fresh(item: Any) -> Any:
    "An item with memory of its own"
    return item.make() if isinstance(item, Lazy) else copied(item)


def ruin(item: Any) -> None:
    "Overwrite every array of an item, as a source does that uses its buffers again. A loss is nobody's buffer"
    if isinstance(item, dict) and "loss" in item:
        return
    for _, a in leaves(item):
        a = a.detach().numpy() if isinstance(a, torch.Tensor) else a
        a[...] = ~a if a.dtype == bool else np.nan if a.dtype.kind == "f" else 77


class Feed:
    "An iterable that counts what is taken from it; with `poison`, what it handed out is overwritten at the next pull"

    def __init__(self, items: list, poison: bool = False):
        self.items, self.poison, self.taken, self.at, self._from = items, poison, 0, 0, 0

    def __iter__(self) -> Iterator:
        self.at, self._from = self._from, 0
        return self._go()

    def _go(self):
        last = None
        while True:
            if self.poison and last is not None:
                ruin(last)
            if self.at == len(self.items):
                return
            last = fresh(self.items[self.at])
            self.at += 1
            self.taken += 1
            yield last


class Stateful(Feed):
    "The same with a state of its own; a feed without one is resumed by taking items again"

    def state_dict(self) -> dict:
        return {"at": self.at}

    def load_state_dict(self, state: dict) -> None:
        self._from = state["at"]


class ListNode(BaseNode):
    "A node that is not ours"

    def __init__(self, items: list):
        super().__init__()
        self.items = items

    def reset(self, initial_state: dict | None = None):
        super().reset(initial_state)
        self.at = 0 if initial_state is None else initial_state["at"]

    def next(self) -> Any:
        if self.at == len(self.items):
            raise StopIteration
        self.at += 1
        return self.items[self.at - 1]

    def get_state(self) -> dict:
        return {"at": self.at}


def env_steps(n: int = 14, rows: int = ROWS, lengths=(4, 3), bare: bool = False) -> list[SimpleStep]:
    "Steps of `rows` environments whose episodes have these lengths, and end by either flag in turn; NumPy"
    rng, steps = np.random.default_rng(0), []
    t, episode, total = np.zeros(rows, int), np.zeros(rows, int), np.zeros(rows)
    length = np.resize(lengths, rows)
    state = rng.standard_normal((rows, S)).astype(np.float32)
    for _ in range(n):
        reward = rng.standard_normal((rows, 1)).astype(np.float32)
        t, total = t + 1, total + reward[:, 0]
        over, by_flag = t == length, episode % 2 == 0
        after = rng.standard_normal((rows, S)).astype(np.float32)
        steps.append(SimpleStep(state=state, action=rng.uniform(-1.5, 1.5, (rows, A)).astype(np.float32), next_state=after, reward=reward,
                                terminated=(over & by_flag)[:, None], truncated=(over & ~by_flag)[:, None], total_reward=total[:, None].copy(),
                                step_n=t[:, None].copy(), episode_n=episode[:, None].copy(), env_id=np.arange(rows)[:, None]))
        t, total, episode = np.where(over, 0, t), np.where(over, 0.0, total), episode + over
        state = np.where(over[:, None], rng.standard_normal((rows, S)), after).astype(np.float32)
    return steps


def near(achieved: np.ndarray, desired: np.ndarray, info: dict) -> np.ndarray:
    "The reward of a goal environment: 0 where the goal is within 1.5, else -1"
    return np.where(np.linalg.norm(achieved - desired, axis=-1) > 1.5, -1.0, 0.0)


def goal_steps(n: int = 14, **settings: Any) -> list[SimpleStep]:
    "The same in a goal environment"
    steps, goal = env_steps(n, **settings), np.full((1, 2), 0.5, np.float32)

    def seen(state):
        return {"observation": state, "achieved_goal": state[:, :2].copy(), "desired_goal": np.repeat(goal, len(state), 0)}
    return [s.replace(state=seen(s.state), next_state=(after := seen(s.next_state)), reward=near(after["achieved_goal"], goal, {})[:, None].astype(np.float32)) for s in steps]


def to_act_on(n: int = 10, **settings: Any) -> list[SimpleStep]:
    "What a stepper gives to its agent: states, and counts that are 0 where an episode begins; no action yet"
    return [SimpleStep(state=s.state, step_n=s.step_n - 1, episode_n=s.episode_n, env_id=s.env_id) for s in env_steps(n, **settings)]


def acted(n: int = 10, **settings: Any) -> list[SimpleStep]:
    "The same with actions"
    return [a.replace(action=s.action) for a, s in zip(to_act_on(n, **settings), env_steps(n, **settings))]


def as_torch(items: list) -> list:
    return [to_tensor(item) for item in items]


def actions(n: int = 10) -> list[np.ndarray]:
    return [s.action for s in env_steps(n)]


def windows(n: int = 12) -> list[tuple]:
    "What `NStepper(3)` makes of steps, loose steps in between"
    made = list(map(copied, NStepper(env_steps(n), 3)))
    return made[:4] + env_steps(1) + made[4:]


def with_gaps() -> list[SimpleStep]:
    "Steps that lack an environment now and then, between its episodes"
    steps = env_steps(9, lengths=(4, 3))
    return [take_rows(s, np.array([False, True])) if i == 4 else s for i, s in enumerate(steps)][:5] + env_steps(12)[8:]


def with_images() -> list[SimpleStep]:
    "Steps with a frame of noise each"
    rng = np.random.default_rng(3)
    return [s.replace(image=rng.integers(0, 256, (ROWS, 4, 4, 3), np.uint8)) for s in env_steps(9)]


def batches(n: int = 6) -> list[SimpleStep]:
    "Learning batches, tensors; every other one with its own discount"
    g, made = torch.Generator().manual_seed(2), []
    for i in range(n):
        end = torch.rand(BS, 1, generator=g)
        s = SimpleStep(state=torch.randn(BS, S, generator=g), action=torch.rand(BS, A, generator=g) * 2 - 1, next_state=torch.randn(BS, S, generator=g),
                       reward=torch.randn(BS, 1, generator=g), terminated=end < 0.3, truncated=end > 0.8)
        made.append(MergedStep(*SimpleStep._values(s), discount=torch.full((BS, 1), 0.81)) if i % 2 else s)
    return made


def scored(n: int = 6) -> list[SampledStep]:
    "Batches as a prioritised replay has them, on which a policy has said its log-probability"
    g = torch.Generator().manual_seed(8)
    return [SampledStep.of(b, weight=torch.rand(BS, 1, generator=g), index=torch.arange(BS) + i, log_prob=torch.randn(BS, 1, generator=g)) for i, b in enumerate(batches(n))]


def scored_and_valued() -> list:
    "Batches with what the policy's loss says of the actions that it drew"
    return [SampledStep.of(b, value=b.reward * 2) for b in scored()]


def valued(n: int = 6) -> list[SampledStep]:
    "Batches of which a critic has said what their actions are worth; every other one with weights"
    g = torch.Generator().manual_seed(9)
    return [SampledStep.of(b, value=torch.randn(BS, 1, generator=g), weight=torch.rand(BS, 1, generator=g) if i % 2 else None) for i, b in enumerate(batches(n))]


def losses_and_batches(parts: SimpleNamespace, n: int = 5) -> list:
    "A loss of the critic, a loss of the actor, a loss of nobody in particular, and their batch"
    items: list = []
    for b in batches(n):
        items += [Lazy(lambda b=b: {"loss": parts.critic(b.state, b.action).square().mean(), "model": parts.critic}),
                  Lazy(lambda b=b: {"loss": parts.actor(b.state).square().mean(), "model": parts.actor}),
                  Lazy(lambda b=b: {"loss": (parts.critic(b.state, b.action) - 1).square().mean()}), b]
    return items


def numbers(n: int = 40) -> list[dict]:
    "Loss dictionaries that need no network, and a batch after every third"
    return [item for i in range(n) for item in ([{"loss": torch.tensor(float(i) / 3)}] + batches(1) * (i % 3 == 0))]


def signalling(n: int = 20) -> list[dict]:
    "Loss dictionaries with signals, and a batch after every third"
    return [item for i in range(n) for item in ([{"loss": torch.tensor(0.5), "signals": {"q1": torch.tensor(float(i))}}] + batches(1) * (i % 3 == 0))]


# --- networks --------------------------------------------------------------------------------------------------------
class Policy(nn.Module):
    "[B, S] -> [B, A], with batch norm"

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(S), nn.Linear(S, A)

    def forward(self, state):
        return torch.tanh(self.layer(self.norm(state)))


class Value(nn.Module):
    "[B, S] and [B, A] -> [B, 1], with batch norm"

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(S), nn.Linear(S + A, 1)

    def forward(self, state, action):
        return self.layer(torch.cat((self.norm(state), action), 1))


class NormedPolicy(GaussianActor):
    "A stochastic policy with batch norm"

    def __init__(self):
        super().__init__(S, A, (8,))
        self.norm = nn.BatchNorm1d(S)

    def forward(self, state, action=None, noise=None):
        return super().forward(self.norm(state), action, noise)


class NormedValue(StateValue):
    "V(s) with batch norm"

    def __init__(self):
        super().__init__(S, (8,))
        self.norm = nn.BatchNorm1d(S)

    def forward(self, state):
        return super().forward(self.norm(state))


def networks() -> SimpleNamespace:
    "Small networks, most of them with batch norm, the same ones at each call"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        actor, critic = Policy(), Value()
        policy, twins, temperature, worth = NormedPolicy(), Critics(S, A, 2, (8,)), Temperature(0.3), NormedValue()
    t_actor, t_critic, t_twins = target_of(actor), target_of(critic), target_of(twins)
    for t in (*t_actor.parameters(), *t_critic.parameters(), *t_twins.parameters()):
        t.data += 0.3  # they have a way to go
    return SimpleNamespace(actor=actor, critic=critic, t_actor=t_actor, t_critic=t_critic, policy=policy, twins=twins, t_twins=t_twins, temperature=temperature, worth=worth)


class Plain(nn.Module):
    "No batch norm, no activation: `[B, S] -> [B, A]`"

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(S, A)
        nn.init.constant_(self.layer.weight, 0.25)
        nn.init.zeros_(self.layer.bias)

    def forward(self, state):
        return self.layer(state)


# --- pipes that only this suite has ----------------------------------------------------------------------------------
class Through(Stage):
    "Feeds an acting chain with what comes in, so that a chain can be pulled like any stack"
    SOURCES = ("source", "chain")

    def __init__(self, source: Any, chain: Pipe, name: str | None = None):
        super().__init__(source, name)
        self.chain, self.inlet = chain, find_pipe(chain, Inlet)

    def forward(self, item: Any) -> Any:
        self.inlet.item = item
        return self.chain.next()


class Reporting(Stage):
    "In the place of a critic: says of each row of a batch that its error is the size of its reward"

    def forward(self, item: Any) -> Any:
        if isinstance(item, SampledStep):
            self.context.priorities(item.index, item.reward[:, 0].abs())
        return item


def through(make: Callable[[Pipe], Pipe]) -> Callable:
    "`build` for a chain"
    return lambda source, parts: Through(source, make(Inlet()))


# --- the table -------------------------------------------------------------------------------------------------------
BOX = spaces.Box(np.float32([-3, 100]), np.float32([11, 101]))
NOTHING = SimpleNamespace
SPACES = {"observation_space": spaces.Box(-10, 10, (S,)), "action_space": spaces.Box(-2, 2, (A,))}


@dataclass
class Entry:
    "One way to use a pipe"
    build: Callable[[Any, SimpleNamespace], Pipe]  # (source, parts) -> a stack whose head, or whose inside, is the pipe
    feed: Callable[[SimpleNamespace], list] | None = field(default=lambda parts: env_steps())  # parts -> items; None: a source
    parts: Callable[[], SimpleNamespace] = NOTHING  # networks, made anew and equal at each call
    pulls: Callable[[int], int] | None = None  # k -> items pulled for k to come out; None: `forward` says it
    count: int = 14  # items that are looked at, at most
    ends: str = ""  # why items that it does not understand do not come out: it is a head
    context: dict[str, Any] = field(default_factory=dict)  # what else is known at bind
    binds_itself: bool = False  # heads do
    foreign: Callable[[SimpleNamespace], list] = lambda parts: []  # more items that it has to let pass


def entry(make: Callable, feed: Callable = env_steps, **more: Any) -> Entry:
    "An entry without networks: `make(source)`"
    return Entry(lambda source, parts: make(source), lambda parts: feed(), **more)


def learning(make: Callable, feed: Callable = lambda parts: batches(), **more: Any) -> Entry:
    "An entry with networks: `make(source, parts)`"
    return Entry(make, feed, networks, **more)


def _filled() -> ReplayMemory:
    memory = ReplayMemory(20)
    for step in env_steps(6):
        memory.write(step)
    return memory


MINARI = find_spec("minari") is not None
FOLDERS = tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)  # for data sets: each pipe writes to a new one


def _folder() -> Path:
    return Path(FOLDERS.name) / f"data-{next(_NUMBERS)}-v0"


_NUMBERS = itertools.count()


@functools.cache
def _recorded() -> Path:
    "A data set of four short episodes"
    pipe = DatasetWriter(ActionClip(env_steps(9, lengths=(2, 4))), _folder(), unfinished="drop")
    bind(pipe, Context(seed=SEED, **SPACES))
    list(pipe)
    pipe.close()
    return pipe.folder


def _pairs(n: int = 8) -> list:
    return [(s, s.replace(action=s.action / 2)) for s in acted(n)] + [(a, a / 2) for a in actions(3)]


def _played(p: SimpleNamespace) -> list:
    "Losses with gradients, and batches"
    return [x for b in batches() for x in ({"loss": torch.ones(()), "model": p.critic, "grads": [torch.ones_like(t) for t in p.critic.parameters()]}, b)]


def _delayed(source, p):
    "TD3's delayed policy update"
    return Every(source, 2, lambda inlet: BasicOptStepper(LossCollector(ActorLossProcessor(inlet, p.critic, p.actor)), p.actor, 1e-2, filter=True))


def _agent(chain: Pipe) -> AgentHead:
    return AgentHead(ActionScaler(ActionClip(OrnsteinUhlenbeck(chain, max_steps=30))))


def _model_agent() -> AgentHead:
    return _agent(SimpleModelRunner(Inlet(), Plain()))


def _learner(source, p):
    pipe = BasicOptStepper(CriticLossProcessor(source, p.critic, p.t_actor, p.t_critic), p.critic, 1e-2)
    return LearnerHead(SoftTargetUpdater(pipe, p.critic, tau=0.1, target_model=p.t_critic), batches=3, loggers=[])


GOAL = partial(Goal, size=A, length=5)  # observation [2 A]
GOAL_SZ = 2 * A


class Pursuit(nn.Module):
    "Plain, for `Goal`"

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, state):
        return self.gain * (state[:, A:] - state[:, :A])


def _pursuer(noise: bool = True) -> AgentHead:
    chain = SimpleModelRunner(Inlet(), Pursuit())
    return _agent(chain) if noise else AgentHead(ActionScaler(ActionClip(chain)))


def _swinging() -> AgentHead:
    "Acts on the first two things that it sees"
    return _agent(SimpleModelRunner(Inlet(), First()))


class First(nn.Module):
    "For `TorchPendulum`"

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1, bias=False)
        nn.init.constant_(self.layer.weight, 0.25)

    def forward(self, state):
        return self.layer(state)


SHORT = partial(TorchPendulum, max_steps=4)  # episodes end within a test
THERE = {"acting_device": torch.device("cpu")}  # as a TensorStepper announces it


ABSTRACT = {Pipe, Stage, Fan, Exploration, LossProcessor, TDLossProcessor}  # bases: nobody puts them into a stack

TABLE: dict[type, dict[str, Entry]] = {
    IterableSource: {"stateful": entry(IterableSource, pulls=lambda k: k),
                     "replayed": entry(lambda feed: IterableSource(Feed(feed.items)), pulls=lambda k: k),
                     "list": entry(lambda feed: IterableSource(feed.items), pulls=lambda k: k)},
    Foreign: {"": entry(lambda feed: Foreign(ListNode(feed.items)), pulls=lambda k: k)},
    Inlet: {"": Entry(through(lambda inlet: inlet))},
    Every: {"swallows": entry(lambda s: Every(s, 2, lambda inlet: NSkipper(inlet, 2))),
            "multiplies": entry(lambda s: Every(s, 3, lambda inlet: Repeat(inlet, 2))),
            "batches": entry(lambda s: Every(s, 2, lambda inlet: StepBatcher(Repeat(inlet, 2), 3))),
            "nested": entry(lambda s: Every(s, 2, lambda inlet: Every(inlet, 2, lambda i: ActionClip(i, -0.5, 0.5), name="inner"), name="outer")),
            "learns": learning(_delayed)},
    Repeat: {"": entry(lambda s: Repeat(s, 3), pulls=lambda k: -(-k // 3)), "once": entry(lambda s: Repeat(s, 1), pulls=lambda k: k)},
    Take: {"": entry(lambda s: Take(s, 1000), pulls=lambda k: k), "few": entry(lambda s: Take(s, 5), pulls=lambda k: k, ends="it counts items of any kind")},
    NStepper: {"": entry(lambda s: NStepper(s, 3)), "one": entry(lambda s: NStepper(s, 1)), "one, there": entry(lambda s: NStepper(s, 1), lambda: as_torch(env_steps()), context=THERE),
               "gaps": entry(lambda s: NStepper(s, 2), with_gaps, context={"rows": ROWS}),
               "groups": Entry(lambda _, p: NStepper(DoubleBufferedStepper(GOAL, _pursuer(), 3, "sync", SEED), 3), None)},
    NSkipper: {"steps": entry(lambda s: NSkipper(s, 2)), "windows": entry(lambda s: NSkipper(s, 2), windows)},
    FirstLastMerger: {"": entry(lambda s: FirstLastMerger(s, 0.9), windows)},
    NStepFlattener: {"": entry(NStepFlattener, windows)},
    Prefetcher: {"": entry(Prefetcher, pulls=lambda k: min(k + 1, 14)), "windows": entry(Prefetcher, windows, pulls=lambda k: min(k + 1, len(windows()))),
                 "acts": learning(lambda s, p: Prefetcher(OrnsteinUhlenbeck(SimpleModelRunner(s, p.actor))), lambda p: to_act_on(), pulls=lambda k: min(k + 1, 10))},
    Tap: {"": entry(Tap), "windows, few": entry(lambda s: Tap(s, limit=3), windows),
          "gradients": learning(lambda s, p: BasicOptStepper(Tap(s, grads=True), p.critic, 1e-2), losses_and_batches)},
    Tape: {"steps": Entry(lambda _, p: Tape(env_steps()), None),
           "losses": Entry(lambda _, p: Tape(_played(p), {"Value": p.critic}), None, networks)},
    StepBatcher: {"": entry(lambda s: StepBatcher(s, 3)), "smaller": entry(lambda s: StepBatcher(s, 1), lambda: env_steps(6)),
                  "tensors": entry(lambda s: StepBatcher(s, 5), lambda: as_torch(env_steps()))},
    GymStepper: {"random": Entry(lambda _, p: GymStepper(GOAL, n=2, mode="sync", seed=SEED), None),
                 "acts": Entry(lambda _, p: GymStepper(GOAL, _pursuer(), 2, "sync", SEED, random_steps=4), None),
                 "one": Entry(lambda _, p: GymStepper(GOAL, _pursuer(), 1, "single", SEED), None),
                 "vector": Entry(lambda _, p: GymStepper(CountingVector(3), seed=SEED), None)},
    TensorStepper: {"random": Entry(lambda _, p: TensorStepper(SHORT, n=2, seed=SEED), None),
                    "acts": Entry(lambda _, p: TensorStepper(SHORT, _swinging(), 2, SEED, random_steps=4), None),
                    "live": Entry(lambda _, p: TensorStepper(TorchPendulum(3, dtype=torch.float64, max_steps=5), seed=SEED), None)},
    DoubleBufferedStepper: {"acts": Entry(lambda _, p: DoubleBufferedStepper(GOAL, _pursuer(), 3, "sync", SEED, random_steps=4), None),
                            "random": Entry(lambda _, p: DoubleBufferedStepper(GOAL, n=2, mode="sync", seed=SEED), None)},
    EpisodeStepper: {"": Entry(lambda _, p: EpisodeStepper(GOAL, _pursuer(noise=False), episodes=5, seed=SEED, n=2), None)},
    ReplayWriter: {"": entry(lambda s: ReplayWriter(s, ReplayMemory(11))),
                   "there": entry(lambda s: ReplayWriter(s, ReplayMemory(11)), lambda: as_torch(env_steps()), context=THERE)},
    ReplaySampler: {"offline": entry(lambda s: ReplaySampler(s, _filled(), BS))},
    ExperienceReplay: {"": entry(lambda s: ExperienceReplay(s, BS, 12, warmup=7)),
                       "repeated": entry(lambda s: ExperienceReplay(s, BS, 12, repeat=2), pulls=lambda k: 1 + -(-k // 2)),
                       "there": entry(lambda s: ExperienceReplay(s, BS, 13), lambda: as_torch(env_steps()), context=THERE),
                       "double": entry(lambda s: ExperienceReplay(s, BS, 12), context={"dtype": torch.float64})},
    PrioritizedSampler: {"offline": entry(lambda s: Reporting(PrioritizedSampler(s, _filled(), BS, beta_steps=9)))},
    PrioritizedReplay: {"": entry(lambda s: PrioritizedReplay(s, BS, 12, warmup=7)),
                        "learns": entry(lambda s: Reporting(PrioritizedReplay(s, BS, 12, beta_steps=20))),
                        "repeated": entry(lambda s: Reporting(PrioritizedReplay(s, BS, 12, repeat=2)), pulls=lambda k: 1 + -(-k // 2)),
                        "double": entry(lambda s: Reporting(PrioritizedReplay(s, BS, 12)), context={"dtype": torch.float64})},
    EpisodeWriter: {"": entry(lambda s: EpisodeWriter(s, ReplayMemory(11)), goal_steps), "small": entry(lambda s: EpisodeWriter(s, ReplayMemory(3)))},
    HindsightReplay: {"": entry(lambda s: HindsightReplay(s, BS, 11, warmup=7, compute_reward=near), goal_steps),
                      "repeated": entry(lambda s: HindsightReplay(s, BS, 12, strategy="episode", compute_reward=near, repeat=2), goal_steps, pulls=lambda k: 1 + -(-k // 2)),
                      "double": entry(lambda s: HindsightReplay(s, BS, 12, strategy="final", compute_reward=near, compute_terminated=lambda a, d, info: near(a, d, info) > 9),
                                      goal_steps, context={"dtype": torch.float64}),
                      "without": entry(lambda s: HindsightReplay(s, BS, 12, k=0), goal_steps)},
    OfflineReplay: {"": Entry(lambda _, p: OfflineReplay(_filled(), BS, SEED), None),
                    "double": Entry(lambda _, p: OfflineReplay(_filled(), BS), None, context={"dtype": torch.float64}),
                    **({"data set": Entry(lambda _, p: OfflineReplay(_recorded(), BS), None)} if MINARI else {})},
    MixedReplay: {"": entry(lambda s: MixedReplay(s, _filled(), 0.25, BS, 12, warmup=7)),
                  "repeated, double": entry(lambda s: MixedReplay(s, _filled(), 0.5, BS, 12, repeat=2), pulls=lambda k: -(-k // 2), context={"dtype": torch.float64})},
    OrnsteinUhlenbeck: {"steps": entry(lambda s: OrnsteinUhlenbeck(s, A, max_steps=15), acted),
                        "arrays": entry(lambda s: OrnsteinUhlenbeck(s, mu=0.3), actions),
                        "tensors": entry(OrnsteinUhlenbeck, lambda: as_torch(acted())),
                        "there": entry(lambda s: OrnsteinUhlenbeck(s, mu=0.3), lambda: as_torch(acted()), context=THERE),
                        "pairs": entry(lambda s: OrnsteinUhlenbeck(s, ret_original=True), acted)},
    GaussianNoise: {"": entry(lambda s: GaussianNoise(s, min_epsilon=0.1, max_steps=15), acted),
                    "there": entry(GaussianNoise, lambda: as_torch(acted()), context=THERE)},
    ExplorationComparisonLogger: {"": entry(ExplorationComparisonLogger, _pairs), "few": entry(lambda s: ExplorationComparisonLogger(s, keep=3), _pairs)},
    SimpleModelRunner: {"numpy": learning(lambda s, p: SimpleModelRunner(s, p.actor), lambda p: to_act_on()),
                        "torch": learning(lambda s, p: SimpleModelRunner(s, p.actor), lambda p: as_torch(to_act_on())),
                        "bare": learning(lambda s, p: SimpleModelRunner(s, p.actor), lambda p: [x.state for x in to_act_on()])},
    PolicyRunner: {"numpy": learning(lambda s, p: PolicyRunner(s, p.policy), lambda p: to_act_on(), context={"action_space": BOX}),
                   "torch": learning(lambda s, p: PolicyRunner(s, p.policy), lambda p: as_torch(to_act_on())),
                   "mode": learning(lambda s, p: PolicyRunner(s, p.policy, deterministic=True), lambda p: to_act_on()),
                   "bare": learning(lambda s, p: PolicyRunner(s, p.policy), lambda p: [x.state for x in to_act_on()])},
    ActionClip: {"steps": entry(lambda s: ActionClip(s, -0.5, 0.5), acted), "tensors": entry(ActionClip, lambda: as_torch(actions()))},
    ActionUnbatcher: {"": entry(ActionUnbatcher, lambda: acted(rows=1)), "bare": entry(ActionUnbatcher, lambda: [a[:1] for a in actions()])},
    StepFieldSelector: {"": entry(lambda s: StepFieldSelector(s, "action"), acted),
                        "nested": entry(StepFieldSelector, lambda: [s.replace(state={"a": s.state, "b": (s.action,)}) for s in acted()])},
    NumpyConverter: {"": entry(NumpyConverter, lambda: as_torch(acted())), "bare": entry(NumpyConverter, lambda: as_torch(actions()))},
    ActionScaler: {"": entry(ActionScaler, acted, context={"action_space": BOX}), "there": entry(ActionScaler, lambda: as_torch(acted()), context={"action_space": BOX}),
                   "unbound": entry(ActionScaler, acted)},
    AgentHead: {"": Entry(through(lambda inlet: _agent(inlet)), lambda p: acted(), context={"action_space": BOX}),
                "learned": learning(lambda s, p: Through(s, AgentHead(OrnsteinUhlenbeck(SimpleModelRunner(Inlet(), p.actor)))), lambda p: to_act_on())},
    CriticLossProcessor: {"": learning(lambda s, p: CriticLossProcessor(s, p.critic, p.t_actor, p.t_critic)),
                          "nsteps": learning(lambda s, p: CriticLossProcessor(s, p.critic, p.t_actor, p.t_critic, nsteps=3, loss=nn.SmoothL1Loss))},
    ActorLossProcessor: {"": learning(lambda s, p: ActorLossProcessor(s, p.critic, p.actor)),
                         "clipped": learning(lambda s, p: ActorLossProcessor(s, p.critic, p.actor, 0.01))},
    SmoothedCriticLossProcessor: {"": learning(lambda s, p: SmoothedCriticLossProcessor(s, p.twins, p.t_actor, p.t_twins)),
                                  "single": learning(lambda s, p: SmoothedCriticLossProcessor(s, p.critic, p.t_actor, p.t_critic)),
                                  "nsteps": learning(lambda s, p: SmoothedCriticLossProcessor(s, p.critic, p.t_actor, p.t_critic, nsteps=3, loss=nn.SmoothL1Loss)),
                                  "weighted": learning(lambda s, p: SmoothedCriticLossProcessor(s, p.twins, p.t_actor, p.t_twins), lambda p: scored())},
    SoftCriticLossProcessor: {"": learning(lambda s, p: SoftCriticLossProcessor(s, p.twins, p.policy, p.temperature, p.t_twins)),
                              "single": learning(lambda s, p: SoftCriticLossProcessor(s, p.critic, p.policy, p.temperature, p.t_critic)),
                              "weighted": learning(lambda s, p: SoftCriticLossProcessor(s, p.twins, p.policy, p.temperature, p.t_twins), lambda p: scored())},
    SoftActorLossProcessor: {"": learning(lambda s, p: SoftActorLossProcessor(s, p.twins, p.policy, p.temperature)),
                             "single": learning(lambda s, p: SoftActorLossProcessor(s, p.critic, p.policy, p.temperature)),
                             "signals": learning(lambda s, p: SoftActorLossProcessor(s, p.twins, p.policy, p.temperature, signals=True))},
    SoftValueLossProcessor: {"": learning(lambda s, p: SoftValueLossProcessor(s, p.worth), lambda p: scored_and_valued()),
                             "signals": learning(lambda s, p: SoftValueLossProcessor(s, p.worth, signals=True), lambda p: scored_and_valued())},
    ValueCriticLossProcessor: {"": learning(lambda s, p: ValueCriticLossProcessor(s, p.twins, p.worth)),
                               "scaled, signals": learning(lambda s, p: ValueCriticLossProcessor(s, p.critic, p.worth, 0.9, 5.0, signals=True), lambda p: scored())},
    TemperatureLossProcessor: {"": learning(lambda s, p: TemperatureLossProcessor(s, p.temperature), lambda p: scored()),
                               "given": learning(lambda s, p: TemperatureLossProcessor(s, p.temperature, -0.5), lambda p: scored())},
    BasicOptStepper: {"": learning(lambda s, p: BasicOptStepper(s, p.critic, 1e-2), losses_and_batches,
                                   foreign=lambda p: [{"loss": torch.ones(()), "model": p.actor}]),
                      "filters": learning(lambda s, p: BasicOptStepper(s, p.critic, 1e-2, filter=True), losses_and_batches),
                      "momentum": learning(lambda s, p: BasicOptStepper(s, p.critic, 1e-2, partial(torch.optim.SGD, momentum=0.9)), losses_and_batches),
                      "adds up": learning(lambda s, p: BasicOptStepper(s, p.critic, 1e-2, do_zero_grad=False), losses_and_batches)},
    IQLValueLossProcessor: {"": learning(lambda s, p: IQLValueLossProcessor(s, p.worth, p.t_twins)),
                            "weighted": learning(lambda s, p: IQLValueLossProcessor(s, p.worth, p.t_critic, 0.9, (-1.0,), signals=True), lambda p: scored())},
    IQLCriticLossProcessor: {"": learning(lambda s, p: IQLCriticLossProcessor(s, p.twins, p.worth)),
                             "weighted": learning(lambda s, p: IQLCriticLossProcessor(s, p.critic, p.worth, calculate_priority=False, signals=True), lambda p: scored())},
    IQLActorLossProcessor: {"": learning(lambda s, p: IQLActorLossProcessor(s, p.policy, p.worth), lambda p: valued()),
                            "signals": learning(lambda s, p: IQLActorLossProcessor(s, p.policy, p.worth, 0.3, 2.0, (2.0,), signals=True), lambda p: valued())},
    CloningLossProcessor: {"": learning(lambda s, p: CloningLossProcessor(s, p.policy)), "deterministic": learning(lambda s, p: CloningLossProcessor(s, p.actor, signals=True)),
                           "weighted": learning(lambda s, p: CloningLossProcessor(s, p.policy), lambda p: scored())},
    JointOptStepper: {"": learning(lambda s, p: JointOptStepper(s, [p.critic, p.actor], 1e-2), losses_and_batches),
                      "rates": learning(lambda s, p: JointOptStepper(s, [p.actor, p.critic], (1e-2, 1e-3), partial(torch.optim.SGD, momentum=0.9), filter=True), losses_and_batches)},
    EpsilonPolicyRunner: {"": learning(lambda s, p: EpsilonPolicyRunner(s, p.policy), lambda p: to_act_on(), context={"action_space": BOX}),
                          "mode": learning(lambda s, p: EpsilonPolicyRunner(s, p.policy, deterministic=True, epsilon=0.5), lambda p: to_act_on())},
    HystereticCriticLossProcessor: {"": learning(lambda s, p: HystereticCriticLossProcessor(s, p.critic, p.t_actor, p.t_critic, q_decrease_rate=0.25)),
                                    "nsteps": learning(lambda s, p: HystereticCriticLossProcessor(s, p.critic, p.t_actor, p.t_critic, nsteps=3, loss=nn.SmoothL1Loss))},
    SoftTargetUpdater: {"": learning(lambda s, p: SoftTargetUpdater(s, p.critic, tau=0.1, target_model=p.t_critic)),
                        "own, every 3": learning(lambda s, p: SoftTargetUpdater(s, p.critic, 3, 1.0))},
    EpisodeCollector: {"": entry(EpisodeCollector), "there": entry(EpisodeCollector, lambda: as_torch(env_steps()), context=THERE)},
    RollingTerminatedRewardCollector: {"": entry(lambda s: RollingTerminatedRewardCollector(s, 3)),
                                       "there": entry(lambda s: RollingTerminatedRewardCollector(s, 3), lambda: as_torch(env_steps()), context=THERE)},
    BatchCollector: {"": entry(BatchCollector, batches)},
    EpocherCollector: {"": entry(EpocherCollector, batches), "batches": entry(lambda s: EpocherCollector(s, 2), batches)},
    VideoCollector: {"": entry(VideoCollector, lambda: with_images()), "few": entry(lambda s: VideoCollector(s, frames=2), lambda: with_images())},
    EpochLength: {"": entry(lambda s: EpochLength(s, 3))},
    SignalCollector: {"": entry(SignalCollector, signalling)},
    LossCollector: {"": entry(LossCollector, numbers, count=60), "filters": entry(lambda s: LossCollector(s, filter=True), numbers)},
    LearnerHead: {"": learning(_learner, pulls=lambda k: k, ends="a head hands on batches only", binds_itself=True)},
}


if MINARI:
    TABLE[DatasetSteps] = {"": Entry(lambda _, p: DatasetSteps(_recorded()), None)}
    TABLE[DatasetWriter] = {"": entry(lambda s: DatasetWriter(s, _folder(), unfinished="drop"), context=SPACES)}
else:
    ABSTRACT |= {DatasetSteps, DatasetWriter}


# --- comparing -------------------------------------------------------------------------------------------------------
def kept(item: Any) -> Any:
    "An item as it is now"
    return {k: v if isinstance(v, nn.Module) else copied(v) for k, v in item.items()} if type(item) is dict else copied(item)


def difference(a: Any, b: Any, at: str = "item") -> str:
    "Where two nests differ, to the bit; empty where they do not. Networks count as equal when their classes are"
    a, b = (x.item() if isinstance(x, np.generic) else x for x in (a, b))  # as a file keeps it
    if isinstance(a, nn.Module):
        return "" if type(a) is type(b) else f"{at}: {type(a)} and {type(b)}"
    if type(a) is not type(b):
        return f"{at}: {type(a)} and {type(b)}"
    if isinstance(a, (np.ndarray, torch.Tensor)):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{at}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        x, y = (np.ascontiguousarray(v.detach().numpy() if isinstance(v, torch.Tensor) else v).tobytes() for v in (a, b))
        return "" if x == y else f"{at}: {a} and {b}"
    if isinstance(a, SimpleStep):
        if a.names() != b.names():
            return f"{at}: fields {a.names()} and {b.names()}"
        a, b = ({n: getattr(s, n) for n in s.names()} for s in (a, b))
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{at}: keys {list(a)} and {list(b)}"
        return next((d for k in a if (d := difference(a[k], b[k], f"{at}.{k}"))), "")
    if isinstance(a, (tuple, list)):
        if len(a) != len(b):
            return f"{at}: {len(a)} and {len(b)} of them"
        return next((d for i, (x, y) in enumerate(zip(a, b)) if (d := difference(x, y, f"{at}[{i}]"))), "")
    return "" if a is b or a == b or (a != a and b != b) else f"{at}: {a!r} and {b!r}"
