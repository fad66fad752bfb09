"""The two blocks of the seed page: what they build, what an epoch is, and which mistakes they name."""
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import PendulumEnv

import fastrl_pipes.agents.ddpg as page
from fastrl_pipes.core import MergedStep, SimpleStep, leaves
from fastrl_pipes.learner.datablock import EpochLength, epoch_length
from fastrl_pipes.loggers.video import Video, VideoCollector
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.walk import bind, named_pipes
from fastrl_pipes.pipes.graph import find_pipe, find_pipes


@pytest.fixture
def actor():
    torch.manual_seed(0)
    return page.Actor(3, 1, 16, 16)


@pytest.fixture
def agent(actor):
    return page.DDPGAgent(actor, max_steps=200)


def names(pipe):
    "From the stepper up; what the agent is made of stands before it"
    found = list(named_pipes(pipe))
    return found[found.index("GymStepper"):]


def same(a, b):
    return type(a) is type(b) and all(np.array_equal(x, y) for (_, x), (_, y) in zip(leaves(a), leaves(b), strict=True))


# --- what is built ---------------------------------------------------------------------------------------------------
def test_the_stack_has_the_pages_order(agent):
    build = lambda **more: names(page.GymTransformBlock(agent, **more).build(["Pendulum-v1"]))
    assert build(nsteps=2, nskips=2, firstlast=True) == ["GymStepper", "NStepper", "NSkipper", "FirstLastMerger"]
    assert build(nsteps=3) == ["GymStepper", "NStepper", "NSkipper", "NStepFlattener"]
    assert build() == ["GymStepper"] and build(bs=4, n=9) == ["GymStepper", "StepBatcher", "EpochLength"]


def test_a_block_gives_what_the_same_pipes_give(actor):
    made = lambda: page.DDPGAgent(actor, max_steps=200)
    block = page.DataBlock(page.GymTransformBlock(made(), nsteps=3, nskips=2, firstlast=True, seed=4, discount=0.9)).dataloaders(["Pendulum-v1"] * 2)[0]
    byhand = page.FirstLastMerger(page.NSkipper(page.NStepper(page.GymStepper(["Pendulum-v1"] * 2, made(), seed=4), 3), 2), 0.9)
    for pipe in (block, byhand):
        bind(pipe, Context())
    for _ in range(60):
        a, b = next(block), next(byhand)
        assert isinstance(a, MergedStep) and same(a, b)


def test_ids_are_environments_side_by_side(agent):
    train, valid = page.DataBlock(page.GymTransformBlock(agent, bs=6, seed=0), page.GymTransformBlock(agent)).dataloaders(["Pendulum-v1"] * 3)
    bind(train, Context())
    batch = next(train)
    assert batch.env_id[:, 0].tolist() == [0, 1, 2, 0, 1, 2] and batch.step_n[:, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert find_pipe(valid, page.GymStepper).n == 3 and not find_pipes(valid, VideoCollector)


def test_images_come_after_the_step(agent):
    train, = page.DataBlock(page.GymTransformBlock(None, include_images=True, seed=0)).dataloaders(["fastrl/PixelReach-v0"])
    bind(train, Context())
    step = next(train)
    env = find_pipe(train, page.GymStepper).backend.envs[0]
    assert step.image.shape == (1, 256, 256, 3) and step.image.dtype == np.uint8 and (step.image[0] == env.render()).all()


def test_factories_and_a_bare_id(agent):
    train, = page.DataBlock(page.GymTransformBlock(agent)).dataloaders([PendulumEnv])
    assert find_pipe(train, page.GymStepper).n == 1
    assert len(page.DataBlock(page.GymTransformBlock(agent)).dataloaders("Pendulum-v1")) == 1


# --- into the learner ------------------------------------------------------------------------------------------------
def test_the_page_from_block_to_validation(actor, agent):
    critic = page.Critic(3, 1, 16, 16)
    block = page.DataBlock(page.GymTransformBlock(agent, nsteps=2, nskips=2, firstlast=True, n=30, seed=0),
                           (page.GymTransformBlock(agent, n=25, include_images=True), page.VSCodeTransformBlock()))
    dls = block.dataloaders(["Pendulum-v1"])
    learner = page.DDPGLearner(actor, critic, dls, logger_bases=[], bs=16, max_sz=500, nsteps=2)
    rows = learner.fit(2)
    assert [row["batch"] for row in rows] == [30, 60], "the block says how long an epoch is"
    found = learner.validate(episodes=2)
    assert isinstance(found["video"], Video) and len(found["video"]) == 25 and found["video"].fmt == "gif" and found["video"].fps == 30
    plain = learner.validate(episodes=2, show=False)
    assert np.array_equal(plain["returns"], found["returns"]) and "video" not in plain
    learner.close()
    assert find_pipe(dls[1], page.GymStepper).backend.closed


def test_batches_win_over_the_block(actor, agent):
    train, = page.DataBlock(page.GymTransformBlock(agent, n=30)).dataloaders(["Pendulum-v1"])
    critic = page.Critic(3, 1, 16, 16)
    assert page.DDPGLearner(actor, critic, train, [], bs=16, batches=7).batches == 7
    other, = page.DataBlock(page.GymTransformBlock(page.DDPGAgent(actor))).dataloaders(["Pendulum-v1"])
    assert page.DDPGLearner(actor, critic, other, [], bs=16).batches == 1000
    assert epoch_length(EpochLength(EpochLength([], 3), 5)) == 5, "the one nearest to the learner"


def test_training_is_the_same_with_and_without_a_filmed_validation():
    def trained(films):
        torch.manual_seed(0)
        actor, critic = page.Actor(3, 1, 16, 16), page.Critic(3, 1, 16, 16)
        agent = page.DDPGAgent(actor, max_steps=200)
        blocks = [page.GymTransformBlock(agent, seed=0, n=20)] + [page.GymTransformBlock(agent, include_images=True, n=3)] * films
        learner = page.DDPGLearner(actor, critic, page.DataBlock(*blocks).dataloaders(["Pendulum-v1"]), [], bs=16)
        for _ in range(2):
            learner.fit(1)
            if films:
                learner.validate(episodes=1)
        return [p.detach().clone() for p in (*actor.parameters(), *critic.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))


# --- mistakes --------------------------------------------------------------------------------------------------------
MISTAKES = {
    "none": (lambda a: page.DataBlock(), ValueError, "one to train on"),
    "three": (lambda a: page.DataBlock(*[page.GymTransformBlock(a)] * 3), ValueError, "several ids"),
    "an id": (lambda a: page.DataBlock("Pendulum-v1"), TypeError, "dataloaders"),
    "the agent": (lambda a: page.DataBlock(a), TypeError, "GymTransformBlock"),
    "not called": (lambda a: page.DataBlock(page.GymTransformBlock), TypeError, r"call it"),
    "shown first": (lambda a: page.DataBlock(page.JupyterTransformBlock()), TypeError, "GymTransformBlock before it"),
    "shown while training": (lambda a: page.DataBlock((page.GymTransformBlock(a, include_images=True), page.JupyterTransformBlock())), ValueError, r"blocks\[0\].*second"),
    "nothing to show": (lambda a: page.DataBlock(page.GymTransformBlock(a), (page.GymTransformBlock(a), page.JupyterTransformBlock)), ValueError, "include_images"),
    "two that play": (lambda a: page.DataBlock(page.GymTransformBlock(a), (page.GymTransformBlock(a), page.GymTransformBlock(a))), TypeError, r"blocks\[1\]"),
    "a network": (lambda a: page.GymTransformBlock(page.Actor(3, 1)), TypeError, "agent"),
    "no steps": (lambda a: page.GymTransformBlock(a, nsteps=0), ValueError, "nsteps"),
    "no environment": (lambda a: page.DataBlock(page.GymTransformBlock(a)).dataloaders([]), ValueError, "Pendulum-v1"),
    "an unknown one": (lambda a: page.DataBlock(page.GymTransformBlock(a)).dataloaders(["Pendulm-v1"]), LookupError, "Pendulum-v1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(agent, name):
    make, kind, said = MISTAKES[name]
    with pytest.raises(kind, match=said):
        make(agent)


# --- StepBatcher -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows, bs", [(1, 4), (3, 3), (4, 3), (3, 7), (5, 1)])
def test_batches_hold_the_rows_in_order(rows, bs):
    steps = [SimpleStep.random(rows, seed=i) for i in range(9)]
    batches = list(page.StepBatcher(steps, bs))
    whole = torch.cat([s.state for s in steps])
    assert [len(b) for b in batches] == [bs] * (len(whole) // bs)
    assert torch.equal(torch.cat([b.state for b in batches]), whole[:len(batches) * bs])


def test_nested_states_are_batched():
    steps = [SimpleStep(state={"camera": np.full((1, 2, 2), i, np.uint8), "speed": (np.ones((1, 1)) * i,)}, reward=np.zeros((1, 1))) for i in range(4)]
    batch = list(page.StepBatcher(steps, 2))[1]
    assert batch.state["camera"].shape == (2, 2, 2) and batch.state["camera"].dtype == np.uint8 and batch.state["speed"][0][:, 0].tolist() == [2, 3]


def test_losses_and_windows_pass_a_batcher_at_once():
    step, loss, window = SimpleStep.random(1, seed=0), {"loss": torch.tensor(1.0)}, (SimpleStep.random(1, seed=1),)
    out = list(page.StepBatcher([step, loss, window, step], 2))
    assert out[0] is loss and len(out[1]) == 1 and isinstance(out[1], tuple) and len(out[2]) == 2
