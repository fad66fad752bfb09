"""Checkpoints that somebody made to do harm, or that were damaged: each is refused with `CheckpointError`, nothing in it is executed, the learner is as it was,
and memory stays bounded (an address space limit holds it)."""
from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from contract_table import difference
from safetensors.torch import load_file, save_file

from fastrl_pipes.agents.ddpg import ddpg
from fastrl_pipes.envs.backends import make_backend
from fastrl_pipes.errors import CheckpointError
from fastrl_pipes.learner.checkpoint import load_checkpoint, read_manifest, to_plain
from fastrl_pipes.learner.resume import load_run, run_state
from fastrl_pipes.memory.segments import file_sum
from fastrl_pipes.pipes.walk import snapshot

HERE = Path(__file__).parent


def small():
    return ddpg("Pendulum-v1", seed=1, hidden1=9, hidden2=7, bs=8, max_sz=60, warmup=10, batches=10, nsteps=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("saved")
    learner = small()
    for _ in range(40):
        next(learner)
    learner.save(folder)
    return folder


# --- tools of the forger: everything that a manifest declares is in order again --------------------------------------
def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def write_manifest(folder, manifest):
    (folder / "manifest.json").write_text(json.dumps(manifest))


def seal(folder, kind):
    "Size and sum of a file as they are now"
    manifest = manifest_of(folder)
    path = folder / manifest["files"][kind]
    manifest["bytes"][kind] = path.stat().st_size
    manifest["sums"][kind] = file_sum(path) if path.is_file() else 0
    write_manifest(folder, manifest)


def edit_manifest(change):
    def attack(folder):
        manifest = manifest_of(folder)
        change(manifest)
        write_manifest(folder, manifest)
    return attack


def edit_text(change):
    "Change the text of the state"
    def attack(folder):
        path = folder / manifest_of(folder)["files"]["state"]
        path.write_text(change(path.read_text()))
        seal(folder, "state")
    return attack


def edit_state(change):
    "Change the state as JSON has it"
    def attack(folder):
        path = folder / manifest_of(folder)["files"]["state"]
        state = json.loads(path.read_text())
        change(state)
        path.write_text(json.dumps(state))
        seal(folder, "state")
    return attack


def edit_tensors(change):
    def attack(folder):
        path = folder / manifest_of(folder)["files"]["tensors"]
        tensors = {k: t.clone() for k, t in load_file(path).items()}
        change(tensors)
        save_file({k: t.contiguous() for k, t in tensors.items()}, path)
        seal(folder, "tensors")
    return attack


def replace(kind, data):
    def attack(folder):
        (folder / manifest_of(folder)["files"][kind]).write_bytes(data() if callable(data) else data)
        seal(folder, kind)
    return attack


def edit_rows(change):
    def attack(folder):
        manifest = manifest_of(folder)
        (listing,) = manifest["rows"].values()
        change(listing, folder)
        write_manifest(folder, manifest)
    return attack


class Evil:
    "Leaves a trace when it is unpickled"

    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL_TRACE"],)


def tensor_called(tensors, part):
    return next(k for k in tensors if part in k)


def put(tensors, part, make):
    key = tensor_called(tensors, part)
    tensors[key] = make(tensors[key])


def link(kind, to=None):
    def attack(folder):
        path = folder / manifest_of(folder)["files"][kind]
        target = to or folder.parent / "moved"
        if to is None:
            shutil.move(path, target)
        else:
            path.unlink()
        path.symlink_to(target)
    return attack


def fifo(name=None):
    def attack(folder):
        path = folder / (name or manifest_of(folder)["files"]["state"])
        path.unlink()
        os.mkfifo(path)
    return attack


def moved_up(kind):
    def attack(folder):
        manifest = manifest_of(folder)
        shutil.copy(folder / manifest["files"][kind], folder.parent / "elsewhere")
        manifest["files"][kind] = "../elsewhere"
        write_manifest(folder, manifest)
    return attack


def header(text, data=b""):
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw + data


def own(name):
    return lambda s: s["pipes"][name]


def hole(path, size):
    "A file that takes no disk"
    with open(path, "wb") as f:
        f.truncate(size)


NAN_KEY = {"__kind__": "items", "items": [[{"__kind__": "float", "value": "nan"}, 1]]}
DEEP = "[" * 100_000 + "]" * 100_000
ATTACKS = {
    "a pickle for a manifest": lambda f: (f / "manifest.json").write_bytes(pickle.dumps(Evil())),
    "a pickle for the state": replace("state", lambda: pickle.dumps(Evil())),
    "a pickle for the tensors": replace("tensors", lambda: pickle.dumps(Evil())),
    "torch.save for the tensors": lambda f: (torch.save({"x": Evil()}, f / manifest_of(f)["files"]["tensors"]), seal(f, "tensors")),
    "a pickle for the rows": edit_rows(lambda rows, f: (f / rows[0]["name"]).write_bytes(pickle.dumps(Evil()))),
    "state outside of the folder": moved_up("state"),
    "tensors outside of the folder": moved_up("tensors"),
    "an absolute path": edit_manifest(lambda m: m["files"].update(state="/etc/hostname")),
    "a path with a null": edit_manifest(lambda m: m["files"].update(state="state-\0.json")),
    "rows outside of the folder": edit_rows(lambda rows, f: rows[0].update(name="../../../../etc/passwd")),
    "a number for a name": edit_manifest(lambda m: m["files"].update(state=3)),
    "files that are a list": edit_manifest(lambda m: m.update(files=[1])),
    "rows that are a list": edit_manifest(lambda m: m.update(rows=[1])),
    "no rows": edit_manifest(lambda m: m.update(rows={})),
    "a link for the manifest": lambda f: (shutil.move(f / "manifest.json", f.parent / "m"), (f / "manifest.json").symlink_to(f.parent / "m")),
    "a link for the state": link("state"),
    "a link for the tensors": link("tensors", "/etc/hostname"),
    "a device for the tensors": link("tensors", "/dev/zero"),
    "a fifo for the state": fifo(),
    "a fifo for the manifest": fifo("manifest.json"),
    "a folder for the state": lambda f: ((p := f / manifest_of(f)["files"]["state"]).unlink(), p.mkdir()),
    "a manifest nested deep": lambda f: (f / "manifest.json").write_text(DEEP),
    "a state nested deep": edit_text(lambda text: DEEP),
    "a value nested deep": edit_text(lambda text: text[:-1] + ', "more": ' + "[" * 900 + "]" * 900 + "}"),
    "marks nested deep": edit_text(lambda text: text[:-1] + ', "more": ' + '{"__kind__": "tuple", "items": [' * 400 + "]}" * 400 + "}"),
    "a key that is not equal to itself": edit_state(lambda s: s["pipes"]["BatchCollector"].update(count=NAN_KEY)),
    "a key that is a list": edit_state(lambda s: s["pipes"]["BatchCollector"].update(count={"__kind__": "items", "items": [[[1], 1]]})),
    "NaN as a word": edit_text(lambda text: text.replace('"count": ', '"count": NaN, "other": ', 1)),
    "a number of many digits": edit_text(lambda text: text.replace('"count": ', '"count": ' + "9" * 6000 + ', "other": ', 1)),
    "an unknown kind": edit_text(lambda text: text.replace('"__kind__": "tensor"', '"__kind__": "eval"', 1)),
    "a step type that is none": edit_text(lambda text: text.replace('"SimpleStep"', '"os.system"')),
    "foreign JSON": edit_text(lambda text: '{"weights": [1, 2, 3]}'),
    "a list": edit_text(lambda text: "[]"),
    "a manifest that is foreign": lambda f: write_manifest(f, {"format": "torchtune", "files": {}}),
    "sums that are missing": edit_manifest(lambda m: m.pop("sums")),
    "another sum": edit_manifest(lambda m: m["sums"].update(state=1)),
    "tensors cut short": lambda f: ((p := f / manifest_of(f)["files"]["tensors"]).write_bytes(p.read_bytes()[:-5]), seal(f, "tensors")),
    "rows cut short": edit_rows(lambda rows, f: (f / rows[0]["name"]).write_bytes(b"\0" * 10)),
    "a bit of a row": edit_rows(lambda rows, f: (p := f / rows[0]["name"]).write_bytes(bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:])),
    "a header of many bytes": replace("tensors", struct.pack("<Q", 2**60) + b"{}"),
    "a header that promises much": replace("tensors", lambda: header('{"0:x": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}')),
    "offsets that overlap": replace("tensors", lambda: header('{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "b": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}', b"\0" * 8)),
    "negative shapes": replace("tensors", lambda: header('{"a": {"dtype": "U8", "shape": [-8], "data_offsets": [0, 8]}}', b"\0" * 8)),
    "a dtype that is none": replace("tensors", lambda: header('{"a": {"dtype": "O64", "shape": [1], "data_offsets": [0, 8]}}', b"\0" * 8)),
    "weights of another dtype": edit_tensors(lambda t: put(t, "SimpleModelRunner.model/", lambda x: x.double())),
    "weights of another shape": edit_tensors(lambda t: put(t, "SimpleModelRunner.model/", lambda x: x[:1])),
    "moments of another dtype": edit_tensors(lambda t: put(t, "exp_avg", lambda x: x.to(torch.int32))),
    "moments of another shape": edit_tensors(lambda t: put(t, "exp_avg_sq", lambda x: x.flatten()[:2])),
    "counts of another dtype": edit_tensors(lambda t: put(t, "step_n", lambda x: x.float())),
    "counts of another shape": edit_tensors(lambda t: put(t, "pipes/GymStepper/total", lambda x: x.repeat(3, 1))),
    "windows of other environments": edit_tensors(lambda t: put(t, "held", lambda x: x.repeat(5))),
    "noise of another shape": edit_tensors(lambda t: put(t, "OrnsteinUhlenbeck/x", lambda x: x.repeat(1, 9))),
    "observations of another dtype": edit_tensors(lambda t: put(t, "envs/shown", lambda x: x.double())),
    "a torch generator of another size": edit_tensors(lambda t: put(t, "generators/torch", lambda x: x[:100])),
    "a torch generator of another dtype": edit_tensors(lambda t: put(t, "generators/torch", lambda x: x.float())),
    "Python's generator": edit_state(lambda s: s["generators"].update(python=[1, 2, 3])),
    "NumPy's generator": edit_state(lambda s: s["generators"]["numpy"].update(bit_generator="os.system")),
    "the stepper's generator": edit_state(lambda s: own("GymStepper")(s)["generator"].update(bit_generator="MT19937")),
    "a state that belongs to no network": edit_state(lambda s: s["modules"].update(evil={})),
    "a pipe too many": edit_state(lambda s: s["pipes"].update(evil={})),
    "a count that is text": edit_state(lambda s: own("BatchCollector")(s).update(count="many")),
    "steps that are text": edit_state(lambda s: own("GymStepper")(s).update(env_steps="many")),
    "a recorder of text": edit_state(lambda s: s["recorder"].update(rewards=["high"])),
    "a window without end": edit_state(lambda s: s["recorder"].update(window=-1)),
    "a learning rate that is text": edit_state(lambda s: s["modules"]["critic_opt.opt"]["param_groups"][0].update(lr="high")),
    "a layout of much": edit_state(lambda s: s["modules"]["ReplayWriter.memory"]["layout"]["columns"].append(["value", "float64", [2**30]])),
    "a layout that overflows": edit_state(lambda s: s["modules"]["ReplayWriter.memory"]["layout"]["columns"].append(["value", "float64", [2**31, 2**31, 4]])),
    "a layout of objects": edit_state(lambda s: s["modules"]["ReplayWriter.memory"]["layout"]["columns"][0].__setitem__(1, "O")),
    "rows that were never written": edit_state(lambda s: s["modules"]["ReplayWriter.memory"].update(written=10**15)),
    "segments that promise much": edit_rows(lambda rows, f: rows[0].update(stop=10**12)),
    "segments with a gap": edit_rows(lambda rows, f: rows[0].update(start=5)),
    "segments that say more": edit_rows(lambda rows, f: rows[0].update(evil=1)),
    "a segment that is huge": edit_rows(lambda rows, f: hole(f / rows[0]["name"], 2**40)),
    "a state that is huge": lambda f: (hole(f / manifest_of(f)["files"]["state"], 2**40), edit_manifest(lambda m: m["bytes"].update(state=2**40))(f)),
    "a manifest that is huge": lambda f: hole(f / "manifest.json", 2**40),
    "another environment": edit_text(lambda text: text.replace('"PendulumEnv"', '"subprocess"')),
    "a method of the environment": edit_text(lambda text: text.replace('"last_u":', '"step":')),
    "a dunder of the environment": edit_text(lambda text: text.replace('"last_u":', '"__class__":')),
    "a constant of the environment": edit_text(lambda text: text.replace('"last_u":', '"spec":')),
    "a kind of attribute that is none": edit_text(lambda text: text.replace('"is": "generator"', '"is": "import"')),
    "an attribute of many": edit_text(lambda text: text.replace('"is": "array"', '"is": "same", "of": 99')),
    "a graph of text": edit_manifest(lambda m: m.update(graph="none")),
}


def whole(learner):
    return {**snapshot(learner), "recorder": learner.recorder.get_state()}


@pytest.mark.parametrize("name", ATTACKS)
def test_is_refused_and_changes_nothing(name, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_TRACE", str(tmp_path / "trace"))
    torch.set_num_threads(1)
    folder = tmp_path / "c"
    shutil.copytree(saved, folder)
    ATTACKS[name](folder)
    learner, fresh = small(), small()
    for _ in range(5):
        next(learner)
    before = whole(learner)
    for x in (learner, fresh):
        with limited(), pytest.raises(CheckpointError) as e:
            x.load(folder)
        assert len(str(e.value)) < 2000, "a message can be read"
    assert not (tmp_path / "trace").exists(), "it was executed"
    assert not (d := difference(whole(learner), before, "state")), d
    next(learner), next(fresh)
    assert fresh.load(saved) is fresh, "the learner can still be used"


def limited(more=2**30):
    "At most this much memory beyond what is there"
    class Limit:
        def __enter__(self):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            self.before = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, self.before[1]))

        def __exit__(self, *error):
            resource.setrlimit(resource.RLIMIT_AS, self.before)
    return Limit()


def test_every_attack_changes_something(saved, tmp_path, monkeypatch):
    "An attack that finds nothing to change would pass for refused"
    monkeypatch.setenv("EVIL_TRACE", str(tmp_path / "trace"))
    for i, (name, attack) in enumerate(ATTACKS.items()):
        folder = tmp_path / str(i)
        shutil.copytree(saved, folder)
        attack(folder)
        same = all((folder / p.name).is_file() and not (folder / p.name).is_symlink() and (folder / p.name).stat().st_size == p.stat().st_size
                   and (folder / p.name).read_bytes() == p.read_bytes() for p in saved.iterdir())
        assert not same, name


# --- load_run: what a manifest may ask for ---------------------------------------------------------------------------
RUNS = {
    "no run": lambda m: m.update(run=None),
    "an algorithm that is none": lambda m: m["run"].update(algorithm="os"),
    "a path for an algorithm": lambda m: m["run"].update(algorithm="../evil"),
    "a module for an algorithm": lambda m: m["run"].update(algorithm="core"),
    "settings that are a list": lambda m: m["run"].update(settings=[1]),
    "an unknown setting": lambda m: m["run"]["settings"].update(evil=1),
    "a setting of another type": lambda m: m["run"]["settings"].update(hidden1="many"),
    "an environment that imports": lambda m: m["run"]["settings"].update(env="antigravity:Evil-v0"),
    "an environment that is none": lambda m: m["run"]["settings"].update(env="Evil-v0"),
    "an environment with a path": lambda m: m["run"]["settings"].update(env="../evil:Evil-v0"),
    "a huge layer": lambda m: m["run"]["settings"].update(hidden1=40_000, hidden2=40_000),
    "a layer beyond all memory": lambda m: m["run"]["settings"].update(hidden1=10**12, hidden2=10**12),
    "many environments": lambda m: m["run"]["settings"].update(n=10**9),
    "a huge batch": lambda m: m["run"]["settings"].update(bs=10**9, max_sz=10**12),
    "other settings": lambda m: m["run"]["settings"].update(tau=0.5),
    "a device that is none": lambda m: m["run"]["settings"].update(device="evil"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_asks_for_much_is_refused(name, saved, tmp_path):
    torch.set_num_threads(1)
    folder = tmp_path / "c"
    shutil.copytree(saved, folder)
    edit_manifest(RUNS[name])(folder)
    with limited(), pytest.raises(CheckpointError):
        load_run(folder)
    assert "antigravity" not in sys.modules


def test_the_untouched_one_loads_within_the_same_limit(saved):
    with limited():
        learner = load_run(saved)
        assert learner.env_steps == small().load(saved).env_steps > 0


def test_reading_a_checkpoint_imports_nothing_and_unpickles_nothing(saved):
    "An audit hook sees every import, every unpickled name, every exec and every file that is opened"
    code = f"""
import sys, pathlib
sys.path.insert(0, {str(HERE)!r})
import test_hostile as t
x = t.small()
next(x)
x.save({str(saved.parent / 'warm')!r}); x.load({str(saved.parent / 'warm')!r})
seen = []
sys.addaudithook(lambda event, args: seen.append((event, str(args[:1]))) if event in ("exec", "import", "pickle.find_class", "compile", "os.system", "subprocess.Popen", "socket.connect") else None)
x.load({str(saved)!r})
next(x)
found = list(seen)
print(found)
sys.exit(bool([f for f in found if f[0] != "import"]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, cwd=HERE,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_what_cannot_be_written_is_refused_when_it_is_written(tmp_path):
    learner = small()
    learner.recorder.record("loss", 1.0)
    learner.source.get_own = lambda: {"evil": object()}
    with pytest.raises(TypeError, match="object"):
        learner.save(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_the_parts_of_a_state_that_this_file_attacks_are_there(saved):
    state, manifest = load_checkpoint(saved)
    tensors: dict = {}
    to_plain(state, tensors)
    for part in ("SimpleModelRunner.model/", "exp_avg_sq", "step_n", "held", "OrnsteinUhlenbeck/x", "envs/shown", "generators/torch"):
        assert tensor_called(tensors, part)
    assert read_manifest(saved)["environments"] == "exact" and np.isfinite(run_state(small_started())["recorder"]["env_steps"])


def small_started():
    learner = small()
    learner.start()
    return learner


def test_a_snapshot_of_a_vector_environment_without_its_environments_is_refused():
    backend = make_backend("CartPole-v1", n=3, mode="native", seed=0)
    backend.observe()
    state = backend.snapshot()
    backend.restore(state)
    for damage in ({"envs": []}, {"envs": None}, {"fake": None}):
        with pytest.raises(CheckpointError, match="VectorBackend"):
            backend.restore({**state, **damage})
