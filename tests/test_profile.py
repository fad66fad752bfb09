"""Own time and waiting time add up, sleeping pipes are found, and nothing is left behind."""
import re
import time
from functools import partial

import pytest
import torch
from contract_table import difference
from test_guards import in_place, learned
from test_tape import learner

from fastrl_pipes.agents.ddpg import DDPGAgent
from fastrl_pipes.core import SimpleStep
from fastrl_pipes.envs.debug import Goal
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.learner.profile import profile
from fastrl_pipes.loggers.collectors import BatchCollector
from fastrl_pipes.memory.experience_replay import ExperienceReplay
from fastrl_pipes.networks.actor_critic import Actor
from fastrl_pipes.pipes.control import Every, Repeat
from fastrl_pipes.pipes.core import Stage
from fastrl_pipes.pipes.walk import named_pipes


class Sleeper(Stage):
    "Takes its time"

    def __init__(self, source, seconds=0.002, name=None):
        super().__init__(source, name)
        self.seconds = seconds

    def forward(self, item):
        time.sleep(self.seconds)
        return item


class SlowGoal(Goal):
    "Takes 3 ms for a step"

    def step(self, action):
        time.sleep(0.003)
        return super().step(action)


def steps(n=100):
    return [SimpleStep.random(4, 3, 2, seed=i) for i in range(n)]


def test_times_add_up_and_the_slow_pipe_is_found():
    pipe = BatchCollector(Sleeper(Repeat(Sleeper(steps(), 0.004, name="slow"), 2), 0.001, name="quick"))
    found = profile(pipe, 20)
    assert [r.name for r in found.rows] == ["IterableSource", "slow", "Repeat", "quick", "BatchCollector"]
    assert [r.items for r in found.rows] == [10, 10, 20, 20, 20] or [r.items for r in found.rows][2:] == [20, 20, 20]
    assert found["slow"].own >= 0.004 * 9 and found["quick"].own >= 0.001 * 20
    assert abs(found["quick"].waiting - sum(found[n].own for n in ("IterableSource", "slow", "Repeat"))) < 1e-6
    assert sum(r.own for r in found.rows) == pytest.approx(found.seconds, abs=1e-6)
    assert max(found.rows, key=lambda r: r.own).name == "slow"


def test_the_time_of_a_stepper_is_split():
    torch.manual_seed(0)
    stepper = GymStepper(partial(SlowGoal, size=2), DDPGAgent(Actor(4, 2, 16, 12)), seed=0)
    found = profile(BatchCollector(stepper), 10)
    names = [r.name for r in found.rows]
    assert names[names.index("GymStepper") + 1] == "GymStepper: environments" and {"SimpleModelRunner", "OrnsteinUhlenbeck", "ActionScaler", "DDPGAgent"} < set(names)
    environments, own = found["GymStepper: environments"], found["GymStepper"]
    assert environments.own >= 0.003 * 10 and environments.items == 10 and own.own < environments.own
    assert own.waiting == pytest.approx(sum(found[n].own for n in names[:names.index("GymStepper")]) + environments.own, abs=1e-6)
    assert found["SimpleModelRunner"].own > 0


def test_branches_have_clocks():
    pipe = BatchCollector(Every(steps(), 3, lambda inlet: Sleeper(inlet, name="inside"), name="every"))
    found = profile(pipe, 30)
    assert found["inside"].items == 10 and found["inside"].own >= 0.02 and found["every"].waiting >= found["inside"].own


def test_a_node_that_is_not_ours_is_waited_for():
    nodes = pytest.importorskip("torchdata.nodes")
    pipe = BatchCollector(nodes.Mapper(nodes.IterableWrapper(range(50)), lambda x: time.sleep(0.002) or x))
    found = profile(pipe, 10)
    assert found["Foreign"].waiting >= 0.02 and found["Foreign"].own == 0


def test_a_warm_up_is_not_counted():
    run = learner(10, warmup=200)
    found = run.profile(15)
    assert found.pulls == 15 == found.env_steps and found["ExperienceReplay"].items == 15 == found["DDPGLearner"].items


def test_it_learns_as_fit_does_and_restores_everything():
    plain, profiled = learner(31), learner(31)
    plain.fit(1)
    before = in_place(plain)
    profiled.profile(30)
    assert in_place(profiled) == before
    assert not difference(learned(plain), learned(profiled))
    profiled.guard()
    guarded = in_place(profiled)
    profiled.profile(3)
    assert in_place(profiled)[:2] == guarded[:2], "the guard stays"
    profiled.guard(False)
    assert in_place(profiled) == before


def test_everything_is_restored_after_an_error():
    run = learner(10)
    run.fit(1)
    before = in_place(run)
    replay = named_pipes(run)["ExperienceReplay"]
    replay.forward = lambda item: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.profile(5)
    del replay.forward
    assert in_place(run) == before
    run.fit(1)


def test_a_stream_that_ends_is_profiled_to_its_end():
    assert profile(BatchCollector(steps(7)), 100).pulls == 6


def test_as_text_table_and_diagram():
    run = learner(10)
    found = run.profile(20)
    text, page, drawing = str(found), found._repr_html_(), found.mermaid()
    lines = text.splitlines()
    assert lines[0].split() == ["pipe", "items/s", "own", "us", "own", "%", "waiting", "us"] and len(lines) == len(found.rows) + 2
    assert re.fullmatch(r"20 pulls in [\d.]+ s: [\d,]+ pulls/s, [\d,]+ environment steps/s, \d+ us each; the clocks took about [\d.]+% of it", lines[-1])
    assert page.count("<tr>") == len(found.rows) + 1 and "<script" not in page
    assert set(named_pipes(run)) | {"GymStepper: environments"} == {r.name for r in found.rows}
    boxes = [line for line in drawing.splitlines() if "[" in line]
    assert len(boxes) == len(named_pipes(run)) and all(re.search(r"<br/>[\d.]+ us, \d+%", b) for b in boxes)
    assert any("environments: " in b for b in boxes) and sum(line.strip().startswith("style") for line in drawing.splitlines()) == len(boxes)
    assert run.mermaid() == learner(10).mermaid(), "the plain diagram is as it was"


def test_what_the_clocks_cost_is_stated():
    run = learner(10, bs=8)
    found = run.profile(100)
    assert 0 < found.cost < 0.5 and found.rows and isinstance(found.pipe, type(run))
    assert found["ExperienceReplay"].items == 100 and isinstance(named_pipes(run)["ExperienceReplay"], ExperienceReplay)


@pytest.mark.parametrize("wrong", [0, -1, 2.5])
def test_a_number_of_pulls_is_whole_and_positive(wrong):
    with pytest.raises((ValueError, TypeError), match="profile: field 'steps'"):
        profile(BatchCollector(steps()), wrong)
