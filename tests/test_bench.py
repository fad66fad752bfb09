"""The benchmark: where the clock is read, what the numbers mean, and what is refused. Two tiny runs in processes of their own."""
import dataclasses
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from fastrl_pipes.cli import main
from fastrl_pipes.errors import WorkerError
from fastrl_pipes.learner import bench, bench_ours, stopwatch
from fastrl_pipes.learner.workloads import RIVALS, WORKLOADS, Entrant, get_rival, get_workload

BENCHMARKS = Path(__file__).resolve().parents[1]/"benchmarks"
limit, ours_filled, ours_profile = (stopwatch.loaded(str(BENCHMARKS/"entrants"/f"{name}.py")) for name in ("limit", "ours_filled", "ours_profile"))
scaling = stopwatch.loaded(str(BENCHMARKS/"scaling.py"))


@pytest.fixture
def times(monkeypatch):
    "A clock that shows what it is told: wall seconds, CPU twice as many"
    now = {"t": 0.0}
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now["t"])
    monkeypatch.setattr(stopwatch.time, "process_time", lambda: 2 * now["t"])
    return now


def row(entrant, number, rate, **more):
    return {"workload": "W1", "entrant": entrant, "what": "steps", "round": number, "threads": 1, "steps": 10, "cpu_rate": rate, "wall_rate": rate / 2, "cores": 0.5, "return": -100.0, "updates": 10,
            "about": "x 1, y 2", **more}


def test_the_clock_counts_whole_turns_between_its_stamps(times):
    clock = stopwatch.Clock(3, 8)
    for i in range(8):
        clock.tick()
        times["t"] += 100.0 if i < 2 else 0.5  # slow before the first stamp: not counted
    assert clock.rates() == (pytest.approx(1.0), pytest.approx(2.0))


def test_the_environment_stamps_when_a_step_begins_and_counts_each_instance(times):
    clock = stopwatch.Clock(2, 4)
    name = stopwatch.registered("Pendulum-v1", clock)
    look, used = gymnasium.make(name), gymnasium.make(name)
    for env, steps in ((look, 1), (used, 4)):
        env.reset(seed=0)
        for _ in range(steps):
            env.step(env.action_space.sample())
            times["t"] += 1.0
    assert clock.stamps == [(2.0, 4.0), (4.0, 8.0)]


def test_a_run_that_ends_early_is_no_measurement():
    clock = stopwatch.Clock(1, 5)
    clock.tick()
    with pytest.raises(ValueError, match="ended before 5"):
        clock.rates()
    with pytest.raises(ValueError, match="'at'"):
        stopwatch.Clock(5, 5)


def test_ratios_pair_rounds_and_efficiency_is_their_median():
    rows = [row("ours", i, r) for i, r in enumerate((100, 50, 30))] + [row("limit", i, r) for i, r in enumerate((200, 200, 50, 1))]
    assert bench.ratios(rows, "ours", "limit") == [0.5, 0.25, 0.6]
    assert bench.efficiency(rows, "ours") == 0.5
    assert bench.efficiency(rows, "ours", "limit-cold") is None


def test_the_table_is_sorted_and_says_threads_returns_and_ratios():
    rows = [row("slow", 0, 50.0), row("fast", 0, 200.0), row("slow", 1, 60.0), row("fast", 1, 180.0), row("limit", 0, 400.0, **{"return": None}), row("limit", 1, 400.0, **{"return": None})]
    lines = bench.table(rows, "slow").splitlines()
    assert "1 thread" in lines[0] and lines[0].startswith("**W1**")
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["limit", "fast", "slow"]
    assert "190 | 180 to 200 | 95.0 | 90.0 to 100 | 0.50 | 0.47 |  | 3.50 | -100 | 2" in lines[5]


def test_rows_survive_a_file_and_another_file_is_refused(tmp_path):
    rows = [row("ours", 0, 12.5), row("limit", 0, 25.0, **{"return": None, "updates": None})]
    for r in rows:
        bench.append_rows(tmp_path/"new"/"speed.csv", [r])
    assert bench.read_bench(tmp_path/"new"/"speed.csv") == rows
    (tmp_path/"other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has columns"):
        bench.read_bench(tmp_path/"other.csv")


def test_rounds_are_interleaved_skip_what_is_there_and_leave_out_who_fails(monkeypatch):
    asked = []

    def measure(entrant, job, number):
        asked.append((entrant.name, number))
        if entrant.name == "broken":
            raise WorkerError("broken: it broke")
        return [row(entrant.name, number, 1.0)]
    monkeypatch.setattr(bench, "measure", measure)
    who, said = [Entrant(n, "") for n in ("a", "broken", "b")], []
    found = bench.rounds(who, [WORKLOADS["W1"]], 2, 10, done=[row("b", 0, 9.0)], on_failure=said.append)
    assert asked == [("a", 0), ("broken", 0), ("a", 1), ("b", 1)] and said == ["broken: it broke"] and len(found) == 4
    with pytest.raises(WorkerError):
        bench.rounds(who, [WORKLOADS["W1"]], 1, 10)


def test_a_process_measures_and_one_that_fails_is_quoted(tmp_path):
    (tmp_path/"good.py").write_text("def learn(job, data, tick):\n    for _ in range(job['total']):\n        tick()\n    return job['total']\ndef about():\n    return 'good 1'\n")
    (tmp_path/"bad.py").write_text("def learn(job, data, tick):\n    raise RuntimeError('no such thing')\n")
    job = WORKLOADS["W8"].job("good", 20, 5) | {"rows": 100}
    (found,) = bench.measure(Entrant("good", str(tmp_path/"good.py")), job, 3)
    assert set(found) == set(bench.FIELDS) and found["updates"] == 26 and found["round"] == 3 and found["about"] == "good 1"
    with pytest.raises(WorkerError, match="(?s)bad.*no such thing"):
        bench.measure(Entrant("bad", str(tmp_path/"bad.py")), job)
    with pytest.raises(WorkerError, match="no `train`"):
        bench.measure(Entrant("good", str(tmp_path/"good.py")), WORKLOADS["W1"].job("good", 5, 5))


def test_wrong_words_are_named(monkeypatch, capsys):
    for name, wanted in (("W5", "comes with its family"), ("W10", "one of")):
        with pytest.raises(LookupError, match=wanted):
            get_workload(name)
    with pytest.raises(ValueError, match="steps"):
        WORKLOADS["W1"].job("ours", 0, 1)
    monkeypatch.setitem(RIVALS, "sb3", Entrant("sb3", "", "no_such_module", "stable-baselines3"))
    with pytest.raises(LookupError, match="pip install stable-baselines3"):
        get_rival("sb3")
    assert main(["bench", "--against", "sb3"]) == 2 and main(["bench", "--against", "nobody"]) == 2 and main(["bench", "--against", "plain", "--eager", "false", "--compiled", "false"]) == 2
    said = capsys.readouterr().err
    assert "pip install stable-baselines3" in said and "one of ['sb3', 'sbx', 'plain']" in said and "at least one of them" in said


def test_the_limit_counts_the_products_of_each_update(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS/"entrants"))
    import limit
    macs = lambda *a, **k: sum(m * i * o * n for (m, i, o), n in limit.products(*a, **k).items())  # noqa: E731
    s, a, h, b = 3, 1, 64, 32
    critic, actor, last = b * ((s + a) * h + h * h + h), b * (s * h + h * h + a * h), b * (h * h + h)
    first, into = b * (s + a) * h, b * (h * h + a * h)
    assert macs("ddpg", s, a, (h, h), b) == critic + (2 * critic + last) + actor + (2 * actor + into) + critic + (last + first)
    assert macs("td3", s, a, (h, h), b) == 2 * critic + 2 * (2 * critic + last) + actor + ((2 * actor + into) + critic + (last + first)) / 2
    sys.modules.pop("limit")


def test_environments_side_by_side_make_one_step_together(monkeypatch):
    clocks, make = [], stopwatch.Clock
    monkeypatch.setattr(stopwatch, "Clock", lambda *at: clocks.append(make(*at)) or clocks[-1])
    job = WORKLOADS["W1"].job("ours", 10, 5) | {"warmup": 20, "n": 8, "bs": 32, "episodes": 0, "hidden": (16, 16)}
    found = stopwatch.run_entrant(bench_ours, job)
    assert clocks[0].at == (26, 36) and len(clocks[0].stamps) == 2 and abs(found["updates"] - 16) <= 1


def test_the_limit_counts_each_product_and_each_environment(monkeypatch):
    monkeypatch.setattr(limit, "product", lambda m, k, n, repeats, cold: (1e-3, 2e-3))
    monkeypatch.setattr(limit, "env_step", lambda env, repeats: (5e-3, 5e-3))
    job = WORKLOADS["W3"].job("limit", 100, 0) | {"n": 10}
    calls = sum(limit.products("sac", 3, 1, job["hidden"], job["bs"]).values())
    assert limit.measure(job)["steps"] == pytest.approx((1 / (calls * 1e-3 + 0.05), 1 / (calls * 2e-3 + 0.05)))


def test_a_replay_is_filled_with_rows_that_it_has():
    from fastrl_pipes.core import SimpleStep
    from fastrl_pipes.memory.replay_memory import ReplayMemory
    memory, rows = ReplayMemory(50), np.arange(8, dtype=np.float32)[:, None]
    memory.write(SimpleStep(state=rows, action=rows, next_state=rows + 1, reward=rows, terminated=rows > 9, truncated=rows > 9))
    ours_filled.fill(memory)
    batch = memory.gather(torch.arange(50))
    assert len(memory) == 50 and set(batch.state.flatten().tolist()) <= set(range(8)) and torch.equal(batch.next_state, batch.state + 1)


def test_a_filled_replay_learns_and_a_profile_has_a_row_for_each_pipe():
    job = WORKLOADS["W3"].job("ours", 10, 5) | {"warmup": 40, "bs": 32, "max_sz": 500, "episodes": 0, "hidden": (16, 16)}
    found = stopwatch.run_entrant(ours_filled, job)
    assert abs(found["updates"] - 16) <= 1 and found["rows"]["steps"][0] > 0
    rows = ours_profile.measure(job)
    own = {name: 1 / cpu for name, (cpu, _) in rows.items()}
    assert {"SoftCriticLossProcessor", "GymStepper: environments", "pull"} < set(own) and sum(own.values()) - own["pull"] == pytest.approx(own["pull"], rel=1e-3)


def test_the_pictures_grid_leaves_the_base_point_in_one_setting_at_a_time():
    grid = {p.workload.name: p for p in scaling.points()}
    assert len(grid) == len(list(scaling.points()))
    values = lambda axis: [int(name.split()[1]) for name, p in grid.items() if p.axis == axis]
    assert all(values(axis)[0] == low and values(axis)[-1] == high for axis, low, high in (("n", 1, 1024), ("batch", 32, 4096), ("width", 32, 1024), ("replay", 1000, 1_000_000)))
    base = grid["base"].workload
    for name, p in grid.items():
        start = dataclasses.replace(WORKLOADS["W3"], episodes=0) if p.axis == "n" else base
        changed = {f for f, v in dataclasses.asdict(p.workload).items() if v != getattr(start, f)} - {"name", "title", "warmup"}
        assert changed <= {{"n": "n", "batch": "bs", "width": "hidden", "replay": "max_sz"}.get(p.axis)} or p.axis == "threads" and len(changed) < 2
        assert p.workload.warmup * p.workload.n >= p.workload.bs and all(w.job("x", steps, 1) for _, w, steps in p.runs())
