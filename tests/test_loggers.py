"""Recorder, collectors, progress and sinks: exact numbers, cheap writes, plain output where nobody watches."""
import json
import math
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from fastrl_pipes.core import SimpleStep
from fastrl_pipes.loggers.collectors import (
    BatchCollector,
    EpisodeCollector,
    EpocherCollector,
    LossCollector,
    RollingTerminatedRewardCollector,
    ended_rows,
)
from fastrl_pipes.loggers.plots import plot_rewards
from fastrl_pipes.loggers.progress import ProgressBarLogger
from fastrl_pipes.loggers.recorder import NOTHING, Recorder
from fastrl_pipes.loggers.sinks import CSVLogger, read_rows
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.walk import bind, load_state, snapshot

ROOT = Path(__file__).parent.parent


def a_step(n, rows=1, ends=(), cut=()):
    "Step n of every row's episode, of reward 1 each; some end, some are cut"
    flags = np.zeros((2, rows, 1), bool)
    flags[0, list(ends)] = flags[1, list(cut)] = True
    return SimpleStep(reward=np.ones((rows, 1)), terminated=flags[0], truncated=flags[1], total_reward=np.full((rows, 1), float(n)),
                      step_n=np.full((rows, 1), n), env_id=np.arange(rows)[:, None])


def a_loss(x):
    return {"loss": torch.tensor(float(x), requires_grad=True) * 1}


# --- recorder --------------------------------------------------------------------------------------------------------
def test_means_sums_and_last_values_by_hand():
    r = Recorder()
    for i in (1, 2, 6):
        r.record("a", torch.tensor([[float(i)]], requires_grad=True))
        r.record("b", i, how="sum")
        r.record("c", torch.tensor(i), how="last")
    row = r.read()
    assert (row["a"], row["b"], row["c"]) == (3, 9, 6) and list(row)[:3] == ["a", "b", "c"]


def test_columns_are_stable_and_bookkeeping_comes_last():
    r = Recorder()
    r.declare("late")
    r.record("early", 1.0)
    first = r.read()
    r.record("late", 1.0)
    second = r.read()
    assert list(first) == list(second) == ["late", "early", "episode", "rolling_reward", "epoch", "batch", "env_steps", "seconds",
                                           "steps_per_second"]
    assert first["late"] is NOTHING is first["rolling_reward"] and second["early"] is NOTHING


def test_a_tensor_may_be_overwritten_after_it_was_recorded():
    r, static = Recorder(), torch.zeros(())
    for i in range(4):
        static.fill_(i)
        r.record("a", static)
        r.record("b", static, how="last")
    static.fill_(100)
    row = r.read()
    assert row["a"] == 1.5 and row["b"] == 3


def test_inference_tensors_and_ordinary_ones_share_a_name():
    r = Recorder()
    with torch.inference_mode():
        r.record("a", torch.ones(()) * 2)
    r.record("a", torch.tensor(4.0, requires_grad=True))
    assert r.read()["a"] == 3


def test_many_small_losses_do_not_drown():
    r = Recorder()
    r.record("a", torch.tensor(1e8))
    for _ in range(1000):
        r.record("a", torch.tensor(1.0))
    assert r.read()["a"] == pytest.approx((1e8 + 1000) / 1001, rel=1e-12), "float32 would still say 1e8 / 1001"


def test_non_finite_losses_are_heard_as_asked():
    for mode, expectation in (("warn", pytest.warns(UserWarning, match="'q' is nan in epoch 1")), ("raise", pytest.raises(ValueError, match="'q' is nan"))):
        r = Recorder(non_finite=mode)
        r.record("q", torch.tensor(float("nan")))
        with expectation:
            r.read()
        r.record("q", 1.0)
        assert r.read()["q"] == 1, "the next epoch is not poisoned"


def test_state_is_json_and_exact_in_the_middle_of_an_epoch():
    values = torch.randn(60, generator=torch.Generator().manual_seed(0)).exp()
    whole, half = Recorder(window=3), Recorder(window=3)
    for r, part in ((whole, values), (half, values[:25])):
        for v in part:
            r.record("q", v)
            r.record("p", float(v), how="sum")
            r.episode(float(v) / 3, 7)
    other = Recorder()
    other.set_state(json.loads(json.dumps(half.get_state())))
    for v in values[25:]:
        other.record("q", v)
        other.record("p", float(v), how="sum")
        other.episode(float(v) / 3, 7)
    a, b = whole.read(), other.read()
    assert [a[k] for k in ("q", "p", "rolling_reward", "episode", "epoch")] == [b[k] for k in ("q", "p", "rolling_reward", "episode", "epoch")]
    assert (whole.reward_min, whole.reward_max, whole.lengths) == (other.reward_min, other.reward_max, other.lengths)


def test_recording_is_cheap():
    r, loss, times = Recorder(), a_loss(1)["loss"], []
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(2000):
            r.record("a", loss)
        times.append((time.perf_counter() - began) / 2000)
    assert min(times) < 10e-6, "about 2.5 microseconds on a quiet machine"


# --- collectors ------------------------------------------------------------------------------------------------------
def test_rows_end_by_either_flag_and_absent_flags_never():
    step = a_step(3, rows=4, ends=(1,), cut=(3,))
    assert list(ended_rows(step)) == [1, 3] == list(ended_rows(step.to("cpu")))
    assert list(ended_rows(step.replace(truncated=None))) == [1] and list(ended_rows(step.replace(terminated=None, truncated=None))) == []
    assert list(ended_rows(a_step(3, ends=(0,)))) == [0] == list(ended_rows(a_step(3, cut=(0,)))) and list(ended_rows(a_step(3))) == []


def test_collectors_hand_on_the_very_items():
    items = [a_step(1), a_loss(1), "anything", 3, None, a_step(2, ends=(0,))]
    for make in (EpisodeCollector, RollingTerminatedRewardCollector, BatchCollector, EpocherCollector, LossCollector):
        pipe = make(items)
        bind(pipe, Context(recorder=Recorder()))
        pipe.start()
        assert all(pipe.next() is item for item in items)


def test_every_episode_counts_once():
    r = Recorder()
    pipe = RollingTerminatedRewardCollector(EpisodeCollector([a_step(5, rows=3, ends=(0,)), a_step(6, rows=3), a_step(9, rows=3, ends=(1, 2), cut=(2,))]), window=2)
    context = bind(pipe, Context(recorder=r))
    bind(pipe, context)  # a stack that grows is bound again
    list(pipe)
    assert (r.episodes, r.lengths, r.reward_min, r.reward_max) == (3, 23, 5, 9) and r.rolling_reward == 9 == pipe.rolling_reward
    with pytest.raises(ValueError, match="one writer"):
        bind(EpisodeCollector(pipe, name="second"), Context(recorder=r))


def test_a_filter_swallows_dictionaries_only():
    items = [a_loss(1), a_step(1), {"note": 1}, a_loss(3)]
    pipe = LossCollector(items, filter=True)
    assert list(pipe)[1] == {"note": 1} and pipe.probe(items[0]) == () and pipe.probe(items[1]) == (items[1],)
    assert pipe.curve.values() == [] and pipe.flush() is None and pipe.curve.values() == [2]


def test_a_loss_of_several_numbers_is_named_as_in_the_dictionary():
    with pytest.raises(ValueError, match=r"^q: field 'loss' is .*\[2\]"):
        list(LossCollector([{"loss": torch.zeros(2)}], title="critic", name="q"))


@pytest.mark.parametrize("cut", [1, 7, 16, 33, 50])
def test_losses_resume_at_any_item_to_the_bit(cut):
    values = torch.randn(64, generator=torch.Generator().manual_seed(1)).tolist()

    def stack():
        pipe = LossCollector([a_loss(v) for v in values], title="q")
        bind(pipe, Context(recorder=Recorder()))
        pipe.start()
        return pipe

    whole, first, second = stack(), stack(), stack()
    for _ in range(64):
        whole.next()
    for _ in range(cut):
        first.next()
    state, numbers = snapshot(first), first.context.recorder.get_state()
    load_state(second, state)
    second.context.recorder.set_state(numbers)
    for _ in range(64 - cut):
        second.next()
    assert second.context.recorder.read()["q"] == whole.context.recorder.read()["q"]
    assert second.curve.values() == whole.curve.values()


def test_a_loss_collector_does_not_grow():
    pipe = LossCollector(item for item in iter(lambda: a_loss(1), None))
    bind(pipe, Context(recorder=Recorder()))
    pipe.start()
    pipe.curve.size = 64
    for _ in range(4000):
        pipe.next()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(4000):
        pipe.next()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 20_000 and len(pipe.curve.points) <= 64


# --- progress --------------------------------------------------------------------------------------------------------
PRETEND = """
import sys, time
from fastrl_pipes.loggers.progress import ProgressBarLogger
from fastrl_pipes.loggers.recorder import Recorder
r, logger = Recorder(), ProgressBarLogger()
r.declare("critic_loss")
logger.on_fit_start(dict(name="x", epochs=3, batches=10, warm_up=100, recorder=r))
logger.on_warm_up(50, 100)
for epoch in range(3):
    for batch in range(1, 11):
        r.env_steps += 1
        time.sleep(0.005)
        logger.on_batch(batch, 10)
    if epoch: r.record("critic_loss", epoch)
    r.episode(-1500 + 300 * epoch, 50)
    row = r.read()
    if epoch == 2: row["validation"] = -1.5
    logger.on_epoch(row)
logger.on_fit_end(r.rows)
"""


def test_without_a_terminal_there_are_plain_lines_as_they_come():
    process = subprocess.Popen([sys.executable, "-c", PRETEND], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    first = process.stdout.readline()
    assert process.poll() is None, "lines are flushed, not kept until the end"
    text = (first + process.stdout.read()).decode()
    process.wait(timeout=30)
    assert "\x1b" not in text and "\r" not in text and text.isascii()
    lines = text.splitlines()
    assert lines[0] == "warming up: 100 transitions before the first batch"
    header, one, two = lines[1:4]
    assert header.split("  ")[0].strip() == "critic loss" and one.split()[0] == "-" and two.split()[0] == "1"
    assert len(header) == len(one) == len(two), "columns are aligned"
    assert "validation" in lines[4] and len(lines) == 6, "a new column brings a new header"


def test_hooks_in_any_order_that_a_learner_may_have(capsys):
    for mode in ("plain", "terminal"):
        logger = ProgressBarLogger(mode=mode)
        logger.on_fit_start({})
        logger.on_batch(0, 10)
        logger.on_batch(3, 10)
        logger.on_fit_end([])
        logger.on_fit_end([])
        logger.on_fit_start({"epochs": 1, "batches": 2})
        logger.on_batch(2, 2)
        logger.on_epoch({"epoch": 1})
        logger.on_batch(1, 2)
        logger.on_epoch({"epoch": 2})
        logger.on_fit_end([{"epoch": 1}, {"epoch": 2}])
    assert capsys.readouterr().out.count("epoch") >= 2


def test_bars_can_be_left_out(capsys):
    logger = ProgressBarLogger(epoch_on_pipe=None, batch_on_pipe=None, mode="plain")
    logger.on_fit_start({})
    logger.on_batch(1, 2)
    logger.on_epoch({"epoch": 1})
    logger.on_fit_end([])
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_in_a_live_notebook_the_table_and_the_curve_remain():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PRETEND)])
    nbclient.NotebookClient(nb, kernel_name="python3", timeout=120).execute()
    outputs = [o["data"] for o in nb.cells[0].outputs if o.output_type == "display_data"]
    assert any("<td>-1350</td>" in o.get("text/html", "") and "validation" in o["text/html"] for o in outputs)
    assert sum("image/png" in o for o in outputs) == 1, "one curve, brought up to date in place"


# --- sinks and plots -------------------------------------------------------------------------------------------------
def test_csv_rows_come_back_to_the_bit_and_gaps_stay_gaps(tmp_path):
    logger = CSVLogger(tmp_path/"metrics.csv")
    rows = [{"a": 0.1 + 0.2, "n": 3, "gap": NOTHING}, {"a": 1e-300, "n": -4, "gap": float("nan")}, {"a": math.inf, "n": 5, "gap": 1.0, "new": 2}]
    for i, row in enumerate(rows):
        logger.on_epoch(row)
        assert len(read_rows(tmp_path/"metrics.csv")) == i + 1, "every row is on the disk when it was written"
    back = read_rows(tmp_path/"metrics.csv")
    assert [r["a"] for r in back] == [r["a"] for r in rows] and [r["n"] for r in back] == [3, -4, 5] and type(back[0]["n"]) is int
    assert back[0]["gap"] is NOTHING and math.isnan(back[1]["gap"]) and back[1]["gap"] is not NOTHING and back[0]["new"] is NOTHING
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_plots_leave_pyplot_alone(tmp_path):
    code = ("import sys; from fastrl_pipes.loggers.plots import plot_rewards; assert 'matplotlib' not in sys.modules;"
            "plot_rewards([dict(epoch=1, env_steps=10, rolling_reward=-3.0, q=1.0)], 'out.png'); assert 'matplotlib.pyplot' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/"out.png").stat().st_size > 5000


def test_plots_take_what_runs_give():
    nothing_yet = [dict(epoch=1, env_steps=10, rolling_reward=NOTHING, q=NOTHING)]
    assert len(plot_rewards(nothing_yet).axes) == 1
    exploded = [dict(epoch=i, env_steps=i, rolling_reward=-1.0 * i, q=float("nan") if i else 1.0, validation=-2.0) for i in range(4)]
    figure = plot_rewards(exploded)
    assert len(figure.axes) == 2 and len(figure.axes[1].lines[0].get_xdata()) == 1
