"""Prioritised replay: the tree draws what a brute-force sampler draws, weights and schedule are the paper's, and whatever holds for a replay holds for this one."""
import json
import math
import warnings
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from contract_table import difference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from test_bad_input import STEPS, nets
from test_bad_input import stack as counted_stack
from test_flatten import check as check_script
from test_flatten import nets as small_nets
from test_flatten import run_here
from test_resume import in_a_new_process, parts, pull, same, strip

from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner, ddpg
from fastrl_pipes.core import SampledStep, SimpleStep, copied, to_tensor
from fastrl_pipes.envs.debug import Goal
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.errors import CheckpointError
from fastrl_pipes.learner.flatten import flatten
from fastrl_pipes.learner.head import LearnerHead
from fastrl_pipes.learner.resume import run_state
from fastrl_pipes.loggers.collectors import BatchCollector
from fastrl_pipes.memory.counting import StepCount
from fastrl_pipes.memory.experience_replay import ExperienceReplay, ReplayWriter
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.memory.prioritized import SILENT, PrioritizedReplay, PrioritizedSampler
from fastrl_pipes.memory.sumtree import TOP, SumTree
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.pipes.compare import replace
from fastrl_pipes.pipes.control import Repeat
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.core import Stage
from fastrl_pipes.pipes.walk import bind, named_pipes, snapshot, traverse
from fastrl_pipes.pipes.graph import find_pipe, find_pipes, probe
from fastrl_pipes.pipes.nstep import FirstLastMerger, NSkipper, NStepFlattener, NStepper
from fastrl_pipes.pipes.tape import play, put_tap


# --- the tree against brute force ------------------------------------------------------------------------------------
def brute_force(places, weights, mass):
    "The first place whose running sum exceeds each number"
    return places[np.minimum(np.cumsum(weights).searchsorted(mass, "right"), len(places) - 1)]


SIZE, UPDATES, DRAWS = 5000, 100_000, 1_000_000


@pytest.fixture(scope="module")
def worn():
    "A tree after 100,000 random updates, some places twice in one batch, and what a plain array makes of the same updates"
    rng, tree, plain = np.random.default_rng(7), SumTree(SIZE), np.zeros(SIZE)
    done = 0
    while done < UPDATES:
        index = rng.integers(0, rng.integers(1, SIZE) + 1, rng.integers(1, 400)) % SIZE
        weight = rng.exponential(size=len(index)) ** rng.integers(1, 4) * (rng.random(len(index)) > 0.1)
        tree.set(index, weight)
        for i, w in zip(index.tolist(), weight.tolist()):
            plain[i] = w
        done += len(index)
    return tree, plain


def test_the_last_of_repeated_updates_counts(worn):
    tree, plain = worn
    assert len(tree.levels) > 2 and (plain == 0).any()
    assert tree.get(np.arange(SIZE)).tobytes() == plain.tobytes()


def test_no_sum_has_drifted(worn):
    tree, plain = worn
    for below, above in zip(tree.levels, tree.levels[1:]):
        assert (above == below[0::2] + below[1::2]).all()
    assert tree.total == pytest.approx(math.fsum(plain), rel=1e-14)
    again = SumTree(SIZE)
    again.fill(0, SIZE, plain)
    assert all((a == b).all() for a, b in zip(again.levels, tree.levels)), "made anew of its leaves it is the same to the bit"


def test_independent_draws_are_those_of_a_brute_force_sampler(worn):
    "Chi-square over a million draws, and each single draw compared"
    tree, plain = worn
    rng = np.random.default_rng(3)
    counts, differ = np.zeros(SIZE), 0
    for _ in range(DRAWS // 10_000):
        mass = rng.random(10_000) * tree.total
        found, weight = tree.find(mass)
        differ += np.count_nonzero(found != brute_force(np.arange(SIZE), plain, mass))
        assert (weight == plain[found]).all()
        counts += np.bincount(found, minlength=SIZE)
    there = plain > 0
    assert not counts[~there].any() and differ == 0
    assert 1e-3 < fit(counts, plain) < 1 - 1e-3
    assert fit(counts, plain**1.05) < 1e-9, "it would show"


def fit(counts, weights):
    "p-value of counts that should be in proportion to weights; places that are expected fewer than five times are taken together"
    expected = weights / weights.sum() * counts.sum()
    many = expected >= 5
    return chisquare([*counts[many], counts[~many].sum()], [*expected[many], expected[~many].sum()]).pvalue


def test_stratified_draws_have_the_same_distribution_with_less_noise(worn):
    tree, plain = worn
    rng, n = np.random.default_rng(4), 1000
    share, counts, each, worst = plain / plain.sum(), np.zeros(SIZE), np.zeros(n), 0.0
    for _ in range(DRAWS // n):
        found, _ = tree.sample(n, rng)
        assert (found[1:] >= found[:-1]).all()
        one = np.bincount(found, minlength=SIZE)
        counts += one
        each += found
        worst = max(worst, np.abs(one - n * share).max())
    assert worst < 2, "a batch has each place as often as its share says, give or take less than two"
    many = share * DRAWS >= 5
    z = ((counts - DRAWS * share) / np.sqrt(np.maximum(share * (1 - share), 1e-12) * DRAWS))[many]
    assert np.abs(z).max() < 5 and 0.5 < (z**2).mean() < 1.05, "no noisier than independent draws"
    edges = brute_force(np.arange(SIZE), plain, np.arange(n + 1) / n * plain.sum() * (1 - 1e-15))
    assert (each / (DRAWS // n) >= edges[:-1]).all() and (each / (DRAWS // n) <= edges[1:]).all(), "draw i comes from part i"


@pytest.mark.parametrize("size", [1, 2, 3, TOP - 1, TOP, TOP + 1, 2 * TOP + 1, 10_000])
def test_every_size(size):
    tree, plain = SumTree(size), np.random.default_rng(size).random(size) + 0.1
    tree.set(np.arange(size), plain)
    assert len(tree.levels[-1]) <= TOP and len(tree) == size
    assert tree.total == pytest.approx(plain.sum(), rel=1e-13)
    ends = np.cumsum(plain)
    for inside in (ends - plain / 2, ends - plain * 1e-6):
        assert (tree.find(inside)[0] == np.arange(size)).all()
    tree.fill(0, 1, 5.0), tree.fill(size - 1, size, 7.0), tree.fill(0, 0, 1.0)
    plain[0], plain[-1] = 5.0, 7.0
    assert tree.total == pytest.approx(plain.sum(), rel=1e-13)
    for below, above in zip(tree.levels, tree.levels[1:]):
        assert (above == below[0::2] + below[1::2]).all()
    tree.clear()
    assert tree.total == 0 and not any(level.any() for level in tree.levels)


def test_a_place_without_weight_is_never_found_even_where_sums_are_rounded(monkeypatch):
    "At the end of the sum, and of a node, a rounded number may lie behind the last weight"
    rescued, before = [], SumTree._before
    monkeypatch.setattr(SumTree, "_before", lambda self, index: rescued.append(len(index)) or before(self, index))
    rng = np.random.default_rng(0)
    for size in rng.integers(3 * TOP, 9 * TOP, 60):
        tree, filled = SumTree(int(size)), int(rng.integers(1, size))
        tree.fill(0, filled, rng.random(filled) ** 8)
        tree.set(rng.integers(0, filled, filled // 3), 0.0)
        tree.set(np.array([0]), 1e-3)
        for mass in (np.full(3, np.nextafter(tree.total, 0)), np.full(2, tree.total * 2), np.cumsum(tree.levels[-1]), np.nextafter(np.cumsum(tree.levels[-1]), 0)):
            found, weight = tree.find(np.minimum(mass, tree.total))
            assert (weight > 0).all() and (weight == tree.leaves[found]).all() and (found < filled).all()
    assert rescued, "else this test says nothing"


def test_weights_of_very_different_size_keep_their_sum():
    tree, rng = SumTree(4 * TOP), np.random.default_rng(1)
    for _ in range(200):
        tree.set(rng.integers(0, 4 * TOP, 256), 10.0 ** rng.uniform(-12, 12, 256))
    tree.set(np.flatnonzero(tree.leaves > 1e-6), 0.0)
    assert tree.total == pytest.approx(math.fsum(tree.leaves), rel=1e-14), "what was large is gone, and has left nothing"


@pytest.mark.parametrize(("wrong", "error", "words"), [
    (lambda t: t.set(np.array([9]), 1.0), LookupError, "index.*9"), (lambda t: t.set(np.array([-1]), 1.0), LookupError, "index.*-1"),
    (lambda t: t.get(np.array([9])), LookupError, "index"), (lambda t: t.set(np.array([1.0]), 1.0), TypeError, "float64"),
    (lambda t: t.set(np.array([[1]]), 1.0), TypeError, "whole numbers"), (lambda t: t.set(np.array([1]), -1.0), ValueError, "not negative"),
    (lambda t: t.set(np.array([1, 2]), np.array([1.0, math.nan])), ValueError, "finite"), (lambda t: t.set(np.array([1]), math.inf), ValueError, "finite"),
    (lambda t: t.set(np.array([1, 2]), np.ones(3)), ValueError, "shape"), (lambda t: t.sample(3, np.random.default_rng(0)), ValueError, "total"),
    (lambda t: t.find(np.zeros(2)), ValueError, "total"), (lambda t: SumTree(0), ValueError, "size")])
def test_a_wrong_call_of_the_tree_is_refused_and_changes_nothing(wrong, error, words):
    tree = SumTree(9)
    with pytest.raises(error, match=f"SumTree.*{words}"):
        wrong(tree)
    assert tree.total == 0


# --- a replay, by hand -----------------------------------------------------------------------------------------------
def steps(n, rows=1, at=0, counts=False):
    "Steps whose reward is the number of the row"
    for i in range(n):
        c = np.arange(at + i * rows, at + (i + 1) * rows, dtype=np.float64)[:, None]
        more = {"step_n": np.full((rows, 1), i + 1), "episode_n": np.zeros((rows, 1), int), "env_id": np.arange(rows)[:, None]} if counts else {}
        yield SimpleStep(state=c, action=c, next_state=c + 1, reward=c, terminated=c % 2 == 0, truncated=c < 0, **more)


def replay(source, *args, dtype=None, seed=0, **kwargs):
    pipe = PrioritizedReplay(source, *args, **kwargs)
    bind(pipe, Context(seed=seed, dtype=dtype))
    return pipe


def news(pipe, index, error):
    pipe.context.priorities(torch.as_tensor(index), torch.as_tensor(error))


def test_probabilities_and_weights_are_the_papers():
    "Ten rows with errors of our own: P(i) and w by the equations, written out"
    alpha, beta, eps, n = 0.7, 0.5, 0.01, 10
    pipe = replay(steps(10_000), 4, n, alpha=alpha, beta=beta, beta_steps=10**9, eps=eps, memory=None)
    source = iter(pipe)
    batch = next(source)
    for _ in range(9):
        batch = next(source)
    errors = np.arange(10) ** 2 / 7
    news(pipe, np.arange(10), errors)
    p = (errors + eps) ** alpha
    assert np.allclose(pipe.tree.leaves[:10], p, rtol=1e-15)
    batch = pipe.forward(SimpleStep())[0]  # nothing is written
    assert isinstance(batch, SampledStep) and batch.index.dtype == torch.int64 and batch.index.shape == (4,)
    assert batch.weight.shape == (4, 1) and batch.weight.dtype == batch.reward.dtype == torch.float32
    w = (n * p[batch.index] / p.sum()) ** -pipe.beta_now
    assert torch.allclose(batch.weight[:, 0], torch.from_numpy(w / w.max()).float(), rtol=1e-6) and batch.weight.max() == 1
    assert (batch.reward[:, 0].long() % 10 == batch.index).all(), "the rows of the index"
    counts = sum(np.bincount(pipe.forward(SimpleStep())[0].index, minlength=10) for _ in range(900))
    assert np.abs(counts / 3600 - p / p.sum()).max() < 0.01


def test_rows_come_by_priority():
    "Through the pipe, chi-square: a batch has one row, so that draws are independent"
    pipe = replay(steps(50), 1, 50)
    list(pipe)
    errors = np.random.default_rng(0).exponential(size=50)
    news(pipe, np.arange(50), errors)
    counts = np.zeros(50)
    for i in range(20_000):
        if i % 500 == 0:
            news(pipe, [0], errors[:1])
        counts[int(pipe.forward(SimpleStep())[0].reward.item())] += 1
    p = (errors + 1e-6) ** 0.6
    assert 1e-3 < chisquare(counts, p / p.sum() * 20_000).pvalue < 1 - 1e-3


def test_alpha_zero_is_uniform_and_its_weights_are_one():
    pipe = replay(steps(64), 8, 64, alpha=0.0)
    source = iter(pipe)
    for batch in source:
        assert (batch.weight == 1).all()
        news(pipe, batch.index.clone(), batch.reward[:, 0].clone() ** 3)
    assert set(pipe.tree.leaves[:64]) == {1.0}


def test_new_rows_get_the_highest_priority_so_far():
    pipe = replay(steps(100), 2, 8)
    source = iter(pipe)
    next(source)
    assert pipe.tree.leaves[:3].tolist() == [1, 1, 0] and pipe.highest == 1, "that of the first row is one"
    news(pipe, [0, 1], [0.5, 0.1])
    next(source)
    assert pipe.tree.leaves[2] == 1, "the errors are lower than one"
    news(pipe, [0, 2], [30.0, 0.2])
    top = (30 + 1e-6) ** 0.6
    next(source)
    assert pipe.tree.leaves[3] == pipe.highest == pytest.approx(top) and pipe.tree.leaves[2] < 1
    news(pipe, [0], [0.0])
    next(source)
    assert pipe.tree.leaves[4] == pytest.approx(top), "also when nobody has it any longer"
    assert pipe.tree.leaves[0] == pytest.approx(1e-6**0.6)


def test_of_two_errors_of_the_same_row_the_last_counts():
    pipe = replay(steps(20), 2, 30)
    list(pipe)
    news(pipe, [3, 7, 3], [1.0, 2.0, 5.0])
    assert pipe.tree.leaves[[3, 7]] == pytest.approx([(5.0 + 1e-6) ** 0.6, (2.0 + 1e-6) ** 0.6], rel=1e-15)
    assert pipe.highest == pipe.tree.leaves[3]


class Model:
    "A prioritised replay as a list: row numbers with their priorities"

    def __init__(self, max_sz):
        self.max_sz, self.rows, self.highest, self.number, self.fresh = max_sz, {}, 1.0, 0, []

    def write(self, n):
        for _ in range(n):
            self.rows[self.number % self.max_sz] = None
            self.number += 1

    def settle(self):
        for place, p in self.rows.items():
            self.rows[place] = self.highest if p is None else p

    def update(self, index, errors):
        waiting = [place for place, p in self.rows.items() if p is None]
        self.settle()
        for place, e in zip(index, errors):
            if place not in waiting:
                self.rows[place] = p = (e + 1e-6) ** 0.6
                self.highest = max(self.highest, p)


@settings(max_examples=60, deadline=None)
@given(max_sz=st.integers(4, 13), ops=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.booleans()), min_size=3, max_size=25), seed=st.integers(0, 99))
def test_priorities_are_those_of_a_plain_model(max_sz, ops, seed):
    "Rows written several at once, around the ring's end and more than it holds, between draws and updates; errors of a batch that is partly overwritten"
    rng, memory, model, at = np.random.default_rng(seed), ReplayMemory(max_sz), Model(max_sz), 0
    pipe = PrioritizedSampler(ReplayWriter([], memory), memory, bs=2)
    bind(pipe, Context(seed=seed))
    pipe.start()
    held = None
    for rows, times, report in ops:
        for _ in range(times if rows else 0):
            memory.write(next(steps(1, rows, at)))
            model.write(rows)
            at += rows
        if held is not None and report:
            errors = rng.exponential(size=2) * 3
            pipe.update(held, torch.from_numpy(errors))
            model.update(held.tolist(), errors.tolist())
            held = None
        else:
            out = pipe.forward(SimpleStep())
            model.settle()
            held = out[0].index.clone() if out else None
        assert pipe.tree.leaves[:max_sz] == pytest.approx([model.rows.get(i, 0.0) for i in range(max_sz)], rel=1e-14)
        assert pipe.highest == pytest.approx(model.highest)
        if out := pipe.forward(SimpleStep()):
            batch = copied(out[0])
            held = batch.index if held is None else held
            assert (batch.reward[:, 0].long() % max_sz == batch.index).all() and (batch.index < len(memory)).all()


def test_a_ring_whose_tree_has_levels():
    "Up to three times as many rows as it holds between two draws"
    rng, size, at = np.random.default_rng(2), 3001, 0  # no multiple of anything: behind the last place there is room
    memory = ReplayMemory(size)
    pipe = PrioritizedSampler(ReplayWriter([], memory), memory, bs=64)
    bind(pipe, Context(seed=0))
    pipe.start()
    plain, highest = np.zeros(size), 1.0
    for _ in range(60):
        for rows in rng.integers(1, 1000, rng.integers(1, 10)) if rng.random() < 0.3 else rng.integers(1, 60, 3):
            memory.write(next(steps(1, int(rows), at)))
            plain[np.arange(at, at + rows) % size] = highest
            at += int(rows)
        for _ in range(4):
            (batch,) = pipe.forward(SimpleStep())
            errors = rng.exponential(size=64) * 2
            pipe.update(batch.index, torch.from_numpy(errors))
            for i, e in zip(batch.index.tolist(), errors):
                plain[i] = (e + 1e-6) ** 0.6
            highest = max(highest, *((errors + 1e-6) ** 0.6))
        assert pipe.tree.leaves[:size] == pytest.approx(plain, rel=1e-14) and len(pipe.tree.levels) > 2
        for below, above in zip(pipe.tree.levels, pipe.tree.levels[1:]):
            assert (above == below[0::2] + below[1::2]).all()


def test_the_index_of_a_batch_leads_to_its_rows():
    memory = ReplayMemory(30)
    pipe = replay(steps(40, rows=3), 8, memory=memory)
    for batch in pipe:
        assert torch.equal(memory.gather(batch.index).state, batch.state)


def test_a_memory_that_was_emptied_is_followed():
    pipe = replay(steps(20), 2, 10)
    source = iter(pipe)
    for _ in range(12):
        batch = next(source)
    news(pipe, batch.index, [3.0, 4.0])
    pipe.memory.clear()
    next(source), next(source)
    assert pipe.tree.leaves.tolist()[:4] == [1, 1, 1, 0] and pipe.highest == 1


def test_several_batches_for_a_step_are_drawn_anew_and_learn_from_each_other():
    pipe = replay(steps(30, rows=2), 4, 40, repeat=3)
    seen, source = [], iter(pipe)
    for batch in source:
        news(pipe, batch.index, batch.reward[:, 0] * 0)  # never again, if it can be helped
        seen.append(batch.index.tolist())
    assert len(seen) == 3 * (30 - 1) and len({tuple(x) for x in seen[-3:]}) == 3
    assert isinstance(pipe.source, Repeat)


# --- what it is given and what it gives ---------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.bfloat16])
def test_batches_are_in_the_networks_dtype(dtype):
    pipe = replay(steps(40, rows=2), 4, 50, dtype=dtype)
    for batch in pipe:
        assert batch.weight.dtype == batch.state.dtype == (dtype or torch.float32) and batch.index.dtype == torch.int64
        news(pipe, batch.index, (batch.state[:, 0] - 3).abs())
    assert (pipe.tree.leaves[:50] > 0).all()
    flows = probe(pipe)
    assert "PrioritizedReplay" in flows


def test_a_probe_shows_the_fields_and_changes_nothing():
    pipe = replay(steps(30), 4, 20, dtype=torch.float64)
    next(pipe)
    before = copied(snapshot(pipe))
    (out,) = pipe.probe(next(steps(1, rows=5)))
    assert out.index.tolist() == [0, 1, 2, 3, 4] and out.weight.dtype == torch.float64 and out.weight.shape == (5, 1)
    assert not difference(snapshot(pipe), before)


def test_half_floats_in_memory():
    pipe = replay(steps(20), 4, memory=ReplayMemory(20, float_dtype="float16"))
    assert next(pipe).weight.dtype == torch.float16


def test_a_mapped_memory(tmp_path):
    plain, mapped = (replay(steps(60, rows=2), 4, memory=ReplayMemory(30, path=path)) for path in (None, tmp_path / "ring.bin"))
    for a, b in zip(plain, mapped):
        assert torch.equal(a.reward, b.reward) and torch.equal(a.weight, b.weight)
        for pipe, batch in ((plain, a), (mapped, b)):
            news(pipe, batch.index, batch.reward[:, 0])
    assert (tmp_path / "ring.bin").stat().st_size


def test_the_tree_takes_sixteen_bytes_a_row():
    for size in (1000, 10_000, 1_000_000):
        tree = SumTree(size)
        assert sum(level.nbytes for level in tree.levels) <= 16 * size + 16 * 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_on_a_gpu_the_tree_stays_on_the_host(where):
    pipe, there = PrioritizedReplay(steps(60, rows=2), 4, memory=ReplayMemory(30, device=where)), torch.device("cuda", 0)
    bind(pipe, Context(seed=0, device=there, dtype=torch.float32))
    plain = replay(steps(60, rows=2), 4, 30, dtype=torch.float32)
    for a, b in zip(plain, pipe):
        assert b.index.device == b.weight.device == b.state.device == there
        assert torch.equal(a.index, b.index.cpu()) and torch.equal(a.weight, b.weight.cpu()) and torch.equal(a.state, b.state.cpu())
        for p, batch in ((plain, a), (pipe, b)):
            news(p, batch.index, batch.reward[:, 0])


# --- environment steps ---------------------------------------------------------------------------------------------------
LENGTHS = {"plain": lambda s: s, "windows": lambda s: FirstLastMerger(NStepper(s, 3)), "skipped windows": lambda s: FirstLastMerger(NSkipper(NStepper(s, 3), 2)),
           "skipped steps": lambda s: NSkipper(s, 3), "flattened windows": lambda s: NStepFlattener(NStepper(s, 3))}


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("n", [1, 3, 9])
@pytest.mark.parametrize("kind", LENGTHS)
def test_beta_counts_environment_steps(kind, n, repeat):
    "Not calls, not rows: whatever stands between the environments and the replay"
    stepper = GymStepper(partial(Goal, length=7), n=n, mode="single" if n == 1 else "sync", seed=0)
    pipe = replay(LENGTHS[kind](stepper), 4, 1000, repeat=repeat, beta=0.3, beta_steps=200)
    seen = []
    for _ in islice(pipe, 60 * repeat):
        behind = stepper.env_steps - pipe.steps  # of a flattened window the first step comes first
        assert behind == 0 if kind != "flattened windows" else 0 <= behind <= 2 * n
        assert pipe.beta_now == pytest.approx(min(1.0, 0.3 + 0.7 * (stepper.env_steps - behind) / 200), rel=1e-12)
        seen.append(pipe.beta_now)
    assert seen == sorted(seen) and (seen[-1] == 1.0) == (pipe.steps >= 200)
    stepper.close()


def test_environments_that_are_behind_count_up_to_their_latest_window():
    "Episodes of different lengths: where one environment has no window yet, its newest steps are not counted; when its episode is over, all are"
    source = [Goal(length=5), Goal(length=8)]
    stepper = GymStepper([lambda e=e: e for e in source], mode="sync", seed=0)
    pipe = replay(FirstLastMerger(NStepper(stepper, 4)), 4, 1000, beta_steps=10**6)
    behind = []
    for _ in islice(pipe, 80):
        behind.append(stepper.env_steps - pipe.steps)
    assert min(behind) == 0 and 0 < max(behind) <= 3
    stepper.close()


def test_steps_that_do_not_say_are_counted_by_row_and_offline_by_batch():
    pipe = replay(steps(30, rows=3), 4, 1000, repeat=2, beta_steps=90)
    list(pipe)
    assert pipe.steps == 90 and pipe.beta_now == 1.0
    offline = PrioritizedSampler([SimpleStep()] * 12, pipe.memory, 4, beta=0.5, beta_steps=24)
    bind(offline, Context(seed=0))
    list(offline)
    assert offline.steps == 12 and offline.beta_now == 0.75 and (offline.tree.leaves[:90] == 1).all()


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8), batch=st.integers(1, 5), skip=st.integers(1, 3))
def test_counting_against_a_list(lengths, batch, skip):
    "One environment; rows collected into batches, of which only some are seen, the last one of an episode always"
    rows = [(e, t + 1, t + 1 == n) for e, n in enumerate(lengths) for t in range(n)]
    kept = [(e, t) for e, t, last in rows if last or t % skip == 0]
    count, total = StepCount(), 0
    for i in range(0, len(kept), batch):
        part = kept[i:i + batch]
        e, t = (np.array(x)[:, None] for x in zip(*part))
        total += count.see(SimpleStep(env_id=e * 0, episode_n=e, step_n=t))
        assert total == sum(lengths[:part[-1][0]]) + part[-1][1]
        assert count.see(to_tensor(SimpleStep(env_id=e * 0, episode_n=e, step_n=t))) == 0, "seen again, perhaps with the end of an older episode"


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=6), n=st.integers(1, 12), drop=st.integers(0, 99))
def test_counting_environments_side_by_side(lengths, n, drop):
    "Rows of n environments whose episodes begin at different times; some are missing now and then, and come again"
    rng, count, total, seen, first = np.random.default_rng(drop), StepCount(), 0, np.zeros(n, int), None
    scripts = [[(e, t + 1) for e, length in enumerate(np.roll(lengths, i)) for t in range(length)] for i in range(n)]
    for k in range(sum(lengths)):
        ends = [k + 1 == len(s) or s[k + 1][0] != s[k][0] for s in scripts]
        env = np.flatnonzero((rng.random(n) < 0.7) | ends)
        if len(env):
            e, t = (np.array([scripts[i][k][j] for i in env])[:, None] for j in (0, 1))
            step = SimpleStep(env_id=env[:, None], episode_n=e, step_n=t)
            first = step if k == 0 or not total else first
            seen[env] = k + 1
            total += count.see(step)
            assert total == seen.sum() and count.see(step) == 0 and count.see(first) == 0


# --- whole learners -----------------------------------------------------------------------------------------------------
def small(**more):
    return ddpg(**{"env": "Pendulum-v1", "prioritized": True, "seed": 3, "hidden1": 9, "hidden2": 7, "bs": 16, "max_sz": 150, "nsteps": 3, "warmup": 40, "noise_steps": 100, "batches": 50, **more})


def test_swapping_it_in_is_one_pipe(capsys):
    learner = ddpg("Pendulum-v1", hidden1=9, hidden2=7, bs=16, max_sz=150, warmup=40, nsteps=3)
    other = replace(learner, "ExperienceReplay", lambda source: PrioritizedReplay(source, 16, 150, 40))
    assert capsys.readouterr().out.splitlines() == ["- ExperienceReplay(bs=16, max_sz=150, warmup=40, repeat=1)",
                                                    "+ PrioritizedReplay(bs=16, max_sz=150, warmup=40, alpha=0.6, beta=0.4, beta_steps=100000, eps=1e-06, repeat=1)"]
    assert len(find_pipes(other, ReplayWriter)) == 1 and find_pipe(other, ReplayWriter).memory is find_pipe(other, PrioritizedReplay).memory
    back = replace(other, "PrioritizedReplay", partial(ExperienceReplay, bs=16, max_sz=150, warmup=40), show=False)
    assert list(named_pipes(back)) == list(named_pipes(learner))
    twice = replace(other, "PrioritizedReplay", repeat=2, alpha=0.3, show=False)
    pipe = find_pipe(twice, PrioritizedReplay)
    assert pipe.alpha == 0.3 and isinstance(pipe.source, Repeat) and pipe.memory is pipe.source.source.memory and pipe.memory is not find_pipe(other, PrioritizedReplay).memory
    bigger = replace(other, "critic_opt", lr=1e-4, show=False)
    assert find_pipe(bigger, PrioritizedReplay).memory is find_pipe(bigger, ReplayWriter).memory is not find_pipe(other, ReplayWriter).memory
    for x in (other, twice):
        x.fit(env_steps=60)


def test_it_checks_learns_and_profiles():
    learner = small(n=2, mode="sync", repeat=2)
    flows = learner.check()
    out = flows["PrioritizedReplay"].went[0]
    assert out.index.dtype == torch.int64 and out.weight.shape == (len(out.index), 1)
    learner.fit(env_steps=400)
    pipe = find_pipe(learner, PrioritizedReplay)
    errors = pipe.tree.leaves[:150]
    assert len(np.unique(errors)) > 75 and pipe.steps == learner.env_steps == 400 and pipe.beta_now == pytest.approx(0.4 + 0.6 * 400 / 100_000)
    found = learner.profile(20)
    assert found["PrioritizedReplay"].items == 20 and found["PrioritizedReplay"].own > 0
    learner.close()


def test_the_errors_are_those_of_the_critic():
    "Of the rows of each batch, at the parameters with which its loss was taken"
    learner = small(nsteps=1)
    pipe, critic_loss = find_pipe(learner, PrioritizedReplay), find_pipe(learner, "CriticLossProcessor")
    reported, announced = [], pipe.context.priorities

    def listen(index, error):
        reported.append((index.clone(), error.clone()))
        announced(index, error)
    pipe.context.priorities = listen
    tap = put_tap(learner, "PrioritizedReplay")
    for _ in range(30):
        critic, t_critic, t_actor = (copied(dict(m.state_dict())) for m in (critic_loss.critic, critic_loss.t_critic, critic_loss.t_actor))
        next(learner)
        batch, (index, error) = tap.record[-1], reported[-1]
        now = [copied(dict(m.state_dict())) for m in (critic_loss.critic, critic_loss.t_critic, critic_loss.t_actor)]
        for m, s in zip((critic_loss.critic, critic_loss.t_critic, critic_loss.t_actor), (critic, t_critic, t_actor)):
            m.load_state_dict(s)
        with torch.no_grad():
            y = batch.reward + 0.99 * ~batch.terminated * critic_loss.t_critic(batch.next_state, critic_loss.t_actor(batch.next_state))
            q = critic_loss.critic(batch.state, batch.action)
        for m, s in zip((critic_loss.critic, critic_loss.t_critic, critic_loss.t_actor), now):
            m.load_state_dict(s)
        assert torch.equal(index, batch.index) and torch.allclose(error, (q - y).abs()[:, 0], rtol=1e-5)
        final = dict(zip(index.tolist(), error.double().tolist()))
        assert pipe.tree.get(np.array(list(final))) == pytest.approx([(e + 1e-6) ** 0.6 for e in final.values()], rel=1e-12)
    learner.close()


CUTS, MORE = [7, 45, 130], 40
CASES = {"one": {}, "three": {"n": 3, "mode": "sync", "repeat": 2}, "no windows": {"nsteps": 1, "max_sz": 60}}


def child(folder):
    "In another process: continue from each checkpoint, and say what became of it"
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        for cut in CUTS:
            x = small(**CASES[case]).load(f"{folder}/{case}/{cut}")
            pull(x, MORE)
            found[f"{case} {cut}"] = parts(x)
            x.close()
    print(json.dumps(found))


def test_stopped_and_continued_it_is_the_run_that_was_never_stopped(tmp_path):
    "To the bit, in another process: tree, highest priority, generator and counters with everything else"
    straight = {}
    for case in CASES:
        run, at = small(**CASES[case]), 0
        for stop in sorted({*CUTS, *(c + MORE for c in CUTS)}):
            pull(run, stop - at)
            at = stop
            if stop in CUTS:
                run.save(tmp_path / case / str(stop))
            if stop - MORE in CUTS:
                straight[f"{case} {stop - MORE}"] = parts(run)
        run.close()
    found = json.loads(in_a_new_process(f"import test_prioritized as t\nt.child({str(tmp_path)!r})").stdout.splitlines()[-1])
    assert found.keys() == straight.keys() and "pipes PrioritizedReplay" in straight["one 7"]
    for key in straight:
        differ = [part for part in straight[key] if straight[key][part] != found[key][part]]
        assert not differ, f"{key}: {differ}"


def test_priorities_are_written_whole_and_rows_once(tmp_path):
    learner = small()
    for _ in range(3):
        pull(learner, 20)
        learner.save(tmp_path)
    rows = {p.name for p in tmp_path.glob("rows-*")}
    assert len(rows) == 3
    other = small().load(tmp_path)
    same(strip(run_state(other)), strip(run_state(learner)))
    mine, theirs = (find_pipe(x, PrioritizedReplay) for x in (learner, other))
    assert all((a == b).all() for a, b in zip(mine.tree.levels, theirs.tree.levels)), "the sums are made anew, and are the same"
    assert mine.highest == theirs.highest and mine.tree.total == theirs.tree.total


def test_a_mapped_replay_with_its_priorities(tmp_path):
    def made(i):
        return LearnerHead(BatchCollector(Reporter(PrioritizedReplay(GymStepper("CartPole-v1", seed=1), 8, memory=ReplayMemory(50, path=tmp_path / f"ring-{i}.bin")))), batches=5)
    learner, other = made(0), made(1)
    pull(learner, 70)
    learner.save(tmp_path / "c")
    pull(learner, 45)
    other.load(tmp_path / "c")
    pull(other, 45)
    same(strip(run_state(other)), strip(run_state(learner)))


class Reporter(Stage):
    "In the place of a critic"

    def forward(self, item):
        if isinstance(item, SampledStep):
            self.context.priorities(item.index, item.state[:, 0].abs())
        return item


def test_a_reset_begins_with_an_empty_tree():
    learner = small()
    pull(learner, 50)
    pipe = find_pipe(learner, PrioritizedReplay)
    learner.reset(None)
    assert pipe.tree.total == 0 and pipe.highest == 1 and pipe.steps == 0 and len(pipe.memory) == 0
    pull(learner, 5)
    assert pipe.steps == learner.env_steps
    learner.close()


JOINTS = ["GymStepper", "NStepper", "FirstLastMerger", "ReplayWriter", "PrioritizedReplay", "CriticLossProcessor"]


def goal(batches=25, **more):
    torch.manual_seed(0)
    actor, critic = Actor(4, 2, 16, 12), Critic(4, 2, 16, 12)
    stepper = GymStepper(partial(Goal, size=2, length=7), DDPGAgent(actor, max_steps=500), 2, "sync", 0)
    return DDPGLearner(actor, critic, stepper, [], **{"bs": 32, "max_sz": 300, "batches": batches, "tau": 0.05, "nsteps": 2, "replay": partial(PrioritizedReplay, beta_steps=150), **more})


@pytest.mark.parametrize("joint", JOINTS)
def test_a_tape_of_any_joint_gives_the_same_parameters_and_priorities(joint):
    run = goal()
    run.fit(1)
    put_tap(run, joint, grads=True)
    run.fit(1)
    again = play(run)
    again.fit(1)
    for name in ("critic_opt", "actor_opt", "critic_target", "actor_target"):
        for attribute, m in find_pipe(run, name).modules().items():
            there = find_pipe(again, name).modules().get(attribute) if find_pipes(again, name) else None
            same(copied(there.state_dict()), copied(m.state_dict()), f"{name}.{attribute}")
    if JOINTS.index(joint) < JOINTS.index("PrioritizedReplay"):
        mine, theirs = (find_pipe(x, PrioritizedReplay) for x in (run, again))
        same(copied(theirs.get_own()), copied(mine.get_own()))
        assert mine.beta_now == theirs.beta_now > 0.6
    run.close()


def test_validation_changes_nothing():
    plain, watched = small(), small()
    pull(plain, 40)
    for _ in range(4):
        pull(watched, 10)
        watched.validate(episodes=1)
    same(strip(run_state(watched)), strip(run_state(plain)))
    for x in (plain, watched):
        x.close()


# --- as a plain script ---------------------------------------------------------------------------------------------------
TINY = dict(hidden1=24, hidden2=16, bs=32, warmup=50, noise_steps=150, prioritized=True)


def double():
    actor, critic = small_nets(dtype=torch.float64)
    return DDPGLearner(actor, critic, GymStepper("Pendulum-v1", DDPGAgent(actor), seed=0), logger_bases=[], bs=16, tau=0.01, replay=partial(PrioritizedReplay, alpha=0.5, beta=0.5, beta_steps=200))


def uneven(skip=1):
    "Two environments whose episodes differ in length: windows do not come together"
    actor, critic = small_nets(sizes=(2, 1))
    stepper = GymStepper([partial(Goal, length=5), partial(Goal, length=8)], DDPGAgent(actor), mode="sync", seed=1)
    pipe = NStepper(stepper, 4)
    pipe = FirstLastMerger(NSkipper(pipe, skip) if skip > 1 else pipe)
    return DDPGLearner(actor, critic, pipe, logger_bases=[], bs=16, repeat=2, tau=0.01, replay=partial(PrioritizedReplay, beta_steps=500))


SCRIPTS = {"one environment": (partial(ddpg, "Pendulum-v1", seed=2, max_sz=250, **TINY), {}),
           "a tree with levels": (partial(ddpg, "Pendulum-v1", seed=2, nsteps=3, max_sz=5000, **TINY), {}),
           "float64": (double, dict(seed=3)), "uneven episodes": (uneven, dict(seed=3)), "uneven episodes, skipped": (partial(uneven, 2), dict(seed=3))}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_the_script_ends_at_the_same_parameters_to_the_bit(kind, tmp_path):
    build, more = SCRIPTS[kind]
    learner = build()
    text = flatten(learner, **more)
    assert "fastrl_pipes.memory" not in text and "PrioritizedReplay" in text
    check_script(learner, text, tmp_path, run_here)
    learner.close()


def test_the_tree_of_the_script_is_used(tmp_path):
    "With its priorities left out the script ends elsewhere"
    learner = ddpg("Pendulum-v1", seed=2, max_sz=250, **TINY)
    text = flatten(learner)
    changed = text.replace("    put(priorities, index.numpy(), p)\n", "    pass\n")
    assert changed != text
    with pytest.raises(AssertionError, match="differs by"):
        check_script(learner, changed, tmp_path, run_here)
    learner.close()


# --- errors --------------------------------------------------------------------------------------------------------------
def learner(**more):
    actor, critic = nets()
    return DDPGLearner(actor, critic, counted_stack(DDPGAgent(actor)), logger_bases=[], bs=4, max_sz=50, replay=partial(PrioritizedReplay, **more))


@pytest.mark.parametrize(("more", "error", "words"), [
    ({"alpha": 1.5}, ValueError, ["alpha", "1.5", "[0, 1]"]), ({"alpha": -0.1}, ValueError, ["alpha", "-0.1"]), ({"alpha": "much"}, TypeError, ["alpha", "much"]),
    ({"beta": 2}, ValueError, ["beta", "2"]), ({"beta": math.nan}, ValueError, ["beta", "nan"]), ({"beta_steps": 0}, ValueError, ["beta_steps", "0"]),
    ({"beta_steps": 1e5}, TypeError, ["beta_steps", "whole"]), ({"eps": 0}, ValueError, ["eps", "never be drawn again"]), ({"eps": -1e-6}, ValueError, ["eps"]),
    ({"betta": 0.4}, TypeError, ["betta", "did you mean 'beta'?"])])
def test_a_wrong_setting_is_refused_before_the_first_step(more, error, words):
    STEPS.clear()
    with pytest.raises(error) as e:
        learner(**more)
    assert not STEPS and all(word in str(e.value) for word in ["PrioritizedReplay", *words])


def test_sizes_are_refused_as_those_of_a_replay():
    for more, words in (({"bs": 64, "max_sz": 32}, "bs.*64.*max_sz=32"), ({"warmup": 64, "max_sz": 32, "bs": 4}, "warmup.*64")):
        with pytest.raises(ValueError, match=f"PrioritizedReplay.*{words}"):
            PrioritizedReplay([], **more)
    with pytest.raises(TypeError, match="ReplayWriter.*window"):
        next(replay(NStepper(GymStepper("CartPole-v1", seed=0), 2), 4))


def test_two_in_one_stack_are_refused():
    inner = PrioritizedReplay(steps(20), 4, 20, name="first")
    with pytest.raises(ValueError, match="PrioritizedReplay: field 'priorities' is kept by another pipe.*one prioritised replay"):
        bind(PrioritizedReplay(inner, 4, 20))


@pytest.mark.parametrize(("index", "error", "words"), [
    ([0, 1], [1.0, math.nan], "td_error.*nan in 1 of 2 rows.*diverged"), ([0, 1], [math.inf, 1.0], "td_error.*inf"), ([0, 1], [1.0, -0.5], "td_error.*-0.5.*absolute"),
    ([0, 1], [1.0], r"td_error.*\[1\], expected \[2\]"), ([0, 1], [[1.0], [2.0]], r"td_error.*\[2, 1\], expected \[2\]"), ([0, 8], [1.0, 2.0], r"index.*\[0, 8\].*\[0, 8\)"),
    ([-1, 1], [1.0, 2.0], "index.*-1"), ([0, 1], [-1e-9, 1.0], "td_error.*absolute")])
def test_wrong_news_are_refused_by_name_and_change_nothing(index, error, words):
    pipe = replay(steps(8), 4, 20, name="my replay")
    list(pipe)
    news(pipe, [0, 1], [0.5, 0.25])
    before = copied(pipe.get_own())
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match=f"my replay: field '{words}"):
            news(pipe, torch.tensor(index), torch.tensor(error, dtype=dtype))
    assert not difference(copied(pipe.get_own()), before)
    news(pipe, torch.zeros(0, dtype=torch.int64), torch.zeros(0))


def test_a_critic_that_diverges_is_told_so():
    learner = small()
    pull(learner, 5)
    find_pipe(learner, "critic_opt").model.head.weight.data.fill_(math.nan) if hasattr(find_pipe(learner, "critic_opt").model, "head") else \
        next(find_pipe(learner, "critic_opt").model.parameters()).data.fill_(math.nan)
    with pytest.raises(ValueError, match="PrioritizedReplay: field 'td_error' is nan.*diverged"):
        next(learner)
    learner.close()


def test_silence_is_noticed():
    pipe = replay([next(steps(1, rows=4))] * (SILENT + 5), 4, 20)
    with pytest.warns(UserWarning, match="PrioritizedReplay: for 1000 batches nobody has reported errors.*Context.priorities"):
        for _ in pipe:
            pass
    pipe = replay([next(steps(1, rows=4))] * (2 * SILENT), 4, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, batch in enumerate(pipe):
            if i % 900 == 0:
                news(pipe, batch.index, batch.reward[:, 0])


# --- checkpoints that do not fit -------------------------------------------------------------------------------------------
DAMAGE = {"one priority too few": lambda s: s.update(priorities=s["priorities"][:-1]), "a NaN": lambda s: s["priorities"].__setitem__(3, math.nan),
          "a negative one": lambda s: s["priorities"].__setitem__(3, -1.0), "a zero": lambda s: s["priorities"].__setitem__(3, 0.0), "an infinite one": lambda s: s["priorities"].__setitem__(0, math.inf),
          "float32": lambda s: s.update(priorities=s["priorities"].astype(np.float32)), "text": lambda s: s.update(priorities="high"), "two axes": lambda s: s.update(priorities=s["priorities"][None]),
          "too many seen": lambda s: s.update(seen=10**9), "fewer seen": lambda s: s.update(seen=3), "seen by halves": lambda s: s.update(seen=20.5), "negative steps": lambda s: s.update(steps=-1),
          "a highest that is none": lambda s: s.update(highest=math.nan), "a highest below one": lambda s: s.update(highest=0.5), "counts of another shape": lambda s: s.update(latest=s["latest"][0]),
          "counts of another kind": lambda s: s.update(latest=s["latest"].astype(float)), "another generator": lambda s: s["generator"].update(bit_generator="MT19937"),
          "a generator of text": lambda s: s["generator"].update(state="seed")}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(name, tmp_path):
    from fastrl_pipes.learner.checkpoint import load_checkpoint
    from fastrl_pipes.learner.resume import put_state
    other, mine = small(nsteps=1), small(nsteps=1, seed=4)
    pull(other, 30), pull(mine, 20)
    other.save(tmp_path)
    state, manifest = load_checkpoint(tmp_path)
    DAMAGE[name](state["pipes"]["PrioritizedReplay"])
    before = copied(strip(run_state(mine)))
    with pytest.raises(CheckpointError):
        put_state(mine, state, manifest["rows"], tmp_path)
    same(copied(strip(run_state(mine))), before)
    pull(mine, 3)
    for x in (other, mine):
        x.close()


def test_the_stack_is_walked_as_any_other():
    learner = small()
    assert "PrioritizedReplay" in learner.mermaid() and "weight float32" in learner.describe()
    assert [type(p).__name__ for p in traverse(learner)].index("PrioritizedReplay") == [type(p).__name__ for p in traverse(learner)].index("ReplayWriter") + 1
    learner.close()
