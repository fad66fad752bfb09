"""Truths about time: what acts on what, what follows what, where an episode ends. Each test fails when its mistake is put back,
which `test_a_mistake_put_back_is_noticed` tries for every one of them."""
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastrl_pipes.agents import ddpg
from fastrl_pipes.agents.core import ActionScaler, AgentHead, SimpleModelRunner
from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner
from fastrl_pipes.core import SimpleStep, leaves
from fastrl_pipes.envs.autoreset import VectorBackend
from fastrl_pipes.envs.debug import Bandit, ConstantReward, Echo, TwoStep, WideBox
from fastrl_pipes.envs.doubles import Counting, CountingVector
from fastrl_pipes.envs.inprocess import EnvRows
from fastrl_pipes.envs.spaces import BoxScaler
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.exploration.noise import Exploration, GaussianNoise, OrnsteinUhlenbeck
from fastrl_pipes.learner import compose
from fastrl_pipes.learner.head import LearnerHead
from fastrl_pipes.memory.experience_replay import ReplayWriter
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.pipes import nstep
from fastrl_pipes.pipes.control import Inlet
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.walk import bind
from fastrl_pipes.pipes.graph import find_pipe
from fastrl_pipes.pipes.nstep import FirstLastMerger, NSkipper, NStepper
from fastrl_pipes.processors.dpg import ActorLossProcessor, CriticLossProcessor

LENGTHS = (5, 3, 8, 1)


# --- what the tests are made of --------------------------------------------------------------------------------------
class Constant(nn.Module):
    "A policy that always says the same"

    def __init__(self, *action):
        super().__init__()
        self.action = nn.Parameter(torch.tensor(action, dtype=torch.float32))

    def forward(self, state):
        return self.action.expand(len(state), -1)


def pulls(pipe, n):
    return [next(pipe) for _ in range(n)]


def rotated(i):
    return LENGTHS[i % 4:] + LENGTHS[:i % 4]


def counting(n, make=Counting, **more):
    "Row i shows 100000 i + 1000 episode + t, and ends its episode e after LENGTHS[(e + i) % 4] steps"
    return [partial(make, lengths=rotated(i), start=100_000 * i, **more) for i in range(n)]


def quiet(model):
    return DDPGAgent(model, min_epsilon=0.0, max_epsilon=0.0)


def learner_on(envs, n=1, actor=None, agent=None, seed=0, hidden=16, **learner):
    "A DDPG learner with small networks over any environment with flat observations"
    torch.manual_seed(seed)
    stepper = GymStepper(envs, n=n, seed=seed, mode="sync" if n > 1 and not isinstance(envs, list) else "auto")
    sizes = stepper.observation_space.shape[0], stepper.action_space.shape[0]
    stepper.close()
    actor = actor or Actor(*sizes, hidden, hidden)
    acting = GymStepper(envs, agent or DDPGAgent(actor), n, "sync" if n > 1 and not isinstance(envs, list) else "auto", seed)
    return DDPGLearner(actor, Critic(*sizes, hidden, hidden), acting, logger_bases=[], **learner)


def kept(learner):
    "Everything that is in the replay, as a step of tensors, in the order of the ring's rows"
    memory = find_pipe(learner, ReplayWriter).memory
    return memory.gather(torch.arange(len(memory)))


# --- the observation that is acted on --------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 4])
def test_the_policy_acts_on_the_current_observation(n):
    stepper = GymStepper(partial(Echo, length=7), quiet(nn.Identity()), n, "auto" if n == 1 else "sync", seed=0)
    for step in pulls(stepper, 30):
        np.testing.assert_array_equal(step.action, step.state)
        np.testing.assert_allclose(step.reward, 1.0, atol=1e-6)


# --- true transitions ------------------------------------------------------------------------------------------------
def check_counting(steps):
    "Every row of a stream of `counting` environments, from their first step on"
    seen = {}
    for step in steps:
        for row in range(len(step)):
            field = {name: float(value[row, 0]) for name, value in leaves(step)}
            i = int(field["env_id"])
            episode, t, total = seen.get(i, (0, 0, 0.0))
            state, t = 100_000 * i + 1000 * episode + t, t + 1
            over = t == rotated(i)[episode % 4]
            total += state + 1
            assert field["state"] == state, "the state is where the last step led, or the first of an episode"
            assert field["next_state"] == field["reward"] == state + 1, "the successor is the true one, also at the end"
            assert field["step_n"] == t and field["episode_n"] == episode and field["total_reward"] == total
            assert field["terminated"] == (over and episode % 2 == 0) and field["truncated"] == (over and episode % 2 == 1)
            seen[i] = (episode + 1, 0, 0.0) if over else (episode, t, total)
    return seen


STEPPERS = {
    "single": lambda: GymStepper(counting(1)),
    "sync": lambda: GymStepper(counting(4), mode="sync"),
    "workers": lambda: GymStepper(counting(4), mode="workers", workers=2),
    "async": lambda: GymStepper(counting(4), mode="async"),
    "native": lambda: GymStepper("fastrl/CountingVector-v0", n=4, mode="native"),
    "live": lambda: GymStepper(Counting(LENGTHS)),
    **{f"live vector {m.value}": partial(lambda m: GymStepper(CountingVector(4, m, LENGTHS)), m) for m in AutoresetMode},
}


@pytest.mark.parametrize("mode", STEPPERS)
def test_every_row_is_a_true_transition(mode):
    stepper = STEPPERS[mode]()
    try:
        seen = check_counting(pulls(stepper, 60))
        assert len(seen) == stepper.n and min(episode for episode, *_ in seen.values()) >= 8
    finally:
        stepper.close()


def test_the_fake_row_of_a_vector_environment_never_leaves_the_stepper():
    "CartPole gives reward 1 for every real step; its fake reset rows would bring 0, and a start that is no successor"
    stepper = GymStepper("CartPole-v1", n=8, mode="native", seed=3)
    ends, rows, last = 0, 0, {}
    for step in pulls(stepper, 200):
        assert len(step) and (step.reward == 1).all()
        for row, i in enumerate(step.env_id[:, 0]):
            state, t, done = step.state[row], step.step_n[row, 0], step.done[row, 0]
            np.testing.assert_array_equal(state, last.get(i, state))
            assert (t == 1) == (i not in last) and (t > 1 or np.abs(state).max() <= 0.05)
            assert step.total_reward[row, 0] == t
            last[i] = step.next_state[row]
            rows += 1
            if done:
                del last[i]
                ends += 1
    assert ends > 20 and rows == stepper.env_steps < 8 * 200, "a row that is being reset brings nothing"
    stepper.close()


# --- ends of episodes ------------------------------------------------------------------------------------------------
class Sum(nn.Module):
    "Q(s, a) = s + a, with a weight so that there is something to learn"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, state, action):
        return self.weight * (state + action)


def test_terminated_alone_stops_the_bootstrap():
    "By hand: Q(1, 0) = 1 is compared with 0.5 + 0.9 Q'(2, 0.25), or with 0.5 alone"
    processor = CriticLossProcessor([], Sum(), Constant(0.25), Sum(), discount=0.9)
    bind(processor)
    for terminated, truncated, y in ((0, 0, 0.5 + 0.9 * 2.25), (0, 1, 0.5 + 0.9 * 2.25), (1, 0, 0.5), (1, 1, 0.5)):
        one = torch.ones(1, 1)
        batch = SimpleStep(one, one * 0, one * 2, one * 0.5, one * terminated > 0, one * truncated > 0)
        loss, out = processor.forward(batch)
        assert out is batch
        torch.testing.assert_close(loss["loss"].detach(), torch.tensor((1 - y) ** 2))


def test_a_truncated_episode_goes_on_in_the_value():
    "Reward 1 for ever, truncated every 10 steps: V = 1 / (1 - 0.9) = 10; with truncation as an end it would be near 5"
    learner = learner_on(partial(ConstantReward, length=10), hidden=32, discount=0.9, tau=0.05, critic_lr=3e-3, bs=64, batches=950)
    learner.fit(1)
    actor, critic = (find_pipe(learner, ActorLossProcessor).modules()[n] for n in ("actor", "critic"))
    with torch.no_grad():
        value = critic(torch.ones(1, 1), actor(torch.ones(1, 1)))
    torch.testing.assert_close(value, torch.full((1, 1), 10.0), rtol=0.02, atol=0)


# --- windows ---------------------------------------------------------------------------------------------------------
def stream(script, gaps):
    "Items of environments, each a list of (length, flag); between two of its episodes, environment i is missing for `gaps[i]` items"
    ticks = {}
    for i, episodes in enumerate(script):
        at = 0
        for e, (length, flag) in enumerate(episodes):
            for t in range(length):
                ends = t == length - 1
                ticks.setdefault(at, {})[i] = (100 * i + 10 * e + t, e, t + 1, ends and flag != "truncated", ends and flag != "terminated")
                at += 1
            at += gaps[i]
    return [item_of(ticks[at]) for at in sorted(ticks)]


def item_of(rows):
    ids = sorted(rows)
    state, episode, step_n, terminated, truncated = (np.array([[rows[i][k]] for i in ids]) for k in range(5))
    state = state.astype(np.float32)
    return SimpleStep(state=state, action=-state, next_state=state + 0.5, reward=state + 1, terminated=terminated, truncated=truncated,
                      step_n=step_n, episode_n=episode, env_id=np.array(ids)[:, None])


def oracle(items, n, discount, skip=1):
    "Every merged row by a plain loop: state, action, next_state, reward, terminated, truncated, discount^k"
    episodes = {}
    for item in items:
        for r in range(len(item)):
            row = {f: float(v[r, 0]) for f, v in leaves(item)}
            episodes.setdefault((row["env_id"], row["episode_n"]), []).append(row)
    merged = []
    for rows in episodes.values():
        over = rows[-1]["terminated"] or rows[-1]["truncated"]
        for t in range(len(rows)):
            window = rows[t:t + n]
            if (len(window) == n or over) and (t % skip == 0 or (over and t == len(rows) - 1)):
                total = sum(discount ** i * row["reward"] for i, row in enumerate(window))
                first, last = window[0], window[-1]
                merged.append((first["state"], first["action"], last["next_state"], total, last["terminated"], last["truncated"], discount ** len(window)))
    return merged


def as_rows(step):
    "Rows of a merged step, as the oracle has them"
    fields = ("state", "action", "next_state", "reward", "terminated", "truncated", "discount")
    return [tuple(float(getattr(step, f)[r, 0]) for f in fields) for r in range(len(step.state))]


def check_windows(items, rows_of_env, n, max_sz, skip=1, discount=0.5):
    "Discount 1/2 and small whole rewards: float32 is exact, so rows are compared with =="
    memory = ReplayMemory(max_sz)
    pipe = NStepper(items, n)
    if skip > 1:
        pipe = NSkipper(pipe, skip)
    pipe = ReplayWriter(FirstLastMerger(pipe, discount), memory)
    bind(pipe, Context(rows=rows_of_env))
    rows = [row for step in pipe for row in as_rows(step)]
    assert sorted(rows) == sorted(oracle(items, n, discount, skip)), "each window once, none over an end, each with the discount of its own length"
    assert len(memory) == min(len(rows), max_sz) and memory.written == len(rows)
    if rows:
        assert sorted(as_rows(memory.gather(torch.arange(len(memory))))) == sorted(rows[-max_sz:]), "the ring holds the latest rows, whole"


EPISODES = st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["terminated", "truncated", "both"])), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(script=st.lists(EPISODES, min_size=1, max_size=4), gaps=st.lists(st.integers(0, 2), min_size=4, max_size=4), cut=st.integers(0, 8),
       n=st.integers(1, 5), max_sz=st.integers(4, 23), skip=st.integers(1, 3))
def test_windows_and_replay_equal_a_naive_oracle(script, gaps, cut, n, max_sz, skip):
    "Random lengths, several environments, both flags, the ring's head, environments that pause between episodes, a stream that stops anywhere"
    items = stream(script, gaps)
    check_windows(items[:max(1, len(items) - cut)], len(script), n, max_sz, skip)


def one_case_of_windows():
    "Two environments that go on together, a ring of seven rows"
    check_windows(stream([[(4, "terminated"), (2, "truncated"), (5, "both")], [(3, "truncated"), (4, "terminated"), (4, "truncated")]], (0, 0)), 2, 3, 7)


@pytest.mark.parametrize("mode", ["single", "sync", "native"])
def test_every_row_of_an_nstep_replay_is_a_window_of_its_episode(mode):
    "The whole learner on environments that count: state s and successor s + k say how long the window was"
    check_nstep_replay({"single": counting(1)[0], "sync": counting(4), "native": CountingVector(4, AutoresetMode.NEXT_STEP, LENGTHS)}[mode])


def check_nstep_replay(envs, discount=0.5, nsteps=3):
    learner = learner_on(envs, nsteps=nsteps, discount=discount, bs=8, max_sz=50)
    pulls(learner, 100)
    assert find_pipe(learner, ReplayWriter).memory.written > 100, "the ring has gone round"
    batch = kept(learner)
    for state, next_state, reward, terminated, truncated, weight in zip(*(getattr(batch, f)[:, 0].tolist() for f in (
            "state", "next_state", "reward", "terminated", "truncated", "discount"))):
        i, episode, t = int(state) // 100_000, int(state) % 100_000 // 1000, int(state) % 1000
        length = rotated(i)[episode % 4]
        k = min(nsteps, length - t)
        assert (next_state, weight) == (state + k, discount ** k)
        assert reward == float(np.float32(sum(discount ** j * (state + j + 1) for j in range(k))))
        assert (terminated, truncated) == ((t + k == length) and episode % 2 == 0, (t + k == length) and episode % 2 == 1)


# --- counted once ----------------------------------------------------------------------------------------------------
class Diary(Counting):
    "Keeps its own account"

    def __init__(self, **counting):
        super().__init__(**counting)
        self.taken, self.total, self.returns = 0, 0.0, []

    def reset(self, **options):
        self.total = 0.0
        return super().reset(**options)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.taken, self.total = self.taken + 1, self.total + reward
        if terminated or truncated:
            self.returns.append((self.total, self.t))
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("nsteps", [1, 3])
def test_episodes_are_counted_once(n, nsteps):
    learner = learner_on(counting(n, Diary), nsteps=nsteps, bs=8, repeat=2, batches=60)
    learner.fit(2)
    learner.validate(episodes=3)  # in environments of its own: goes into no count
    learner.fit(env_steps=40)
    recorder, envs = learner.recorder, learner.stepper.backend.envs
    returns = [episode for env in envs for episode in env.returns]
    assert recorder.episodes == recorder.rows[-1]["episode"] == len(returns) > 10
    assert recorder.env_steps == learner.stepper.env_steps == sum(env.taken for env in envs)
    assert recorder.lengths == sum(length for _, length in returns)
    assert recorder.reward_min == min(total for total, _ in returns) and recorder.reward_max == max(total for total, _ in returns)
    if n == 1:
        assert list(recorder.rewards) == [total for total, _ in returns][-20:]


# --- seeds -----------------------------------------------------------------------------------------------------------
def test_the_first_reset_is_seeded_and_later_ones_are_not():
    stepper = GymStepper(counting(3), seed=5, mode="sync")
    pulls(stepper, 20)
    for i, env in enumerate(stepper.backend.envs):
        assert env.seeds == [5 + i] + [None] * (len(env.seeds) - 1) and len(env.seeds) > 3
    for mode in AutoresetMode:
        vector = CountingVector(3, mode)
        pulls(GymStepper(vector, seed=5), 20)
        assert vector.seeds == [5] + [None] * (len(vector.seeds) - 1)
    unseeded = GymStepper(counting(2), mode="sync")
    pulls(unseeded, 20)
    assert all(set(env.seeds) == {None} for env in unseeded.backend.envs)


def test_episodes_of_a_seeded_stream_differ():
    "A reset that is seeded every time starts every episode at the same place"
    starts = [step.state[0].tolist() for step in pulls(GymStepper("CartPole-v1", seed=0), 400) if step.step_n[0, 0] == 1]
    assert len(starts) > 5 and len({tuple(s) for s in starts}) == len(starts)


# --- exploration -----------------------------------------------------------------------------------------------------
NOISY = {
    "single": lambda agent: GymStepper(counting(1), agent),
    "sync": lambda agent: GymStepper(counting(4), agent, mode="sync"),
    **{m.value: partial(lambda m, agent: GymStepper(CountingVector(4, m, LENGTHS), agent), m) for m in AutoresetMode},
}


@pytest.mark.parametrize("mode", NOISY)
def test_exploration_restarts_with_its_episode_and_no_other(mode):
    "No pushes (sigma 0), drawn to 0.8 by half of the way at each step: at step t of an episode the noise is 0.8 (1 - 2^-t)"
    chain = OrnsteinUhlenbeck(SimpleModelRunner(Inlet(), Constant(0.0)), mu=0.8, theta=0.5, sigma=0.0, min_epsilon=1.0)
    for step in pulls(NOISY[mode](AgentHead(ActionScaler(chain))), 40):
        np.testing.assert_allclose(step.action, 0.8 * (1 - 0.5 ** step.step_n), rtol=1e-6)


@pytest.mark.parametrize("noise", [OrnsteinUhlenbeck, GaussianNoise])
def test_environments_do_not_share_their_noise(noise):
    agent = AgentHead(ActionScaler(noise(SimpleModelRunner(Inlet(), Constant(0.0, 0.0)), sigma=0.3, min_epsilon=1.0)))
    actions = np.stack([s.action.ravel() for s in pulls(GymStepper(WideBox, agent, 4, "sync", seed=0), 500)])
    assert (np.abs(np.corrcoef(actions.T) - np.eye(8)) < 0.25).all()


@pytest.mark.parametrize("n", [1, 8])
def test_epsilon_falls_with_environment_steps(n):
    stepper = GymStepper([partial(Counting, 5)] * n, DDPGAgent(Constant(0.0), min_epsilon=0.25, max_epsilon=1.0, max_steps=80), mode="sync")
    noise = find_pipe(stepper, OrnsteinUhlenbeck)
    for taken, epsilon in ((0, 1.0), (40, 0.625), (80, 0.25), (160, 0.25)):
        while stepper.env_steps < taken:
            next(stepper)
        stepper.start()
        assert stepper.env_steps == taken and noise.epsilon == pytest.approx(epsilon)


def test_epsilon_does_not_fall_with_rows_that_are_no_steps():
    "Episodes of one step, of which a NEXT_STEP environment takes half of its rows for resets: a quarter of the schedule is a quarter of the real steps"
    agent = DDPGAgent(Constant(0.0), min_epsilon=0.0, max_epsilon=1.0, max_steps=80)
    stepper = GymStepper(CountingVector(4, AutoresetMode.NEXT_STEP, (1, 2)), agent)
    while stepper.env_steps < 40:
        next(stepper)
    assert find_pipe(stepper, OrnsteinUhlenbeck).epsilon == pytest.approx(1 - stepper.env_steps / 80)


# --- units of actions ------------------------------------------------------------------------------------------------
class Receiver(WideBox):
    "Writes down what it is told"

    def reset(self, **options):
        self.told = self.__dict__.get("told", [])
        return super().reset(**options)

    def step(self, action):
        self.told.append(np.array(action))
        return super().step(action)


def in_units(action):
    "By hand: [-1, 1] to the bounds -3 to 11 and 100 to 101"
    low, high = np.array([-3.0, 100.0]), np.array([11.0, 101.0])
    return low + (np.asarray(action, np.float64) + 1) / 2 * (high - low)


def test_the_policys_unit_box_is_mapped_to_the_bounds():
    for said in ((-1.0, 1.0), (0.0, 0.0), (0.5, -0.25)):
        stepper = GymStepper(Receiver(), quiet(Constant(*said)))
        step = next(stepper)
        np.testing.assert_allclose(step.action, [said])
        np.testing.assert_allclose(step.raw_action, [in_units(said)], rtol=1e-6)
        np.testing.assert_allclose(stepper.backend.envs[0].told, step.raw_action)


def test_replay_keeps_what_the_policy_said():
    "Noise so wide that it is clipped: what is kept is, in policy units, exactly what the environment was told"
    actor, env = Constant(0.6, -0.4), Receiver()
    learner = learner_on(env, actor=actor, agent=DDPGAgent(actor, sigma=0.8, min_epsilon=1.0), actor_lr=0.0, bs=8)
    pulls(learner, 60)
    batch = kept(learner)
    action = batch.action.numpy()
    assert np.abs(action).max() == 1.0 and (np.abs(action) < 1).mean() > 0.5, "some are clipped, most are not"
    np.testing.assert_allclose(in_units(action), env.told, rtol=1e-5)
    assert all(env.action_space.contains(told) for told in env.told)
    half = np.array([7.0, 0.5])
    rewards = -(((in_units(action) - [9.5, 100.1]) / half) ** 2).sum(1)
    np.testing.assert_allclose(batch.reward[:, 0], rewards, rtol=1e-3, atol=1e-4)


# --- validation ------------------------------------------------------------------------------------------------------
def by_hand(actor, episodes, seed=10_000):
    "Pendulum-v1 without any of our pipes"
    env, returns = gymnasium.make("Pendulum-v1"), []
    for i in range(episodes):
        observation, _ = env.reset(seed=seed + i)
        total, over = 0.0, False
        while not over:
            with torch.no_grad():
                action = 2 * actor(torch.from_numpy(observation)[None])[0].numpy()
            observation, reward, terminated, truncated, _ = env.step(action)
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    return returns


def test_validation_plays_fixed_starts_without_noise():
    learner = learner_on("Pendulum-v1", actor=Actor(3, 1, 16, 16, final_layer_init_fn=nn.Identity()), bs=16, batches=20)
    learner.fit(1)
    first = learner.validate(episodes=3)
    expected = by_hand(find_pipe(learner, SimpleModelRunner).model, 3)
    np.testing.assert_allclose(sorted(first["returns"]), sorted(expected), rtol=1e-4)
    assert first["mean"] == pytest.approx(np.mean(expected), rel=1e-4) and list(first["lengths"]) == [200] * 3
    np.testing.assert_array_equal(first["returns"], learner.validate(episodes=3)["returns"])
    np.testing.assert_allclose(sorted(first["returns"]), sorted(learner.validate(episodes=3, n=1)["returns"]), rtol=1e-4)


@pytest.mark.parametrize("envs", ["Pendulum-v1", gymnasium.make("Pendulum-v1")], ids=["an id", "a live environment"])
def test_validation_in_a_stack_of_its_own_plays_the_policy_that_learns(envs):
    actor = Actor(3, 1, 16, 16, final_layer_init_fn=nn.Identity())
    train, valid = GymStepper("Pendulum-v1", DDPGAgent(actor), seed=0), GymStepper(envs)
    learner = DDPGLearner(actor, Critic(3, 1, 16, 16), (train, valid), logger_bases=[], bs=16, batches=20)
    learner.fit(1)
    np.testing.assert_allclose(sorted(learner.validate(episodes=2)["returns"]), sorted(by_hand(actor, 2)), rtol=1e-4)


def test_training_is_the_same_to_the_bit_with_and_without_validation():
    def trained(validate):
        learner = learner_on("Pendulum-v1", nsteps=2, bs=16, batches=40)
        for _ in range(3):
            learner.fit(1)
            if validate:
                learner.validate(episodes=2, deterministic=False)
                learner.predict(np.zeros(3, np.float32), deterministic=False)
        return [*find_pipe(learner, SimpleModelRunner).model.parameters(), kept(learner).action]
    for a, b in zip(trained(True), trained(False), strict=True):
        assert torch.equal(a, b)


# --- known optima ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env, updates, least", [(Bandit, 600, -0.02), (TwoStep, 600, 0.97), (WideBox, 1000, -0.08)])
def test_ddpg_finds_the_known_optimum(env, updates, least):
    "Optima are 0, 1 and 0; the centre of the box gives -0.09, 0.75 and -1.26"
    torch.manual_seed(0)
    actor = Actor(GymStepper(env).observation_space.shape[0], GymStepper(env).action_space.shape[0], 32, 32)
    agent = DDPGAgent(actor, theta=1.0, sigma=0.5, min_epsilon=0.3, max_steps=500)
    learner = learner_on(env, actor=actor, agent=agent, hidden=32, tau=0.02, critic_lr=3e-3, bs=64, batches=updates)
    learner.fit(1)
    assert learner.validate(episodes=1)["mean"] > least


# --- mistakes put back -----------------------------------------------------------------------------------------------
def wrapped(owner, name, wrong):
    "A mistake: `owner.name` becomes `wrong(right, *arguments)`"
    def put_back(monkeypatch):
        right = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: wrong(right, *args, **kwargs))
    return put_back


def instead(owner, name, wrong):
    "A mistake: `owner.name` becomes `wrong`"
    return lambda monkeypatch: monkeypatch.setattr(owner, name, wrong)


def unchecked(mistake):
    "Of a mistake that a learner would notice when it is made: let it learn all the same"
    def put_back(monkeypatch):
        monkeypatch.setattr(LearnerHead, "check", lambda self: None)
        mistake(monkeypatch)
    return put_back


def on_the_state_before(act, head, step):
    before = head.__dict__.get("before", step.state)
    head.before = np.array(step.state)
    return act(head, step.replace(state=before))


def reset_as_successor(step, backend, actions):
    successor, *rest = step(backend, actions)
    if (rest[1] | rest[2]).any():
        successor = np.array(backend.observe())
    return successor, *rest


def fake_rows_as_true_ones(step, backend, actions):
    return *step(backend, actions)[:-1], None


def counters_go_on(begin, stepper, first):
    total, step_n = stepper._total.copy(), stepper._step_n.copy()
    begin(stepper, first)
    stepper._total[...], stepper._step_n[...] = total, step_n


def over_the_end(self, done):
    return ()


def no_tails(self, done):
    self._held[done] = 0
    return ()


def first_successor(forward, merger, item):
    merged = forward(merger, item)
    return merged.replace(next_state=item[0].next_state) if isinstance(item, tuple) else merged


def first_flags(forward, merger, item):
    merged = forward(merger, item)
    return merged.replace(terminated=item[0].terminated, truncated=item[0].truncated) if isinstance(item, tuple) else merged


def last_reward_first(nstep_return, rewards, discount):
    return nstep_return(rewards[::-1], discount)


def nominal_horizon(filled, like, value):
    return filled(like, 0.5 ** 3)


def rows_lost_at_the_head(self, step, first):
    for get, view in zip(self._getters, self._views):
        view[self.cursor:] = get(step)[:first]


def counted_behind_the_windows(monkeypatch):
    "The collectors stand where the samples are, and see an end once per window"
    merged = compose.with_nsteps

    def late(who, pipe, nsteps, discount):
        pipe = merged(who, pipe, nsteps, discount)
        return ddpg.RollingTerminatedRewardCollector(ddpg.EpisodeCollector(pipe))
    monkeypatch.setattr(compose, "with_collectors", lambda pipe: pipe)
    monkeypatch.setattr(compose, "with_nsteps", late)


def seeded_every_time(reset, rows, all_rows):
    seed = rows._seed if rows._seed is not None else rows.__dict__.get("kept_seed")
    rows._seed = rows.kept_seed = seed
    reset(rows, all_rows)


def never_forgets(forget, noise, rows):
    if isinstance(rows, slice):  # the very beginning
        forget(noise, rows)


def everybody_forgets(forget, noise, rows):
    forget(noise, slice(None))


def one_for_all(noise, self, rows):
    return np.repeat(noise(self, rows)[:1], rows, 0)


def calls_are_counted(self, rows):
    self.steps += 1


def seeing_validation_as_training(self, rows):
    (self.leader or self).steps += rows


def raw_is_kept(forward, scaler, item):
    item = forward(scaler, item)
    return item.replace(action=item.raw_action)


def unclipped_is_kept(monkeypatch):
    "The clip stands behind what is kept: the environment is told one thing, replay another"
    monkeypatch.setattr(ddpg, "ActionClip", lambda pipe: pipe)
    to_env = BoxScaler.to_env
    monkeypatch.setattr(BoxScaler, "to_env", lambda self, action: to_env(self, action.clip(-1, 1)))


def noise_in_validation(for_validation, head, deterministic=True):
    return for_validation(head, False)


def ended_by_truncation(loss, processor, batch):
    return loss(processor, batch.replace(terminated=batch.terminated | batch.truncated))


def never_ended(loss, processor, batch):
    return loss(processor, batch.replace(terminated=batch.terminated & False))


true_rows = {mode: partial(test_every_row_is_a_true_transition, mode) for mode in STEPPERS}
MISTAKES = {  # what: (the truth, the mistake)
    "the policy acts on the observation before": (partial(test_the_policy_acts_on_the_current_observation, 1), wrapped(AgentHead, "act", on_the_state_before)),
    "the same with four": (partial(test_the_policy_acts_on_the_current_observation, 4), wrapped(AgentHead, "act", on_the_state_before)),
    "the reset observation as successor": (true_rows["single"], wrapped(EnvRows, "step", reset_as_successor)),
    "the same of four": (true_rows["sync"], wrapped(EnvRows, "step", reset_as_successor)),
    "the same, DISABLED": (true_rows["live vector Disabled"], wrapped(VectorBackend, "step", reset_as_successor)),
    "final_obs not looked at": (true_rows["live vector SameStep"], instead(VectorBackend, "_put_final", lambda self, info: None)),
    "the fake row leaves the stepper": (true_rows["live vector NextStep"], wrapped(VectorBackend, "step", fake_rows_as_true_ones)),
    "the same, native CartPole": (test_the_fake_row_of_a_vector_environment_never_leaves_the_stepper, wrapped(VectorBackend, "step", fake_rows_as_true_ones)),
    "the fake row enters the replay": (partial(check_nstep_replay, CountingVector(4, AutoresetMode.NEXT_STEP, LENGTHS)),
                                       wrapped(VectorBackend, "step", fake_rows_as_true_ones)),
    "totals go on over the end": (true_rows["sync"], wrapped(GymStepper, "_begin_episodes", counters_go_on)),
    "truncation stops the bootstrap": (test_terminated_alone_stops_the_bootstrap, wrapped(CriticLossProcessor, "loss", ended_by_truncation)),
    "truncation stops the bootstrap of a learner": (test_a_truncated_episode_goes_on_in_the_value, unchecked(wrapped(CriticLossProcessor, "loss", ended_by_truncation))),
    "termination does not stop it": (test_terminated_alone_stops_the_bootstrap, wrapped(CriticLossProcessor, "loss", never_ended)),
    "windows reach over the end": (one_case_of_windows, instead(NStepper, "_tails", over_the_end)),
    "the same in a learner": (partial(check_nstep_replay, counting(1)[0]), instead(NStepper, "_tails", over_the_end)),
    "the last windows of an episode are lost": (one_case_of_windows, instead(NStepper, "_tails", no_tails)),
    "the successor of the first step": (one_case_of_windows, wrapped(FirstLastMerger, "forward", first_successor)),
    "the flags of the first step": (one_case_of_windows, wrapped(FirstLastMerger, "forward", first_flags)),
    "the wrong reward is discounted": (one_case_of_windows, wrapped(nstep, "nstep_return", last_reward_first)),
    "the discount of the nominal horizon": (one_case_of_windows, wrapped(nstep, "_filled", nominal_horizon)),
    "rows are lost at the ring's head": (one_case_of_windows, instead(ReplayMemory, "_write_around", rows_lost_at_the_head)),
    "episodes counted once per window": (partial(test_episodes_are_counted_once, 1, 3), counted_behind_the_windows),
    "the same, by four": (partial(test_episodes_are_counted_once, 4, 3), counted_behind_the_windows),
    "every reset is seeded": (test_the_first_reset_is_seeded_and_later_ones_are_not, wrapped(EnvRows, "_reset", seeded_every_time)),
    "every episode begins alike": (test_episodes_of_a_seeded_stream_differ, wrapped(EnvRows, "_reset", seeded_every_time)),
    "noise goes on over the end": (partial(test_exploration_restarts_with_its_episode_and_no_other, "single"), wrapped(OrnsteinUhlenbeck, "forget", never_forgets)),
    "all noise restarts with any episode": (partial(test_exploration_restarts_with_its_episode_and_no_other, "sync"),
                                            wrapped(OrnsteinUhlenbeck, "forget", everybody_forgets)),
    "environments share correlated noise": (partial(test_environments_do_not_share_their_noise, OrnsteinUhlenbeck), wrapped(OrnsteinUhlenbeck, "noise", one_for_all)),
    "environments share white noise": (partial(test_environments_do_not_share_their_noise, GaussianNoise), wrapped(GaussianNoise, "noise", one_for_all)),
    "epsilon falls with calls": (partial(test_epsilon_falls_with_environment_steps, 8), instead(Exploration, "_count", calls_are_counted)),
    "actions are not scaled": (test_the_policys_unit_box_is_mapped_to_the_bounds, instead(BoxScaler, "to_env", lambda self, a: a.astype(self.dtype))),
    "actions are clipped to the box": (test_the_policys_unit_box_is_mapped_to_the_bounds,
                                       instead(BoxScaler, "to_env", lambda self, a: a.clip(*(self.offset - self.scale, self.offset + self.scale)).astype(self.dtype))),
    "replay keeps the environment's units": (test_replay_keeps_what_the_policy_said, wrapped(ActionScaler, "forward", raw_is_kept)),
    "replay keeps what was not done": (test_replay_keeps_what_the_policy_said, unclipped_is_kept),
    "noise in validation": (test_validation_plays_fixed_starts_without_noise, wrapped(AgentHead, "for_validation", noise_in_validation)),
    "starts are not fixed": (test_validation_plays_fixed_starts_without_noise, wrapped(EnvRows, "seed", lambda seed, rows, value: seed(rows, None))),
    "validation moves the schedule": (test_training_is_the_same_to_the_bit_with_and_without_validation, instead(Exploration, "_count", seeing_validation_as_training)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_put_back_is_noticed(mistake, monkeypatch):
    truth, put_back = MISTAKES[mistake]
    put_back(monkeypatch)
    with pytest.raises(AssertionError):
        truth()
