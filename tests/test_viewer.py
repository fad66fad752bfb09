"""The memory viewer: its numbers are those of the memory."""
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from fastrl_pipes.core import SimpleStep
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.memory.experience_replay import ExperienceReplay, ReplaySampler
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.memory.viewer import ReplayViewer, show_memory


def filled(n=7, max_sz=5, **fields):
    memory = ReplayMemory(max_sz)
    for i in range(n):
        memory.write(SimpleStep.random(1, seed=i).replace(reward=torch.full((1, 1), float(i)), **fields))
    return memory


@pytest.mark.parametrize("n", [1, 4, 5, 7, 10, 13])
def test_rows_are_oldest_first(n):
    assert ReplayViewer(filled(n)).rows()["reward"][:, 0].tolist() == list(range(max(0, n - 5), n))


def test_few_of_many_are_evenly_spaced():
    memory = filled(40, 30)
    assert ReplayViewer(memory, most=4).rows()["reward"][:, 0].tolist() == [10, 20, 29, 39]
    assert ReplayViewer(memory).rows(1)["reward"].shape == (1, 1)


def test_the_table_counts_bytes():
    memory = filled(7, 5, terminated=torch.ones(1, 1, dtype=torch.bool))
    table = {row["field"]: row for row in ReplayViewer(memory).table()}
    assert set(table) == {"state", "action", "next_state", "reward", "terminated", "truncated"}
    assert table["state"] == {**table["state"], "dtype": "float32", "shape": [4], "bytes": 16, "filled": 80}
    assert table["reward"] == {**table["reward"], "min": 2, "mean": 4, "max": 6}
    assert sum(row["bytes"] for row in table.values()) == memory.layout.payload
    text = str(ReplayViewer(memory))
    assert "5 rows, 100% filled, 7 ever written" in text and "terminated in 5, truncated in 0" in text


def test_the_figure_shows_what_is_there():
    memory = filled(7, 5, state=torch.randint(0, 255, (1, 3, 12, 12), dtype=torch.uint8), next_state=torch.randint(0, 255, (1, 1, 12, 12), dtype=torch.uint8))
    figure = ReplayViewer(memory).show()
    assert isinstance(figure, Figure) and [ax.get_title() for ax in figure.axes[:3]] == ["rewards", "actions, in policy units", "ends of episodes so far"]
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == 5
    assert sum(len(ax.images) for ax in figure.axes) == 10, "five rows of two image fields"


def test_whole_actions_and_nested_states():
    memory = ReplayMemory(50)
    for i in range(30):
        memory.write(SimpleStep(state={"camera": np.full((1, 16, 16, 3), i, np.uint8), "speed": np.ones((1, 2), np.float32)}, action=np.array([[i % 3]]),
                                reward=np.zeros((1, 2), np.float32), terminated=np.array([[i == 9]]), truncated=np.array([[False]])))
    viewer = ReplayViewer(memory)
    assert "state.camera" in viewer.rows() and len(viewer.show().axes) == 3 + 8


def test_it_has_no_effect_and_finds_the_memory(capsys):
    pipe = ExperienceReplay(GymStepper("fastrl/Goal-v0", seed=0), bs=4, max_sz=50)
    for _ in range(30):
        next(pipe)
    rows, state, generator = pipe.memory.rows.clone(), torch.get_rng_state(), pipe._generator.get_state()
    assert isinstance(show_memory(pipe), Figure) and "reward" in capsys.readouterr().out
    assert torch.equal(rows, pipe.memory.rows) and torch.equal(state, torch.get_rng_state()) and torch.equal(generator, pipe._generator.get_state())


def test_mistakes_are_named():
    with pytest.raises(TypeError, match="ReplayMemory"):
        ReplayViewer({"loss": 1})
    with pytest.raises(LookupError, match="0 memories"):
        ReplayViewer(GymStepper("fastrl/Goal-v0"))
    with pytest.raises(LookupError, match="2 memories"):
        ReplayViewer(ExperienceReplay(ReplaySampler([], filled(), 4), bs=4))
    assert "empty" in str(ReplayViewer(ReplayMemory(3)))
    with pytest.raises(ValueError, match="pull the stack first"):
        ReplayViewer(ReplayMemory(3)).show()
