"""The command line: what it understands, what it refuses, and what a run leaves behind. A fake algorithm stands in for a learner."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fake_algorithm import BUILT

from fastrl_pipes.cli import main
from fastrl_pipes.learner.resolve import resolve
from fastrl_pipes.learner.settings import UsageError
from fastrl_pipes.loggers.sinks import read_rows

HERE = Path(__file__).parent
PROGRAM = "import sys; import fake_algorithm; from fastrl_pipes.cli import main; sys.exit(main())"


def values(*tokens):
    return resolve("train", ["fake", *tokens])[1]


def started(*tokens, **kwargs):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *tokens], env={**os.environ, "COLUMNS": "80", "PYTHONPATH": f"{HERE}:{HERE.parent}"}, text=True, **kwargs)


def test_help_and_import_load_no_torch():
    code = "import sys, fastrl_pipes.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules or 'jsonargparse' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_help_lists_every_setting_with_its_comment(capsys):
    assert main(["train", "fake", "--help"]) == 0
    said = capsys.readouterr().out
    for part in ("--hidden", "widths of the layers", "--stop-at", "--overwrite", "presets: Pendulum-v1, slow"):
        assert part in said


def test_the_command_line_wins_over_a_file_over_a_preset_over_defaults(tmp_path):
    (tmp_path/"mine.yaml").write_text("lr: 5e-2\nhidden: [7]\nseed: 3\n")
    got = values("--config", str(tmp_path/"mine.yaml"), "--env", "Pendulum-v1", "--seed=4")
    assert (got["lr"], got["hidden"], got["seed"], got["env_steps"], got["preset"]) == (0.05, (7,), 4, 40, "Pendulum-v1")
    assert values("--env", "Pendulum-v1")["lr"] == 0.01
    assert values("--env", "Pendulum-v1", "--preset", "none")["lr"] == 1e-3
    assert values("--env", "CartPole-v1", "--preset", "slow")["pause"] == 0.05


def test_epochs_replace_the_budget_of_a_preset():
    got = values("--env", "Pendulum-v1", "--epochs", "3")
    assert (got["epochs"], got["env_steps"]) == (3, None)


def test_a_file_may_name_the_algorithm(tmp_path):
    (tmp_path/"mine.yaml").write_text("algorithm: fake\nenv: CartPole-v1\n")
    algorithm, got = resolve("describe", ["--config", str(tmp_path/"mine.yaml")])
    assert algorithm.name == "fake" and got["env"] == "CartPole-v1"


def test_mappings_take_dotted_names_and_numbers_stay_numbers():
    assert values("--env", "x", "--env-kwargs.g", "9.81", "--env_kwargs.n=2")["env_kwargs"] == {"g": 9.81, "n": 2}
    assert values("--env", "x", "--stop-at", "-1e2")["stop_at"] == -100


@pytest.mark.parametrize(("tokens", "said"), [
    (["trian"], "did you mean 'train'?"),
    (["train", "fkae"], "did you mean 'fake'?"),
    (["train", "fake", "--env", "x", "--hiden", "[3]"], "did you mean '--hidden'?"),
    (["train", "fake", "--env", "x", "--stop_ta=3"], "did you mean '--stop-at'?"),
    (["train", "fake", "--env", "x", "--lr", "fast"], "field '--lr' is fast, expected float; learning rate"),
    (["train", "fake", "--env", "x", "--epochs", "2.5"], "field '--epochs' is 2.5, expected int | None"),
    (["train", "fake", "--env", "x", "--lr"], "field '--lr' has no value, expected float"),
    (["train", "fake", "Pendulum-v1"], "options that begin with --"),
    (["train", "fake"], "field '--env' is missing"),
    (["train", "fake", "--env", "x", "--preset", "Pendulum"], "did you mean 'Pendulum-v1'?"),
    (["train", "fake", "--env", "x", "--epochs", "1", "--env-steps", "1"], "expected one budget"),
    (["train", "--env", "x"], "field 'algorithm' is missing"),
    (["play"], "field 'run' is missing"),
    (["play", "no/such/run"], "has no config.yaml"),
])
def test_a_wrong_command_line_says_what_to_change(tokens, said, capsys):
    code = main(tokens)
    out = capsys.readouterr()
    assert said in out.err and out.out == "" and "Traceback" not in out.err
    assert code == 2


@pytest.mark.parametrize(("text", "said"), [("leraning: 1", "field 'leraning' does not exist (in"), ("lr: [1]", "field 'lr' is"),
                                            ("- 1", "a mapping of settings"), ("a: b: c", "cannot be read"), ("sed: 1", "did you mean 'seed'?")])
def test_a_wrong_file_says_what_to_change(text, said, tmp_path):
    (tmp_path/"mine.yaml").write_text(text)
    with pytest.raises(UsageError) as e:
        values("--env", "x", "--config", str(tmp_path/"mine.yaml"))
    assert said in str(e.value) and "mine.yaml" in str(e.value)


def test_a_run_leaves_its_folder(tmp_path, capsys):
    out = tmp_path/"run"
    assert main(["train", "fake", "--env", "Pendulum-v1", "--seed", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint", "config.yaml", "metrics.csv", "rewards.png", "verdict.json"]
    config = yaml.safe_load((out/"config.yaml").read_text())
    assert config["algorithm"] == "fake" and config["lr"] == 0.01 and config["seed"] == 2 and "overwrite" not in config
    assert [row["env_steps"] for row in read_rows(out/"metrics.csv")] == [10, 20, 30, 40]
    assert json.loads((out/"verdict.json").read_text())["mean"] == -160 and BUILT[-1].validations == [(200, True, 10_000)]
    assert "\x1b" not in said and "\r" not in said, "what goes into a file is plain"
    for part in ("FakeStack", "critic loss", "Verdict: mean return -160.0", "10000 to 10199", f"fastrl_pipes play {out}"):
        assert part in said


def test_the_config_of_a_run_repeats_it(tmp_path):
    main(["train", "fake", "--env", "Pendulum-v1", "--hidden", "[9]", "--out", str(tmp_path/"a")])
    assert main(["train", "--config", str(tmp_path/"a/config.yaml"), "--out", str(tmp_path/"b")]) == 0
    assert (tmp_path/"a/config.yaml").read_text() == (tmp_path/"b/config.yaml").read_text()


def test_a_goal_is_tried_on_other_starts_before_the_run_stops(tmp_path, capsys):
    assert main(["train", "fake", "--env", "Pendulum-v1", "--stop-at", "-175", "--out", str(tmp_path/"run")]) == 0
    assert BUILT[-1].validations == [(20, True, 20_000)] * 3 + [(80, True, 20_020), (200, True, 10_000)]
    rows = read_rows(tmp_path/"run/metrics.csv")
    assert [row["validation"] for row in rows] == [-190, -180, -170]
    assert "The goal of -175 is reached" in capsys.readouterr().out


def test_a_run_is_not_overwritten_unasked(tmp_path, capsys):
    run = ["train", "fake", "--env", "Pendulum-v1", "--verdict-episodes", "0", "--out", str(tmp_path)]
    (tmp_path/"notes.txt").write_text("mine")
    built = len(BUILT)
    assert main(run) == 2 and "--overwrite" in capsys.readouterr().err and len(BUILT) == built
    assert main([*run, "--overwrite"]) == 0
    assert (tmp_path/"notes.txt").read_text() == "mine" and not (tmp_path/"verdict.json").exists()


def test_a_run_goes_on_up_to_a_new_budget(tmp_path, capsys):
    run = tmp_path/"run"
    main(["train", "fake", "--env", "Pendulum-v1", "--out", str(run)])
    assert main(["train", "--resume", str(run)]) == 2 and "more than 40" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--lr", "3"]) == 2 and "keeps its learner" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--env-steps", "60"]) == 0
    assert [row["env_steps"] for row in read_rows(run/"metrics.csv")] == [10, 20, 30, 40, 50, 60]


def test_print_config_prints_what_config_reads(tmp_path, capsys):
    assert main(["train", "fake", "--env", "Pendulum-v1", "--hidden", "[5, 6]", "--print-config"]) == 0
    (tmp_path/"mine.yaml").write_text(capsys.readouterr().out)
    assert values("--config", str(tmp_path/"mine.yaml"))["hidden"] == (5, 6)


def test_describe_and_play(tmp_path, capsys):
    main(["train", "fake", "--env", "Pendulum-v1", "--out", str(tmp_path/"run")])
    capsys.readouterr()
    assert main(["describe", "fake", "--env", "Pendulum-v1"]) == 0 and "FakeStack on Pendulum-v1" in capsys.readouterr().out
    assert main(["play", str(tmp_path/"run"), "--episodes", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("200 steps") == 2 and "mean return" in said


def test_an_interrupt_saves_and_says_how_to_go_on(tmp_path):
    run = started("train", "fake", "--env", "Pendulum-v1", "--preset", "slow", "--out", str(tmp_path/"run"), stdout=subprocess.PIPE)
    lines = []
    while not any("critic loss" in line for line in lines):
        lines.append(run.stdout.readline())
        assert lines[-1], "the run has ended too early"
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 130 and f"fastrl_pipes train --resume {tmp_path/'run'}" in said
    assert (tmp_path/"run/checkpoint/manifest.json").exists() and read_rows(tmp_path/"run/metrics.csv")


def test_what_fails_while_running_is_told_from_what_was_wrong_before(tmp_path, capsys, monkeypatch):
    def nan(*args, **kwargs):
        raise ValueError("GymStepper: field 'reward' is nan")
    monkeypatch.setattr("fake_algorithm.FakeLearner.fit", nan)
    assert main(["train", "fake", "--env", "Pendulum-v1", "--out", str(tmp_path/"run")]) == 1
    assert "field 'reward' is nan" in capsys.readouterr().err and not (tmp_path/"run/checkpoint").exists()


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals")
def test_in_a_terminal_there_is_a_bar_with_a_speed(tmp_path):
    import pty
    master, slave = pty.openpty()
    run = started("train", "fake", "--env", "Pendulum-v1", "--preset", "slow", "--epochs", "2", "--out", str(tmp_path/"run"),
                  stdout=slave, stderr=slave)
    os.close(slave)
    seen, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            chunk = os.read(master, 4096)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    assert run.wait(timeout=60) == 0
    text = seen.decode()
    assert "Epoch 1/2" in text and "steps/s" in text and "50.00% [5/10" in text and "Verdict" in text
    assert all(len(part) <= 80 for line in text.split("\n") if "Epoch" in line for part in line.split("\r")), "a bar that wraps is no bar"
