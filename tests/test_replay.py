"The replay keeps what it was given, in the space that arithmetic says, and draws from it uniformly."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fastrl_pipes.core import MergedStep, SimpleStep
from fastrl_pipes.memory.experience_replay import ExperienceReplay, ReplaySampler, ReplayWriter
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.memory.rows import RowLayout
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.walk import bind


def half_cheetah(rows=1, at=0):
    "A step with the sizes of HalfCheetah: 17 observations in float64, 6 actions"
    column = np.arange(at, at + rows)[:, None]
    return SimpleStep(state=np.tile(column, 17).astype(np.float64), action=np.tile(column, 6).astype(np.float32), next_state=np.tile(column + 1, 17).astype(np.float64),
                      reward=column.astype(np.float32), terminated=column % 7 == 0, truncated=column % 11 == 0)


ARITHMETIC = 4 * (17 + 17 + 6 + 1) + 2  # bytes: floats of four, flags of one


def test_a_million_half_cheetahs_take_five_percent_over_arithmetic():
    layout = RowLayout.of(half_cheetah())
    assert layout.payload == ARITHMETIC
    assert layout.itemsize <= 1.05 * ARITHMETIC


@pytest.mark.slow
def test_the_process_grows_by_the_arithmetic_size_and_no_more():
    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096
    memory, before = ReplayMemory(1_000_000), resident()
    for at in range(0, 1_000_000, 1000):
        memory.write(half_cheetah(1000, at))
    full = resident() - before
    for at in range(0, 100_000, 10):
        memory.write(half_cheetah(10, at))
    assert full <= 1.05 * ARITHMETIC * 1_000_000
    assert resident() - before - full < 2_000_000, "flat once full"


@settings(max_examples=40, deadline=None)
@given(max_sz=st.integers(3, 12), writes=st.lists(st.integers(1, 3), min_size=1, max_size=15))
def test_the_ring_holds_the_latest_rows(max_sz, writes):
    memory, rows, at = ReplayMemory(max_sz), [], 0
    for n in writes:
        memory.write(half_cheetah(n, at))
        rows += range(at, at + n)
        at += n
    held = memory.gather(torch.arange(len(memory)))
    assert sorted(held.reward[:, 0].tolist()) == rows[-max_sz:]
    assert torch.equal(held.next_state, held.state + 1) and torch.equal(held.terminated, held.reward % 7 == 0)


def test_draws_are_uniform():
    memory = ReplayMemory(50)
    memory.write(half_cheetah(50))
    sampler = ReplaySampler([half_cheetah()] * 2000, memory, bs=50)
    bind(sampler, Context(seed=0))
    counts = sum(np.bincount(batch.reward[:, 0].long().numpy(), minlength=50) for batch in sampler)
    assert chisquare(counts).pvalue > 1e-4


def test_types_are_kept_and_floats_are_stored_as_asked():
    step = SimpleStep(state={"camera": np.full((2, 3, 4, 4), 200, np.uint8), "joints": np.ones((2, 5))}, action=np.full((2, 1), 3, np.int64),
                      next_state={"camera": np.full((2, 3, 4, 4), 201, np.uint8), "joints": np.ones((2, 5)) * 2}, reward=np.ones((2, 2)),
                      terminated=np.zeros((2, 1), bool))
    for asked, expected in (("float32", torch.float32), ("float64", torch.float64), ("float16", torch.float16)):
        memory = ReplayMemory(10, float_dtype=asked)
        memory.write(step)
        batch = memory.gather(torch.tensor([1, 0, 1]))
        assert batch.state["camera"].dtype == torch.uint8 and batch.state["camera"].shape == (3, 3, 4, 4) and (batch.next_state["camera"] == 201).all()
        assert batch.action.dtype == torch.int64 and batch.terminated.dtype == torch.bool and batch.reward.shape == (3, 2)
        assert batch.state["joints"].dtype == expected


def test_batches_follow_the_networks_dtype():
    replay = ExperienceReplay([half_cheetah(4)] * 3, bs=2, max_sz=20)
    bind(replay, Context(dtype=torch.float64, seed=0))
    batch = next(replay)
    assert batch.state.dtype == batch.reward.dtype == torch.float64 and batch.terminated.dtype == torch.bool


def test_merged_steps_keep_their_discount():
    step = half_cheetah(2)
    memory = ReplayMemory(10)
    memory.write(MergedStep(*SimpleStep._values(step), discount=np.array([[0.5], [0.25]], np.float32)))
    batch = memory.gather(torch.tensor([0, 1]))
    assert isinstance(batch, MergedStep) and batch.discount[:, 0].tolist() == [0.5, 0.25]


def test_a_memory_can_live_in_a_file(tmp_path):
    memory = ReplayMemory(100, path=tmp_path / "rows.bin")
    memory.write(half_cheetah(30))
    assert (tmp_path / "rows.bin").stat().st_size == 100 * memory.layout.itemsize
    assert memory.gather(torch.tensor([29])).reward.item() == 29


def test_a_field_that_changes_its_shape_is_named():
    memory = ReplayMemory(100)
    memory.write(half_cheetah(3))
    with pytest.raises(ValueError, match=r"field 'action' has rows of shape \[5\], expected \[6\]"):
        memory.write(half_cheetah(3).replace(action=np.zeros((3, 5), np.float32)))
    assert len(memory) == 3


def test_several_batches_per_step_are_fresh():
    replay = ExperienceReplay([half_cheetah(8)] * 2, bs=4, max_sz=20, repeat=3)
    bind(replay, Context(seed=0))
    rewards = [tuple(batch.reward[:, 0].tolist()) for batch in replay]
    assert len(rewards) == 6 and len(set(rewards)) > 1


def test_a_sampler_alone_is_offline_learning():
    memory = ReplayMemory(20)
    for _ in ReplayWriter([half_cheetah(10)], memory):
        pass
    sampler = ReplaySampler(range(3), memory, bs=4)
    assert list(sampler) == [0, 1, 2], "items that are no steps pass"
    assert len(list(ReplaySampler([SimpleStep()] * 3, memory, bs=4))) == 3
