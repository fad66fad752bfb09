"""`check()` finds planted mistakes before the first real step, and names the pipe. The environment that trains counts how often it
was touched: never. And what is looked for leaves no trace: training is the same to the bit with and without a check."""
import random
import time
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from fastrl_pipes.agents.core import ActionScaler, AgentHead, SimpleModelRunner
from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner, ddpg
from fastrl_pipes.core import SimpleStep, copied
from fastrl_pipes.envs.doubles import AnyAction
from fastrl_pipes.envs.stepper import GymStepper, synthetic
from fastrl_pipes.errors import WorkerError
from fastrl_pipes.envs import visit
from fastrl_pipes.learner.head import LearnerHead
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.loggers.collectors import EpisodeCollector, LossCollector
from fastrl_pipes.memory.experience_replay import ExperienceReplay
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.networks.targets import target_of
from fastrl_pipes.pipes.control import Every, Inlet
from fastrl_pipes.pipes.core import IterableSource, Stage
from fastrl_pipes.pipes.walk import named_modules, snapshot
from fastrl_pipes.pipes.nstep import NStepper
from fastrl_pipes.processors.dpg import ActorLossProcessor, CriticLossProcessor
from fastrl_pipes.processors.targets import SoftTargetUpdater

S, A, BS = 3, 2, 8
TRAINING = []  # the environments that steppers of `stack` train on


# --- a learner that is right -----------------------------------------------------------------------------------------
class Walk(gymnasium.Env):
    "A point that is pushed around; counts what is done to it"

    def __init__(self):
        self.observation_space = spaces.Box(-2, 2, (S,), np.float32)
        self.action_space = spaces.Box(-1, 1, (A,), np.float32)
        self.touched, self.closed = [], False

    def see(self):
        return self.x.astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.touched.append("reset")
        self.t, self.x = 0, self.np_random.uniform(-1, 1, S)
        return self.see(), {}

    def step(self, action):
        self.touched.append("step")
        self.t, self.x = self.t + 1, np.clip(self.x + 0.1 * float(action[0]), -2, 2)
        return self.see(), -float(np.abs(self.x).mean()), False, self.t >= 10, {}

    def close(self):
        self.closed = True


def nets():
    torch.manual_seed(0)
    return Actor(S, A, 8, 8), Critic(S, A, 8, 8)


def stack(actor=None, env=Walk, agent=None, **more):
    stepper = GymStepper(env, agent or DDPGAgent(actor or nets()[0]), **{"mode": "sync", "seed": 0, **more})
    TRAINING.extend(getattr(stepper.backend, "envs", ()))
    return stepper


def learner(actor=None, critic=None, env=Walk, before=(), behind=(), **more):
    "The right one, but for what is given: `before` stages stand before the replay, `behind` ones behind everything"
    actor, critic = actor or nets()[0], critic or nets()[1]
    pipe = stack(actor, env, **more.pop("stepper", {}))
    for stage in before:
        pipe = stage(pipe)
    return DDPGLearner(actor, critic, pipe, logger_bases=[], bs=BS, batches=10, dp_augmentation_fns=behind, **more)


def by_hand(t_actor=None, critic_stepped=None, critic_opt=True, collector=lambda pipe: pipe):
    "The same by hand, in the paper's order"
    actor, critic = nets()
    t_critic = target_of(critic)
    mine = t_actor or target_of(actor)
    pipe = collector(ExperienceReplay(stack(actor), BS))
    pipe = CriticLossProcessor(pipe, critic, mine, t_critic)
    if critic_opt:
        pipe = BasicOptStepper(pipe, critic_stepped or critic, 1e-3, name="critic_opt")
    pipe = ActorLossProcessor(pipe, critic, actor)
    pipe = BasicOptStepper(pipe, actor, 1e-3, name="actor_opt")
    pipe = SoftTargetUpdater(pipe, critic, 1, 0.01, t_critic)
    return LearnerHead(SoftTargetUpdater(pipe, actor, 1, 0.01, None if t_actor else mine), batches=10)


@pytest.fixture(autouse=True)
def nothing_stepped_yet():
    TRAINING.clear()


# --- eight mistakes in models ----------------------------------------------------------------------------------------
class Changed(nn.Module):
    "A right network with a mistake around it: `change(network, *inputs)`"

    def __init__(self, inside, change):
        super().__init__()
        self.inside, self.change = inside, change

    def forward(self, *inputs):
        return self.change(self.inside, *inputs)


def actor_that(change, **more):
    return learner(actor=Changed(nets()[0], change), **more)


def critic_that(change):
    return learner(critic=Changed(nets()[1], change))


class Named(Walk):
    "The same, seen as two named parts"

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict(arm=self.observation_space, camera=spaces.Box(0, 255, (4, 4), np.uint8))

    def see(self):
        return {"arm": super().see(), "camera": np.full((4, 4), 7, np.uint8)}


class OfLegs(nn.Module):
    "Asks for a field that is not there"

    def __init__(self):
        super().__init__()
        self.inside = nets()[0]

    def forward(self, legs):
        return self.inside(legs)


class OfArm(nn.Module):
    "Looks at one field of two"

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, arm, action=None):
        return (self.inside(arm) if action is None else self.inside(arm, action)), {"rides": "along"}


class ArmActor(OfArm):
    def forward(self, arm):
        return super().forward(arm)


MODELS = {
    "the critic returns [B]": (lambda: critic_that(lambda net, s, a: net(s, a)[:, 0]), ["CriticLossProcessor", "'critic' has shape [4], expected [4, 1]", "came SampledStep("]),
    "the actor has no squash": (lambda: actor_that(lambda net, s: net.layers[:-1](s)), ["ActorLossProcessor", "'actor'", "[-1, 1]", "nn.Tanh"]),
    "the actor returns a list": (lambda: actor_that(lambda net, s: [net(s), s]), ["SimpleModelRunner", "'action'", "list of 2", "tuple"]),
    "the critic computes in float64": (lambda: critic_that(lambda net, s, a: net(s, a).double()), ["CriticLossProcessor", "'critic'", "float64", "float32"]),
    "the actor returns NaN": (lambda: actor_that(lambda net, s: net(s) / 0 * 0), ["SimpleModelRunner", "'action'", "NaN"]),
    "an argument that the observation lacks": (lambda: learner(actor=OfLegs(), env=Named), ["SimpleModelRunner", "'legs'", "['arm', 'camera']"]),
    "a squeeze drops the batch axis": (lambda: actor_that(lambda net, s: net(s).squeeze()), ["SimpleModelRunner", "'action'", "[2] for a batch of one", "squeeze"]),
    "the critic looks at other rows": (lambda: critic_that(lambda net, s, a: net(s - s.mean(0), a)), ["CriticLossProcessor", "'critic'", "other rows"]),
}


# --- eight mistakes in pipes -----------------------------------------------------------------------------------------
class Stageof(Stage):
    "A user's stage: a function of the step"
    change = staticmethod(lambda step: step)

    def forward(self, item):
        return self.change(item) if isinstance(item, SimpleStep) else item


def stage(name, change):
    "A class of that name, as a user would write it"
    return type(name, (Stageof,), {"change": staticmethod(change)})


Scaled = stage("RewardScaler", lambda step: step.replace(reward=step.reward[:, 0] * 0.1))
Stacked = stage("StateStacker", lambda step: step.replace(state=np.concatenate([step.state, step.state], 1)))
Ended = stage("DoneMaker", lambda step: step.replace(terminated=step.done))
Normed = stage("Normalizer", lambda step: step.replace(reward=step.reward * np.float32("nan")))

PIPES = {
    "windows reach the replay": (lambda: learner(before=[partial(NStepper, n=2)]), ["ReplayWriter", "window of 2 steps", "FirstLastMerger"]),
    "a stage flattens the reward": (lambda: learner(before=[Scaled]), ["RewardScaler", "'reward' has shape [4], expected [4, any]", "from upstream (RollingTerminatedRewardCollector)"]),
    "a stage changes the state, but not its successor": (lambda: learner(before=[Stacked]), ["StateStacker", "'next_state'", "[4, 3]", "[4, 6]"]),
    "a stage takes truncation for termination": (lambda: learner(before=[Ended]), ["DoneMaker", "'terminated'", "truncated"]),
    "an optimizer of another network": (lambda: by_hand(critic_stepped=nets()[1]), ["critic_opt", "'model'", "no loss upstream", "Critic"]),
    "a loss that nobody steps": (lambda: by_hand(critic_opt=False), ["CriticLossProcessor", "'loss'", "stepped by nobody", "BasicOptStepper"]),
    "a target that nobody moves": (lambda: by_hand(t_actor=target_of(nets()[0])), ["CriticLossProcessor", "'t_actor'", "moved by nobody", "SoftTargetUpdater"]),
    "episodes counted behind the replay": (lambda: by_hand(collector=EpisodeCollector), ["EpisodeCollector", "'total_reward'", "stepper"]),
}


# --- eight mistakes in environments ----------------------------------------------------------------------------------
class Wrong(Walk):
    "A `Walk` with a mistake in what it returns"
    reset_as = staticmethod(lambda obs, info: (obs, info))
    step_as = staticmethod(lambda obs, reward, terminated, truncated, info: (obs, reward, terminated, truncated, info))

    def reset(self, *, seed=None, options=None):
        return self.reset_as(*super().reset(seed=seed))

    def step(self, action):
        return self.step_as(*super().step(action))


def env_that(reset=None, step=None, space=None):
    more = ({"reset_as": staticmethod(reset)} if reset else {}) | ({"step_as": staticmethod(step)} if step else {})

    def init(self):
        Walk.__init__(self)
        self.observation_space = space or self.observation_space
    return lambda: learner(*(Changed(net, lambda net, s, *a: net(s.float(), *a)) for net in nets()), env=type("Wrong", (Wrong,), more | {"__init__": init}))


AT = "GymStepper, environment 0 (Wrong), step "
ENVIRONMENTS = {
    "one flag, as before 0.26": (env_that(step=lambda o, r, e, c, i: (o, r, e or c, i)), [AT + "1", "'step' returned 4 values", "terminated, truncated"]),
    "a reset without info": (env_that(reset=lambda o, i: o), [AT + "0", "'reset' returned", "(observation, info)"]),
    "an observation of another shape": (env_that(reset=lambda o, i: (o[:2], i)), [AT + "0", "'observation'", "[2]", "[3]"]),
    "floats where the space says bytes": (env_that(space=spaces.Box(0, 255, (S,), np.uint8)), [AT + "0", "'observation'", "float32", "uint8"]),
    "an observation out of bounds": (env_that(step=lambda o, r, e, c, i: (o + 5, r, e, c, i)), [AT + "1", "'observation'", "Box(-2.0, 2.0, (3,), float32)"]),
    "a reward in a list": (env_that(step=lambda o, r, e, c, i: (o, np.array([r]), e, c, i)), [AT + "1", "'reward' has shape [1]", "one number"]),
    "flags as numbers": (env_that(step=lambda o, r, e, c, i: (o, r, int(e), c, i)), [AT + "1", "'terminated' is 0, of type int", "True or False"]),
    "no info": (env_that(step=lambda o, r, e, c, i: (o, r, e, c, None)), [AT + "1", "'info' is None", "dictionary"]),
}

MISTAKES = {**MODELS, **PIPES, **ENVIRONMENTS}


def test_there_are_twenty_four_of_them():
    assert len(MODELS) == len(PIPES) == len(ENVIRONMENTS) == 8 and len(MISTAKES) == 24


def found(make, words):
    with pytest.raises((ValueError, TypeError, LookupError, WorkerError)) as caught:
        make()
    said = str(caught.value)
    for word in words:
        assert word in said, f"{said!r} does not say {word!r}"
    assert ": field '" in said and ", expected " in said and "\n" not in said and len(said) < 600, said
    assert TRAINING and not any(env.touched for env in TRAINING), "the environment that trains was touched"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found_before_the_first_step(mistake):
    found(*MISTAKES[mistake])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_is_check_that_finds_it(mistake, monkeypatch):
    "Without the check, the learner is made as if nothing were wrong: the mistakes are of the kind that constructors do not see"
    monkeypatch.setattr(LearnerHead, "check", lambda self: None)
    MISTAKES[mistake][0]()


# --- and more --------------------------------------------------------------------------------------------------------
def frozen(net, s):
    with torch.no_grad():
        return net(s)


class CutLoss(CriticLossProcessor):
    "Truncation stops the bootstrap"

    def loss(self, batch):
        return super().loss(batch.replace(terminated=batch.done))


class Deaf(Wrong):
    def reset(self, options=None):
        return super().reset()


class Refuses(Wrong):
    def step(self, action):
        raise ArithmeticError("the arm is stuck")


def another_network_acts():
    return learner(stepper={"agent": DDPGAgent(nets()[0])})


def truncation_in_a_loss():
    actor, critic = nets()
    pipe = CutLoss(ExperienceReplay(stack(actor), BS), critic, target_of(actor), target_of(critic))
    return LearnerHead(LossCollector(pipe, filter=True))


def unclipped():
    return learner(stepper={"agent": AgentHead(ActionScaler(SimpleModelRunner(Inlet(), Changed(nets()[0], lambda net, s: 3 + net(s)))))})


def in_a_branch():
    actor, critic = nets()
    pipe = ExperienceReplay(stack(actor), BS)
    return LearnerHead(Every(pipe, 2, lambda inlet: ActorLossProcessor(inlet, Changed(critic, lambda net, s, a: net(s, a)[:, 0]), actor)))


MORE = {
    "an actor without gradient": (lambda: actor_that(frozen), ["ActorLossProcessor", "'actor'", "no gradient"]),
    "a critic that does not look at the action": (lambda: critic_that(lambda net, s, a: net(s, torch.zeros_like(a))), ["ActorLossProcessor", "no gradient", "the action"]),
    "a model that changes its input": (lambda: critic_that(lambda net, s, a: net(s.mul_(2), a)), ["CriticLossProcessor", "in place"]),
    "another network acts": (another_network_acts, ["DDPGLearner", "SimpleModelRunner", "nobody steps", "actor_opt"]),
    "a stage makes NaN": (lambda: learner(before=[Normed]), ["Normalizer", "'reward'", "NaN or infinity"]),
    "a loss that truncation stops": (truncation_in_a_loss, ["CutLoss", "'truncated'"]),
    "actions outside of the box": (unclipped, ["GymStepper", "'raw_action'", "ActionClip"]),
    "a mistake in a branch": (in_a_branch, ["ActorLossProcessor", "'critic' has shape [4]"]),
    "a reset that takes no seed": (lambda: learner(env=type("Wrong", (Deaf,), {})), [AT + "0", "'reset' raised TypeError", "seed"]),
    "a step that raises": (lambda: learner(env=type("Wrong", (Refuses,), {})), [AT + "1", "ArithmeticError: the arm is stuck", "the action was"]),
    "NaN as a reward": (env_that(step=lambda o, r, e, c, i: (o, float("nan"), e, c, i)), [AT + "1", "'reward' is nan"]),
    "images without a renderer": (lambda: learner(env=type("Wrong", (Wrong,), {}), stepper={"include_images": True}), [AT, "'render_mode'", "rgb_array"]),
}


@pytest.mark.parametrize("mistake", MORE)
def test_more_of_them(mistake):
    found(*MORE[mistake])


# --- what is right is not refused ------------------------------------------------------------------------------------
def test_right_learners_pass():
    for right in (learner(), by_hand(), learner(nsteps=3), learner(stepper={"n": 3}), learner(env=Walk(), stepper={"mode": "auto"})):
        assert right.check()["CriticLossProcessor"].went
    arm = ArmActor(nets()[0]), OfArm(nets()[1])
    assert learner(*arm, env=Named).fit(1)


def test_a_learner_on_recorded_steps_is_looked_at_too():
    steps = [SimpleStep.random(8, S, A, seed=0)]
    actor, critic = nets()
    assert DDPGLearner(actor, critic, IterableSource(steps), logger_bases=[], bs=BS).check()["IterableSource"].went
    with pytest.raises(ValueError, match=r"IterableSource: field 'reward' has shape \[8\]"):
        DDPGLearner(actor, critic, IterableSource([steps[0].replace(reward=steps[0].reward[:, 0])]), logger_bases=[], bs=BS)


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (3,)), spaces.Box(-np.inf, np.inf, (2, 2)), spaces.Box(0, 255, (4, 4, 3), np.uint8), spaces.Box(5, np.inf, (2,)),
                                   spaces.Box(-3e38, 3e38, (2,)), spaces.Discrete(5, start=3), spaces.MultiDiscrete([3, 7]), spaces.MultiBinary(4),
                                   spaces.Box(100, 101, (2,), np.float64), spaces.Box(-5, 5, (2,), np.int8)], ids=str)
def test_made_up_observations_are_in_their_space_and_differ(space):
    made = synthetic(space, 5)
    assert all(row in space for row in made)
    assert len({row.tobytes() for row in np.asarray(made)}) > 1
    assert np.array_equal(made, synthetic(space, 5))


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiDiscrete([3, 2, 4]), spaces.MultiBinary(4), spaces.Box(-3, 11, (2, 2))], ids=str)
def test_any_action_space_is_accepted(space):
    env = partial(AnyAction, space)
    assert LearnerHead(GymStepper(env, mode="sync")).check()["GymStepper"].went


# --- no trace --------------------------------------------------------------------------------------------------------
class Noisy(Walk):
    "Draws from everybody's generators"

    def see(self):
        return super().see() * (1 - 0.01 * random.random()) * (1 - 0.01 * np.random.rand()) * (1 - 0.01 * torch.rand(()).item())


class Restless(nn.Module):
    "Draws in any mode, and counts"

    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, state):
        self.seen += 1
        return self.inside(state + 0.01 * torch.randn_like(state))


class Counter(Stageof):
    "A stage with an undeclared list and number"

    def __init__(self, source, name=None):
        super().__init__(source, name)
        self.seen, self.n, self.rng = [], 0, np.random.default_rng(0)

    def forward(self, item):
        self.seen.append(self.rng.random())
        self.n += 1
        return item


@pytest.mark.parametrize("checks", [0, 3])
def test_training_is_the_same_to_the_bit_with_and_without(checks, monkeypatch):
    def run(times):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        check = LearnerHead.check
        if not times:
            monkeypatch.setattr(LearnerHead, "check", lambda self: None)
        actor, critic = Restless(Actor(S, A, 8, 8)), Critic(S, A, 8, 8, batch_norm=True)
        made = learner(actor, critic, env=Noisy, before=[Counter])
        monkeypatch.setattr(LearnerHead, "check", check)
        for _ in range(times):
            made.check()
        made.fit(1)
        for _ in range(times):
            made.check()
        made.fit(1)
        return copied(snapshot(made)["modules"]), random.random(), np.random.rand(), torch.rand(())
    (a, *x), (b, *y) = run(checks), run(0)
    assert x == y
    assert all(torch.equal(a[k][n], b[k][n]) for k in a if "opt" not in k and "memory" not in k for n in a[k])


def test_gradients_modes_and_attributes_are_left_alone():
    made = learner(before=[Counter])
    counter = next(p for p in made.check().values() if isinstance(p.pipe, Counter)).pipe
    assert counter.seen == [] and counter.n == 0 and counter.rng.random() == np.random.default_rng(0).random()
    networks = [m for m in named_modules(made).values() if isinstance(m, nn.Module)]
    assert all(p.grad is None for m in networks for p in m.parameters())
    assert sum(m.training for m in networks) == 2 and len(networks) == 4, "actor and critic train, their targets do not"
    assert made.stepper.backend.steps == 0 and not made.started


def test_an_environment_that_was_made_is_closed_again():
    made = []

    def factory():
        made.append(Walk())
        return made[-1]
    learner(env=factory)
    assert len(made) == 2 and made[0].touched == [] and not made[0].closed
    assert made[1].touched == ["reset", "step", "step"] and made[1].closed


def test_live_environments_and_those_handed_out_again_are_not_touched():
    live, shared = Walk(), Walk()
    learner(env=live, stepper={"mode": "auto"}), learner(env=lambda: shared), learner(env=[Walk(), Walk()])
    assert not live.touched and not shared.touched and not shared.closed


def test_environments_kept_in_other_processes_are_not_run_here(tmp_path):
    "What kills its process is put at arm's length, and stays there"
    made = learner(env=Deadly, stepper={"mode": "workers", "n": 2, "workers": 1})
    made.close()


class Deadly(Walk):
    def step(self, action):
        import os
        os._exit(3)


# --- its cost --------------------------------------------------------------------------------------------------------
def test_it_takes_little_time():
    made, taken = ddpg(warmup=0, bs=8), []
    for _ in range(5):
        start = time.perf_counter()
        made.check()
        taken.append(time.perf_counter() - start)
    assert min(taken) < 0.1


def test_a_slow_environment_is_not_waited_for(monkeypatch):
    made = []

    class Slow(Walk):
        def __init__(self):
            super().__init__()
            made.append(self)

        def step(self, action):
            time.sleep(0.1)
            return super().step(action)
    monkeypatch.setattr(visit, "LIMIT", 0.05)
    learner(env=Slow, stepper={"mode": "single"})
    assert made[1].touched == ["reset", "step"]
