"""Named observations, goals, boxes that are not symmetric and actions of several boxes run through whole learners: acting, replay, losses, checks,
validation, saving and resuming, with nothing special in between."""
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

from fastrl_pipes.agents.ddpg import Actor, Critic, DDPGAgent, DDPGLearner, ddpg
from fastrl_pipes.agents.sac import SACAgent, SACLearner, sac
from fastrl_pipes.agents.td3 import TD3Agent, TD3Learner
from fastrl_pipes.core import copied, leaves
from fastrl_pipes.envs.debug import TwoBoxes
from fastrl_pipes.envs.episodes import EpisodeStepper
from fastrl_pipes.envs.reach import Reach2D
from fastrl_pipes.envs.spaces import TupleMap, action_map, action_rows, action_size, check_action_space, is_boxes, random_actions
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.errors import WorkerError
from fastrl_pipes.learner.flatten import flatten
from fastrl_pipes.memory.hindsight import HindsightReplay
from fastrl_pipes.networks.calls import call_model
from fastrl_pipes.networks.ensemble import Critics
from fastrl_pipes.networks.goals import GoalConditioned, fields_size
from fastrl_pipes.networks.policies import GaussianActor
from fastrl_pipes.pipes.walk import bind, named_modules, snapshot
from fastrl_pipes.pipes.graph import find_pipe
from fastrl_pipes.pipes.tape import Tap, Tape

SMALL = dict(logger_bases=[], bs=16, max_sz=200, batches=15, warmup=30)


# --- networks that name their fields ------------------------------------------------------------------------------------
class ByName(nn.Module):
    "Looks at two of three fields, in an order of its own; no wrapper"

    def __init__(self, out=2):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, out), nn.Tanh())

    def forward(self, desired_goal, observation):
        return self.layers(torch.cat((desired_goal, observation), 1))


class ValueByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, observation, desired_goal, action):
        return self.layers(torch.cat((observation, desired_goal, action), 1))


def goal_networks(learner):
    size = fields_size(Reach2D().observation_space)
    if learner is DDPGLearner:
        return GoalConditioned(Actor(size, 2, 16, 16)), GoalConditioned(Critic(size, 2, 16, 16)), DDPGAgent
    if learner is TD3Learner:
        return GoalConditioned(Actor(size, 2, 16, 16)), GoalConditioned(Critics(size, 2, hidden=(16, 16))), TD3Agent
    return GoalConditioned(GaussianActor(size, 2, (16, 16))), GoalConditioned(Critics(size, 2, hidden=(16, 16))), SACAgent


def by_name():
    return ByName(), ValueByName(), DDPGAgent


def made(learner, networks, env="fastrl/Reach2D-v0", n=1, mode="auto", seed=0, **more):
    torch.manual_seed(seed)
    actor, critic, agent = networks()
    stepper = GymStepper(env, agent(actor), n, mode, seed, random_steps=30)
    return learner(actor, critic, stepper, **{**SMALL, **more})


GOALS = {
    "DDPG": partial(made, DDPGLearner, partial(goal_networks, DDPGLearner)),
    "DDPG, by name": partial(made, DDPGLearner, by_name),
    "DDPG, three steps": partial(made, DDPGLearner, partial(goal_networks, DDPGLearner), nsteps=3),
    "DDPG, hindsight": partial(made, DDPGLearner, partial(goal_networks, DDPGLearner), replay=HindsightReplay),
    "DDPG, hindsight, two environments, two batches": partial(made, DDPGLearner, partial(goal_networks, DDPGLearner), n=2, mode="sync", repeat=2, replay=partial(HindsightReplay, strategy="final")),
    "TD3, hindsight": partial(made, TD3Learner, partial(goal_networks, TD3Learner), replay=HindsightReplay),
    "SAC": partial(made, SACLearner, partial(goal_networks, SACLearner)),
    "SAC, hindsight": partial(made, SACLearner, partial(goal_networks, SACLearner), replay=HindsightReplay),
}


def two_boxes(learner, kind="tuple", **more):
    env = "fastrl/TwoBoxes-v0" if kind == "tuple" else partial(TwoBoxes, kind=kind)
    size = action_size(TwoBoxes(kind=kind).action_space)

    def networks():
        if learner is DDPGLearner:
            return Actor(1, size, 16, 16), Critic(1, size, 16, 16), DDPGAgent
        if learner is TD3Learner:
            return Actor(1, size, 16, 16), Critics(1, size, hidden=(16, 16)), TD3Agent
        return GaussianActor(1, size, (16, 16)), Critics(1, size, hidden=(16, 16)), SACAgent
    return made(learner, networks, env, **more)


BOXES = {
    "DDPG": partial(two_boxes, DDPGLearner),
    "DDPG, dict": partial(two_boxes, DDPGLearner, "dict"),
    "TD3": partial(two_boxes, TD3Learner, n=2, mode="sync"),
    "SAC": partial(two_boxes, SACLearner),
    "SAC, dict, three environments": partial(two_boxes, SACLearner, "dict", n=3, mode="sync"),
}
ALL = [pytest.param(build, id=f"{kind}: {name}") for kind, builds in (("goals", GOALS), ("boxes", BOXES)) for name, build in builds.items()]
every = pytest.mark.parametrize("build", ALL)


def parameters(learner):
    return {f"{n}.{k}": v for n, m in named_modules(learner).items() if isinstance(m, nn.Module) for k, v in m.state_dict().items()}


def same(a, b):
    a, b = dict(leaves(a)), dict(leaves(b))
    return a.keys() == b.keys() and all(np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes() for k in a)


# --- whole learners -------------------------------------------------------------------------------------------------------
@every
def test_it_is_checked_learns_and_is_judged(build):
    learner = build()
    flows = learner.check()
    assert all(flow.went for name, flow in flows.items() if name not in ("Inlet", "EpochLength")), "a probe goes through every pipe"
    before = copied(parameters(learner))
    rows = learner.fit(2)
    after = parameters(learner)
    assert len(rows) == 2 and all(torch.isfinite(v).all() for v in after.values() if v.is_floating_point())
    moved = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert {"actor_opt", "critic_opt"} & moved or len(moved) >= 2, moved
    found = learner.validate(episodes=3)
    assert len(found["returns"]) == 3 and np.isfinite(found["mean"])
    assert learner.describe() and learner.mermaid() and str(learner.profile(3))


@every
def test_it_continues_to_the_bit(build, tmp_path):
    whole = build()
    for _ in range(25):
        next(whole)
    whole.save(tmp_path)
    ahead = [copied(next(whole)) for _ in range(20)]
    other = build()
    with pytest.warns() if whole.stepper.get_own()["inexact"] else _nothing():
        other.load(tmp_path)
    assert whole.stepper.get_own()["inexact"] == "", "the environments are kept to the bit"
    for a in ahead:
        assert same(a, next(other))
    a, b = parameters(whole), parameters(other)
    assert all(torch.equal(a[k], b[k]) for k in a)


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


@every
def test_it_is_taped(build):
    "What passes the critic's joint is recorded and played again"
    learner = build(dp_augmentation_fns=[lambda pipe: Tap(pipe, name="tap")])
    items = [copied(next(learner)) for _ in range(5)]
    record = find_pipe(learner, Tap).record
    again = list(Tape(record))
    assert len(again) >= 5 and same(again[-1], items[-1])


def test_prediction_for_a_named_observation():
    learner = GOALS["DDPG"]()
    obs, _ = Reach2D().reset(seed=0)
    action = learner.predict(obs)
    actor = find_pipe(learner, "actor_opt").model
    expected = call_model(actor, {k: torch.from_numpy(v)[None] for k, v in obs.items()})[0]
    assert action.shape == (2,) and np.allclose(action, expected.detach().numpy(), atol=1e-6)


def test_a_field_that_is_missing_is_named_before_the_first_step():
    class Wrong(ByName):
        def forward(self, observation, goal):
            return super().forward(goal, observation)
    for actor, critic in ((Wrong(), ValueByName()), (GoalConditioned(Actor(6, 2), ("observation", "goal")), ValueByName())):
        with pytest.raises(LookupError, match=r"SimpleModelRunner.*'goal'.*achieved_goal"):
            made(DDPGLearner, lambda actor=actor, critic=critic: (actor, critic, DDPGAgent))
    with pytest.raises(LookupError, match="SimpleModelRunner.*Actor.*'state'"):
        made(DDPGLearner, lambda: (Actor(6, 2), Critic(6, 2), DDPGAgent))


def test_goal_conditioned_networks_of_another_size_are_refused():
    with pytest.raises(ValueError, match="CriticLossProcessor.*GoalConditioned"):
        made(DDPGLearner, lambda: (GoalConditioned(Actor(6, 2)), GoalConditioned(Critic(5, 2)), DDPGAgent))


def test_networks_of_float64_over_named_observations():
    learner = made(DDPGLearner, lambda: (*(n.double() for n in goal_networks(DDPGLearner)[:2]), DDPGAgent), replay=HindsightReplay)
    batch = next(learner)
    assert batch.state["observation"].dtype == torch.float64 and torch.isfinite(batch.reward).all()


# --- asymmetric boxes -----------------------------------------------------------------------------------------------------
class Lopsided(Reach2D):
    "The same with a push between -2 and 10 along one axis, and between 0 and 1 along the other"

    def __init__(self):
        super().__init__()
        self.action_space = spaces.Box(np.float32([-2, 0]), np.float32([10, 1]))
        self.taken = []

    def step(self, action):
        assert self.action_space.contains(action), action
        self.taken.append(action)
        return super().step((action - self.action_space.low) / (self.action_space.high - self.action_space.low) * 2 - 1)


def test_a_lopsided_box_is_reached_to_its_ends_and_nothing_else_changes():
    "The same seeds in both boxes: the same actions in policy units, the same states"
    runs = []
    for env in (Lopsided, Reach2D):
        learner = made(DDPGLearner, partial(goal_networks, DDPGLearner), env, replay=HindsightReplay)
        runs.append([copied(next(learner)) for _ in range(40)])
        taken = getattr(learner.stepper.backend.envs[0], "taken", None)
        if taken:
            assert np.min(taken, 0)[0] < -1 and np.max(taken, 0)[0] > 9, "random actions fill the box"
    for a, b in zip(*runs):
        for x, y in zip(dict(leaves(a)).values(), dict(leaves(b)).values()):
            assert torch.allclose(x.float(), y.float(), atol=1e-4)


# --- several boxes --------------------------------------------------------------------------------------------------------
PARTS = {
    "tuple": spaces.Tuple([spaces.Box(-1, 1, (2,)), spaces.Box(-3, 11, ())]),
    "dict": spaces.Dict(grip=spaces.Box(-3, 11, ()), arm=spaces.Box(np.float32([-2, 0]), np.float32([10, 1]))),
    "nested": spaces.Tuple([spaces.Dict(left=spaces.Box(0, 1, (2, 2)), right=spaces.Box(-5, 5, (1,), np.float64)), spaces.Box(-7, -6, (3,))]),
    "integers": spaces.Tuple([spaces.Box(-2, 5, (3,), np.int8), spaces.Box(-1, 1)]),
    "one": spaces.Tuple([spaces.Box(0, 4, (2,))]),
}


class Strict(gymnasium.Env):
    "Refuses an action outside of its space; the observation is the last action in policy units"

    def __init__(self, space, length=4):
        self.action_space, self.length, self.map = space, length, action_map(space)
        self.observation_space = spaces.Box(-2, 2, (self.map.size,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(self.map.size), {}

    def step(self, action):
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} is not in {self.action_space}")
        self.t += 1
        return self.map.to_policy(action).astype(np.float64), 1.0, False, self.t == self.length, {}


@pytest.mark.parametrize("kind", PARTS)
def test_policy_units_to_boxes_and_back(kind):
    space = PARTS[kind]
    policy, rng = TupleMap(space), np.random.default_rng(0)
    actions = random_actions(space, 50, rng)
    raw = policy.to_env(actions)
    assert actions.shape == (50, action_size(space)) and all(space.contains(a) for a in action_rows(raw))
    assert np.allclose(policy.to_policy(raw), actions, atol=0.2 if kind == "integers" else 1e-5)
    ends = policy.to_env(np.repeat(np.float32([[-1], [1]]), policy.size, 1))
    assert all(space.contains(a) for a in action_rows(ends))
    for part, box in zip(dict(leaves(ends)).values(), _boxes(space)):
        assert np.allclose(part[0], box.low, atol=1e-5) and np.allclose(part[1], box.high, atol=1e-5), "to the ends of each box"


def _boxes(space):
    if isinstance(space, spaces.Box):
        return [space]
    return [b for part in (space.values() if isinstance(space, spaces.Dict) else space) for b in _boxes(part)]


MODES = {"single": 1, "sync": 3, "workers": 3, "async": 2}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_environment_gets_its_own_action_however_it_runs(kind, mode):
    if mode in ("workers", "async") and kind not in ("tuple", "dict"):
        pytest.skip("processes take seconds to start")
    stepper = GymStepper(partial(Strict, PARTS[kind]), n=MODES[mode], mode=mode, seed=0)
    try:
        for _ in range(9):
            step = copied(next(stepper))
            assert isinstance(step.raw_action, dict if kind == "dict" else tuple)
            assert np.allclose(step.next_state, step.action, atol=0.2 if kind == "integers" else 1e-5)
            assert all(PARTS[kind].contains(a) for a in action_rows(step.raw_action))
    finally:
        stepper.close()


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_live_vector_environment_takes_several_boxes(mode):
    stepper = GymStepper(SyncVectorEnv([partial(Strict, PARTS["tuple"])] * 3, autoreset_mode=mode), seed=0)
    for _ in range(12):
        step = next(stepper)
        assert len(step.action) == len(step.raw_action[0]) and np.allclose(step.next_state, step.action, atol=1e-5)


def test_workers_and_one_process_do_the_same():
    came = []
    for mode in ("sync", "workers"):
        stepper = GymStepper("fastrl/TwoBoxes-v0", n=3, mode=mode, seed=1)
        came.append([copied(next(stepper)) for _ in range(6)])
        state = snapshot(stepper)
        came[-1] += [copied(next(stepper)) for _ in range(3)]
        stepper.reset(state)
        assert all(same(a, copied(next(stepper))) for a in came[-1][6:])
        stepper.close()
    assert all(same(a, b) for a, b in zip(*came))


def test_a_dict_is_taken_by_key_whatever_its_order():
    from fastrl_pipes.envs.backends import make_backend
    for mode, n in (("sync", 2), ("workers", 2)):
        backend = make_backend(partial(Strict, PARTS["dict"]), n, mode, workers=1) if mode == "workers" else make_backend(partial(Strict, PARTS["dict"]), n, mode)
        raw = TupleMap(PARTS["dict"]).to_env(np.float32([[0.5, -0.5, 0.1]] * n))
        backend.observe()
        obs, *_ = backend.step(dict(reversed(raw.items())))
        assert np.allclose(obs, [[0.5, -0.5, 0.1]] * n, atol=1e-5)
        with pytest.raises(ValueError, match="actions.*2 rows"):
            backend.observe()
            backend.step({k: v[:1] for k, v in raw.items()})
        backend.close()


def test_validation_plays_several_boxes():
    steps = list(EpisodeStepper("fastrl/TwoBoxes-v0", episodes=5, n=2))
    assert sum(len(s.reward) for s in steps) == 5


@pytest.mark.slow
@pytest.mark.parametrize("learner", [ddpg, sac])
def test_each_box_is_learned_in_its_own_units(learner):
    found = learner("fastrl/TwoBoxes-v0", 0, hidden1=64, hidden2=64, warmup=500, **({} if learner is ddpg else {"actor_lr": 1e-3, "critic_lr": 1e-3}))
    found.fit(env_steps=3000)
    assert found.validate(20)["mean"] > -0.05, "the best is 0, a random one about -1.5"


def test_mixtures_are_refused_by_name():
    mixed = spaces.Tuple([spaces.Box(-1, 1), spaces.Dict(gear=spaces.Discrete(5))])
    for space, said in ((mixed, ["action_space.1.gear", "Discrete(5)", "a Box"]), (spaces.Tuple([spaces.Discrete(2)]), ["action_space.0", "Discrete(2)"]), (spaces.Dict({}), ["no part"]),
                        (spaces.Text(3), ["Text", "Tuple and Dict of boxes"])):
        with pytest.raises(TypeError) as caught:
            check_action_space("GymStepper", space)
        assert all(word in str(caught.value) for word in said), str(caught.value)
        assert not is_boxes(space)

    class Mixed(Strict):
        def __init__(self):
            super().__init__(PARTS["tuple"])
            self.action_space = mixed
    with pytest.raises(TypeError, match=r"Mixed.*action_space.1.gear.*Discrete\(5\)"):
        GymStepper(Mixed)


def test_actions_outside_of_a_box_are_seen_by_the_check():
    "Without an ActionClip, noise leaves the box"
    from fastrl_pipes.agents.core import ActionScaler, AgentHead, SimpleModelRunner
    from fastrl_pipes.pipes.control import Inlet

    class Loud(Actor):
        def forward(self, state):
            return super().forward(state) + 3
    actor = Loud(1, 3)
    with pytest.raises(ValueError, match="GymStepper.*raw_action.*Tuple.*ActionClip"):
        DDPGLearner(actor, Critic(1, 3), GymStepper("fastrl/TwoBoxes-v0", AgentHead(ActionScaler(SimpleModelRunner(Inlet(), actor)))), **SMALL)


def test_an_actor_of_another_width_is_refused():
    actor = Actor(1, 2)
    with pytest.raises(ValueError, match=r"'action'.*3.*Tuple"):
        DDPGLearner(actor, Critic(1, 2), GymStepper("fastrl/TwoBoxes-v0", DDPGAgent(actor)), **SMALL)


def test_a_fault_names_the_environment():
    class Breaks(Strict):
        def step(self, action):
            raise ZeroDivisionError("the arm is broken")
    with pytest.raises(WorkerError, match="environment 0.*step 1.*the arm is broken"):
        next(GymStepper(partial(Breaks, PARTS["tuple"])))


def test_flatten_says_that_it_has_no_line_for_several_boxes():
    with pytest.raises(ValueError, match="flatten.*action_space.*Tuple.*a Box or Discrete"):
        flatten(BOXES["DDPG"](), seed=0)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_an_agent_predicts_several_boxes(kind):
    "One action without batch axis, in the environment's units, as `env.step` takes it"
    env = TwoBoxes(kind=kind)
    actor = GaussianActor(env.observation_space.shape[0], action_size(env.action_space), hidden=(8,))
    stepper = GymStepper(lambda: TwoBoxes(kind=kind), SACAgent(actor), seed=0)
    bind(stepper)
    observation, _ = env.reset(seed=0)
    action = stepper.agent.predict(observation)
    assert env.action_space.contains(action), action
    stepper.close()
