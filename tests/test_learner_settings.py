"""What learners and builders are given: unknown names, replays, priorities, windows and losses of every critic; and what a run without environment says of itself."""
import inspect

import pytest
import torch
from every_learner import learners
from torch import nn

from fastrl_pipes.agents.ddpg import ddpg
from fastrl_pipes.agents.hddpg import HystereticCriticLossProcessor
from fastrl_pipes.agents.sac import sac
from fastrl_pipes.agents.td3 import SmoothedCriticLossProcessor, td3
from fastrl_pipes.cli import main
from fastrl_pipes.core import SimpleStep
from fastrl_pipes.learner.compose import replay_of
from fastrl_pipes.learner.run import amount, verdict_text
from fastrl_pipes.memory.experience_replay import ExperienceReplay
from fastrl_pipes.memory.prioritized import PrioritizedReplay, PrioritizedSampler
from fastrl_pipes.networks.ensemble import Critics
from fastrl_pipes.networks.targets import target_of
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.walk import bind
from fastrl_pipes.pipes.graph import find_pipe
from fastrl_pipes.processors.dpg import CriticLossProcessor


# --- names
def test_there_are_learners():
    assert {"DDPGLearner", "DDPGPerLearner", "HDDPGLearner", "TD3Learner", "SACLearner", "SACVLearner", "IQLLearner", "BCLearner"} <= set(learners())


@pytest.mark.parametrize("name", learners())
@pytest.mark.parametrize(("wrong", "near"), [("actr_lr", "actor_lr"), ("bacthes", "batches"), ("devise", "device")])
def test_an_unknown_argument_is_the_learners_and_has_a_neighbour(name, wrong, near):
    with pytest.raises(TypeError) as caught:
        learners()[name](**{wrong: 1})
    said = str(caught.value)
    assert said.startswith(f"{name}: field '{wrong}' is no argument, expected one of [") and said.endswith(f"did you mean '{near}'?")
    assert "'who'" not in said and "'pipe'" not in said, "these are the learner's own business"
    assert len(said) < 1000 and "finished_learner" not in said


@pytest.mark.parametrize("name", [n for n, f in learners().items() if "replay" in inspect.signature(f).parameters])
@pytest.mark.parametrize("by_position", [False, True])
def test_a_replay_that_is_none(name, by_position):
    learner = learners()[name]
    names = list(inspect.signature(learner).parameters)
    given = ([None] * names.index("replay") + [3], {}) if by_position else ([], {"replay": 3})
    with pytest.raises(TypeError, match=f"^{name}: field 'replay' is 3, expected a function that puts a replay on a stack; .*ExperienceReplay"):
        learner(*given[0], **given[1])


@pytest.mark.parametrize("build", [ddpg, td3, sac])
def test_an_unknown_setting_is_the_builders(build):
    with pytest.raises(TypeError, match=f"^{build.__name__}: field 'critc_lr' is no argument.*did you mean 'critic_lr'"):
        build(critc_lr=1e-3)


def test_a_missing_argument_is_still_pythons():
    with pytest.raises(TypeError, match=r"SACLearner\(\) missing.*'dls'"):
        learners()["SACLearner"](None, None)


# --- priorities
@pytest.mark.parametrize("build", [ddpg, td3, sac])
def test_priorities_are_settings(build):
    small = {"hidden1": 8, "hidden2": 8, "bs": 8, "max_sz": 100, "warmup": 10}
    sampler = find_pipe(build(prioritized=True, priority_alpha=0.7, priority_beta=0.5, **small), PrioritizedSampler)
    assert (sampler.alpha, sampler.beta) == (0.7, 0.5)
    sampler = find_pipe(build(prioritized=True, priority_beta=0.0, **small), PrioritizedSampler)
    assert (sampler.alpha, sampler.beta) == (0.6, 0.0), "0 is a number like others, and what is not given keeps its default"


@pytest.mark.parametrize("build", [ddpg, td3, sac])
@pytest.mark.parametrize("name", ["priority_alpha", "priority_beta"])
def test_priorities_without_a_prioritised_replay_are_refused(build, name):
    with pytest.raises(ValueError, match=f"^{build.__name__}: field '{name}' is 0.0, expected None, or prioritized=True"):
        build(**{name: 0.0})


def test_the_switch_alone_takes_the_pipe_as_it_is():
    assert replay_of("x", True) is PrioritizedReplay and replay_of("x", False) is ExperienceReplay


def test_the_defaults_that_the_settings_name_are_the_pipes():
    defaults = {n: p.default for n, p in inspect.signature(PrioritizedSampler).parameters.items()}
    assert (defaults["alpha"], defaults["beta"]) == (0.6, 0.4)


def test_the_command_line_refuses_priorities_of_a_uniform_replay(tmp_path, capsys):
    assert main(["train", "td3", "--env", "Pendulum-v1", "--priority-alpha", "0.5", "--out", str(tmp_path/"run")]) == 2
    assert "field 'priority_alpha' is 0.5, expected None, or prioritized=True" in capsys.readouterr().err and not (tmp_path/"run").exists()


# --- windows and losses of critics that descend from DDPG's
class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, state):
        return torch.tanh(self.layer(state))


@pytest.mark.parametrize(("kind", "plain"), [(SmoothedCriticLossProcessor, {"policy_noise": 0.0}), (HystereticCriticLossProcessor, {"q_decrease_rate": 1.0})])
def test_windows_and_losses_are_the_parents(kind, plain):
    "Without what they add, they are the parent; with windows of 3 and another loss, too"
    torch.manual_seed(0)
    critic, actor = Critics(3, 2, 2, (8,)), Policy()
    t_critic, t_actor = target_of(Critics(3, 2, 2, (8,))), target_of(actor)
    batch = SimpleStep(state=torch.randn(4, 3), action=torch.rand(4, 2), next_state=torch.randn(4, 3), reward=torch.randn(4, 1), terminated=torch.tensor([[True], [False], [False], [False]]))

    def loss(kind, **settings):
        pipe = kind([batch], critic, t_actor, t_critic, **settings)
        bind(pipe, Context(seed=0))
        pipe.start()
        found = pipe.loss(batch)
        return float((found[0] if type(found) is tuple else found).detach())
    found = {(nsteps, made): loss(kind, nsteps=nsteps, loss=made, **plain) for nsteps in (1, 3) for made in (nn.MSELoss, nn.SmoothL1Loss)}
    assert found == pytest.approx({(n, made): loss(CriticLossProcessor, nsteps=n, loss=made) for n, made in found}, rel=1e-6)
    assert len({round(v, 6) for v in found.values()}) == 4, "and each of them counts"


# --- words of a run that acts nowhere
def test_a_verdict_without_environment_steps_says_updates():
    found = {"mean": -162.0, "std": 10.0, "episodes": 4, "first_seed": 10_000, "goal": None, "reached": None, "seconds": 3.0}
    assert "after 60,000 updates in 3 s" in verdict_text({**found, "env_steps": 0, "updates": 60_000})
    assert "after 10,000 environment steps in 3 s" in verdict_text({**found, "env_steps": 10_000, "updates": 9001})
    assert "after 0 environment steps in 3 s" in verdict_text({**found, "env_steps": 0}), "written before updates were counted"
    assert amount(0, 5) == "5 updates" and amount(5, 0) == "5 environment steps"
