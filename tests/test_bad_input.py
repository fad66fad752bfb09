"""Wrong calls, as users make them: each is refused with a message that names the pipe and the field and says what to change, and
before the first environment step wherever it can be known."""
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn
from torchdata.nodes import IterableWrapper, Loader

from fastrl_pipes.agents.ddpg import (Actor, ActionClip, ActionScaler, ActorLossProcessor, AgentHead, BasicOptStepper, Critic, CriticLossProcessor, DDPGAgent,
                                      DDPGLearner, ExperienceReplay, FirstLastMerger, GymStepper, Inlet, LearnerHead, LossCollector, NSkipper, NStepper,
                                      OrnsteinUhlenbeck,
                                      ProgressBarLogger, SimpleModelRunner, SimpleStep, SoftTargetUpdater, ddpg, ddpg_conv2d_block, get_target_model, target_of)
from fastrl_pipes.envs.doubles import Faulty, Nested, NoOp
from fastrl_pipes.errors import WorkerError
from fastrl_pipes.pipes.core import IterableSource
from fastrl_pipes.pipes.walk import named_modules

S, A = 3, 2
STEPS = []  # one entry for every step of any environment below


class Env(NoOp):
    "Does nothing, and says so; what was tried in a throw-away environment, which is closed again, does not count"

    def __init__(self):
        super().__init__(S, A)

    def step(self, action):
        STEPS.append(self)
        return super().step(action)

    def close(self):
        STEPS[:] = [env for env in STEPS if env is not self]


class Switch(Env):
    "The same observations, but two discrete actions"

    def __init__(self):
        super().__init__()
        self.action_space = gymnasium.spaces.Discrete(2)


class Breaks(Faulty):
    "Counts, and breaks at its third step"

    def __init__(self, fault, at=3):
        super().__init__(fault, at, lengths=50)


def nets(state_sz=S, action_sz=A, **more):
    return Actor(state_sz, action_sz, 8, 8, **more), Critic(state_sz, action_sz, 8, 8, **more)


def stack(agent=None, env=Env, **more):
    return GymStepper(env, agent, **more)


def learner(actor=None, critic=None, dls=None, env=Env, **settings):
    "A learner that is right, but for what is given"
    actor_, critic_ = nets()
    actor, critic = actor or actor_, critic or critic_
    return DDPGLearner(actor, critic, stack(DDPGAgent(actor), env) if dls is None else dls, **{"logger_bases": [], "bs": 4, "batches": 10, **settings})


def on_counting(fault, **more):
    "A learner on an environment with one number to see and one to say, which breaks"
    actor, critic = nets(1, 1)
    return DDPGLearner(actor, critic, GymStepper(partial(Breaks, fault, **more), DDPGAgent(actor)), logger_bases=[], bs=4)


class Shaped(nn.Module):
    "A critic that returns another shape than [B, 1]"

    def __init__(self, change):
        super().__init__()
        self.critic, self.change = nets()[1], change

    def forward(self, state, action):
        return self.change(self.critic(state, action))


def windows(n, agent=None):
    return NStepper(stack(agent), n)


def two_targets():
    critic = nets()[1]
    return get_target_model(critic, SoftTargetUpdater(SoftTargetUpdater([], critic), critic, name="second"))


def trained_with_a_target():
    actor, critic = nets()
    return ActorLossProcessor(CriticLossProcessor([], critic, actor, target_of(critic)), critic, actor)


def same_stack_twice():
    actor, critic = nets()
    pipe = stack(DDPGAgent(actor))
    learner(actor, critic, pipe).start()
    learner(actor, critic, pipe).start()


def named_twice():
    actor, critic = nets()
    return learner(actor, critic, dp_augmentation_fns=[lambda pipe: SoftTargetUpdater(pipe, actor, name="actor_target")])


def unreduced_loss():
    actor, critic = nets()
    pipe = CriticLossProcessor(ExperienceReplay(stack(DDPGAgent(actor)), 4), critic, target_of(actor), target_of(critic), loss=partial(nn.MSELoss, reduction="none"))
    return LearnerHead(LossCollector(pipe))


def no_replay():
    actor, critic = nets()
    return LearnerHead(CriticLossProcessor(stack(DDPGAgent(actor)), critic, target_of(actor), target_of(critic)))


def noise_of_another_size():
    actor, critic = nets()
    return learner(actor, critic, stack(AgentHead(ActionScaler(OrnsteinUhlenbeck(SimpleModelRunner(Inlet(), actor), action_sz=5)))))


def validated_elsewhere():
    actor, critic = nets()
    return learner(actor, critic, (stack(DDPGAgent(actor)), stack(env=Switch)))


def offline():
    return learner(dls=IterableSource([SimpleStep.random(8, S, A)]))


V, T, L, W = ValueError, TypeError, LookupError, WorkerError
BAD = {  # what: (the call, its error, what the message must say)
    # networks
    "actor for another observation": (lambda: learner(actor=nets(4)[0]), V, ["SimpleModelRunner", "Actor", ", 3]"]),
    "actor with batch norm for another observation": (lambda: learner(actor=nets(4, batch_norm=True)[0]), V, ["SimpleModelRunner", "Actor"]),
    "critic for another observation": (lambda: learner(critic=nets(4)[1]), V, ["CriticLossProcessor", "Critic", "the observation and the action"]),
    "critic for another action": (lambda: learner(critic=nets(S, 1)[1]), V, ["CriticLossProcessor", "Critic", "the observation and the action"]),
    "critic returns [B]": (lambda: learner(critic=Shaped(lambda q: q[:, 0])), V, ["CriticLossProcessor", "critic", ", 1]", "last axis"]),
    "critic returns [B, 2]": (lambda: learner(critic=Shaped(lambda q: q.expand(-1, 2))), V, ["CriticLossProcessor", "critic", ", 2]", ", 1]"]),
    "actor's action too wide": (lambda: learner(actor=nets(S, 3)[0]), V, ["'action'", ", 3]", "the action space is Box(-1.0, 1.0, (2,)"]),
    "actor's action too narrow": (lambda: learner(actor=nets(S, 1)[0]), V, ["'action'", ", 1]", "the action space is Box(-1.0, 1.0, (2,)"]),
    "actor and critic swapped": (lambda: learner(*nets()[::-1]), (V, T), ["Critic", "SimpleModelRunner"]),
    "noise of another size": (noise_of_another_size, V, ["OrnsteinUhlenbeck", "'action'", "5", "action_sz"]),
    "networks of two dtypes": (lambda: learner(actor=nets()[0].double()), V, ["CriticLossProcessor", "Double"]),
    "a flat network for images": (lambda: Actor((3, 64, 64), 2), T, ["Actor", "state_sz", "conv_block=ddpg_conv2d_block"]),
    "an image that is too small": (lambda: ddpg_conv2d_block((3, 8, 8)), V, ["ddpg_conv2d_block", "state_sz[1]", "15"]),
    "a named observation for a plain actor": (lambda: learner(env=Nested), L, ["Actor", "'state'", "count"]),
    "an agent with another network than the learner's": (lambda: learner(dls=stack(DDPGAgent(nets()[0]))), V, ["DDPGLearner", "actor", "the network that acts"]),
    "an agent of a function": (lambda: DDPGAgent(lambda state: state), T, ["SimpleModelRunner", "model", "nn.Module"]),
    # targets and optimizers
    "no target": (lambda: CriticLossProcessor([], nets()[1], nets()[0]), L, ["get_target_model", "SoftTargetUpdater upstream", "target_of(model)"]),
    "two targets": (two_targets, L, ["get_target_model", "SoftTargetUpdater", "second", "exactly one"]),
    "the target is the model": (lambda: (lambda c: SoftTargetUpdater([], c, target_model=c))(nets()[1]), V, ["SoftTargetUpdater", "target_model", "target_of(model)"]),
    "the target critic is the critic": (lambda: (lambda c: CriticLossProcessor([], c, nets()[0], c))(nets()[1]), V, ["t_critic", "target_of(critic)"]),
    "the target actor is the actor": (trained_with_a_target, V, ["t_actor", "target_of(actor)"]),
    "a target of another network": (lambda: SoftTargetUpdater([], nets()[1], target_model=nets(4)[1]), V, ["SoftTargetUpdater", "layers.0.weight", "[8, 6]", "[8, 5]"]),
    "an optimizer on a target": (lambda: BasicOptStepper([], target_of(nets()[1]), 1e-3), V, ["BasicOptStepper", "model", "target network"]),
    "an optimizer by name": (lambda: learner(critic_opt="adam"), T, ["critic_opt", "'adam'"]),
    "a negative learning rate": (lambda: learner(actor_lr=-1e-3), V, ["actor_opt", "lr", "-0.001", "[0, inf]"]),
    "a learning rate as text": (lambda: learner(critic_lr="1e-3"), T, ["critic_opt", "lr", "'1e-3'"]),
    "a loss per sample": (unreduced_loss, V, ["CriticLossProcessor", "loss", ", 1]", "mean"]),
    # numbers
    "tau below 0": (lambda: learner(tau=-0.1), V, ["critic_target", "tau", "-0.1", "[0, 1]"]),
    "tau above 1": (lambda: learner(tau=1.1), V, ["critic_target", "tau", "1.1", "[0, 1]"]),
    "tau is NaN": (lambda: learner(tau=float("nan")), V, ["critic_target", "tau", "nan"]),
    "both Polyak knobs": (lambda: learner(tau=0.1, critic_target_copy_freq=5), V, ["DDPGLearner", "tau", "copy_freq", "one of the two"]),
    "a copy frequency of 0": (lambda: learner(tau=1.0, actor_target_copy_freq=0), V, ["actor_target", "target_sync", "0"]),
    "half a copy frequency": (lambda: learner(tau=1.0, actor_target_copy_freq=1.5), T, ["actor_target", "target_sync", "1.5", "whole number"]),
    "discount above 1": (lambda: learner(discount=1.5), V, ["discount", "1.5", "[0, 1]"]),
    "no batches in an epoch": (lambda: learner(batches=0), V, ["DDPGLearner", "batches", "0"]),
    "a negative bound on gradients": (lambda: learner(clip_critic_grad=-1.0), V, ["ActorLossProcessor", "clip_critic_grad", "-1"]),
    "nsteps of 0": (lambda: learner(nsteps=0), V, ["DDPGLearner", "nsteps", "0"]),
    "noise that grows": (lambda: DDPGAgent(nets()[0], min_epsilon=0.5, max_epsilon=0.1), V, ["OrnsteinUhlenbeck", "max_epsilon", "0.1", "0.5"]),
    "a clip from high to low": (lambda: ActionClip([], 1.0, -1.0), V, ["ActionClip", "clip_min", "clip_max"]),
    "a negative seed": (lambda: stack(seed=-1), V, ["GymStepper", "seed", "-1"]),
    # replay
    "bs above max_sz": (lambda: learner(bs=100, max_sz=50), V, ["ExperienceReplay", "bs", "100", "max_sz=50"]),
    "warmup above max_sz": (lambda: learner(warmup=100, max_sz=50), V, ["ExperienceReplay", "warmup", "100", "max_sz=50"]),
    "a replay that does not fit": (lambda: learner(max_sz=10**12), V, ["ReplayMemory", "max_sz", "GB", "would fit", "path="]),
    "windows into the replay": (lambda: learner(dls=windows(2)), T, ["ReplayWriter", "window of 2 steps", "FirstLastMerger"]),
    # composition
    "nsteps that disagree": (lambda: learner(dls=FirstLastMerger(windows(2)), nsteps=3), V, ["DDPGLearner", "nsteps", "3", "2", "upstream"]),
    "discounts that disagree": (lambda: learner(dls=FirstLastMerger(windows(2), 0.9)), V, ["CriticLossProcessor", "discount", "0.99", "0.9", "FirstLastMerger"]),
    "losses of steps that have not passed a replay": (no_replay, V, ["CriticLossProcessor", "numpy"]),
    "skipped before windows": (lambda: NStepper(NSkipper(stack(), 2), 2), V, ["NStepper", "source", "put NSkipper after NStepper"]),
    "skipped before a learner's windows": (lambda: learner(dls=NSkipper(stack(), 2), nsteps=2), V, ["NStepper", "put NSkipper after NStepper"]),
    "a number as source": (lambda: NStepper(3, 2), T, ["NStepper", "source", "3", "iterable"]),
    "an id as source": (lambda: NStepper("Pendulum-v1", 2), T, ["NStepper", "source", "'Pendulum-v1'", "iterable"]),
    "no source": (lambda: NStepper(None, 2), T, ["NStepper", "source", "None"]),
    "source and model swapped": (lambda: SoftTargetUpdater(nets()[1], []), T, ["SoftTargetUpdater", "source", "Critic", "the source comes first"]),
    "a Loader as source": (lambda: ExperienceReplay(Loader(IterableWrapper([1]))), T, ["source", "torchdata Loader", "the node that it wraps"]),
    "a Loader to learn from": (lambda: learner(dls=Loader(IterableWrapper([1]))), T, ["DDPGLearner", "torchdata Loader", "the node that it wraps"]),
    "an environment as dls": (lambda: learner(dls=gymnasium.make("Pendulum-v1")), T, ["DDPGLearner", "TimeLimit", "a pipe"]),
    "three stacks as dls": (lambda: learner(dls=[stack(), stack(), stack()]), V, ["DDPGLearner", "dls", "3 stacks", "(train, valid)"]),
    "two pipes of a name": (named_twice, V, ["SoftTargetUpdater", "name", "'actor_target'"]),
    "an augmentation that returns nothing": (lambda: learner(dp_augmentation_fns=[lambda pipe: None]), T, ["Learner", "source", "None"]),
    "a logger's class": (lambda: learner(logger_bases=[ProgressBarLogger]), T, ["DDPGLearner", "loggers", "ProgressBarLogger"]),
    "a logger by name": (lambda: learner(logger_bases=["bar"]), T, ["DDPGLearner", "loggers", "'bar'"]),
    "a device that is none": (lambda: learner(device="cudaa"), V, ["DDPGLearner", "device", "'cudaa'"]),
    "one stack in two learners": (same_stack_twice, V, ["GymStepper", "another learner"]),
    # environments
    "discrete actions": (lambda: learner(env="CartPole-v1"), T, ["DDPGLearner", "action_space", "Discrete(2)", "Box", "DQN"]),
    "discrete actions for the builder": (lambda: ddpg("CartPole-v1"), T, ["ddpg", "action_space", "Discrete(2)", "Box", "DQN"]),
    "an unknown environment": (lambda: stack(env="Pendulumm-v1"), L, ["make_backend", "'Pendulumm-v1'", "did you mean 'Pendulum-v1'?"]),
    "an unknown version": (lambda: ddpg("Pendulum-v9"), L, ["'Pendulum-v9'", "did you mean 'Pendulum-v1'?"]),
    "an unknown way of running": (lambda: stack(mode="snyc"), L, ["make_backend", "mode", "'snyc'", "did you mean 'sync'?"]),
    "several of a live environment": (lambda: stack(env=Env(), n=3), V, ["make_backend", "n", "3", "a live Env"]),
    "no vector version": (lambda: stack(n=2, env="Pendulum-v1", mode="native"), V, ["make_backend", "mode", "'native'", "'sync'"]),
    "no environments": (lambda: stack(n=0), V, ["make_backend", "n", "0"]),
    "a network in the place of the agent": (lambda: stack(nets()[0]), T, ["GymStepper", "agent", "Actor", "AgentHead(chain)"]),
    "a chain in the place of the agent": (lambda: stack(ActionScaler(SimpleModelRunner(Inlet(), nets()[0]))), T, ["GymStepper", "agent", "ActionScaler", "AgentHead"]),
    "a chain without an inlet": (lambda: AgentHead(SimpleModelRunner([], nets()[0])), L, ["Inlet", "exactly one"]),
    # fit, validate, predict
    "fit without a budget": (lambda: learner().fit(), V, ["DDPGLearner", "epochs", "env_steps", "one of the two"]),
    "fit with two budgets": (lambda: learner().fit(1, env_steps=10), V, ["DDPGLearner", "epochs", "env_steps", "one of the two"]),
    "fit for no epochs": (lambda: learner().fit(0), V, ["DDPGLearner.fit", "epochs", "0"]),
    "fit for negative steps": (lambda: learner().fit(env_steps=-5), V, ["DDPGLearner.fit", "env_steps", "-5"]),
    "fit for half an epoch": (lambda: learner().fit(1.5), T, ["DDPGLearner.fit", "epochs", "1.5", "whole number"]),
    "environment steps without an environment": (lambda: offline().fit(env_steps=10), V, ["DDPGLearner.fit", "env_steps", "epochs"]),
    "validation in a live environment": (lambda: learner(env=Env()).validate(), V, ["DDPGLearner.validate", "envs", "live", "dls=(train, valid)"]),
    "validation without an environment": (lambda: offline().validate(), L, ["DDPGLearner.validate", "GymStepper"]),
    "a prediction without an agent": (lambda: offline().predict(np.zeros(S, np.float32)), L, ["DDPGLearner.predict", "agent", "None"]),
    "validation of no episodes": (lambda: learner().validate(episodes=0), V, ["episodes", "0"]),
    "validation in another action space": (validated_elsewhere, T, ["DDPGLearner", "action_space", "Discrete(2)"]),
    "an observation of another size": (lambda: learner().predict(np.zeros(5, np.float32)), V, ["predict", "observation", "[5]", "[3]"]),
    "an observation with a batch axis": (lambda: learner().predict(np.zeros((1, S), np.float32)), V, ["predict", "observation", "[1, 3]", "[3]"]),
    # words
    "an unknown argument of a pipe": (lambda: SoftTargetUpdater([], nets()[1], taus=0.1), T, ["SoftTargetUpdater", "'taus'", "did you mean 'tau'?"]),
    "an unknown argument of the stepper": (lambda: stack(sed=3), T, ["GymStepper", "'sed'", "did you mean 'seed'?"]),
    "an unknown argument of the learner": (lambda: learner(critc_lr=0.1), T, ["DDPGLearner", "'critc_lr'", "did you mean 'critic_lr'?"]),
    "an unknown argument of the builder": (lambda: ddpg(critc_lr=0.1), T, ["ddpg", "'critc_lr'", "did you mean 'critic_lr'?"]),
    "a number as replay": (lambda: learner(replay=3), T, ["DDPGLearner", "'replay'", "is 3", "a function that puts a replay", "ExperienceReplay"]),
    "priorities of a uniform replay": (lambda: ddpg(priority_alpha=0.5), V, ["ddpg", "'priority_alpha'", "0.5", "prioritized=True"]),
    "priorities above 1": (lambda: ddpg(prioritized=True, priority_beta=1.5), V, ["PrioritizedReplay", "beta", "1.5", "[0, 1]"]),
    "named observations for the builder": (lambda: ddpg("fastrl/Reach2D-v0"), T, ["ddpg", "observation_space", "desired_goal", "a Box of one axis", "GoalConditioned"]),
    "images for the builder": (lambda: ddpg("fastrl/PixelReach-v0"), T, ["ddpg", "observation_space", "a Box of one axis", "conv_block"]),
    "a missing argument": (lambda: SoftTargetUpdater([]), T, ["SoftTargetUpdater", "'model'", "target_sync"]),
    "an unknown field": (lambda: SimpleStep().replace(rewrad=3), L, ["SimpleStep", "'rewrad'", "did you mean 'reward'?"]),
}
PLAIN_PYTHON = {"an unknown argument of a pipe", "an unknown argument of the stepper", "a missing argument"}


@pytest.mark.parametrize("what", BAD)
def test_a_wrong_call_is_refused_before_the_first_step(what):
    call, error, words = BAD[what]
    STEPS.clear()
    with pytest.raises(error) as caught:
        call()
    said = str(caught.value)
    for word in words:
        assert word in said, f"{said!r} does not say {word!r}"
    if what not in PLAIN_PYTHON:
        assert ": field '" in said and ", expected " in said, f"{said!r} has not the form of our messages"
    assert "\n" not in said and len(said) < 1000
    assert not STEPS, "it could be known before the first environment step"


def test_there_are_many_wrong_calls():
    assert len(BAD) >= 60


FAULTS = {  # fault: what the message must say
    "nan_reward": ["'reward'", "nan", "finite"],
    "nan_observation": ["'observation'", "NaN", "finite", "check=False"],
    "wrong_shape": ["'observation'", "[2]", "[1]"],
    "wrong_dtype": ["'observation'", "float32"],
    "raise": ["ZeroDivisionError", "the simulator is broken"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_environment_that_breaks_is_named_with_its_step(fault):
    broken = on_counting(fault)
    with pytest.raises(WorkerError) as caught:
        broken.fit(1)
    for word in ["environment 0", "Breaks", "step 3", *FAULTS[fault]]:
        assert word in str(caught.value)


def test_an_environment_that_breaks_at_its_reset_is_named():
    with pytest.raises(WorkerError, match="environment 0 .Breaks., step 0: field 'observation' has NaN"):
        on_counting("nan_observation", at=0).fit(1)


def test_a_fault_in_the_middle_leaves_the_networks_finite_and_the_learner_usable():
    "The weights are those of the last whole update; the environment begins anew"
    learner = on_counting("nan_reward", at=30)
    with pytest.raises(WorkerError, match="step 30"):
        learner.fit(1)
    networks = [m for m in named_modules(learner).values() if isinstance(m, nn.Module)]
    assert len(networks) == 4 and all(torch.isfinite(x).all() for m in networks for x in m.parameters())
    learner.batches = 10
    assert len(learner.fit(1)) == 1, "the environment is broken once only"


def test_vector_rewards_are_refused_where_they_first_come():
    class Vector(Env):
        def step(self, action):
            obs, _, *rest = super().step(action)
            return obs, np.ones(2), *rest
    with pytest.raises(WorkerError, match=r"step 1: field 'reward' has shape \[2\], expected one number"):
        learner(env=Vector).fit(1)


def test_a_right_call_is_not_refused():
    "The learner from which all wrong calls above are made"
    right = learner()
    right.fit(1)
    assert len(STEPS) >= 10 and right.predict([0.0, 0.0, 0.0]).shape == (A,)
    assert right.validate(episodes=2)["lengths"].tolist() == [200, 200]
