"""Hindsight replay against a loop over plain lists: which goals, which rewards, from which steps, after any number of overwritten rows; and
what it refuses before the first step."""
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit, TransformReward
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fastrl_pipes.agents.ddpg import Actor, Critic, DDPGAgent, DDPGLearner
from fastrl_pipes.core import MergedStep, SimpleStep, copied, spawn_seed, take_rows
from fastrl_pipes.envs.doubles import Counting, Nested
from fastrl_pipes.envs.reach import Reach2D
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.errors import CheckpointError, WorkerError
from fastrl_pipes.learner.flatten import flatten
from fastrl_pipes.memory.episodes import EpisodeIndex, EpisodeWriter
from fastrl_pipes.memory.experience_replay import ExperienceReplay, ReplayWriter
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.memory.hindsight import STRATEGIES, HindsightReplay
from fastrl_pipes.networks.goals import GoalConditioned
from fastrl_pipes.pipes.batch import StepBatcher
from fastrl_pipes.pipes.compare import replace
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.walk import bind, snapshot
from fastrl_pipes.pipes.graph import find_pipe, find_pipes
from fastrl_pipes.pipes.nstep import FirstLastMerger, NSkipper, NStepFlattener, NStepper

UNREACHED = -1.0  # the goal that every episode has


# --- a source whose every number says where it comes from ---------------------------------------------------------------
def tag(env, episode, t):
    "An achieved goal that no other step has"
    return np.float32(1000 * env + 20 * episode + t)


def within_half(achieved, desired, info):
    assert info == {}
    return np.where(np.abs(achieved - desired)[..., 0] > 0.5, -1.0, 0.0)


def playing(n, lengths, gaps=False, terminates=False):
    "`n` steps of an environment for each of `lengths`, lists of the lengths of episodes in turn. With gaps, an environment misses the step after an end"
    envs = [{"t": 0, "episode": 0, "rest": False} for _ in lengths]
    for _ in range(n):
        rows = []
        for e, env in enumerate(envs):
            if env["rest"]:
                env["rest"] = False
                continue
            length = lengths[e][env["episode"] % len(lengths[e])]
            t, episode = env["t"], env["episode"]
            rows.append((e, episode, t, t + 1 == length))
            env["t"] += 1
            if t + 1 == length:
                env["t"], env["episode"], env["rest"] = 0, episode + 1, gaps
        if rows:
            yield step_of(rows, terminates)


def step_of(rows, terminates=False):
    def seen(ahead):
        goals = np.array([[tag(e, k, t + ahead)] for e, k, t, _ in rows], np.float32)
        return {"observation": np.array([[e, k, t] for e, k, t, _ in rows], np.float32), "achieved_goal": goals, "desired_goal": np.full_like(goals, UNREACHED)}
    over, no = np.array([[over] for *_, over in rows]), np.zeros((len(rows), 1), bool)
    return SimpleStep(state=seen(0), next_state=seen(1), action=np.array([[t] for _, _, t, _ in rows], np.float32), reward=np.full((len(rows), 1), -1, np.float32),
                      terminated=over if terminates else no, truncated=no if terminates else over, step_n=np.array([[t + 1] for _, _, t, _ in rows]), env_id=np.array([[e] for e, *_ in rows]))


def hindsight(source, bs=4, max_sz=100, context=None, **more):
    replay = HindsightReplay(source, bs, max_sz, **{"compute_reward": within_half, **more})
    bind(replay, context or Context(seed=0))
    return replay


# --- a hand-made episode ------------------------------------------------------------------------------------------------
EXPECTED = {  # step -> goals that it may be given, of an episode of four steps from achieved goal 0 to 4
    "future": {0: [1, 2, 3, 4], 1: [2, 3, 4], 2: [3, 4], 3: [4]},
    "final": {t: [4] for t in range(4)},
    "episode": {t: [1, 2, 3, 4] for t in range(4)},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("k", [1, 4, 0])
def test_a_hand_made_episode(strategy, k):
    replay = hindsight(playing(4, [[4]]), bs=4, max_sz=4, k=k, strategy=strategy, repeat=600)
    counts = {t: {} for t in range(4)}
    for batch in replay:
        for t, goal, goal_after, reward in zip(batch.action[:, 0].int().tolist(), batch.state["desired_goal"][:, 0].tolist(), batch.next_state["desired_goal"][:, 0].tolist(),
                                               batch.reward[:, 0].tolist()):
            assert goal == goal_after and reward == (0.0 if goal == t + 1 else -1.0)
            counts[t][goal] = counts[t].get(goal, 0) + 1
    for t, seen in counts.items():
        goals = EXPECTED[strategy][t] if k else []
        assert set(seen) == {UNREACHED, *goals}
        if k:
            n = sum(seen.values())
            expected = [n / (k + 1), *[n * k / (k + 1) / len(goals)] * len(goals)]
            assert chisquare([seen[UNREACHED], *[seen[g] for g in goals]], expected).pvalue > 1e-4


def test_the_rest_of_a_transition_stays_as_it_was_and_so_do_the_rows():
    steps = list(playing(30, [[4], [7]]))
    replay = hindsight(steps, bs=16, max_sz=60)
    plain = {tuple(o): (s, i) for s in steps for i, o in enumerate(s.state["observation"].tolist())}
    for batch in replay:
        for j, where in enumerate(batch.state["observation"].tolist()):
            step, i = plain[tuple(where)]
            for field in ("action", "terminated", "truncated"):
                assert getattr(batch, field)[j].tolist() == getattr(step, field)[i].tolist()
            for field in ("state", "next_state"):
                for name in ("observation", "achieved_goal"):
                    assert getattr(batch, field)[name][j].tolist() == getattr(step, field)[name][i].tolist()
    held = replay.memory.gather(torch.arange(60))
    assert (held.reward == -1).all() and (held.state["desired_goal"] == UNREACHED).all() and (held.next_state["desired_goal"] == UNREACHED).all()


# --- against a loop -----------------------------------------------------------------------------------------------------
def by_loop(steps, bs, max_sz, k, strategy, seed=0):
    "Batches as (where, goal, reward), made with lists and loops from the same generator"
    generator = torch.Generator().manual_seed(spawn_seed(seed, "ReplaySampler", "HindsightReplay"))
    ring, at, written = [None] * max_sz, 0, 0
    for step in steps:
        for i in range(len(step.reward)):
            ring[at] = (tuple(step.state["observation"][i].astype(int).tolist()), written)
            at, written = (at + 1) % max_sz, written + 1
        if min(written, max_sz) < bs:
            continue
        index = torch.empty(bs, dtype=torch.int64).random_(0, min(written, max_sz), generator=generator)
        coin, chance = torch.rand((2, bs), generator=generator, dtype=torch.float64).tolist()
        rows, held = [], [r for r in ring if r is not None]
        for j, i in enumerate(index.tolist()):
            (env, episode, t), _ = ring[i]
            times = sorted(where[2] for where, _ in held if where[:2] == (env, episode))
            allowed = {"future": [x for x in times if x >= t], "final": times[-1:], "episode": times}[strategy]
            goal = UNREACHED
            if coin[j] < k / (k + 1):
                goal = float(tag(env, episode, allowed[int(chance[j] * len(allowed))] + 1))
            rows.append(((env, episode, t), goal, 0.0 if goal == float(tag(env, episode, t + 1)) else -1.0))
        yield rows


def as_rows(batch):
    return list(zip([tuple(o) for o in batch.state["observation"].int().tolist()], batch.state["desired_goal"][:, 0].tolist(), batch.reward[:, 0].tolist()))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4), n=st.integers(1, 40), max_sz=st.integers(4, 30), k=st.sampled_from([1, 4]),
       strategy=st.sampled_from(STRATEGIES), gaps=st.booleans(), data=st.data())
def test_equal_to_a_loop_over_lists(lengths, n, max_sz, k, strategy, gaps, data):
    "Episodes of any length, environments interleaved and with gaps, unfinished ones, rings that are overwritten many times"
    bs = data.draw(st.integers(1, 4))
    steps = list(playing(n, lengths, gaps))
    replay = hindsight(steps, bs, max_sz, k=k, strategy=strategy)
    assert [as_rows(batch) for batch in replay] == list(by_loop(steps, bs, max_sz, k, strategy))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=5), n=st.integers(1, 60), max_sz=st.integers(5, 40), strategy=st.sampled_from(STRATEGIES),
       gaps=st.booleans())
def test_every_goal_was_achieved_in_the_same_episode_at_an_allowed_time(lengths, n, max_sz, strategy, gaps):
    "Said without a second implementation: from the numbers in the batch alone, and from what the ring holds"
    held = []
    replay = HindsightReplay(playing(n, lengths, gaps), bs=5, max_sz=max_sz, strategy=strategy, compute_reward=within_half)
    bind(replay, Context(seed=1))
    for batch in replay:
        held = replay.memory.gather(torch.arange(len(replay.memory))).next_state["achieved_goal"][:, 0].tolist()
        for (env, episode, t), goal, reward in as_rows(batch):
            assert reward == (0.0 if goal == tag(env, episode, t + 1) else -1.0)
            if goal != UNREACHED:
                when = goal - tag(env, episode, 0)
                mine = [g - tag(env, episode, 0) for g in held if 0 < g - tag(env, episode, 0) < 20]
                assert when in mine, "achieved in this episode, in a row that is still there"
                assert strategy != "future" or when >= t + 1
                assert strategy != "final" or when == max(mine)


def test_a_row_of_an_overwritten_episode_does_not_lead_into_the_new_one():
    "A ring of four rows: an episode of six steps is half gone when the next begins, in the same places"
    replay = hindsight(playing(9, [[6, 20]]), bs=4, max_sz=4, strategy="episode", repeat=50)
    for batch in replay:
        for (_, episode, _), goal, _ in as_rows(batch):
            assert goal == UNREACHED or goal // 20 == episode
    *_, last = hindsight(playing(7, [[6, 20]]), bs=4, max_sz=4, strategy="episode", k=1000, repeat=20)
    left = {goal for (_, episode, _), goal, _ in as_rows(last) if episode == 0}
    assert left and left <= {4.0, 5.0, 6.0}, "what is left of the first"


def test_an_unfinished_episode_reaches_up_to_where_it_is():
    for strategy in STRATEGIES:
        replay = hindsight(playing(5, [[50]]), bs=4, max_sz=50, strategy=strategy, repeat=20)
        steps, batches = 0, []
        for i, batch in enumerate(replay):
            steps = 4 + i // 20
            batches.append(batch)
            goals = {goal for _, goal, _ in as_rows(batch)} - {UNREACHED}
            assert goals <= ({float(steps)} if strategy == "final" else set(map(float, range(1, steps + 1))))
        assert steps == 5


def test_an_episode_that_was_broken_off_without_a_flag_is_over():
    "As after a resume at the boundary of episodes: the environment begins another one"
    steps = [*playing(3, [[50]]), *[s.replace(state={**s.state, "observation": s.state["observation"] + [0, 1, 0]}, next_state={**s.next_state, "achieved_goal": s.next_state["achieved_goal"] + 20})
                                    for s in map(copied, playing(4, [[50]]))]]
    replay = hindsight(steps, bs=4, max_sz=50, strategy="final", k=1000)
    *_, last = replay
    found = {where[1]: goal for where, goal, _ in (r for b in hindsight(steps, bs=4, max_sz=50, strategy="final", k=1000) for r in as_rows(b)) if goal != UNREACHED}
    assert found.keys() == {0, 1} and found[0] == 3.0 and len(last) == 4


# --- the environment's methods ------------------------------------------------------------------------------------------
class Falls(Reach2D):
    "Ends where the goal is reached, and also where the point falls off the right border"

    def __init__(self):
        super().__init__(radius=0.3, push=0.2, ends=True)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated or bool(self.position[0] > 0.9), truncated, info


def test_terminated_follows_the_goal_and_an_end_with_another_cause_stays():
    "Every combination is looked for: an end of the new goal, one that was only the old goal's, one by falling, and none"
    env, seen = Falls(), set()
    replay = HindsightReplay(GymStepper(Falls, n=4, mode="sync", seed=0), bs=256, max_sz=4000, warmup=1000, strategy="episode")
    next(replay)
    held = replay.memory.gather(torch.arange(len(replay.memory)))
    plain = {tuple(o): (bool(end), tuple(goal), x) for o, end, goal, x in zip(held.state["observation"].tolist(), held.terminated[:, 0].tolist(), held.state["desired_goal"].tolist(),
                                                                               held.next_state["observation"][:, 0].tolist())}
    for _ in range(40):
        batch = next(replay)
        for o, goal, achieved, now in zip(batch.state["observation"].tolist(), batch.state["desired_goal"].numpy(), batch.next_state["achieved_goal"].numpy(), batch.terminated[:, 0].tolist()):
            if tuple(o) not in plain:
                continue  # written since
            ended, before, x = plain[tuple(o)]
            fell, reached, was = x > 0.9, bool(env.compute_terminated(achieved, goal, {})), bool(env.compute_terminated(achieved, np.float32(before), {}))
            if was and ended and fell:
                continue  # both causes: the goal explains the end
            assert now == (reached or (ended and not was))
            seen.add((reached, was, ended))
    assert seen >= {(True, False, False), (False, True, True), (False, False, True), (False, False, False)}


def test_without_compute_terminated_flags_stay():
    class Bare(gymnasium.Wrapper):
        def get_wrapper_attr(self, name):
            if name == "compute_terminated":
                raise AttributeError(name)
            return super().get_wrapper_attr(name)
    replay = HindsightReplay(GymStepper(lambda: Bare(Reach2D(ends=True, radius=0.3)), seed=0), bs=64, max_sz=500, warmup=300)
    for _ in range(10):
        batch = next(replay)
        assert not (batch.terminated & (batch.reward < 0) & (batch.next_state["desired_goal"] == batch.next_state["achieved_goal"]).all(1, keepdim=True)).any()
    held = replay.memory.gather(torch.arange(300))
    assert (batch.reward == 0).sum() > (held.reward == 0).float().mean() * 64 and not (batch.terminated & (batch.reward == -1)).all()


WAYS = {
    "single": lambda: GymStepper("fastrl/Reach2D-v0", seed=0),
    "sync": lambda: GymStepper("fastrl/Reach2D-v0", n=3, mode="sync", seed=0),
    "workers": lambda: GymStepper("fastrl/Reach2D-v0", n=3, mode="workers", workers=2, seed=0),
    "async": lambda: GymStepper("fastrl/Reach2D-v0", n=2, mode="async", seed=0),
    "settings": lambda: GymStepper("fastrl/Reach2D-v0", n=2, mode="workers", workers=1, seed=0, env_kwargs={"radius": 0.9}),
    "live": lambda: GymStepper(Reach2D(), seed=0),
    "wrapped": lambda: GymStepper(lambda: TimeLimit(Reach2D(), 17), seed=0),
    "vector, next step": lambda: GymStepper(SyncVectorEnv([partial(Reach2D, length=7)] * 3, autoreset_mode=AutoresetMode.NEXT_STEP), seed=0),
    "vector, same step": lambda: GymStepper(SyncVectorEnv([partial(Reach2D, length=7)] * 3, autoreset_mode=AutoresetMode.SAME_STEP), seed=0),
}


@pytest.mark.parametrize("way", WAYS)
def test_rewards_are_computed_however_the_environments_run(way):
    replay = HindsightReplay(WAYS[way](), bs=64, max_sz=300, warmup=100)
    try:
        for _ in range(30):
            batch = next(replay)
        near = torch.linalg.vector_norm(batch.next_state["achieved_goal"] - batch.state["desired_goal"], dim=1) <= (0.9 if way == "settings" else 0.05)
        assert torch.equal(batch.reward[:, 0] == 0, near) and 0.1 < near.float().mean() < 1
    finally:
        find_pipe(replay, GymStepper).close()


def test_a_wrapper_that_says_its_own_reward_is_asked_first():
    class Shifted(gymnasium.Wrapper):
        def compute_reward(self, achieved, desired, info):
            return self.env.compute_reward(achieved, desired, info) + 1

        def step(self, action):
            obs, reward, *rest = self.env.step(action)
            return obs, reward + 1, *rest
    batch = next(HindsightReplay(GymStepper(lambda: Shifted(Reach2D()), seed=0), bs=64, max_sz=300, warmup=100))
    assert set(batch.reward[:, 0].tolist()) == {0.0, 1.0}


def test_networks_of_float64_get_batches_of_float64():
    batch = next(hindsight(playing(60, [[9]]), bs=16, context=Context(seed=0, dtype=torch.float64)))
    assert batch.state["desired_goal"].dtype == batch.reward.dtype == torch.float64 and batch.terminated.dtype == torch.bool
    other = next(hindsight(playing(60, [[9]]), bs=16))
    assert torch.equal(other.reward.double(), batch.reward) and torch.equal(other.state["desired_goal"].double(), batch.state["desired_goal"])


@pytest.mark.parametrize("kind", [spaces.Box(0, 255, (2, 3), np.uint8), spaces.MultiDiscrete([50, 50]), spaces.Discrete(50)], ids=str)
def test_goals_of_other_kinds(kind):
    "An image, or whole numbers"
    class Whole(gymnasium.Env):
        def __init__(self):
            self.observation_space, self.action_space = spaces.Dict(observation=kind, achieved_goal=kind, desired_goal=kind), spaces.Box(-1, 1, (1,), np.float32)

        def compute_reward(self, achieved, desired, info):
            return np.where((achieved == desired).reshape(len(achieved), -1).all(1), 0.0, -1.0)

        def see(self):
            now = np.full(kind.shape, self.t, kind.dtype)
            return {"observation": now, "achieved_goal": now, "desired_goal": np.full(kind.shape, 49, kind.dtype)}

        def reset(self, *, seed=None, options=None):
            self.t = 0
            return self.see(), {}

        def step(self, action):
            self.t += 1
            return self.see(), -1.0, False, self.t == 9, {}
    batch = next(HindsightReplay(GymStepper(Whole, seed=0), bs=32, max_sz=100, warmup=50))
    goal, after = (x.reshape(32, -1)[:, 0] for x in (batch.state["desired_goal"], batch.next_state["achieved_goal"]))
    assert torch.equal(batch.reward[:, 0] == 0, goal == after) and (goal != 49).any() and (goal[goal != 49] >= after[goal != 49]).all()


# --- in the place of another replay -------------------------------------------------------------------------------------
def test_without_hindsight_it_is_an_experience_replay_to_the_bit():
    plain, none = ExperienceReplay(playing(40, [[9], [4]]), 8, 50, name="replay"), hindsight(playing(40, [[9], [4]]), 8, 50, k=0, compute_reward=None, name="replay")
    bind(plain, Context(seed=0))
    a, b = list(plain), list(none)
    assert len(a) == len(b) > 30 and all(torch.equal(x.state["observation"], y.state["observation"]) and torch.equal(x.reward, y.reward) for x, y in zip(a, b))


def learner(seed=0, k=4, repeat=1, n=1, **more):
    torch.manual_seed(seed)
    actor, critic = (GoalConditioned(net(6, 2, 16, 16)) for net in (Actor, Critic))
    stepper = GymStepper(partial(Reach2D, length=9), DDPGAgent(actor), n=n, seed=seed)
    made = DDPGLearner(actor, critic, stepper, logger_bases=[], bs=16, max_sz=60, batches=20, tau=0.05, **more)
    return replace(made, "ExperienceReplay", partial(HindsightReplay, bs=16, max_sz=60, k=k, repeat=repeat), show=False)


def test_a_learner_swaps_one_pipe_and_learns():
    made = learner()
    assert find_pipe(made, EpisodeWriter).memory is find_pipe(made, HindsightReplay).memory and not find_pipes(made, lambda p: type(p) is ReplayWriter), "the old writer went with the old replay"
    before = copied({k: v for k, v in find_pipe(made, "actor_opt").model.state_dict().items()})
    made.fit(2)
    after = find_pipe(made, "actor_opt").model.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before) and all(torch.isfinite(v).all() for v in after.values())


@pytest.mark.parametrize("n", [1, 3])
def test_a_learner_continues_to_the_bit(n, tmp_path):
    "Cut in the middle of episodes, of which the ring has overwritten some"
    whole = learner(n=n)
    for _ in range(70):
        next(whole)
    whole.save(tmp_path)
    ahead = [copied(next(whole)) for _ in range(50)]
    other = learner(n=n)
    other.load(tmp_path)
    for a in ahead:
        b = next(other)
        for x, y in ((a.reward, b.reward), (a.state["desired_goal"], b.state["desired_goal"]), (a.state["observation"], b.state["observation"])):
            assert torch.equal(x, y)
    assert all(torch.equal(x, y) for x, y in zip(find_pipe(whole, "actor_opt").model.parameters(), find_pipe(other, "actor_opt").model.parameters()))


def test_a_checkpoint_says_which_strategy_it_is_of(tmp_path):
    made = learner()
    next(made)
    made.save(tmp_path)
    with pytest.raises(CheckpointError, match="HindsightReplay.*k=4.*k=2"):
        learner(k=2).load(tmp_path)


# --- the index's own state ------------------------------------------------------------------------------------------------
def filled(n=30, max_sz=20):
    writer = EpisodeWriter(playing(n, [[4], [7], [1]]), ReplayMemory(max_sz))
    bind(writer)
    list(writer)
    return writer.episodes


FORGERIES = {
    "no array": lambda s: s.update(env=[1, 2]), "floats": lambda s: s.update(at=s["at"].astype(float)), "one row less": lambda s: s.update(begin=s["begin"][1:]),
    "an environment that is not there": lambda s: s["env"].__setitem__(3, 99), "a negative one": lambda s: s["env"].__setitem__(3, -1), "rows of another": lambda s: s["env"].__setitem__(slice(0, 2), s["env"][:2][::-1].copy()),
    "numbers out of order": lambda s: s["at"].__setitem__(slice(0, 4), s["at"][:4][::-1].copy()), "a beginning after the step": lambda s: s["begin"].__setitem__(2, 10**6),
    "an end that never came": lambda s: s["end"].__setitem__(2, 10**9), "an end before the step": lambda s: s["end"].__setitem__(2, 0), "more rows than there are": lambda s: s.update(written=10**12),
    "fewer": lambda s: s.update(written=3), "a bool": lambda s: s.update(written=True), "other counts": lambda s: s["count"].__setitem__(0, 10**9), "another environment more": lambda s: s.update(count=np.append(s["count"], 5)),
    "a field too much": lambda s: s.update(more=1), "a field too few": lambda s: s.pop("due"), "negative counts": lambda s: s["due"].__setitem__(0, -4),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_state_is_refused_and_changes_nothing(what):
    episodes, other = filled(), filled(11)
    before = copied(other.state_dict())
    state = copied(episodes.state_dict())
    FORGERIES[what](state)
    with pytest.raises(CheckpointError, match="EpisodeIndex"):
        other.load_state_dict(state)
    after = other.state_dict()
    assert all(np.array_equal(before[k], after[k]) for k in before)


def test_an_index_and_its_rows_belong_together():
    replay = hindsight(playing(30, [[4]]), bs=4, max_sz=20)
    next(replay)
    replay.memory.write(next(playing(1, [[4]])))
    with pytest.raises(ValueError, match="HindsightReplay.*'memory' has 5 rows, expected 4"):
        replay._index.zero_()
        replay.forward(next(playing(1, [[4]])))


def test_one_environment_may_give_almost_all_rows():
    "Its own ring grows, and the others' do not"
    steps = [step_of([(0, 0, 0, False), (1, 0, 0, True)])] + [step_of([(0, 0, t, False)]) for t in range(1, 150)]
    replay = hindsight(steps, bs=4, max_sz=100, strategy="episode", k=1000)
    *_, last = replay
    assert all(goal == UNREACHED or 50 < goal <= 150 for _, goal, _ in as_rows(last))
    assert replay._episodes._table.size < 320


# --- what is refused ------------------------------------------------------------------------------------------------------
STEPS = []


class NoReward(gymnasium.Wrapper):
    "A goal environment without its methods"

    def get_wrapper_attr(self, name):
        if name.startswith("compute_"):
            raise AttributeError(name)
        return super().get_wrapper_attr(name)

    def step(self, action):
        STEPS.append(self)
        return super().step(action)


class Watched(Reach2D):
    def step(self, action):
        STEPS.append(self)
        return super().step(action)


def stepper(env=Watched, **more):
    return GymStepper(env, seed=0, **more)


def started(replay):
    replay.start()


def unlike():
    class Unlike(Watched):
        def __init__(self):
            super().__init__()
            self.observation_space = spaces.Dict({**self.observation_space.spaces, "desired_goal": spaces.Box(-1, 1, (3,), np.float32)})
    return Unlike


def with_method(**methods):
    return type("With", (Watched,), methods)


V, T, L = ValueError, TypeError, LookupError
BAD = {
    "k below 0": (lambda: HindsightReplay([], k=-1), V, ["HindsightReplay", "'k'", "-1"]),
    "half a k": (lambda: HindsightReplay([], k=1.5), T, ["HindsightReplay", "'k'", "1.5"]),
    "an unknown strategy": (lambda: HindsightReplay([], strategy="futur"), L, ["HindsightReplay", "'strategy'", "'futur'", "did you mean 'future'?"]),
    "a reward that is no function": (lambda: HindsightReplay([], compute_reward=3.0), T, ["HindsightReplay", "'compute_reward'", "3.0"]),
    "an end that is no function": (lambda: HindsightReplay([], compute_terminated="no"), T, ["HindsightReplay", "'compute_terminated'", "'no'"]),
    "a batch larger than the replay": (lambda: HindsightReplay([], bs=64, max_sz=32), V, ["HindsightReplay", "'bs'", "64", "32"]),
    "merged steps": (lambda: HindsightReplay(FirstLastMerger(NStepper(stepper(), 3))), V, ["HindsightReplay", "'source'", "NStepper", "nsteps=1"]),
    "windows": (lambda: HindsightReplay(NStepFlattener(NStepper(stepper(), 3))), V, ["HindsightReplay", "'source'", "NStepper"]),
    "skipped steps": (lambda: HindsightReplay(NSkipper(stepper(), 2)), V, ["HindsightReplay", "'source'", "NSkipper"]),
    "a learner with n steps": (lambda: learner(nsteps=3), V, ["HindsightReplay", "'source'", "nsteps=1"]),
    "a replay that lost its writer": (lambda: (lambda r: (r.stand_on(playing(3, [[4]])), started(r)))(HindsightReplay([])), L, ["HindsightReplay", "'source'", "EpisodeWriter"]),
    "an environment without goals": (lambda: started(HindsightReplay(stepper(Counting))), T, ["HindsightReplay", "'observation_space'", "Box", "'desired_goal'"]),
    "a dictionary without goals": (lambda: started(HindsightReplay(stepper(Nested))), T, ["HindsightReplay", "'observation_space'", "'desired_goal'"]),
    "goals of two kinds": (lambda: started(HindsightReplay(stepper(unlike()))), T, ["HindsightReplay", "'desired_goal'", "(3,)", "(2,)"]),
    "an environment without compute_reward": (lambda: started(HindsightReplay(stepper(lambda: NoReward(Reach2D())))), L, ["HindsightReplay", "'compute_reward'", "Reach2D", "GoalEnv"]),
    "no environment": (lambda: started(HindsightReplay(playing(3, [[4]]))), L, ["HindsightReplay", "'compute_reward'", "nothing upstream"]),
    "one number for all rows": (lambda: started(HindsightReplay(stepper(with_method(compute_reward=lambda self, a, d, info: -np.linalg.norm(a - d))))), V,
                                ["HindsightReplay", "'compute_reward'", "[3]", "axis=-1"]),
    "a mean over the rows": (lambda: started(HindsightReplay(stepper(with_method(compute_reward=lambda self, a, d, info: np.full(len(a), -abs(a - d).mean()))))), V,
                             ["HindsightReplay", "'compute_reward'", "one by one"]),
    "an end for all rows": (lambda: started(HindsightReplay(stepper(with_method(compute_terminated=lambda self, a, d, info: bool(np.linalg.norm(a - d) < 0.1))))), V,
                            ["HindsightReplay", "'compute_terminated'", "one by one"]),
    "a reward that needs more info": (lambda: started(HindsightReplay(stepper(with_method(compute_reward=lambda self, a, d, info: info["force"])))), V,
                                      ["HindsightReplay", "'compute_reward'", "KeyError", "empty info"]),
}


@pytest.mark.parametrize("what", BAD)
def test_a_wrong_call_is_refused_before_the_first_step(what):
    call, error, words = BAD[what]
    STEPS.clear()
    with pytest.raises(error) as caught:
        call()
    said = str(caught.value)
    for word in words:
        assert word in said, f"{said!r} does not say {word!r}"
    assert ": field '" in said and ", expected " in said and "\n" not in said and len(said) < 1000
    assert not STEPS


def test_a_constant_end_holds_for_all_rows():
    "As gymnasium-robotics' arms have it"
    env = with_method(compute_terminated=lambda self, a, d, info: False)
    assert not next(HindsightReplay(stepper(env), 8, 100)).terminated.any()


LATER = {  # what shows with the first steps
    "a wrapper that scales rewards": (lambda: next(HindsightReplay(stepper(lambda: TransformReward(Reach2D(), lambda r: 0.1 * r)), 8, 100)), ["HindsightReplay", "'reward'", "-0.1", "-1", "wrapper"]),
    "an end that no real episode has": (lambda: next(HindsightReplay(stepper(partial(Reach2D, radius=1.0)), 8, 100, warmup=60, compute_terminated=Reach2D(radius=1.0, ends=True).compute_terminated)),
                                        ["HindsightReplay", "'terminated'", "compute_terminated"]),
    "steps without goals": (lambda: next(HindsightReplay([SimpleStep.random(8, 3, 2)], 4, 100, compute_reward=within_half)), ["HindsightReplay", "'state'", "'desired_goal'"]),
    "merged steps": (lambda: next(hindsight([MergedStep(*SimpleStep._values(next(playing(1, [[4]] * 4))), discount=np.ones((4, 1), np.float32))])), ["HindsightReplay", "'discount'"]),
    "no step_n": (lambda: next(hindsight([next(playing(1, [[4]] * 4)).replace(step_n=None)])), ["EpisodeWriter", "'step_n'", "GymStepper"]),
    "steps of one environment together": (lambda: next(hindsight(StepBatcher(playing(8, [[4]]), 4))), ["EpisodeWriter", "'env_id'", "StepBatcher"]),
    "a step that is missing": (lambda: list(hindsight([s for i, s in enumerate(playing(8, [[8]])) if i != 3])), ["EpisodeWriter", "'step_n'", "5", "4"]),
    "rows that are missing": (lambda: list(hindsight([take_rows(s, np.array([True, i != 3])) for i, s in enumerate(playing(8, [[8], [8]]))])), ["EpisodeWriter", "environment 1", "5", "4"]),
    "flat flags": (lambda: next(hindsight([next(playing(1, [[4]] * 4)).replace(terminated=np.zeros(4, bool))])), ["EpisodeWriter", "'terminated'", "[4]", "1]"]),
}


@pytest.mark.parametrize("what", LATER)
def test_a_wrong_step_is_named(what):
    call, words = LATER[what]
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{caught.value} does not say {word!r}"


def test_a_step_that_is_refused_is_not_written():
    writer = EpisodeWriter([s for i, s in enumerate(playing(8, [[8]])) if i != 3], memory := ReplayMemory(20))
    with pytest.raises(ValueError, match="step_n"):
        list(writer)
    assert memory.written == writer.episodes.written == 3


def test_flatten_says_why_not():
    with pytest.raises(ValueError, match="flatten.*observation_space.*Dict"):
        flatten(learner(), seed=0)


def test_an_index_that_is_attached_in_the_middle_of_an_episode_begins_there():
    steps = list(playing(8, [[8]]))[3:]
    replay = hindsight(steps, bs=4, max_sz=20, strategy="episode", k=1000)
    assert {goal for batch in replay for _, goal, _ in as_rows(batch)} - {UNREACHED} <= {4.0, 5.0, 6.0, 7.0, 8.0}


# --- the environment --------------------------------------------------------------------------------------------------------
def test_reach_keeps_the_conventions_of_goal_environments():
    env = gymnasium.make("fastrl/Reach2D-v0").unwrapped
    rng = np.random.default_rng(0)
    for seed in range(5):
        obs, info = env.reset(seed=seed)
        for _ in range(50):
            assert env.observation_space.contains(obs) and info["is_success"] in (True, False)
            obs, reward, terminated, truncated, info = env.step(rng.uniform(-1, 1, 2).astype(np.float32))
            assert reward == env.compute_reward(obs["achieved_goal"], obs["desired_goal"], info) and terminated == env.compute_terminated(obs["achieved_goal"], obs["desired_goal"], info)
            assert info["is_success"] == (reward == 0)
        assert truncated
    from gymnasium.utils.env_checker import check_env
    check_env(Reach2D(), skip_render_check=True)


def test_reach_is_kept_to_the_bit():
    stepper = GymStepper("fastrl/Reach2D-v0", n=2, mode="sync", seed=3)
    for _ in range(60):
        next(stepper)
    state = snapshot(stepper)
    assert state["pipes"]["GymStepper"]["inexact"] == ""
    ahead = [copied(next(stepper)) for _ in range(60)]
    other = GymStepper("fastrl/Reach2D-v0", n=2, mode="sync", seed=3)
    other.reset(state)
    for a in ahead:
        b = next(other)
        assert a.state["observation"].tobytes() == b.state["observation"].tobytes() and a.next_state["desired_goal"].tobytes() == b.next_state["desired_goal"].tobytes()


def test_wrong_settings_of_reach_are_refused():
    for wrong in (dict(length=0), dict(radius=0), dict(push=-1), dict(friction=0), dict(friction=2)):
        with pytest.raises(ValueError, match=f"Reach2D.*{next(iter(wrong))}"):
            Reach2D(**wrong)
    with pytest.raises((WorkerError, ValueError)):
        GymStepper("fastrl/Reach2D-v0", env_kwargs={"radius": -1})


def test_the_index_alone():
    index = EpisodeIndex(5)
    for t in range(1, 8):
        index.write(*index.read("test", step_of([(0, 0, t - 1, t == 4 or t == 7)]).replace(step_n=np.array([[t if t <= 4 else t - 4]]))))
    env, first, at, last = index.span(np.arange(5))
    assert index.size == 5 and env.tolist() == [0] * 5
    assert at.tolist() == [5, 6, 2, 3, 4] and first.tolist() == [4, 4, 2, 2, 4] and last.tolist() == [6, 6, 3, 3, 6], "of the first episode, two of four steps are left"
    assert index.place(env, at).tolist() == [0, 1, 2, 3, 4]
