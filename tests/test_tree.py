"""The shape of the house: floors, docstrings, names, notebooks. Every check is a function from a tree to a list of
complaints; each is run over this repository, where the list must be empty, and over a small tree with the fault planted."""
import ast
import io
import json
import re
import textwrap
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PKG = "fastrl_pipes"

# A module imports from rooms on floors below its own, or from its own folder. `agents/*` is every algorithm.
FLOORS = [
    {"core", "errors"},
    {"functional"},
    {"networks", "pipes"},
    {"envs", "memory", "exploration", "loggers"},
    {"agents/core", "learner", "processors"},
    {"agents/*"},
    {"distributed", "cli"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
FORBIDDEN_NAMES = {"util", "utils", "common", "misc", "helper", "helpers"}
ONLY_IN = {"torchdata": "pipes.core", "ray": "distributed"}  # library: the one module or room that may import it


# --- reading ---------------------------------------------------------------------------------------------------------
def modules(root):
    "`{dotted name below the package: path}` of every module, packages' `__init__` and nbdev's index left out"
    pkg = Path(root)/PKG
    return {".".join(p.relative_to(pkg).with_suffix("").parts): p for p in sorted(pkg.rglob("*.py"))
            if p.name not in ("__init__.py", "_modidx.py") and "__pycache__" not in p.parts}

def imported(path, mod, is_pkg=False):
    "Absolute dotted names that the module `mod` (full name) imports, wherever in the file, with `import_module('x')`"
    res = []
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): res += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = mod.split(".")[:len(mod.split(".")) - node.level + is_pkg] if node.level else []
            base = ".".join(up + ([node.module] if node.module else []))
            res += [f"{base}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"): res.append(str(node.args[0].value))
    return res

def room_of(name):
    "The room of a dotted name below the package: its folder, except that each algorithm is a room of its own"
    parts = name.split(".")
    return "/".join(parts[:2]) if parts[0] == "agents" else parts[0]

def floor_of(room):
    "Its floor, or None for a room that is not in the table"
    if room in FLOOR: return FLOOR[room]
    return FLOOR["agents/*"] if room.startswith("agents/") and room != "agents/*" else None

def public_defs(path):
    "Functions and classes defined in the module and named in its `__all__`"
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    names = {n for node in tree.body if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
             for n in ast.literal_eval(node.value)}
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    return [node for node in tree.body if isinstance(node, kinds) and node.name in names]

def notebooks(root):
    "Notebooks below `nbs`, without checkpoints and folders that start with a dot or an underscore"
    nbs = Path(root)/"nbs"
    return [p for p in sorted(nbs.rglob("*.ipynb")) if not any(o[0] in "._" for o in p.relative_to(nbs).parts)]

def exported_to(path):
    "The module named by a notebook's `default_exp`, or None"
    nb = json.loads(Path(path).read_text(encoding="utf-8"))
    meta = nb["metadata"].get("nbdev", {}).get("default_exp")
    src = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]
    found = [m[1] for s in src if (m := re.search(r"^\s*#\|\s*default_exp:?\s+(\S+)", s, re.M))]
    return found[0] if found else meta


# --- checks ----------------------------------------------------------------------------------------------------------
def check_floors(root):
    "Imports that go up, sideways, or to a room that is not in the table"
    res = []
    for name, path in modules(root).items():
        room, floor = room_of(name), floor_of(room_of(name))
        if floor is None:
            res.append(f"{name}: room '{room}' is on no floor; rooms are {sorted(FLOOR)}")
            continue
        for imp in imported(path, f"{PKG}.{name}"):
            if not imp.startswith(PKG + ".") or imp == f"{PKG}.__version__": continue
            there = room_of(imp.removeprefix(PKG + "."))
            below = floor_of(there)
            ground = room in FLOORS[0] and there in FLOORS[0]  # `core` and `errors` share the top folder
            if there == room or ground: continue
            if below is None: res.append(f"{name}: imports '{imp}', which is on no floor")
            elif below >= floor:
                res.append(f"{name} (floor {floor}) imports '{imp}' (floor {below}): only floors below, or its own folder")
    return res

def check_only_in(root):
    "Libraries imported outside the one place that may import them"
    return [f"{name}: imports {lib}, which only '{home}' may"
            for name, path in modules(root).items() for imp in imported(path, f"{PKG}.{name}")
            for lib, home in ONLY_IN.items()
            if imp.split(".")[0] == lib and not (name == home or name.startswith(home + "."))]

def check_packages_are_empty(root):
    "Packages' `__init__` files that import modules of the package: `import fastrl_pipes.x` would then load more than x"
    pkg = Path(root)/PKG
    res = []
    for p in sorted(pkg.rglob("__init__.py")):
        mod = ".".join(p.parent.relative_to(pkg.parent).parts)
        res += [f"{p.relative_to(root)}: imports '{i}'" for i in imported(p, mod, is_pkg=True) if i.startswith(PKG)]
    return res

def check_names(root):
    "Modules and folders whose name says nothing"
    return [f"{name}: what lives there? '{bad}' does not say" for name in modules(root)
            for bad in FORBIDDEN_NAMES & set(name.lower().split("."))]

def check_docstrings(root):
    "Public functions and classes without a docstring"
    return [f"{name}.{node.name}: no docstring" for name, path in modules(root).items()
            for node in public_defs(path) if not (ast.get_docstring(node) or "").strip()]

def _params(node):
    "Lines (first, last) of each parameter of a function, of a class's `__init__`, or of a dataclass's fields"
    if isinstance(node, ast.ClassDef):
        init = next((o for o in node.body if isinstance(o, ast.FunctionDef) and o.name == "__init__"), None)
        if init is not None: return _params(init)
        if "dataclass" not in "".join(ast.dump(d) for d in node.decorator_list): return {}
        return {o.target.id: (o.lineno, o.end_lineno) for o in node.body if isinstance(o, ast.AnnAssign)}
    a = node.args
    pos, kw = a.posonlyargs + a.args, a.kwonlyargs
    default = dict(zip([o.arg for o in reversed(pos)], reversed(a.defaults))) | dict(zip([o.arg for o in kw], a.kw_defaults))
    return {o.arg: (o.lineno, (default.get(o.arg) or o).end_lineno) for o in pos + kw if o.arg not in ("self", "cls")}

def check_parameters(root):
    "Parameters of public functions and classes without a comment: its shape, unit or range, on its line or the one above"
    res = []
    for name, path in modules(root).items():
        text = path.read_text(encoding="utf-8")
        toks = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
        said = {t.start[0] for t in toks}
        alone = {t.start[0] for t in toks if t.line.lstrip().startswith("#")}
        res += [f"{name}.{node.name}: parameter '{p}' has no comment" for node in public_defs(path)
                for p, (first, last) in _params(node).items() if not (first in said or last in said or first - 1 in alone)]
    return res

def check_notebooks(root):
    "Notebooks whose module is missing, and modules that no notebook makes"
    mods = modules(root)
    made = {exp: nb for nb in notebooks(root) if (exp := exported_to(nb))}
    return ([f"{nb.relative_to(root)}: exports to '{exp}', but {PKG}/{exp.replace('.', '/')}.py does not exist"
             for exp, nb in made.items() if exp not in mods]
            + [f"{name}: no notebook exports to it" for name in mods if name not in made])

CHECKS = [check_floors, check_only_in, check_packages_are_empty, check_names, check_docstrings, check_parameters, check_notebooks]


# --- this repository -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_repository_keeps(check):
    complaints = check(ROOT)
    assert not complaints, f"{check.__doc__}:\n" + "\n".join(complaints)


# --- planted faults --------------------------------------------------------------------------------------------------
GOOD = {
    "__init__": '"A package."',
    "errors": '__all__ = ["PipeError"]\nclass PipeError(ValueError): "What went wrong."',
    "core": "from .errors import *",
    "functional.returns": """
        __all__ = ['decay']
        def decay(
            rewards, # [B, T] float
            discount:float=.99, # in [0, 1]
        ):
            "What enters, what leaves."
            return rewards*discount""",
    "pipes.core": "import torchdata.nodes\nfrom ..core import *",
    "pipes.control": "from .core import Pipe",
    "agents.core": "from ..pipes.control import Every",
    "agents.ddpg": "from .core import Agent\nfrom ..pipes import core",
    "cli": "from fastrl_pipes import __version__\nfrom fastrl_pipes.agents.ddpg import DDPGLearner",
}

def plant(root, **files):
    "Write the good tree below `root`, with `files` (dotted names, `__` for a dot) laid over it; None leaves one out"
    tree = {k: v for k, v in {**GOOD, **{k.replace("__", ".") if k != "__init__" else k: v for k, v in files.items()}}.items()}
    for i, (name, src) in enumerate(tree.items()):
        path = Path(root)/PKG/(name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        if src is not None: path.write_text(textwrap.dedent(src), encoding="utf-8")
        if name == "__init__": continue
        nb = Path(root)/"nbs"/f"{i:02}_{name}.ipynb"
        nb.parent.mkdir(exist_ok=True)
        cell = {"cell_type": "code", "metadata": {}, "source": [f"#| default_exp {name}"], "outputs": []}
        nb.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return root

@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_a_good_tree_has_no_complaints(tmp_path, check): assert check(plant(tmp_path)) == []

FAULTS = {
    "upwards": (check_floors, dict(functional__returns="from fastrl_pipes.pipes.core import Pipe"), "floor 2"),
    "upwards, relative": (check_floors, dict(core="from .cli import main"), "floor 6"),
    "upwards, in a function": (check_floors, dict(pipes__core="def f():\n    import fastrl_pipes.envs.gym"), "floor 3"),
    "upwards, by name": (check_floors, dict(core="import importlib\nimportlib.import_module('fastrl_pipes.learner.core')"), "floor 4"),
    "sideways between rooms": (check_floors, dict(pipes__control="from ..networks.mlp import MLP"), "floor 2"),
    "sideways between algorithms": (check_floors, dict(agents__td3="from .ddpg import DDPGLearner"), "floor 5"),
    "sideways, from the folder": (check_floors, dict(agents__td3="from fastrl_pipes.agents import ddpg"), "floor 5"),
    "up from the agents' core": (check_floors, dict(agents__core="from .ddpg import Actor"), "floor 5"),
    "an unknown room": (check_floors, dict(attic__boxes="x = 1"), "on no floor"),
    "import of an unknown room": (check_floors, dict(core="import fastrl_pipes.attic"), "on no floor"),
    "torchdata outside": (check_only_in, dict(pipes__control="from torchdata.nodes import BaseNode"), "torchdata"),
    "ray outside": (check_only_in, dict(cli="import ray"), "ray"),
    "a package that loads its modules": (check_packages_are_empty, {"__init__": "from .core import *"}, "__init__.py"),
    "a module named utils": (check_names, dict(pipes__utils="x = 1"), "utils"),
    "a folder named common": (check_names, dict(common__shapes="x = 1"), "common"),
    "no docstring": (check_docstrings, dict(core="__all__ = ['f']\ndef f(): pass"), "core.f"),
    "a class without one": (check_docstrings, dict(core="__all__ = ['C']\nclass C: x = 1"), "core.C"),
    "a bare parameter": (check_parameters, dict(core="__all__ = ['f']\ndef f(\n    a, # [B]\n    b=1,\n): 'Doc.'"), "'b'"),
    "a bare constructor": (check_parameters, dict(core="__all__ = ['C']\nclass C:\n    'Doc.'\n    def __init__(self, lr): pass"), "'lr'"),
    "a bare field": (check_parameters, dict(core="__all__ = ['C']\n@dataclass\nclass C:\n    'Doc.'\n    x: int = 1"), "'x'"),
    "a notebook without its module": (check_notebooks, dict(learner__core=None), "does not exist"),
}

@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(tmp_path, name):
    check, files, word = FAULTS[name]
    complaints = check(plant(tmp_path, **files))
    assert len(complaints) == 1 and word in complaints[0], complaints

def test_a_module_without_notebook_is_found(tmp_path):
    plant(tmp_path)
    (tmp_path/PKG/"learner").mkdir()
    (tmp_path/PKG/"learner"/"core.py").write_text("x = 1", encoding="utf-8")
    assert check_notebooks(tmp_path) == ["learner.core: no notebook exports to it"]
