"""The law of pipes, contract by contract, over every pipe of the package. A pipe that is not in `contract_table` fails."""
from __future__ import annotations

import copy
import importlib
import json
import os
import pickle
import pkgutil
import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from contract_table import (
    ABSTRACT,
    BS,
    GOAL,
    SEED,
    TABLE,
    A,
    Entry,
    Lazy,
    Plain,
    Stateful,
    acted,
    actions,
    batches,
    difference,
    env_steps,
    fresh,
    kept,
    networks,
    ruin,
)
from torch import nn

import fastrl_pipes
from fastrl_pipes.agents.core import AgentHead, SimpleModelRunner
from fastrl_pipes.core import copied
from fastrl_pipes.envs.doubles import CountingVector
from fastrl_pipes.envs.episodes import EpisodeStepper
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.errors import CheckpointError, Interrupted
from fastrl_pipes.exploration.noise import Exploration, OrnsteinUhlenbeck
from fastrl_pipes.learner.checkpoint import from_plain, to_plain
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.loggers.collectors import BatchCollector, LossCollector
from fastrl_pipes.loggers.recorder import Recorder
from fastrl_pipes.memory.experience_replay import ExperienceReplay
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.pipes.control import Every, Inlet
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.core import (
    BaseNode,
    Fan,
    Foreign,
    IterableSource,
    Pipe,
    Stage,
)
from fastrl_pipes.pipes.walk import (
    bind,
    named_modules,
    named_pipes,
    snapshot,
    traverse,
)
from fastrl_pipes.pipes.graph import describe, find_pipes, mermaid, pipe_to_device, probe
from fastrl_pipes.pipes.nstep import NStepper
from fastrl_pipes.processors.dpg import ActorLossProcessor, CriticLossProcessor

ON_STANDIN = BaseNode.__module__ == "standin"
needs_torchdata = pytest.mark.skipif(ON_STANDIN, reason="the stand-in brings no other nodes")
ENTRIES = [pytest.param(cls, e, id=cls.__name__ + (f"-{name}" if name else "")) for cls, uses in TABLE.items()
           for name, e in list(uses.items())[:1 if ON_STANDIN else None]]  # one use of each pipe shows what the base class does
every = pytest.mark.parametrize("cls, e", ENTRIES)
fed = pytest.mark.parametrize("cls, e", [p for p in ENTRIES if p.values[1].feed is not None])
SOURCES = (IterableSource, Foreign)  # what they hand out is given to their constructor
lets_pass = pytest.mark.parametrize("cls, e", [p for p in ENTRIES if p.values[1].feed is not None and not p.values[1].ends and p.values[0] not in SOURCES])
fans = pytest.mark.parametrize("cls, e", [p for p in ENTRIES if p.values[1].feed is not None and issubclass(p.values[0], Fan)])


# --- building and pulling --------------------------------------------------------------------------------------------
class Rig:
    "A pipe over a source, bound and not started"

    def __init__(self, cls: type, e: Entry, items: list | None = None, poison: bool = False, extra=lambda parts: []):
        self.cls, self.e, self.parts = cls, e, e.parts()
        if e.feed is None:
            self.items, self.feed, self.head = [], None, e.build(None, self.parts)
        else:
            self.items = (e.feed(self.parts) if items is None else items) + extra(self.parts)
            self.feed = Stateful(self.items, poison)
            self.head = e.build(self.feed, self.parts)
        if not e.binds_itself:
            bind(self.head, Context(**{"seed": SEED, "recorder": Recorder(), **e.context}))

    @property
    def pipe(self) -> Pipe:
        "The pipe itself, where `head` only drives it"
        return next(p for p in reversed(traverse(self.head)) if type(p) is self.cls)

    def take(self, n: int | None = None) -> list:
        "The next n items, as they are when they come out"
        return [kept(item) for item in islice(self.head, self.e.count if n is None else n)]

    def pulled(self) -> int:
        return 0 if self.feed is None else self.feed.taken

    def learned(self) -> dict:
        "Networks and optimizers; what a replay keeps belongs to the stream"
        return copied({k: m.state_dict() for k, m in named_modules(self.head).items() if not isinstance(m, ReplayMemory)})

    def learn_as(self, state: dict) -> None:
        for name, module in named_modules(self.head).items():
            if name in state:
                module.load_state_dict(copied(state[name]))


WHOLE: dict[int, list] = {}


def whole_of(cls: type, e: Entry) -> list:
    "What comes out when nothing happens to it"
    if id(e) not in WHOLE:
        WHOLE[id(e)] = Rig(cls, e).take()
    return WHOLE[id(e)]


def check_same(a, b, what=""):
    found = difference(a, b)
    assert not found, f"{what} {found}"


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(subclasses, cls.__subclasses__()))


# --- the table itself ------------------------------------------------------------------------------------------------
def test_the_table_holds_every_pipe_of_the_package():
    for module in pkgutil.walk_packages(fastrl_pipes.__path__, "fastrl_pipes."):
        importlib.import_module(module.name)
    ours = {c for c in subclasses(Pipe) if c.__module__.startswith("fastrl_pipes.")}
    assert ours - ABSTRACT == set(TABLE), "put a new pipe into TABLE of contract_table.py, or a base into ABSTRACT"
    assert all(TABLE.values())


def test_the_bases_cannot_be_pulled():
    for base in (Stage, Fan, Exploration):
        with pytest.raises(NotImplementedError, match=base.__name__):
            next(base(actions()))


@every
def test_what_comes_out_does_not_depend_on_the_process(cls, e):
    "Twice the same: without this the other tests say nothing"
    a, b = Rig(cls, e), Rig(cls, e)
    first, second = a.take(), b.take()
    assert len(first) >= 3
    check_same(first, second)


# --- a. pass-through -------------------------------------------------------------------------------------------------
def strangers() -> list:
    return [object(), "a string", {"unrelated": 1}, 7, ("a", "b"), frozenset()]


@lets_pass
def test_passes_on_what_it_does_not_understand(cls, e):
    plain = Rig(cls, e).take(1000)
    rig = Rig(cls, e)
    more = strangers() + e.foreign(rig.parts)
    mixed = [Lazy(lambda x=x: x) for x in more]
    for i, item in enumerate(rig.items):
        mixed += [item, Lazy(lambda x=more[i % len(more)]: x)]
    rig.feed.items[:] = mixed
    came, own = [], []
    for item in rig.head:
        (came if any(item is x for x in more) else own).append(kept(item))
    assert len(came) == len(more) + (len(mixed) - len(more)) // 2, "each stranger comes out once, as it went in"
    check_same(own, plain, "without the strangers:")


@lets_pass
def test_passes_strangers_in_a_probe_as_well(cls, e):
    if cls is Inlet:
        return  # a source, which is asked with None
    rig = Rig(cls, e)
    for x in strangers() + e.foreign(rig.parts):
        out = rig.pipe.probe(x)
        assert len(out) == 1 and out[0] is x


# --- b. no pulling ahead ---------------------------------------------------------------------------------------------
def outputs_of(cls, e, items):
    "How many come out of each item, by calling `forward` of one pipe after the other by hand"
    rig = Rig(cls, e, [])
    rig.head.start()
    chain, p = [], rig.head
    while p.source is not None:
        chain.insert(0, p)
        p = p.source
    for item in items(rig.parts):
        out = [fresh(item)]
        for p in chain:
            out = [o for i in out for o in (p.forward(i) if isinstance(p, Fan) else (p.forward(i),))]
        yield len(out)


def least(cls, e, n):
    "For k = 1 ... n: how many items must have been pulled"
    if e.pulls is not None:
        return [e.pulls(k) for k in range(1, n + 1)]
    needed = []
    for i, outputs in enumerate(outputs_of(cls, e, e.feed), 1):
        needed += [i] * outputs
    return needed[:n]


@fed
def test_pulls_exactly_what_it_needs(cls, e):
    if cls is Foreign or e is TABLE[IterableSource]["list"]:
        return  # its items are not taken from the feed
    rig = Rig(cls, e)
    assert rig.pulled() == 0, "pulled by the constructor or by bind"
    rig.head.start()
    assert rig.pulled() == 0, "pulled by the start"
    rig.head.reset(None)
    assert rig.pulled() == 0, "pulled by reset"
    feed = next((p.iterable for p in traverse(rig.head) if isinstance(p, IterableSource)), rig.feed)
    pulls = []
    for _ in islice(rig.head, e.count):
        rig.head.get_state()  # where something is pulled ahead, waits until it is there
        pulls.append(feed.taken)
    assert pulls == least(cls, e, len(pulls)) and len(pulls) >= 3


@every
def test_a_probe_a_description_and_a_state_pull_nothing(cls, e):
    rig = Rig(cls, e)
    rig.head.start()
    if e.feed is None:
        counters = [p.backend for p in find_pipes(rig.head, GymStepper)]
        steps = lambda: [b.steps for b in counters]  # noqa: E731
    else:
        steps = rig.pulled
    before = steps()
    probe(rig.head), describe(rig.head), mermaid(rig.head), rig.head.get_state(), snapshot(rig.head)
    assert steps() == before
    check_same(rig.take(), whole_of(cls, e))


# --- c. reset(None) --------------------------------------------------------------------------------------------------
@every
def test_reset_restarts_the_stream_and_keeps_what_was_learned(cls, e):
    rig = Rig(cls, e)
    rig.take()
    learned = rig.learned()
    rig.head.reset(None)
    check_same(rig.learned(), learned, "reset(None) changed")
    twin = Rig(cls, e)
    twin.head.start()
    twin.learn_as(learned)
    if isinstance(rig.head, GymStepper) and isinstance(rig.head.settings["envs"], CountingVector):
        return  # counts its resets
    check_same(rig.take(), twin.take(), "the second time")


@fed
def test_reset_forgets_what_is_pending(cls, e):
    for k in range(5):
        rig = Rig(cls, e)
        rig.take(k)
        rig.head.reset(None)
        twin = Rig(cls, e)
        twin.head.start()
        twin.learn_as(rig.learned())
        check_same(rig.take(), twin.take(), f"reset after {k}:")


@every
def test_a_lazy_start_starts_only_what_has_not_started(cls, e):
    rig = Rig(cls, e)
    whole = whole_of(cls, e)
    first = rig.take(3)
    above = Above(rig.head)
    rest = [kept(item) for item in islice(above, len(whole) - 3)]
    check_same(first + rest, whole)


class Above(Stage):
    "Put on a stack that runs"

    def forward(self, item):
        return item


# --- d. resume at any item -------------------------------------------------------------------------------------------
def through_a_file(state):
    "As a checkpoint has it"
    tensors = {}
    plain = json.loads(json.dumps(to_plain(state, tensors)))
    return from_plain(plain, {k: t.clone() for k, t in tensors.items()})


@every
def test_resumes_at_any_item(cls, e):
    rig = Rig(cls, e)
    rig.head.start()
    states, came = [snapshot(rig.head)], []
    while len(came) < e.count and (item := rig.take(1)):
        came += item
        states.append(snapshot(rig.head))
    for k, state in enumerate(states):
        other = Rig(cls, e)
        other.head.reset(state if k % 2 else through_a_file(state))
        check_same(other.take(len(came) - k), came[k:], f"from {k}:")
        check_same(snapshot(other.head), states[-1], f"state, from {k}:")
    assert len(states) >= 4


@every
def test_goes_back_and_goes_on(cls, e):
    rig = Rig(cls, e)
    whole = whole_of(cls, e)
    first = rig.take(2)
    state = snapshot(rig.head)
    rig.take(3)
    rig.head.reset(state)
    third = rig.take(1)
    rig.head.reset(rig.head.get_state())
    rest = rig.take(len(whole) - 3)
    check_same(first + third + rest, whole)
    for other in (rig, Rig(cls, e)):
        other.head.reset(state)
        check_same(other.take(len(whole) - 2), whole[2:], "a state is not used up:")


@every
def test_a_state_can_be_taken_before_the_first_pull(cls, e):
    state = copied(Rig(cls, e).head.get_state())
    other = Rig(cls, e)
    other.head.reset(state)
    check_same(other.take(), whole_of(cls, e))


@every
def test_a_state_of_another_stack_is_refused(cls, e):
    rig = Rig(cls, e)
    before = rig.take(2)
    state = rig.head.get_state()
    for kind in ("pipes", "modules"):
        with pytest.raises(CheckpointError, match="Stranger"):
            rig.head.reset({**state, kind: {**state[kind], "Stranger": {}}})
    check_same(before + rig.take(2), whole_of(cls, e)[:4], "after the refusal")


# --- e. devices ------------------------------------------------------------------------------------------------------
@pytest.fixture
def moving(monkeypatch):
    "A move gives every tensor of a network new memory, as it does from one device to another; on the CPU it would not"
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **kwargs: self._apply(torch.clone))


@every
@pytest.mark.parametrize("after", [0, 2])
def test_goes_on_after_a_move(cls, e, after, moving):
    rig, twin, whole = Rig(cls, e), Rig(cls, e), whole_of(cls, e)
    first = rig.take(after)
    assert pipe_to_device(rig.head, "cpu") is rig.head
    assert all(p.context.device == torch.device("cpu") for p in traverse(rig.head))
    check_same(first + rig.take(len(whole) - after), whole)
    twin.take(len(whole))
    if e.feed is not None:
        check_same(snapshot(rig.head), snapshot(twin.head), "the state after a move:")
    assert not any(t.is_meta for m in named_modules(rig.head).values() if isinstance(m, nn.Module) for t in m.state_dict().values())


# --- f. probes -------------------------------------------------------------------------------------------------------
def world(rig):
    "Everything that a probe could disturb"
    networks = [m for m in named_modules(rig.head).values() if isinstance(m, nn.Module)]
    flags = [[(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in n.modules()] for n in networks]
    grads = [[copied(p.grad) for p in n.parameters()] for n in networks]
    envs = [p.backend.steps for p in find_pipes(rig.head, GymStepper)]
    numpy = np.random.get_state(legacy=False)["state"]
    return copied([random.getstate(), numpy, torch.get_rng_state(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
                   flags, grads, envs, snapshot(rig.head)])


@every
def test_a_probe_has_no_effect(cls, e):
    rig = Rig(cls, e)
    first = rig.take(3)
    items = [fresh(item) for item in rig.items[:4]]
    before = world(rig)
    for item in items:
        went = rig.pipe.probe(item)
        assert isinstance(went, tuple)
    check_same(world(rig), before, "probing an item changed")
    probe(rig.head)
    check_same(world(rig), before, "probing the stack changed")
    for k, m in named_modules(rig.head).items():
        if isinstance(m, nn.Module):
            m.train(not m.training)
    before = world(rig)
    for item in items:
        rig.pipe.probe(item)
    check_same(world(rig), before, "probing an item changed, in the other mode,")
    if not named_modules(rig.head):
        check_same(first + rig.take(), Rig(cls, e).take(e.count + 3))


class Dreamer(nn.Module):
    "Draws a number for each action, in any mode"

    def __init__(self):
        super().__init__()
        self.layer = Plain()

    def forward(self, state):
        return self.layer(state) + torch.randn(len(state), A)


def test_a_probe_of_networks_that_draw_leaves_the_generators_alone():
    p = networks()
    actor = Dreamer()
    acts = GymStepper(GOAL, AgentHead(SimpleModelRunner(Inlet(), WithGoal(actor))), mode="single", seed=0)
    learns = ActorLossProcessor(Given(batches()[0]), p.critic, actor)
    for stack in (acts, learns):
        bind(stack, Context(seed=0))
        before = torch.get_rng_state()
        flows = probe(stack)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(flow.went for name, flow in flows.items() if name not in ("Inlet", "SimpleModelRunner", "AgentHead"))


class WithGoal(nn.Module):
    "Looks at a part of the state only"

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, state):
        return self.inside(state[:, :3])


class Given(Pipe):
    "A source that knows in a probe what it will hand out"
    SOURCES = ()

    def __init__(self, item):
        super().__init__()
        self.item = item

    def next(self):
        return self.item

    def probe(self, item):
        return (self.item,)


# --- g. the graph ----------------------------------------------------------------------------------------------------
@every
def test_the_graph_is_walked_sources_first(cls, e):
    rig = Rig(cls, e)
    walk = traverse(rig.head)
    place = {id(p): i for i, p in enumerate(walk)}
    assert len(place) == len(walk) and walk[-1] is rig.head and rig.pipe in walk
    assert all(place[id(s)] < place[id(p)] for p in walk for s in p.sources)
    names = named_pipes(rig.head)
    assert list(names.values()) == walk and all(names)
    held = {id(v) for p in walk for v in vars(p).values() if isinstance(v, Pipe)}
    assert held <= set(place), "a pipe holds another one that its SOURCES do not declare"


@every
def test_settings_are_what_the_constructor_was_given(cls, e):
    import inspect
    pipe = Rig(cls, e).pipe
    parameters = [n for n in inspect.signature(cls.__init__).parameters if n not in ("self", "name", *cls.SOURCES)]
    assert list(pipe.settings) == parameters
    assert "name" in inspect.signature(cls.__init__).parameters, "a pipe can be given a name"
    with pytest.raises(TypeError, match=f"{cls.__name__}.*arguments are"):
        cls(nonsense=1, **{n: None for n in inspect.signature(cls.__init__).parameters if n != "self"})


@every
def test_rebuilt_from_its_settings_it_is_equal(cls, e):
    rig = Rig(cls, e)
    new: dict = {}
    for p in traverse(rig.head):
        new[id(p)] = p.rebuilt(*[new[id(s)] for s in p.sources])
    head = new[id(rig.head)]
    assert type(head) is type(rig.head) and head is not rig.head
    assert describe(head, shapes=False) == describe(rig.head, shapes=False) and list(named_pipes(head)) == list(named_pipes(rig.head))
    assert [sorted(p.settings) for p in traverse(head)] == [sorted(p.settings) for p in traverse(rig.head)]
    rig.head = head
    if not e.binds_itself:
        bind(head, Context(**{"seed": SEED, "recorder": Recorder(), **e.context}))
    if not (isinstance(head, GymStepper) and isinstance(head.settings["envs"], CountingVector)):
        check_same(rig.take(), whole_of(cls, e))


# --- h. arrays are valid until the next pull -------------------------------------------------------------------------
@fed
def test_keeps_copies_of_what_it_keeps(cls, e):
    rig = Rig(cls, e, poison=True)
    check_same(rig.take(), whole_of(cls, e))


@fed
def test_what_the_outside_gets_is_its_own(cls, e):
    "Through the door to the outside, items outlive the pulls that follow"
    whole = whole_of(cls, e)
    rig = Rig(cls, e, poison=True)
    held = list(islice(rig.head, len(whole)))
    list(rig.head)
    check_same([kept(item) for item in held], whole)


@every
def test_what_the_outside_gets_may_be_changed(cls, e):
    if cls is Foreign:
        return  # hands on the node's own items
    whole, rig, came = Rig(cls, e).take(), Rig(cls, e), []
    for item in islice(rig.head, len(whole)):
        came.append(kept(item))
        ruin(item)
    check_same(came, whole)


@every
def test_a_snapshot_is_kept(cls, e):
    rig = Rig(cls, e)
    rig.take(2)
    state = snapshot(rig.head)
    before = through_a_file(state)
    rig.take()
    check_same(through_a_file(state), before)


# --- i. nodes that are not ours --------------------------------------------------------------------------------------
def let_go(e, *nodes):
    "A node that is through has ended its thread; one on endless environments would wait for it"
    for node in nodes:
        while e.feed is not None and next(node, None) is not None:
            pass


@needs_torchdata
@every
def test_under_a_prefetcher(cls, e):
    from torchdata.nodes import Prefetcher
    whole = whole_of(cls, e)
    rig = Rig(cls, e, poison=True)
    node = Prefetcher(rig.head, prefetch_factor=3, snapshot_frequency=0)
    held = list(islice(node, len(whole)))
    check_same([kept(item) for item in held], whole, "Prefetcher:")
    let_go(e, node)


@needs_torchdata
@every
def test_a_prefetcher_put_on_a_running_stack_does_not_reset_it(cls, e):
    from torchdata.nodes import ParallelMapper, Prefetcher
    whole = whole_of(cls, e)
    for put in (lambda p: Prefetcher(p, 2, snapshot_frequency=0), lambda p: ParallelMapper(p, lambda x: x, num_workers=1, method="thread", snapshot_frequency=0)):
        rig = Rig(cls, e)
        first = rig.take(3)
        node = put(rig.head)
        rest = [kept(item) for item in islice(node, len(whole) - 3)]
        check_same(first + rest, whole, type(node).__name__)
        let_go(e, node)


@needs_torchdata
@fed
def test_a_foreign_node_above_resumes(cls, e):
    "Its state holds ours, taken ahead of what was handed out: the two belong together"
    from torchdata.nodes import Prefetcher
    whole = whole_of(cls, e)
    for frequency in (1, 2):
        rig = Rig(cls, e)
        node = Prefetcher(rig.head, 3, snapshot_frequency=frequency)
        list(islice(node, 3))
        state = node.state_dict()
        assert set(state["snapshot"]) == {"modules", "pipes"}, "our state is nested in that of the node"
        list(islice(node, 2))
        other = Rig(cls, e)
        again = Prefetcher(other.head, 3, snapshot_frequency=frequency)
        again.reset(copied(state))
        check_same([kept(item) for item in islice(again, len(whole) - 3)], whole[3:], f"snapshot_frequency={frequency}:")
        let_go(e, node, again)


def prefetched(items, size=3, frequency=1):
    from torchdata.nodes import Prefetcher
    return Prefetcher(IterableSource(items), size, snapshot_frequency=frequency)


@needs_torchdata
def test_a_foreign_node_below_keeps_order_and_resumes():
    from torchdata.nodes import ParallelMapper
    steps = env_steps(20)
    whole = [kept(x) for x in NStepper(steps, 3)]
    for below in (lambda: prefetched(steps), lambda: ParallelMapper(IterableSource(steps), lambda x: x, num_workers=2, method="thread")):
        pipe = NStepper(below(), 3)
        check_same([kept(x) for x in pipe], whole)
        pipe.reset(None)
        check_same([kept(x) for x in pipe], whole, "after reset(None):")
        pipe = NStepper(below(), 3)
        first = [kept(x) for x in islice(pipe, 7)]
        state = snapshot(pipe)
        assert set(state["pipes"]) == {"Foreign", "NStepper"}, "the walk stops at a foreign node, whose state is nested"
        other = NStepper(below(), 3)
        other.reset(state)
        check_same(first + [kept(x) for x in other], whole, "resumed:")


@needs_torchdata
def test_pipes_below_a_foreign_node_are_bound_and_found():
    below = OrnsteinUhlenbeck(acted())
    from torchdata.nodes import Prefetcher
    pipe = BatchCollector(Prefetcher(below, 2))
    context = bind(pipe, Context(seed=3))
    assert below.context is context and find_pipes(pipe, OrnsteinUhlenbeck) == [below]
    assert below not in traverse(pipe) and "OrnsteinUhlenbeck" not in named_pipes(pipe)


@needs_torchdata
def test_a_stack_on_a_running_prefetcher_goes_on():
    node = prefetched(env_steps(12))
    first = [kept(next(node)) for _ in range(3)]
    rest = [kept(x) for x in BatchCollector(node)]
    check_same(first + rest, env_steps(12))


@needs_torchdata
def test_a_stepper_with_buffers_under_a_prefetcher():
    "The environments write into the same arrays again and again; what was prefetched stays"
    from torchdata.nodes import Prefetcher
    alone = GymStepper(CountingVector(3), seed=0)
    expected = [kept(next(alone)) for _ in range(20)]
    node = Prefetcher(GymStepper(CountingVector(3), seed=0), 4, snapshot_frequency=0)
    held = [next(node) for _ in range(20)]
    check_same([kept(x) for x in held], expected)
    node._it._shutdown()


@needs_torchdata
def test_a_loader_is_refused():
    from torchdata.nodes import IterableWrapper, Loader
    with pytest.raises(TypeError, match="BatchCollector.*source.*Loader"):
        BatchCollector(Loader(IterableWrapper(batches())))


# --- j. copies -------------------------------------------------------------------------------------------------------
@every
def test_refuses_to_be_copied_or_pickled(cls, e):
    rig = Rig(cls, e)
    rig.take(1)
    for attempt in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match=f"{rig.pipe}.*pipes are not copied"):
            attempt(rig.pipe)


# --- k. interrupts ---------------------------------------------------------------------------------------------------
class Endless(Pipe):
    "Hands out the same item, and asks for an interrupt at the fifth"
    SOURCES = ()

    def __init__(self, item):
        super().__init__()
        self.item, self.given = item, 0

    def next(self):
        self.given += 1
        if self.given == 5:
            self.context.interrupted = True
        if self.given > 50:
            raise RuntimeError("nobody heard")
        return self.item


@fans
def test_a_fan_hears_an_interrupt_between_items(cls, e):
    rig = Rig(cls, e)
    rig.pipe.forward = lambda item: ()
    source = Endless(next(fresh(x) for x in rig.items if not isinstance(x, (Lazy, dict))))
    next(p for p in traverse(rig.head) if isinstance(p.source, IterableSource)).stand_on(source)
    bind(rig.head, rig.head.context)
    with pytest.raises(Interrupted, match=str(rig.pipe)):
        next(rig.head)
    assert source.given == 5, "heard at the next chance"
    del rig.pipe.forward
    source.context.interrupted, source.given = False, 5
    rig.take(1)


def test_a_warm_up_hears_an_interrupt_and_goes_on_afterwards():
    source = Endless(env_steps(1)[0])
    pipe = ExperienceReplay(source, BS, 100, warmup=60)
    with pytest.raises(Interrupted):
        next(pipe)
    assert source.given == 5 and len(pipe.memory) == 10
    pipe.context.interrupted = False
    source.given = 6
    assert len(next(pipe)) == BS and len(pipe.memory) == 60


def updates(interrupt_at=None):
    "Losses and parameters of twelve updates; the flag is set while a loss passes"
    p = networks()
    source = IterableSource(batches(12))

    class Pressing(Stage):
        def forward(self, item):
            self.seen = getattr(self, "seen", 0) + 1
            if self.seen == interrupt_at:
                self.context.interrupted = True
            return item

    def build(inlet):
        pipe = Pressing(ActorLossProcessor(inlet, p.critic, p.actor))
        return BasicOptStepper(LossCollector(pipe), p.actor, 1e-2, filter=True, name="actor_opt")
    pipe = Pressing(CriticLossProcessor(source, p.critic, p.t_actor, p.t_critic))
    pipe = BatchCollector(Every(BasicOptStepper(pipe, p.critic, 1e-2, filter=True, name="critic_opt"), 2, build))
    return pipe, p


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6])
def test_an_interrupt_leaves_no_update_half_done(at):
    "What was asked while a loss was on its way is heard after its batch"
    pipe, p = updates(interrupt_at=at)
    other, q = updates()
    done, stopped = 0, False
    while done < 12:
        try:
            next(pipe)
            done += 1
        except Interrupted:
            stopped = True
        if pipe.context.interrupted:
            pipe.context.interrupted = False
            counter = find_pipes(pipe, BatchCollector)[0]
            reference, r = updates()
            for _ in range(done):
                next(reference)
            assert counter.count == done
            check_same(p.critic.state_dict(), r.critic.state_dict(), f"interrupted after {done} batches{', in between' if stopped else ''}: critic")
            check_same(p.actor.state_dict(), r.actor.state_dict(), "actor")
    for _ in range(12):
        next(other)
    check_same(p.actor.state_dict(), q.actor.state_dict(), "in the end")


@fed
def test_an_interrupt_loses_nothing(cls, e):
    "Asked before each item: some pipes stop in between, and go on where they were"
    rig, came, stops = Rig(cls, e), [], 0
    rig.head.start()
    whole = whole_of(cls, e)
    while len(came) < len(whole):
        rig.head.context.interrupted = True
        try:
            came.append(kept(next(rig.head)))
        except Interrupted:
            stops += 1
            rig.head.context.interrupted = False
            came.append(kept(next(rig.head)))
    check_same(came, whole, f"with {stops} stops:")
    if (cls, e) in [(NStepper, TABLE[NStepper][""]), (ExperienceReplay, TABLE[ExperienceReplay][""])]:
        assert stops


# --- l. in words -----------------------------------------------------------------------------------------------------
@every
def test_can_be_described_and_drawn(cls, e):
    rig = Rig(cls, e)
    names = named_pipes(rig.head)
    for shapes in (True, False):
        text = describe(rig.head, shapes)
        assert all(f"{name}(" in text for name in names) and "0x" not in text
    drawing = mermaid(rig.head).splitlines()
    assert drawing[0].startswith("flowchart") and sum("-->" in line or "-.->" in line for line in drawing) == sum(len(p.sources) for p in names.values())
    assert all(line.count('"') in (0, 2) for line in drawing)
    boxes = [line.split("[")[0].strip() for line in drawing if "[" in line]
    assert len(set(boxes)) == len(names) and all(re.fullmatch(r"\w+", box) and box != "end" for box in boxes)
    assert str(rig.pipe) == (rig.pipe.name or cls.__name__)


@every
def test_a_name_is_kept_and_used(cls, e):
    rig = Rig(cls, e)
    named = rig.pipe.rebuilt(*rig.pipe.sources)
    assert named.name == rig.pipe.name
    parameters = {**dict(zip(cls.SOURCES, rig.pipe.sources)), **rig.pipe.settings, "name": "of its own"}
    import inspect
    named = cls(**{k: v for k, v in parameters.items() if k in inspect.signature(cls.__init__).parameters})
    assert str(named) == "of its own" and "of its own" in named_pipes(named)
    assert 'of_its_own["<b>of its own</b>' in mermaid(named)
    assert str(named.rebuilt(*named.sources)) == "of its own"


# --- environments whose state cannot be had: resumed at the boundary of episodes ------------------------------------------
STEPPERS = [pytest.param(e, id=name) for name, e in TABLE[GymStepper].items()]


def at_the_boundary(rig) -> dict:
    "The state of a stack, as it is where the environments do not give theirs"
    state = snapshot(rig.head)
    state["pipes"][rig.cls.__name__].update(envs=None, inexact="for a test")
    return state


@pytest.mark.parametrize("e", STEPPERS)
@pytest.mark.parametrize("k", [0, 1, 3, 7])
def test_a_stepper_continues_its_counters_and_generators(e, k):
    rig, other = Rig(GymStepper, e), Rig(GymStepper, e)
    rig.head.start()
    rig.take(k)
    state = at_the_boundary(rig)
    other.head.reset(through_a_file(state))
    step = next(other.head)
    assert (step.step_n == 1).all() and not difference(step.total_reward, step.reward.astype(np.float64)), "episodes begin anew"
    check_same(step.episode_n, state["pipes"]["GymStepper"]["episode_n"] + 1, "and are counted on")
    assert other.head.env_steps == rig.head.env_steps + len(step.reward)
    if e is not TABLE[GymStepper]["vector"] and (other.head.agent is None or other.head.env_steps <= other.head.random_steps):
        check_same(step.action, next(rig.head).action, "the generator goes on")


def test_two_that_resume_from_one_state_do_the_same():
    "The environments begin new episodes: which ones, follows from the run's seed"
    e = TABLE[GymStepper]["acts"]
    rig = Rig(GymStepper, e)
    rig.take(5)
    state, came = at_the_boundary(rig), []
    for _ in range(2):
        other = Rig(GymStepper, e)
        other.head.reset(copied(state))
        came.append(other.take(12))
    rig.head.reset(copied(state))
    check_same(*came, "in two new stacks:")
    check_same(rig.take(12), came[0], "in the one that the state is from:")
    first = Rig(GymStepper, e).take(1)
    assert difference(first[0].state, came[0][0].state), "and they are not the first ones again"


def test_episodes_are_resumed_at_the_round_that_was_played():
    e = TABLE[EpisodeStepper][""]
    whole = Rig(EpisodeStepper, e).take(100)
    assert len(whole) == 15, "five episodes of five steps, two at a time"
    for k in (0, 2, 5, 7, 10, 13, 15):
        rig, other = Rig(EpisodeStepper, e), Rig(EpisodeStepper, e)
        rig.head.start()
        rig.take(k)
        state = at_the_boundary(rig)
        expected = [s.state for s in whole[k // 5 * 5:]]
        other.head.reset(copied(state))
        check_same([s.state for s in other.take(100)], expected, f"new, from {k}:")
        rig.head.reset(copied(state))
        check_same([s.state for s in rig.take(100)], expected, f"the same, from {k}:")


# --- without torchdata -----------------------------------------------------------------------------------------------
@pytest.mark.skipif(ON_STANDIN, reason="runs there already")
def test_all_of_this_holds_on_a_local_base_node():
    here = Path(__file__).parent
    code = "import sys; sys.path.insert(0, '.'); import standin, pytest; standin.install(); " \
           "sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', '-p', 'no:logging', 'test_contract.py']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
