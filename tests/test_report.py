"""Runs compared: the statistics against hand numbers and brute force, tables and curves from files, run folders with every way of not being finished, and the rows that learning benchmarks write."""
import csv
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_algorithm import BUILT  # noqa: F401  (registers the algorithm)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import trim_mean

from fastrl_pipes.cli import main
from fastrl_pipes.functional.aggregates import bootstrap_interval, interquartile_mean, on_common_grid
from fastrl_pipes.learner.readback import OF_NO_INFLUENCE, group_runs, read_run
from fastrl_pipes.learner.report import report_runs
from fastrl_pipes.learner.tables import Table, learning_table, spread, summary
from fastrl_pipes.loggers.curves import plot_curves, read_curves
from fastrl_pipes.loggers.sinks import write_rows

BENCHMARKS = Path(__file__).parent.parent/"benchmarks"
finite = st.floats(-1e3, 1e3)


# --- the kernels

@pytest.mark.parametrize(("scores", "expected"), [
    ([7], 7), ([1, 5], 3), ([1, 2, 6], 3), ([0, 1, 3, 100], 2), ([-550, -145, -141, -140, -138], -142), ([8, 1, 2, 7, 3, 6, 4, 5], 4.5)])
def test_interquartile_mean_by_hand(scores, expected):
    assert interquartile_mean(scores) == expected == interquartile_mean(scores[::-1])


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=finite), st.sampled_from([None, 0, 1, -1]))
def test_interquartile_mean_is_the_trimmed_mean(scores, axis):
    np.testing.assert_allclose(interquartile_mean(scores, axis), trim_mean(scores, 0.25, axis), rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(finite, min_size=4, max_size=15), st.floats(1e4, 1e9))
def test_interquartile_mean_is_not_moved_by_one_run(scores, wild):
    worse, best = sorted(scores), sorted(scores)
    best[-1] = wild
    assert interquartile_mean(worse) == interquartile_mean(best)


def exact_interval(strata, statistic, level):
    "By going through every resample there is"
    found = sorted(float(statistic(np.concatenate(drawn))) for drawn in itertools.product(*[itertools.product(s, repeat=len(s)) for s in strata]))
    return np.quantile(found, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")


@pytest.mark.parametrize("statistic", [np.mean, np.median, interquartile_mean])
@pytest.mark.parametrize("strata", [[[0.0, 1.0]], [[0.0, 1.0, 5.0]], [[3.0, -2.0, 5.0, 8.0]], [[0.0, 1.0], [100.0, 103.0]], [[0.0, 1.0, 4.0], [50.0, 57.0]]])
def test_the_interval_is_that_of_all_resamples(strata, statistic):
    "Levels whose quantiles lie inside a step of the exact distribution, where 20,000 drawings cannot miss"
    low, high = bootstrap_interval(*strata, statistic=statistic, level=0.81, resamples=20_000)
    loose = [exact_interval(strata, statistic, level) for level in (0.79, 0.83)]
    assert min(e[0] for e in loose) <= low <= max(e[0] for e in loose) and min(e[1] for e in loose) <= high <= max(e[1] for e in loose)


def test_strata_are_drawn_within():
    "Two tasks far apart: drawn together, the mean of four would reach from 0 to 101"
    assert bootstrap_interval([0.0, 1.0], [100.0, 101.0], statistic=np.mean, level=0.999) == (50.0, 51.0)
    low, high = bootstrap_interval([0.0, 1.0, 100.0, 101.0], statistic=np.mean, level=0.999)
    assert low < 10 and high > 90


def test_an_interval_per_column_and_the_same_twice():
    values = np.array([[0.0, 5.0, 1.0], [2.0, 5.0, 9.0], [4.0, 5.0, 2.0]])
    low, high = bootstrap_interval(values, statistic=np.mean)
    assert low.tolist() == [0.0, 5.0, 1.0] and high.tolist() == [4.0, 5.0, 9.0], "of three runs, from the lowest to the highest"
    many = np.random.default_rng(0).normal(size=20)
    assert bootstrap_interval(many, resamples=99) == bootstrap_interval(many, resamples=99) != bootstrap_interval(many, resamples=99, seed=1)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [low <= 3.0 <= high for low, high in (bootstrap_interval(rng.normal(3.0, 1.0, 30), statistic=np.mean, resamples=400, seed=i) for i in range(300))]
    assert 0.89 < np.mean(held) < 0.98


@pytest.mark.parametrize(("call", "words"), [
    (lambda: interquartile_mean([]), "at least one number"),
    (lambda: interquartile_mean([1.0, float("nan")]), "holds NaN"),
    (lambda: bootstrap_interval([1.0]), "at least 2 runs"),
    (lambda: bootstrap_interval([1.0, 2.0], [3.0]), "strata[1]"),
    (lambda: bootstrap_interval([1.0, float("nan")]), "holds NaN"),
    (lambda: bootstrap_interval(), "are none"),
    (lambda: bootstrap_interval([1.0, 2.0], level=95), "between 0 and 1"),
    (lambda: bootstrap_interval([1.0, 2.0], resamples=0), "resamples"),
    (lambda: on_common_grid([]), "are none"),
    (lambda: on_common_grid([([0, 1], [1, 2]), ([5, 6], [1, 2])]), "that all share"),
    (lambda: on_common_grid([([0, 1], [1])]), "as many x as y"),
    (lambda: on_common_grid([([0, 1], [float("nan")] * 2)]), "0 points"),
    (lambda: on_common_grid([([1, 1], [1, 2])]), "does not rise"),
])
def test_kernels_refuse(call, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[").replace("]", r"\]")):
        call()


def test_the_grid_is_where_all_runs_are():
    grid, values = on_common_grid([([0, 10, 20], [0, 1, 2]), ([5, 15, 40], [3, 5, 0]), ([0, 5, 30], [float("nan"), 1.0, 1.0])], points=4)
    assert grid.tolist() == [5.0, 10.0, 15.0, 20.0]
    for (x, y), row in zip([([0, 10, 20], [0, 1, 2]), ([5, 15, 40], [3, 5, 0]), ([5, 30], [1, 1])], values):
        for at, value in zip(grid, row):
            i = max(k for k in range(len(x) - 1) if x[k] <= at)
            assert value == pytest.approx(y[i] + (y[i + 1] - y[i]) * (at - x[i]) / (x[i + 1] - x[i]))
    assert on_common_grid([([3], [1.0]), ([0, 3], [0.0, 3.0])])[0].tolist() == [3.0]


# --- tables and curves from a file

def write_csv(path, header, *rows):
    with path.open("w", newline="") as f:
        csv.writer(f).writerows([header, *rows])
    return path


@pytest.fixture
def study(tmp_path):
    return write_csv(tmp_path/"study.csv", ["cell", "seed", "env_steps", "mean"], ["a", 0, 100, -3.0], ["a", 1, 100, -1.0], ["b", 0, 50, 7.0], ["a", 2, 120, -2.0])


def test_a_study_as_a_table(study):
    table = learning_table(study, bar=-2.5)
    assert [r["cell"] for r in table.rows] == ["a", "b"] and table.header[-1] == "bar"
    a, b = table.rows
    assert (a["runs"], a["mean"], a["median"], a["iqm"], a["mean_low"], a["mean_high"], a["reached"]) == (3, -2.0, -2.0, -2.0, -3.0, -1.0, 2)
    assert (b["runs"], b["mean_low"], b["reached"]) == (1, None, 1)
    assert "One run" in str(table) and "100 to 120" in table.markdown() and "2 of 3 reach -2.5" in table._repr_markdown_()
    assert len(str(learning_table(study, cells="b")).splitlines()) == 3
    assert learning_table(study, bar={"b": 8.0}).rows[1]["reached"] == 0 and learning_table(study, bar={"b": 8.0}).rows[0]["bar"] is None


def test_markdown_has_as_many_cells_in_every_line():
    lines = Table(["x", "y"], [["a|b", "1"], ["c", "2"]]).markdown().strip().splitlines()
    assert {line.replace("\\|", "").count("|") for line in lines} == {3} and "a\\|b" in lines[2]


def test_zero_has_no_minus_and_equal_ends_are_one_number():
    from fastrl_pipes.learner.tables import score_cells
    assert score_cells(summary([-0.001, -0.0]))[0] == "0.00 [0.00, 0.00]" and score_cells(summary([-0.001, -0.0]))[3] == "0.00" and spread([7, 7]) == "7"


@pytest.mark.parametrize(("rows", "options", "words"), [
    ([["a", 0, 100, 1.0], ["a", 0, 100, 2.0]], {}, "seed 0 of 'a' twice"),
    ([["a", 0, 100, 1.0]], {"cells": "aa"}, "did you mean 'a'"),
    ([["a", 0, 100, 1.0]], {"column": "men"}, "did you mean 'mean'"),
    ([], {}, "no row"),
])
def test_tables_refuse(tmp_path, rows, options, words):
    with pytest.raises(ValueError, match=words):
        learning_table(write_csv(tmp_path/"s.csv", ["cell", "seed", "env_steps", "mean"], *rows), **options)


def test_a_table_without_cells_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'cell' or 'setting'"):
        learning_table(write_csv(tmp_path/"s.csv", ["seed", "env_steps", "mean"], [0, 1, 2.0]))


@pytest.fixture
def curves(tmp_path):
    points = [[cell, seed, step, 10 * seed + step] for cell in ("a", "b") for seed in range(3 if cell == "a" else 1) for step in (0, 5, 10)]
    return write_csv(tmp_path/"curves.csv", ["setting", "seed", "env_steps", "rolling_reward"], *reversed(points))


def test_curves_are_drawn_as_mean_band_and_runs(curves, tmp_path):
    found = read_curves(curves)
    assert list(found) == ["b", "a"] and found["a"]["2"][1].tolist() == [20.0, 25.0, 30.0]
    figure = plot_curves(curves, bar={"a": 12.0}, path=tmp_path/"x.png")
    b, a = figure.axes
    assert len(a.lines) == 1 + 3 + 1 and len(a.collections) == 1 and len(b.lines) == 1 and not b.collections
    np.testing.assert_allclose(a.lines[0].get_ydata()[[0, -1]], [10.0, 20.0])
    assert (tmp_path/"x.png").read_bytes().startswith(b"\x89PNG")
    together = plot_curves(curves, ["a", "b"], together=True, bar=1.0, lowest=-5)
    assert len(together.axes) == 1 and len(together.axes[0].lines) == 6 and together.axes[0].get_ylim()[0] == -5


@pytest.mark.parametrize(("options", "words"), [({"cells": "c"}, "cells of"), ({"y": "rolling"}, "did you mean 'rolling_reward'")])
def test_curves_refuse(curves, options, words):
    with pytest.raises(ValueError, match=words):
        plot_curves(curves, **options)


def test_runs_that_act_nowhere_are_as_long_as_their_updates(tmp_path):
    header = ["cell", "seed", "updates", "env_steps", "mean"]
    path = write_csv(tmp_path/"offline.csv", header, ["iql", 0, 300, 0, -160.0], ["iql", 1, 400, 0, -162.0])
    table = learning_table(path, length="updates")
    assert table.header[2] == "updates" and table.cells[0][2] == "300 to 400" and learning_table(path).cells[0][2] == "0"
    with pytest.raises(ValueError, match="did you mean 'updates'"):
        learning_table(path, length="update")
    path = write_csv(tmp_path/"offline_curves.csv", header, *[["iql", 0, n, 0, -n] for n in (0, 100, 300)])
    assert read_curves(path, x="updates")["iql"]["0"][0].tolist() == [0, 100, 300]
    figure = plot_curves(path, x="updates")
    assert figure.axes[0].lines[0].get_xdata()[-1] == 300 and figure.get_supxlabel() == "updates"
    assert plot_curves(write_csv(tmp_path/"c.csv", header, ["iql", 0, 5, 0, 1.0])).get_supxlabel() == "environment steps"
    with pytest.raises(ValueError, match="did you mean 'updates'"):
        plot_curves(path, x="update")


# --- run folders

def a_run(folder, mean=-150.0, seed=0, done=100, budget=100, verdict=True, rows=True, goal=None, **config):
    "A run folder as `train` leaves it"
    folder.mkdir(parents=True)
    config = {"algorithm": "ddpg", "env": "Pendulum-v1", "seed": seed, "tau": 0.005, "epochs": None, "env_steps": budget, "keep": 1, "verdict_episodes": 20, **config}
    (folder/"config.yaml").write_text("# a comment\n" + yaml.safe_dump({k: v for k, v in config.items() if v is not ...}, sort_keys=False))
    if rows:
        write_rows(folder/"metrics.csv", [{"rolling_reward": float("nan") if not i else mean - 10 + i, "batch": 10 * i, "env_steps": done * i // 4, "seconds": 1.5} for i in range(5)])
    if verdict:
        at = done if verdict is True else verdict
        (folder/"verdict.json").write_text(json.dumps({"mean": mean, "std": 5.0, "episodes": 20, "first_seed": 10_000, "env_steps": at, "goal": goal, "reached": None if goal is None else mean >= goal, "seconds": 9.0}))
    return folder


def test_groups_tell_apart_what_matters_and_name_what_differs(tmp_path):
    runs = [a_run(tmp_path/"0"), a_run(tmp_path/"1", seed=1, keep=5), a_run(tmp_path/"2", tau=0.01), a_run(tmp_path/"3", seed=1, tau=0.01, preset="x"),
            a_run(tmp_path/"4", env="Reacher-v5"), a_run(tmp_path/"5", algorithm="td3"), a_run(tmp_path/"6", tau=...)]
    groups = group_runs([read_run(r) for r in runs])
    assert {name: [r.folder.path.name for r in g] for name, g in groups.items()} == {
        "ddpg on Pendulum-v1: tau 0.005": ["0", "1"], "ddpg on Pendulum-v1: tau 0.01": ["2", "3"], "ddpg on Reacher-v5": ["4"], "td3 on Pendulum-v1": ["5"],
        "ddpg on Pendulum-v1: tau not set": ["6"]}
    assert "env_steps" not in OF_NO_INFLUENCE and "verdict_episodes" not in OF_NO_INFLUENCE


def test_the_numbers_of_a_report(tmp_path):
    means = [-140.0, -150.0, -130.0, -900.0]
    found = report_runs([a_run(tmp_path/str(i), m, seed=i) for i, m in enumerate(means)] + [a_run(tmp_path/"other", -200.0, tau=0.5)], out=str(tmp_path/"out"))
    row, other = found.groups.rows
    assert (row["runs"], row["mean"], row["median"], row["iqm"], row["env_steps"], row["seconds"]) == (4, -330.0, -145.0, -145.0, 100, 7.5)
    assert row["mean_low"] < -330 < row["mean_high"] and other["iqm_low"] is None and "no interval" in str(found)
    assert [r["mean"] for r in found.runs.rows] == [*means, -200.0]
    out = tmp_path/"out"
    assert sorted(p.name for p in out.iterdir()) == ["curves.csv", "curves.png", "groups.csv", "report.md", "runs.csv"] == sorted(p.name for p in found.files)
    with (out/"curves.csv").open() as f:
        rows = list(csv.DictReader(f))
    mine = [r for r in rows if r["group"].endswith("tau 0.005")]
    assert float(mine[0]["env_steps"]) == 25 and float(mine[-1]["env_steps"]) == 100 and float(mine[-1]["mean"]) == pytest.approx(-330 - 10 + 4)
    assert float(mine[-1]["low"]) < float(mine[-1]["mean"]) < float(mine[-1]["high"]) and "nan" in {r["low"] for r in rows}
    assert "![Learning curves](curves.png)" in (out/"report.md").read_text()
    with (out/"groups.csv").open() as f:
        assert [r["iqm_low"] == "" for r in csv.DictReader(f)] == [False, True]


@pytest.mark.parametrize(("config", "words"), [
    ({"verdict": False, "done": 40}, "40 of 100 environment steps; is it still running"),
    ({"verdict": False, "rows": False}, "0 of 100 environment steps; is it still running"),
    ({"verdict": False}, "100 of 100 environment steps, no verdict"),
    ({"verdict": False, "verdict_episodes": 0}, "since its verdict_episodes is 0"),
    ({"verdict": 100, "done": 160, "budget": 200}, "its verdict is of 100"),
    ({"budget": 200}, "an earlier budget"),
    ({"mean": float("nan")}, "diverged"),
    ({"verdict": False, "budget": None, "epochs": 9}, "5 of 9 epochs"),
])
def test_an_unfinished_run_is_named_and_left_out(tmp_path, config, words):
    late = a_run(tmp_path/"late", seed=1, **config)
    found = report_runs([a_run(tmp_path/"done"), late])
    assert len(found.unfinished) == 1 and words in found.unfinished[0] and str(late) in str(found) and words in found.markdown()
    assert [r["runs"] for r in found.groups.rows] == [1] and len(found.runs.rows) == 1
    with pytest.raises(ValueError, match="at least one finished run"):
        report_runs([late])


def test_a_goal_reached_early_is_an_end(tmp_path):
    found = report_runs([a_run(tmp_path/"x", -140.0, done=40, budget=100, goal=-150)])
    assert not found.unfinished and "-150 reached" in str(found)


def test_every_folder_that_is_no_run_is_named(tmp_path):
    a_run(tmp_path/"runs"/"a")
    a_run(tmp_path/"broken")
    (tmp_path/"broken"/"verdict.json").write_text("{")
    a_run(tmp_path/"numbers")
    (tmp_path/"numbers"/"metrics.csv").write_text("env_steps,x\nten,2\n")
    a_run(tmp_path/"other")
    (tmp_path/"other"/"config.yaml").write_text("- 1\n")
    a_run(tmp_path/"partial")
    (tmp_path/"partial"/"verdict.json").write_text("{}")
    a_run(tmp_path/"columns")
    (tmp_path/"columns"/"metrics.csv").write_text("step,x\n1,2\n")
    (tmp_path/"file").write_text("")
    with pytest.raises(ValueError) as e:
        report_runs([tmp_path/n for n in ("runs", "runs/a", "nowhere", "broken", "numbers", "other", "partial", "columns", "file")])
    said = str(e.value).splitlines()
    for line, words in zip(said, ("it holds 1 runs", "does not exist", "do not read", "do not read", "names no algorithm", "has no mean", "env_steps and batch", "a file")):
        assert words in line
    assert len(said) == 8


def test_a_run_twice_is_refused_and_a_seed_twice_is_told(tmp_path):
    a_run(tmp_path/"a")
    (tmp_path/"b").mkdir()
    with pytest.raises(ValueError, match="twice"):
        report_runs([tmp_path/"a", tmp_path/"b"/".."/"a"])
    assert "seed 0 is there more than once" in str(report_runs([tmp_path/"a", a_run(tmp_path/"c")]))


def test_runs_without_curves_or_environment_steps(tmp_path):
    offline = a_run(tmp_path/"offline", done=0, budget=None, epochs=5)
    found = report_runs([offline])
    assert found.figure.axes[0].get_xlabel() == "batches" and found.bands[-1]["env_steps"] == 40.0
    bare = report_runs([a_run(tmp_path/"bare", rows=False)], out=str(tmp_path/"out"))
    assert bare.figure is None and "no curve" in str(bare) and not (tmp_path/"out"/"curves.png").exists() and bare.groups.rows[0]["seconds"] == 9.0
    with pytest.raises(ValueError, match="did you mean 'rolling_reward'"):
        report_runs([offline], column="rolling_rewards")
    (tmp_path/"taken").write_text("")
    with pytest.raises(ValueError, match="a folder"):
        report_runs([offline], out=str(tmp_path/"taken"))


# --- the command

def test_the_command_over_runs_that_train_has_made(tmp_path, capsys):
    for seed in (0, 1):
        assert main(["train", "fake", "--env", "Pendulum-v1", "--seed", str(seed), "--out", str(tmp_path/f"s{seed}")]) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path/"s0"), "--out", str(tmp_path/"out"), "--level=0.9", str(tmp_path/"s1")]) == 0
    said = capsys.readouterr().out
    assert "fake on Pendulum-v1" in said and "-160.0 [-160.0, -160.0]" in said and "mean [90% interval]" in said and str(tmp_path/"out"/"report.md") in said
    assert main(["report", str(tmp_path/"s0")]) == 0 and "no interval" in capsys.readouterr().out
    assert main(["report", "--help"]) == 0 and "--column" in capsys.readouterr().out


@pytest.mark.parametrize(("tokens", "words"), [
    ([], "the folders of one or more runs"), (["--out", "x"], "the folders of one or more runs"), (["nowhere"], "does not exist"), (["nowhere", "--colum", "x"], "did you mean '--column'"),
    (["nowhere", "--level", "much"], "expected float")])
def test_the_command_refuses(tokens, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *tokens]) == 2
    assert words in capsys.readouterr().err


# --- the rows of learning benchmarks

sys.path.insert(0, str(BENCHMARKS))
import control_cells  # noqa: E402


def _write(out, seed):
    for cell in "ab":
        control_cells.write_rows(Path(out)/"control.csv", ["cell", "seed", "env_steps", "mean"], [{"cell": cell, "seed": seed, "env_steps": 10, "mean": 1.0}])


def test_rows_of_several_processes_are_all_there(tmp_path):
    jobs = [multiprocessing.get_context("spawn").Process(target=_write, args=(str(tmp_path), seed)) for seed in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    rows = control_cells.read_rows(tmp_path/"control.csv")
    assert sorted((r["cell"], r["seed"]) for r in rows) == sorted((c, str(s)) for c in "ab" for s in range(4))
    assert [p.name for p in tmp_path.iterdir()] == ["control.csv"]


def test_a_run_made_again_takes_the_place_of_its_rows(tmp_path):
    for mean in (1.0, 2.0):
        control_cells.write_rows(tmp_path/"control.csv", ["cell", "seed", "env_steps", "mean"], [{"cell": "a", "seed": 0, "env_steps": 10, "mean": mean}])
    assert [r["mean"] for r in control_cells.read_rows(tmp_path/"control.csv")] == ["2.0"]
    assert control_cells.is_there(tmp_path, "a", 0, 10) and not control_cells.is_there(tmp_path, "a", 0, 11) and not control_cells.is_there(tmp_path, "a", 1, 10)


def test_learning_by_turns(tmp_path):
    trained, judged = [], []

    def train(env_steps):
        trained.append(env_steps)
        return sum(trained)

    def evaluate(episodes, first):
        judged.append((episodes, first))
        return float(sum(trained)), 1.0
    control_cells.learn(control_cells.cell_of("sac-pendulum"), "x", 3, tmp_path, train, evaluate, {"version": "1", "settings": "{}"}, 2500)
    assert trained == [1000, 1000, 500] and judged == [(20, 20_000)] * 4 + [(200, 10_000)]
    assert [(r["env_steps"], r["mean"]) for r in control_cells.read_rows(tmp_path/"control_curves.csv")] == [("0", "0.0"), ("1000", "1000.0"), ("2000", "2000.0"), ("2500", "2500.0")]
    row, = control_cells.read_rows(tmp_path/"control.csv")
    assert (row["cell"], row["seed"], row["env_steps"], row["mean"], row["episodes"]) == ("x", "3", "2500", "2500.0", "200")
    assert learning_table(tmp_path/"control.csv").rows[0]["mean"] == 2500.0 and list(read_curves(tmp_path/"control_curves.csv")) == ["x"]


def test_cells_by_name():
    cell = control_cells.cell_of("td3-cheetah:tau=1e-2,bs=64,clip=null,opt=Adam")
    assert (cell.algorithm, cell.task.env, cell.settings) == ("td3", "HalfCheetah-v5", {"tau": 0.01, "bs": 64, "clip": None, "opt": "Adam"})
    for name in ("sac", "sac-moon", "sac-pendulum:tau", "-pendulum"):
        with pytest.raises(ValueError, match="expected"):
            control_cells.cell_of(name)


@pytest.mark.slow
def test_the_script_learns_once_and_then_skips(tmp_path):
    command = [sys.executable, str(BENCHMARKS/"learning_control.py"), "ddpg-pendulum:bs=32,hidden1=16,hidden2=16", "--cut", "1200", "--seeds", "0", "1", "--jobs", "2", "--out", str(tmp_path)]
    first, second = (subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False) for _ in range(2))
    assert first.returncode == 0 and second.returncode == 0 and second.stdout.count("is there") == 2, first.stderr + second.stderr
    rows = control_cells.read_rows(tmp_path/"control.csv")
    assert sorted(r["seed"] for r in rows) == ["0", "1"] and {r["env_steps"] for r in rows} == {"1200"} and json.loads(rows[0]["settings"])["bs"] == 32
