"""What coming in costs: importing an algorithm loads torch, NumPy, gymnasium and torchdata, and what is rarely used comes when it is used."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LATE = ("IPython", "PIL", "ale_py", "av", "fastcore", "fastprogress", "h5py", "jsonargparse", "matplotlib", "minari", "mujoco", "optuna", "pandas", "pygame", "ray", "scipy", "sympy", "tensorboard",
        "torch._dynamo", "torch._inductor", "trackio", "wandb", "yaml")
HEAVY = ("gymnasium", "numpy", "torch", "torchdata", *LATE)
ALGORITHMS = sorted(p.stem for p in (ROOT/"fastrl_pipes"/"agents").glob("*.py") if p.stem not in ("__init__", "core"))


def run(code, cwd=ROOT):
    "What a fresh interpreter prints last, which is JSON"
    ran = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def loads(statement, names, before="pass", cwd=ROOT):
    "Those of the names that a statement imports, beyond what the one before it did"
    return run(f"import sys\n{before}\nthere = set(sys.modules)\n{statement}\nimport json\nprint(json.dumps([n for n in {names} if n in sys.modules and n not in there]))", cwd)


def test_every_algorithm_imports_nothing_that_can_wait():
    assert ALGORITHMS
    assert loads("\n".join(f"from fastrl_pipes.agents.{name} import *" for name in ALGORITHMS), LATE, "import torch") == []


@pytest.mark.parametrize("statement", ["import fastrl_pipes", "import fastrl_pipes.cli", "from fastrl_pipes.cli import main\nmain(['--help'])"], ids=["package", "cli", "help"])
def test_the_package_and_its_help_need_not_even_torch(statement):
    assert loads(statement, HEAVY) == []


def test_an_import_that_could_wait_is_found(tmp_path):
    (tmp_path/"door.py").write_text("import torch\nimport scipy\n")
    assert loads("import door", LATE, cwd=tmp_path) == ["scipy"]
    assert {"numpy", "torch"} <= set(loads("import door", HEAVY, cwd=tmp_path))


@pytest.mark.slow
def test_an_algorithm_costs_at_most_a_third_of_a_second_over_torch():
    code = "import time, torch\nbegan = time.process_time()\nfrom fastrl_pipes.agents.sac import *\nprint(time.process_time() - began)"
    assert min(run(code) for _ in range(5)) <= 0.3
