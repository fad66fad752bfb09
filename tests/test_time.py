"""Truths about time: what acts on what, what follows what, where an episode ends. Each test fails when its mistake is put back,
which `test_a_mistake_put_back_is_noticed` tries for every one of them."""
import math
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastrl_pipes.agents import ddpg
from fastrl_pipes.agents.core import ActionScaler, AgentHead, SimpleModelRunner
from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner
from fastrl_pipes.core import SimpleStep, copied, leaves
from fastrl_pipes.envs.autoreset import VectorBackend
from fastrl_pipes.envs.debug import Bandit, ConstantReward, Echo, TwoStep, WideBox
from fastrl_pipes.envs.doubles import Counting, CountingVector
from fastrl_pipes.envs.inprocess import EnvRows
from fastrl_pipes.envs.spaces import BoxScaler
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.exploration.noise import Exploration, GaussianNoise, OrnsteinUhlenbeck
from fastrl_pipes.memory.experience_replay import ReplayMemory, ReplaySampler, ReplayWriter
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.pipes import nstep
from fastrl_pipes.pipes.control import Inlet
from fastrl_pipes.pipes.core import Context, bind
from fastrl_pipes.pipes.graph import find_pipe
from fastrl_pipes.pipes.nstep import FirstLastMerger, NSkipper, NStepper
from fastrl_pipes.processors.dpg import CriticLossProcessor

LENGTHS = (5, 3, 8, 1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def test_a_truncated_episode_goes_on_in_the_value(updates=900):
    "Reward 1 for ever, truncated every 10 steps: V = 1 / (1 - 0.9) = 10; with truncation as an end it would be about 5"
    learner = learner_on(partial(ConstantReward, length=10), hidden=32, discount=0.9, tau=0.05, bs=64, batches=updates)
    learner.fit(1)
    with torch.no_grad():
        value = find_pipe(learner, CriticLossProcessor).critic(torch.ones(5, 1), torch.linspace(-1, 1, 5)[:, None])
    torch.testing.assert_close(value, torch.full((5, 1), 10.0), rtol=0.02, atol=0)


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
    check_windows(stream([[(4, "terminated"), (2, "truncated"), (5, "both")], [(3, "truncated"), (4, "terminated")]], (0, 1)), 2, 3, 7)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("mode", ["single", "sync", "native"])
def test_every_row_of_an_nstep_replay_is_a_window_of_its_episode(mode, n):
    "The whole learner on environments that count: state s and successor s + k say how long the window was"
    if (mode == "single") != (n == 1):
        pytest.skip("one environment or four")
    envs = {"single": counting(1)[0], "sync": counting(4), "native": CountingVector(4, AutoresetMode.NEXT_STEP, LENGTHS)}[mode]
    check_nstep_replay(envs)


def check_nstep_replay(envs, discount=0.5, nsteps=3):
    learner = learner_on(envs, nsteps=nsteps, discount=discount, bs=8, max_sz=50, batches=100)
    next(learner)
    pulls(learner, 99)
    assert find_pipe(learner, ReplayWriter).memory.written > 120, "the ring has gone round"
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
