"""The libraries that `speed.py` and `time_to_solve.py` compare with, installed from the registry.

    python benchmarks/peers.py [--into benchmarks/.peers] [sb3 sbx tianshou torchrl skrl d3rlpy cpprb]

Makes a virtual environment `base` with PyTorch, in the version that `constraints.txt` pins, and gymnasium with MuJoCo; then one for each library, which sees the packages of `base` and adds its own. So PyTorch is there once, and
two libraries that want different versions of something do not meet. A library that does not install, or cannot be imported, is named with the end of what pip said, and left out. What is there already is kept; `--again` makes it anew.
On Linux the registry's PyTorch is a CUDA build; to keep to the CPU, give pip the index of CPU builds, for example by PIP_INDEX_URL and PIP_EXTRA_INDEX_URL.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = {"sb3": ("stable-baselines3", "stable_baselines3"), "sbx": ("sbx-rl", "sbx"), "tianshou": ("tianshou", "tianshou"), "torchrl": ("torchrl", "torchrl"), "skrl": ("skrl", "skrl"), "d3rlpy": ("d3rlpy", "d3rlpy"),
         "cpprb": ("cpprb", "cpprb")}
BASE = ["torch", "gymnasium[mujoco]>=1.1", "numpy"]


def python_of(folder):
    "The interpreter of a virtual environment"
    return next((p for p in (folder/"bin"/"python", folder/"Scripts"/"python.exe") if p.exists()), folder/"bin"/"python")


def pinned(constraints):
    "The line of constraints.txt that pins torch. Raises ValueError where there is none"
    found = re.search(r"^torch==\S+", constraints.read_text(encoding="utf-8"), re.M)
    if not found:
        raise ValueError(f"peers: field '{constraints}' has no line torch==..., expected the tested version")
    return found[0]


def make(folder, packages, constraint, module, base=None):
    "A virtual environment with some packages. Returns what went wrong, or nothing"
    venv.create(folder, with_pip=True)
    python = str(python_of(folder))
    if base is not None:
        where = [subprocess.run([str(p), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True).stdout.strip() for p in (python_of(base), python)]
        (Path(where[1])/"base.pth").write_text(where[0] + "\n")
    for command in ([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraint), *packages], [python, "-c", f"import {module}"]):
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            return "\n".join(ran.stderr.strip().splitlines()[-5:]) or f"exit code {ran.returncode}"
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", help=f"of {list(PEERS)}; default: all")
    parser.add_argument("--into", type=Path, default=HERE/".peers", help="folder of the environments")
    parser.add_argument("--constraints", type=Path, default=HERE.parent/"constraints.txt")
    parser.add_argument("--again", action="store_true", help="make anew what is there")
    args = parser.parse_args()
    if unknown := set(args.peers) - set(PEERS):
        parser.error(f"unknown: {sorted(unknown)}; there are {list(PEERS)}")
    args.into.mkdir(parents=True, exist_ok=True)
    constraint = args.into/"constraint.txt"
    constraint.write_text(pinned(args.constraints) + "\n")
    base, left_out = args.into.resolve()/"base", []
    for name in ("base", *(args.peers or PEERS)):
        folder = args.into.resolve()/name
        if (folder/"ready").exists() and not args.again:
            print(f"{name}: is there")
            continue
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{name}: installing ...", flush=True)
        wrong = make(folder, BASE, constraint, "torch, gymnasium, mujoco") if name == "base" else make(folder, [PEERS[name][0]], constraint, PEERS[name][1], base)
        if wrong and name == "base":
            sys.exit(f"base: did not install\n{wrong}")
        if wrong:
            left_out.append(name)
            print(f"{name}: left out\n{wrong}", flush=True)
        else:
            (folder/"ready").touch()
            print(f"{name}: ready", flush=True)
    print("\nleft out: " + (", ".join(left_out) or "nobody"))


if __name__ == "__main__":
    main()
