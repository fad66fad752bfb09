"""Stacks in outline: DDPG becomes TD3, and TD3 becomes SAC, in fewer than ten lines each; and what counts as a line."""
from functools import partial

import pytest
from test_tape import learner

from fastrl_pipes.agents.ddpg import ddpg
from fastrl_pipes.agents.hddpg import hddpg
from fastrl_pipes.agents.sac import sac
from fastrl_pipes.agents.td3 import td3
from fastrl_pipes.pipes.compare import replace
from fastrl_pipes.pipes.control import Every, Repeat
from fastrl_pipes.pipes.core import Stage
from fastrl_pipes.pipes.outline import outline, steps_between

SAME = dict(hidden1=8, hidden2=8, bs=16, max_sz=100, actor_lr=1e-3, critic_lr=1e-3, tau=0.005, warmup=16)

EXPECTED = {
    "DDPG to TD3": (ddpg, td3, ["~ OrnsteinUhlenbeck -> GaussianNoise", "~ CriticLossProcessor -> SmoothedCriticLossProcessor",
                                "+ Every, n=2, around ActorLossProcessor, actor_loss, actor_opt, critic_target, actor_target"]),
    "TD3 to SAC": (td3, partial(sac, alpha=0.2), ["~ SimpleModelRunner -> PolicyRunner", "- GaussianNoise", "~ SmoothedCriticLossProcessor -> SoftCriticLossProcessor",
                                                  "~ ActorLossProcessor -> SoftActorLossProcessor", "- actor_target: SoftTargetUpdater",
                                                  "- Every, n=2, around ActorLossProcessor, actor_loss, actor_opt, critic_target, actor_target"]),
    "DDPG to hysteretic DDPG": (ddpg, hddpg, ["~ CriticLossProcessor -> HystereticCriticLossProcessor"]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_an_algorithm_adds_to_another(name):
    a, b, expected = EXPECTED[name]
    assert list(steps_between(a(**SAME), b(**SAME))) == expected


def test_a_learned_temperature_stays_within_ten_lines():
    learned, fixed = sac(**SAME), sac(alpha=0.2, **SAME)
    added = list(steps_between(fixed, learned))
    assert {"+ TemperatureLossProcessor", "+ alpha_opt: BasicOptStepper"} <= set(added) and all(line.startswith("+") for line in added)
    assert len(steps_between(td3(**SAME), learned)) <= 10
    assert len(steps_between(ddpg(**SAME), td3(**SAME))) <= 10


def test_every_change_is_counted_once():
    a = learner()
    assert list(steps_between(a, learner())) == [] and str(steps_between(a, a)) == "no difference"
    slower = replace(a, "actor_target", show=False, tau=0.5)
    assert len(steps_between(a, slower)) == 1 and "actor_target: tau" in str(steps_between(a, slower))


class One(Stage):
    def forward(self, item):
        return item


class Two(One):
    pass


@pytest.mark.parametrize("build, expected", [
    (lambda: One(One([1])), ["+ One_2"]),
    (lambda: Two([1]), ["~ One -> Two"]),
    (lambda: One([1], name="other"), []),
    (lambda: Repeat(One([1]), 2), ["+ Repeat"]),
    (lambda: Two(Two([1])), ["~ One -> Two", "+ Two_2"]),
    (lambda: Every(One([1]), 3, lambda inlet: Two(inlet, name="late")), ["+ late: Two", "+ Every, n=3, around late"]),
], ids=["one more", "swapped", "the head's name", "another kind", "swapped, and one more", "a branch"])
def test_lines_of_small_stacks(build, expected):
    assert list(steps_between(One([1]), build())) == expected


def test_outline_indents_agents_and_branches():
    lines = outline(td3(**SAME))
    assert lines[:2] == ["    SimpleModelRunner", "    GaussianNoise"] and "GymStepper" in lines
    at = lines.index("Every")
    assert lines[at - 1] == "    actor_target: SoftTargetUpdater" and not any("Inlet" in line for line in lines)
