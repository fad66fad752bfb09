"""What runs ahead of the learner: `Prefetcher` and `DoubleBufferedStepper`. How stale it is, exactly; that the timing changes
nothing; that it resumes to the bit, says what went wrong, hears Ctrl-C, and leaves no thread and no process behind."""
from __future__ import annotations

import gc
import os
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from contract_table import difference
from torch import nn

from fastrl_pipes.agents.core import AgentHead, SimpleModelRunner
from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner
from fastrl_pipes.agents.sac import SACAgent, SACLearner
from fastrl_pipes.core import (
    SimpleStep,
    copied,
    denormals_flushed,
    seed_everything,
    spawn_seed,
)
from fastrl_pipes.envs.backends import make_backend
from fastrl_pipes.envs.debug import Bandit, Goal
from fastrl_pipes.envs.double_buffered import DoubleBufferedStepper
from fastrl_pipes.envs.doubles import Counting, Faulty
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.errors import Interrupted, WorkerError
from fastrl_pipes.learner.flatten import flatten
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.memory.prioritized import PrioritizedReplay
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.networks.ensemble import Critics
from fastrl_pipes.networks.policies import GaussianActor
from fastrl_pipes.pipes.control import Every, Inlet
from fastrl_pipes.pipes.context import Ahead, Context
from fastrl_pipes.pipes.core import Stage
from fastrl_pipes.pipes.walk import bind, named_modules, snapshot
from fastrl_pipes.pipes.graph import find_pipe
from fastrl_pipes.pipes.guards import NotFinite
from fastrl_pipes.pipes.nstep import FirstLastMerger, NStepper
from fastrl_pipes.pipes.prefetch import Prefetcher


def whole(learner) -> dict:
    "Everything that a learner holds, without its clocks"
    recorder = learner.recorder.get_state()
    recorder["rows"] = [{k: v for k, v in row.items() if k not in ("seconds", "steps_per_second")} for row in recorder["rows"]]
    return {**snapshot(learner), "recorder": recorder}


def learned(learner) -> dict:
    "What does not depend on how environments tell their state"
    state = whole(learner)
    return {"modules": state["modules"], "recorder": state["recorder"]}


def same(a, b, what: str = "") -> None:
    found = difference(a, b, "state")
    assert not found, f"{what} {found}"


EARLIER: list = []  # threads of a test that failed, which its traceback holds


def threads() -> list:
    until = time.monotonic() + 3
    while True:
        found = [t for t in threading.enumerate() if isinstance(t, Ahead) and t not in EARLIER]
        if not found or time.monotonic() > until:
            return found
        gc.collect()  # only then: it takes a while where many tests are loaded
        time.sleep(0.05)  # one that is at work still holds what it works for


@pytest.fixture(autouse=True)
def nothing_is_left():
    "No thread of ours lives longer than what it works for"
    EARLIER.extend(threads())
    yield
    assert not threads()


# --- learners --------------------------------------------------------------------------------------------------------
class Sleepy(Goal):
    "Now and then it takes its time"

    def __init__(self, seconds: float = 0.0):
        super().__init__()
        self.seconds = seconds

    def step(self, action):
        if np.random.default_rng(int(1e6 * abs(action[0]))).random() < 0.3:  # no generator that others use
            time.sleep(self.seconds)
        return super().step(action)


class Pause(Stage):
    "Takes its time at every third item"
    count = 0

    def __init__(self, source, seconds: float = 0.0, name=None):
        super().__init__(source, name)
        self.seconds = seconds

    def forward(self, item):
        self.count += 1
        if self.count % 3 == 0 and isinstance(item, SimpleStep):
            time.sleep(self.seconds)
        return item


def ddpg(ahead=True, env="fastrl/Goal-v0", n=1, double="", learner_sleeps=0.0, batch_norm=False, batches=10, warmup=10, nsteps=1, **more):
    "A DDPG learner with tiny networks"
    seed_everything(0)
    sizes = (3, 1) if env == "Pendulum-v1" else (2, 1)
    actor, critic = Actor(*sizes, 7, 5, batch_norm=batch_norm), Critic(*sizes, 7, 5)
    pipe = GymStepper(env, DDPGAgent(actor, max_steps=40), n, "single" if n == 1 else "sync", 0, random_steps=warmup) if not double else \
        DoubleBufferedStepper(env, DDPGAgent(actor, max_steps=40), n, double, 0, random_steps=warmup, workers=2)
    pipe = Prefetcher(pipe) if ahead else pipe
    return DDPGLearner(actor, critic, pipe, [], tau=0.05, bs=8, max_sz=60, warmup=warmup, nsteps=nsteps, batches=batches,
                       dp_augmentation_fns=[partial(Pause, seconds=learner_sleeps)], **more)


# --- how stale -------------------------------------------------------------------------------------------------------
class Weight(nn.Module):
    "Acts with its only parameter"

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))
        self.register_buffer("other", torch.zeros(1))

    def forward(self, state):
        return (self.value + self.other).expand(len(state), 1)


class Moves(Stage):
    "In the place of an update: after item k the parameter is k / 100, half of it in a buffer"

    def __init__(self, source, model, name=None):
        super().__init__(source, name)
        self.model, self.count = model, 0

    def forward(self, item):
        if isinstance(item, SimpleStep):
            self.count += 1
            with torch.no_grad():
                self.model.value += 0.005
                self.model.other += 0.005
        return item


def plain(agent):
    return GymStepper("fastrl/ConstantReward-v0", agent, 1, "single", 0)


def acted_with(ahead, pulls=12, compiled="", pause=0.0, between=lambda k, pipe: None, make=plain):
    "For each item: after how many updates were the parameters that chose its action?"
    model = Weight()
    pipe = make(AgentHead(SimpleModelRunner(Inlet(), model)))
    runner = find_pipe(pipe, SimpleModelRunner)
    if compiled == "before":
        runner.compile(backend="eager")
    pipe = Moves(Pause(ahead(pipe) if ahead else pipe, pause), model)
    bind(pipe, Context(seed=0))
    said = []
    for k in range(pulls):
        if compiled == "after" and k == 3:
            runner.compile(backend="eager")
        item = next(pipe)
        said.append(round(100 * float(item.action[0, 0])))
        between(k, pipe)
    if compiled:
        assert runner._compiled is not None and runner._compiled._graphs, "it did act with the graph"
    return said


def test_without_it_nothing_is_stale():
    assert acted_with(None) == list(range(12))


@pytest.mark.parametrize("compiled", ["", "before", "after"])
@pytest.mark.parametrize("pause", [0.0, 0.003])
def test_a_prefetched_item_is_stale_by_exactly_one_pull(compiled, pause):
    assert acted_with(Prefetcher, compiled=compiled, pause=pause) == [0, *range(11)]


def test_looking_on_changes_no_item():
    "Whoever asks for the state, a probe, a description, a pipe for validation: the item that is under way is as stale as it was"
    def look(k, pipe):
        find = partial(find_pipe, pipe)
        [lambda: snapshot(pipe), lambda: find(SimpleModelRunner).probe(SimpleStep.random(3, 1, 1)), lambda: find(AgentHead).for_validation(),
         lambda: find(GymStepper).get_own(), lambda: named_modules(pipe), lambda: find(Prefetcher).close()][k % 6]()
    assert acted_with(Prefetcher, 30, between=look) == [0, *range(29)]
    assert acted_with(Prefetcher, 11, "before", between=look) == [0, *range(10)]


def test_reset_begins_anew():
    model = Weight()
    pipe = Moves(Prefetcher(GymStepper("fastrl/ConstantReward-v0", AgentHead(SimpleModelRunner(Inlet(), model)), seed=0)), model)
    first = [next(pipe) for _ in range(3)]
    pipe.reset(None)
    again = [next(pipe) for _ in range(3)]
    assert [s.episode_n.item() for s in again] == [s.episode_n.item() for s in first]
    assert [round(100 * s.action.item()) for s in again] == [3, 3, 4]


def test_the_network_that_learns_is_the_one_that_is_shown_and_saved():
    learner = ddpg()
    learner.fit(1)
    runner, stepped = find_pipe(learner, SimpleModelRunner), find_pipe(learner, "actor_opt").model
    assert runner.model is not stepped, "the copy acts"
    assert runner.modules()["model"] is stepped and runner.settings["model"] is stepped
    assert sum(m is stepped for m in named_modules(learner).values()) == 1
    assert not any(m is runner.model for m in named_modules(learner).values())
    learner.check()
    learner.close()
    assert runner.model is stepped and "modules" not in vars(runner) and "get_own" not in vars(learner.stepper)


def test_a_collected_prefetcher_leaves_the_acting_side_as_it_was():
    model = Weight()
    stepper = GymStepper("fastrl/ConstantReward-v0", AgentHead(SimpleModelRunner(Inlet(), model)), seed=0)
    runner = find_pipe(stepper, SimpleModelRunner)
    pipe = Prefetcher(stepper)
    next(pipe)
    assert runner.model is not model and any(isinstance(t, Ahead) for t in threading.enumerate())
    del pipe
    assert not threads() and runner.model is model and "close" not in vars(stepper)
    next(stepper)


def test_networks_that_share_a_part_share_it_in_the_copy():
    body = nn.Linear(1, 1)

    class Two(Stage):
        def __init__(self, source, one, two, name=None):
            super().__init__(source, name)
            self.one, self.two = one, two

        def modules(self):
            return {"one": self.one, "two": self.two}

        def forward(self, item):
            return item, self.one[0] is self.two[0], self.one[0] is body
    pipe = Prefetcher(Two([1, 2, 3], nn.Sequential(body), nn.Sequential(body, nn.Tanh())))
    assert list(pipe) == [(1, True, False), (2, True, False), (3, True, False)]


# --- the timing changes nothing --------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, nsteps", [(1, 1), (2, 3)])
def test_the_timing_changes_nothing(n, nsteps):
    found = []
    for env, learner in ((0.0, 0.0), (0.004, 0.0), (0.0, 0.004), (0.002, 0.002), (0.0, 0.0)):
        learner = ddpg(env=partial(Sleepy, env), n=n, nsteps=nsteps, learner_sleeps=learner, batches=15)
        learner.fit(3)
        found.append(learned(learner))
    for other in found[1:]:
        same(found[0], other)
    twin = ddpg(False, env=Sleepy, n=n, nsteps=nsteps, batches=15)
    twin.fit(3)
    assert difference(found[0]["modules"], learned(twin)["modules"]), "it is another run than without"


def test_policies_that_draw_do_so_from_generators_of_their_own():
    def sac():
        seed_everything(0)
        actor, critic = GaussianActor(2, 1, hidden=(8,)), Critics(2, 1, 2, (8,))
        pipe = Prefetcher(GymStepper("fastrl/Goal-v0", SACAgent(actor), seed=0, random_steps=10))
        return SACLearner(actor, critic, pipe, [], bs=8, warmup=10, batches=20)
    a, b = sac(), sac()
    a.fit(2), b.fit(2)
    same(whole(a), whole(b))


@pytest.mark.parametrize("count", [30, 31, 55])
def test_environment_steps_are_counted_when_they_are_handed_on(count):
    "`fit(env_steps=...)` ends where it does without; the environments are one step further"
    learner, twin = ddpg(batches=7), ddpg(False, batches=7)
    rows, expected = learner.fit(env_steps=count), twin.fit(env_steps=count)
    columns = ("env_steps", "batch", "episode", "epoch")
    assert [[row[c] for c in columns] for row in rows] == [[row[c] for c in columns] for row in expected]
    assert learner.env_steps == twin.env_steps and learner.recorder.episodes == twin.recorder.episodes > 0
    learner.get_state()
    assert learner.stepper.env_steps == twin.stepper.env_steps + 1


def test_episodes_are_told_with_the_item_in_which_they_end():
    learner = ddpg(warmup=8)
    pipe, ends = find_pipe(learner, Prefetcher), 0
    learner.start()
    for _ in range(60):
        step = pipe.next()
        ends += int(step.terminated.item() or step.truncated.item())
        assert learner.recorder.episodes == ends
    assert ends == 3


def test_validation_changes_nothing():
    learner, twin = ddpg(), ddpg()
    for _ in range(3):
        learner.fit(1), twin.fit(1)
        learner.validate(2), learner.validate(2, deterministic=False), learner.predict(np.zeros(2, np.float32)), learner.describe()
    same(whole(learner), whole(twin))


def test_no_two_threads_compile_at_once():
    "The graph of the network that acts is made while the learner waits; all others, while the thread does nothing that is new"
    learner = ddpg()
    learner.compile(backend="eager")
    at_work, both = [], []
    for p in (find_pipe(learner, SimpleModelRunner), find_pipe(learner, "CriticLossProcessor"), find_pipe(learner, "ActorLossProcessor")):
        made = type(p._compiled)._made

        def slowly(graph, *args, made=made):
            at_work.append(graph)
            both.append(len(at_work))
            time.sleep(0.05)
            try:
                return made(graph, *args)
            finally:
                at_work.remove(graph)
        p._compiled._made = partial(slowly, p._compiled)
    runner = find_pipe(learner, SimpleModelRunner)
    compiled_call = runner.compiled_call

    def anew(**options):  # for the copy
        graph = compiled_call(**options)
        graph._made = partial(slowly, graph)
        return graph
    runner.compiled_call = anew
    learner.fit(2)
    assert both == [1, 1, 1] and not find_pipe(learner, Prefetcher)._places.untried


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("error:.*stays eager")
def test_a_compiled_learner_pulls_ahead():
    "With torch's own compiler, in the thread: the same run each time, near to the eager one"
    found = []
    for compiled in (True, True, False):
        learner = ddpg(batches=20)
        if compiled:
            learner.compile()
        learner.fit(2)
        assert not compiled or {"SimpleModelRunner", "CriticLossProcessor", "ActorLossProcessor"} <= {k for k, v in learner.compile_seconds.items() if v}
        found.append(learned(learner))
    same(found[0], found[1])
    for name, state in found[0]["modules"].items():
        if name.endswith("model"):
            for key, x in state.items():
                assert torch.allclose(x, found[2]["modules"][name][key], rtol=1e-3, atol=1e-4), (name, key)


# --- resume ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("use", [dict(), dict(n=2, nsteps=3), dict(batch_norm=True)], ids=str)
@pytest.mark.parametrize("at", [1, 7])
def test_resumes_to_the_bit(use, at, tmp_path):
    learner = ddpg(batches=at, **use)
    learner.fit(1)
    learner.save(tmp_path / "run")
    other = ddpg(batches=at, **use).load(tmp_path / "run")
    same(whole(learner), whole(other), "the checkpoint:")
    learner.fit(3), other.fit(3)
    same(whole(learner), whole(other), "both go on alike:")
    third = ddpg(batches=at, **use)
    third.fit(4)
    same(learned(learner), learned(third), "as if it had not been saved:")


def test_a_learner_goes_back_while_its_thread_is_at_work():
    learner, twin = ddpg(env=partial(Sleepy, 0.002)), ddpg(env=Sleepy)
    learner.fit(1), twin.fit(1)
    state = snapshot(twin)
    learner.fit(2)
    learner.reset(copied(state))
    assert learner.stepper.env_steps == state["pipes"]["GymStepper"]["env_steps"]
    same(learner.get_state()["pipes"]["Prefetcher"], state["pipes"]["Prefetcher"])


def test_environments_that_begin_anew():
    "Where the environments cannot be kept, what was pulled ahead is handed on all the same"
    learner = ddpg()
    learner.fit(1)
    state = snapshot(learner)
    state["pipes"]["GymStepper"].update(envs=None, inexact="for a test")
    learner.reset(state)
    pipe = find_pipe(learner, Prefetcher)
    first, second = copied(pipe.next()), copied(pipe.next())
    same(first, state["pipes"]["Prefetcher"]["pending"][0])
    assert second.step_n.item() == 1 and second.episode_n.item() == first.episode_n.item() + 1


# --- errors ----------------------------------------------------------------------------------------------------------
def test_an_error_is_raised_by_the_pull_that_it_belongs_to():
    def stepper():
        return GymStepper(partial(Faulty, "raise", 3), seed=0)
    plain, pipe = stepper(), Prefetcher(stepper())
    with pytest.raises(WorkerError) as expected:
        for done in range(10):
            next(plain)
    for _ in range(done):
        next(pipe)
    assert snapshot(pipe)["pipes"]["Prefetcher"]["pending"] == [], "the error is there, and no item"
    with pytest.raises(WorkerError) as found:
        next(pipe)
    assert str(found.value) == str(expected.value) and done >= 1
    assert any("stepper" in str(entry.path) for entry in found.traceback), "with the place where it arose"


def test_after_an_error_it_goes_on():
    class Once(Stage):
        count = 0

        def forward(self, item):
            self.count += 1
            if self.count == 3:
                raise LookupError("three")
            return item
    pipe, came = Prefetcher(Once(range(6))), []
    while True:
        try:
            came.append(next(pipe))
        except LookupError as e:
            came.append(str(e))
        except StopIteration:
            break
    assert came == [0, 1, "three", 3, 4, 5]
    with pytest.raises(StopIteration):
        next(pipe)


def test_an_error_leaves_no_thread():
    pipe = Prefetcher(GymStepper(partial(Faulty, "raise", 1), seed=0))
    with pytest.raises(WorkerError):
        list(pipe)
    del pipe
    assert not threads()


def test_a_guard_finds_what_the_thread_made():
    class Spoils(Stage):
        def forward(self, item):
            return item.replace(reward=item.reward * np.nan) if isinstance(item, SimpleStep) and self.context.recorder.env_steps > 20 else item
    seed_everything(0)
    actor, critic = Actor(2, 1, 7, 5), Critic(2, 1, 7, 5)
    learner = DDPGLearner(actor, critic, Prefetcher(Spoils(GymStepper("fastrl/Goal-v0", DDPGAgent(actor), seed=0, random_steps=10))), [], bs=8, warmup=10, batches=50)
    learner.guard()
    with pytest.raises(NotFinite, match="Spoils: field 'reward'"):
        learner.fit(1)
    learner.guard(False)


def refuse_optimizer():
    model = nn.Linear(1, 1)
    return Prefetcher(BasicOptStepper([], model, 0.1))


def refuse_priorities():
    return Prefetcher(PrioritizedReplay(GymStepper("fastrl/Goal-v0", seed=0), 4, 20))


def refuse_branch():
    return Every(GymStepper("fastrl/Goal-v0", seed=0), 2, Prefetcher)


class Unfindable(Stage):
    def modules(self):
        return {"model": nn.Linear(1, 1)}


@pytest.mark.parametrize("build, words", [
    (refuse_optimizer, "Prefetcher: field 'source' has BasicOptStepper, which steps an optimizer"),
    (refuse_priorities, "which is told the errors of what is learned"),
    (refuse_branch, "stands on Inlet, which is fed by hand"),
    (lambda: Prefetcher(Prefetcher([1])), "has Prefetcher, which is a Prefetcher, too"),
    (lambda: Prefetcher(Unfindable([1])), "Prefetcher: field 'model' of Unfindable is not where its modules\\(\\) says"),
])
def test_what_cannot_be_pulled_ahead_is_refused(build, words):
    with pytest.raises((ValueError, LookupError), match=words):
        pipe = build()
        bind(pipe, Context(seed=0))
        pipe.start()
    assert not threads()


def test_a_loss_is_refused():
    pipe = Prefetcher([{"loss": torch.zeros(())}])
    with pytest.raises(ValueError, match="Prefetcher: field 'item' is a loss, expected steps or windows"):
        next(pipe)
    with pytest.raises(ValueError, match="is a loss"):
        pipe.probe({"loss": torch.zeros(())})


def test_a_network_that_cannot_be_copied_is_refused_before_anything_is_pulled():
    class Stubborn(Weight):
        def __deepcopy__(self, memo):
            raise RuntimeError("no")
    runner = SimpleModelRunner(Inlet(), Stubborn())
    stepper = GymStepper("fastrl/ConstantReward-v0", AgentHead(runner), seed=0)
    with pytest.raises(TypeError, match="Prefetcher: field 'model' of SimpleModelRunner cannot be copied"):
        Prefetcher(stepper).start()
    assert stepper.env_steps == 0 and not {"modules", "get_own"} & set(vars(stepper)) and isinstance(runner.model, Stubborn)


def test_flatten_says_why_not():
    with pytest.raises(ValueError, match="flatten: field 'Prefetcher' .*runs ahead"):
        flatten(ddpg(), seed=0)


# --- interrupts ------------------------------------------------------------------------------------------------------
def press(when):
    "Ctrl-C, for real, once `when()` is true"
    def wait():
        until = time.monotonic() + 20
        while not when() and time.monotonic() < until:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def interrupted_and_loaded(use, tmp_path):
    "A learner whose fit was interrupted, and another that has loaded its checkpoint"
    learner, other = ddpg(**use), ddpg(**use)
    learner.folder = tmp_path / "interrupted"
    thread = press(lambda: learner.recorder.batch > 3)
    assert learner.fit(1) == [] and learner.interrupted
    thread.join()
    other.load(learner.folder)
    return learner, other


def go_on_alike(learner, other):
    "Five batches more"
    learner.batches = other.batches = learner.batches_seen + 5
    assert len(learner.fit(1)) == 1
    other.fit(1)
    same(whole(learner), whole(other), "both go on alike:")


@pytest.mark.parametrize("slow", [0.0, 0.2])
def test_ctrl_c_saves_a_checkpoint_and_the_learner_goes_on(slow, tmp_path, capsys):
    use = dict(env=partial(Sleepy, slow), nsteps=2, batches=10**9)
    learner, other = interrupted_and_loaded(use, tmp_path)
    same(whole(other), whole(learner), "the checkpoint:")
    go_on_alike(learner, other)


def test_an_interrupt_is_heard_while_an_item_is_awaited():
    class Long(Stage):
        def forward(self, item):
            time.sleep(0.5)
            return item
    pipe = Prefetcher(Long(range(3)))
    bind(pipe, Context())
    pipe.start()
    pipe.context.interrupted, began = True, time.monotonic()
    with pytest.raises(Interrupted, match="Prefetcher"):
        next(pipe)
    assert time.monotonic() - began < 0.4
    pipe.context.interrupted = False
    assert [next(pipe), next(pipe)] == [0, 1], "nothing is lost"


def test_the_thread_itself_hears_no_interrupt():
    "Else an item would be half done: `NStepper` reads the flag between the steps of a window"
    heard = []

    class Notes(Stage):
        def forward(self, item):
            self.context.interrupted = True
            self.context.pause(str(self))
            heard.append(type(threading.current_thread()))
            return item
    pipe = Prefetcher(Notes(range(3)))
    bind(pipe, Context(on_wait=lambda: pytest.fail("nobody waits in the thread") if isinstance(threading.current_thread(), Ahead) else None))
    assert list(pipe) == [0, 1, 2] and set(heard) == {Ahead}


# --- the thread ------------------------------------------------------------------------------------------------------
class Says(Stage):
    "The modes in which it works"

    def forward(self, item):
        return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads(), denormals_flushed(), np.geterr()["over"],
                isinstance(threading.current_thread(), Ahead))


def test_the_thread_works_in_the_modes_of_the_one_who_pulls():
    pipe = Prefetcher(Says([torch.zeros(1)] * 40))
    assert next(pipe) == (True, False, 1, False, "warn", True)
    with torch.inference_mode(), np.errstate(over="ignore"):
        next(pipe)
        assert next(pipe) == (False, True, 1, False, "ignore", True)
    with torch.no_grad():
        next(pipe)
        assert next(pipe)[:2] == (False, False)
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    next(pipe)
    assert next(pipe) == (True, False, 2, True, "warn", True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    next(pipe)
    assert next(pipe) == (True, False, 1, False, "warn", True)


def test_no_thread_before_the_first_pull_and_none_after_the_end():
    pipe = Prefetcher(GymStepper("fastrl/Goal-v0", seed=0))
    pipe.start()
    assert not threads()
    first = [next(pipe) for _ in range(3)]
    assert sum(isinstance(t, Ahead) for t in threading.enumerate()) == 1 + len(EARLIER)
    pipe.close()
    pipe.close()
    assert not threads()
    again = Prefetcher(GymStepper("fastrl/Goal-v0", seed=0))
    expected = [next(again) for _ in range(6)]
    same(first + [next(pipe) for _ in range(3)], expected, "a closed one goes on where it was:")
    again.close()


class Busy(Counting):
    "Each step takes a while; `at_work` while it lasts"
    at_work = False

    def step(self, action):
        self.at_work = True
        time.sleep(0.15)
        self.at_work = False
        return super().step(action)

    def close(self):
        self.closed_at_work = self.at_work


@pytest.mark.parametrize("ask", [
    lambda pipe, stepper, runner: stepper.close(), lambda pipe, stepper, runner: stepper.get_own(), lambda pipe, stepper, runner: pipe.get_state(), lambda pipe, stepper, runner: named_modules(pipe),
    lambda pipe, stepper, runner: runner.probe(SimpleStep.random(3, 1, 1)), lambda pipe, stepper, runner: stepper.agent.for_validation(), lambda pipe, stepper, runner: pipe.reset(None),
    lambda pipe, stepper, runner: pipe.close(), lambda pipe, stepper, runner: bind(Pause(pipe), pipe.context), lambda pipe, stepper, runner: runner.compile(backend="eager"),
], ids=["close a stepper", "its state", "all state", "networks", "probe", "validation", "reset", "close", "bind", "compile"])
def test_whoever_asks_while_the_thread_is_at_work_waits(ask):
    env = Busy()
    stepper = GymStepper(lambda: env, AgentHead(SimpleModelRunner(Inlet(), Weight())), seed=0)
    pipe, runner = Prefetcher(stepper), find_pipe(stepper, SimpleModelRunner)
    next(pipe)
    until = time.monotonic() + 5
    while not env.at_work and time.monotonic() < until:
        time.sleep(0.001)
    assert env.at_work
    ask(pipe, stepper, runner)
    assert not env.at_work and not getattr(env, "closed_at_work", False)
    pipe.close()


def test_the_items_outlive_the_pulls_of_the_thread():
    "The environments write into the same arrays again and again"
    pipe, plain = Prefetcher(GymStepper(Counting, seed=0)), GymStepper(Counting, seed=0)
    bind(pipe, Context()), bind(plain, Context())
    pipe.start(), plain.start()
    for _ in range(20):
        item, expected = pipe.next(), copied(plain.next())
        pipe.get_own()  # the next one is there
        same(item, expected)


def test_acting_overlaps_with_learning():
    "Without a clock: the environment waits until the learner is at work, and the learner until the environment is"
    acting, learning = threading.Event(), threading.Event()

    class Waits(Stage):
        count = 0

        def forward(self, item):
            self.count += 1
            if self.count > 1:
                acting.set()
                assert learning.wait(10), "the learner does not work meanwhile"
                learning.clear()
            return item
    pipe = Prefetcher(Waits(range(5)))
    for _ in range(4):
        next(pipe)
        learning.set()
        assert acting.wait(10), "nobody acts meanwhile"
        acting.clear()


def test_a_profile_has_both_sides():
    learner = ddpg(env=partial(Sleepy, 0.003))
    learner.fit(1)
    found = learner.profile(30)
    acting, waiting = found["GymStepper"], found["Prefetcher"]
    assert found.pulls == 30 and acting.items >= 30 and waiting.items == 30
    assert 0 < acting.own < found.seconds and found["GymStepper: environments"].own > 0
    assert sum(r.own for r in found.rows if r.name.startswith(("critic", "actor", "Experience", "Every", "DDPG"))) < found.seconds
    learner.fit(1)


# --- it learns -------------------------------------------------------------------------------------------------------
def test_it_still_solves():
    seed_everything(0)
    actor, critic = Actor(1, 1, 32, 32), Critic(1, 1, 32, 32)
    pipe = Prefetcher(GymStepper(Bandit, DDPGAgent(actor), 1, "single", 0, random_steps=64))
    learner = DDPGLearner(actor, critic, pipe, [], 5e-3, critic_lr=5e-3, tau=0.05, bs=64, warmup=64, batches=400)
    learner.fit(1)
    assert learner.validate(4)["mean"] > -0.02


# === DoubleBufferedStepper ===========================================================================================
LENGTHS = (5, 3, 8, 1)
MODES = ["sync", "workers"]


def counting(n):
    return [partial(Counting, lengths=LENGTHS[i % 4:] + LENGTHS[:i % 4], start=100_000 * i) for i in range(n)]


def by_row(pipe, pulls) -> dict:
    "env_id -> its steps, one row each, in order"
    found: dict = {}
    for _ in range(pulls):
        step = next(pipe)
        for row, env in enumerate(step.env_id[:, 0].tolist()):
            found.setdefault(env, []).append(step.map(lambda a, row=row: a[row:row + 1]))
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("envs, n", [(counting(4), 4), (counting(3), 3), ("Pendulum-v1", 2)], ids=["four", "three", "pendulum"])
def test_each_row_is_as_in_a_plain_stepper(mode, envs, n):
    "Transitions, flags, seeds, episodes and their totals; and the actions of the random phase"
    double, plain = DoubleBufferedStepper(envs, n=n, mode=mode, seed=5, name="stepper"), GymStepper(envs, n=n if isinstance(envs, str) else 1, mode="sync", seed=5, name="stepper")
    found, expected = by_row(double, 80), by_row(plain, 40)
    assert sorted(found) == list(range(n)) and all(len(steps) == 40 for steps in found.values())
    for env in range(n):
        same(found[env], expected[env], f"environment {env}:")
    assert double.env_steps == plain.env_steps == 40 * n
    double.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compiled", ["", "before"])
def test_a_double_buffered_step_is_stale_by_exactly_two_pulls(mode, compiled):
    made = []

    def make(agent):
        made.append(DoubleBufferedStepper("fastrl/ConstantReward-v0", agent, 2, mode, 0))
        return made[-1]
    assert acted_with(None, make=make, compiled=compiled) == [0, 0, *range(10)]
    if mode == "sync":
        assert acted_with(Prefetcher, make=make, compiled=compiled) == [0, 0, 0, *range(9)], "both: by three"
    for stepper in made:
        stepper.close()


def test_where_groups_take_turns_noise_has_a_state_for_each_environment():
    "Ornstein-Uhlenbeck noise, computed by hand from the same generator"
    actor = Weight()
    stepper = DoubleBufferedStepper([partial(Counting, lengths=5)] * 3, DDPGAgent(actor, theta=0.3, sigma=0.1), mode="sync", seed=4)
    bind(stepper, Context())
    steps = [next(stepper) for _ in range(24)]
    noise = find_pipe(stepper, "OrnsteinUhlenbeck")
    rng, x = np.random.default_rng(spawn_seed(4, "OrnsteinUhlenbeck", "OrnsteinUhlenbeck")), np.zeros((3, 1))
    for k, step in enumerate(steps):
        rows = step.env_id[:, 0]
        assert rows.tolist() == ([0, 1] if k % 2 == 0 else [2])
        x[rows[step.step_n[:, 0] == 1]] = 0
        x[rows] = 0.7 * x[rows] + 0.1 * rng.standard_normal((len(rows), 1))
        epsilon = 1.0 - 0.8 * min(sum(len(s.env_id) for s in steps[:k]) / 100, 1)
        assert np.allclose(step.action, epsilon * x[rows], atol=1e-6)
    assert noise.steps == sum(len(s.env_id) for s in steps) + 3, "two groups are one step ahead"


def test_windows_of_groups_are_those_of_their_environments():
    def merged(stepper):
        return FirstLastMerger(NStepper(stepper, 3), 0.9)
    found = by_row(merged(DoubleBufferedStepper(counting(4), n=4, mode="sync", seed=0)), 150)
    expected = by_row(merged(GymStepper(counting(4), mode="sync", seed=0)), 75)
    for env in range(4):
        k = min(len(found[env]), len(expected[env]))
        assert k > 30 and [s.step_n.item() for s in found[env][:k]] == [s.step_n.item() for s in expected[env][:k]]
        for field in ("state", "next_state", "reward", "discount", "terminated", "truncated"):
            same([getattr(s, field) for s in found[env][:k]], [getattr(s, field) for s in expected[env][:k]], field)


def test_the_timing_of_double_buffers_changes_nothing():
    def env(seconds):
        class Sleepy(Goal):  # made here, so that it travels to the workers by value
            def step(self, action):
                time.sleep(seconds * (abs(action[0]) < 0.3))
                return super().step(action)
        return Sleepy
    found = []
    for sleeps, learner_sleeps, mode in ((0.0, 0.0, "workers"), (0.004, 0.0, "workers"), (0.0, 0.004, "workers"), (0.001, 0.0, "sync")):
        learner = ddpg(False, env(sleeps), 3, mode, learner_sleeps, nsteps=2, batches=20)
        learner.fit(2)
        found.append(learned(learner))
        learner.close()
    for other in found[1:]:
        same(found[0], other)


@pytest.mark.parametrize("use", [dict(double="sync"), dict(double="sync", nsteps=3, n=3), dict(double="workers", env="Pendulum-v1"), dict(double="sync", ahead=True)], ids=str)
@pytest.mark.parametrize("at", [1, 8])
def test_double_buffers_resume_to_the_bit(use, at, tmp_path):
    use = {"ahead": False, "n": 2, "batches": at, **use}
    learner, other, third = ddpg(**use), ddpg(**use), ddpg(**use)
    learner.fit(1)
    learner.save(tmp_path / "run")
    other.load(tmp_path / "run")
    same(whole(learner), whole(other), "the checkpoint:")
    learner.fit(3), other.fit(3), third.fit(4)
    same(whole(learner), whole(other), "both go on alike:")
    same(learned(learner), learned(third), "as if it had not been saved:")
    for one in (learner, other, third):
        one.close()


def test_fit_counts_what_double_buffers_hand_on():
    learner = ddpg(False, n=4, double="sync")
    learner.fit(env_steps=50)
    assert learner.env_steps == learner.stepper.env_steps == 50 and learner.stepper._sent == 54
    learner.validate(2)


@pytest.mark.parametrize("row, kind", [(0, "raise"), (3, "raise"), (1, "hang"), (2, "exit")])
def test_a_failing_environment_is_named_and_takes_all_processes_along(row, kind):
    envs = [Counting if i != row else partial(Faulty, kind, 4) for i in range(4)]
    stepper = DoubleBufferedStepper(envs, seed=0, timeout=1.5, workers=4)
    processes = [p for half in stepper.backend.halves for p in half._processes]
    began = time.monotonic()
    with pytest.raises(WorkerError, match=f"environment {row} "):
        for _ in range(30):
            next(stepper)
    assert time.monotonic() - began < 10 and len(processes) == 4
    for p in processes:
        p.join(5)
    assert not any(p.is_alive() for p in processes)
    with pytest.raises(WorkerError, match="closed"):
        next(stepper)


def test_double_buffers_leave_no_process():
    for end in ("close", "collect"):
        stepper = DoubleBufferedStepper(Counting, n=2)
        next(stepper)
        processes = [p for half in stepper.backend.halves for p in half._processes]
        assert len(processes) == 2
        if end == "close":
            stepper.close(), stepper.close()
        else:
            del stepper
            gc.collect()
        for p in processes:
            p.join(5)
        assert not any(p.is_alive() for p in processes)


def test_an_interrupt_while_a_step_is_awaited_loses_nothing(monkeypatch):
    stepper, twin = (DoubleBufferedStepper(counting(2), seed=0) for _ in range(2))
    same([next(stepper) for _ in range(3)], [next(twin) for _ in range(3)])
    half = stepper.backend.halves[1]
    collect = half._collect

    def interrupt(*rest):
        raise KeyboardInterrupt
    monkeypatch.setattr(half, "_collect", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(stepper)
    monkeypatch.setattr(half, "_collect", collect)
    same([next(stepper) for _ in range(20)], [next(twin) for _ in range(20)])
    stepper.close(), twin.close()


def test_ctrl_c_in_a_fit_on_double_buffers(tmp_path, capsys):
    use = dict(ahead=False, env="Pendulum-v1", n=2, double="workers", batches=10**9)
    learner, other = interrupted_and_loaded(use, tmp_path)
    go_on_alike(learner, other)
    learner.close(), other.close()


def test_both_groups_step_while_the_learner_learns(tmp_path):
    "Without a clock: between two pulls both groups are in the middle of a step, which ends only when the learner says so"
    def env(row):
        class Held(Counting):
            taken = -1

            def step(self, action):
                self.taken += 1
                (tmp_path / f"begun-{row}-{self.taken}").touch()
                until = time.monotonic() + 20
                while not (tmp_path / f"go-{self.taken}").exists():
                    if time.monotonic() > until:
                        raise RuntimeError("the learner does not work meanwhile")
                    time.sleep(0.002)
                (tmp_path / f"ended-{row}-{self.taken}").touch()
                return super().step(action)
        return Held

    def await_file(name):
        until = time.monotonic() + 20
        while not (tmp_path / name).exists():
            assert time.monotonic() < until, name
            time.sleep(0.002)
    (tmp_path / "go-0").touch()
    stepper = DoubleBufferedStepper([env(0), env(1)], seed=0)
    for step in range(1, 4):
        next(stepper), next(stepper)
        for row in (0, 1):
            await_file(f"begun-{row}-{step}")
            assert not (tmp_path / f"ended-{row}-{step}").exists()
        (tmp_path / f"go-{step}").touch()
    stepper.close()


@pytest.mark.parametrize("use, error, words", [
    (dict(envs=Counting, n=1), ValueError, "DoubleBufferedStepper: field 'n' is 1"),
    (dict(envs=[Counting]), ValueError, "DoubleBufferedStepper: field 'n' is 1"),
    (dict(envs=Counting, workers=1), ValueError, "field 'workers' is 1"),
    (dict(envs=Counting, mode="async"), LookupError, "DoubleBufferedStepper: field 'mode' is 'async'"),
    (dict(envs=[Counting(), Counting()]), ValueError, "holds a live Counting, expected ids or factories"),
    (dict(envs="Nowhere-v0"), LookupError, "Nowhere-v0"),
    (dict(envs=[Counting, Goal], mode="sync"), ValueError, "environment 1 .*field 'observation_space'"),
])
def test_what_double_buffers_refuse(use, error, words):
    with pytest.raises(error, match=words):
        DoubleBufferedStepper(**use)


def test_flatten_refuses_double_buffers():
    with pytest.raises(ValueError, match="flatten: field 'DoubleBufferedStepper' .*runs ahead"):
        flatten(ddpg(False, n=2, double="sync"), seed=0)


@pytest.mark.parametrize("mode", MODES)
def test_send_and_receive(mode):
    "What `step` does, in two halves"
    one, two = (make_backend(counting(2), mode=mode, workers=2) if mode == "workers" else make_backend(counting(2), mode=mode) for _ in range(2))
    action = np.zeros((2, 1), np.float32)
    with pytest.raises(ValueError, match="`send` before it"):
        one.receive()
    for _ in range(20):
        same(copied(one.observe()), copied(two.observe()))
        one.send(action)
        same(copied(one.receive()), copied(two.step(action)))
    one.observe()
    one.send(action)
    if mode == "workers":
        with pytest.raises(ValueError, match="`observe` before each step"):
            one.send(action)
        state = one.snapshot()
        assert state is None or state["steps"] == 21, "a snapshot waits for what is under way"
        same(copied(one.receive()), copied(one.receive()))
    one.close(), two.close()


def test_double_buffers_still_solve():
    seed_everything(0)
    actor, critic = Actor(1, 1, 32, 32), Critic(1, 1, 32, 32)
    pipe = DoubleBufferedStepper(Bandit, DDPGAgent(actor), 2, "sync", 0, random_steps=64)
    learner = DDPGLearner(actor, critic, pipe, [], 5e-3, critic_lr=5e-3, tau=0.05, bs=64, warmup=64, batches=400)
    learner.fit(1)
    assert learner.validate(4)["mean"] > -0.02
