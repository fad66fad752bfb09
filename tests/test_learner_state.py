"""The state of a whole learner: what it holds, that it comes back to the bit, that interrupts, refusals and validation leave
it as it should be, and whose batch norm moves when."""
from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from contract_table import difference
from torch import nn

import fastrl_pipes.envs.debug  # noqa: F401, its environments become known
from fastrl_pipes.agents.core import SimpleModelRunner
from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner, ddpg
from fastrl_pipes.core import SimpleStep, copied
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.errors import CheckpointError
from fastrl_pipes.learner.checkpoint import load_checkpoint, save_checkpoint, to_plain
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.loggers.collectors import BatchCollector, EpisodeCollector
from fastrl_pipes.loggers.recorder import Logger
from fastrl_pipes.memory.experience_replay import ReplaySampler
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.networks.targets import target_of
from fastrl_pipes.pipes.walk import bind, named_modules, snapshot
from fastrl_pipes.pipes.graph import find_pipe, find_pipes
from fastrl_pipes.processors.dpg import ActorLossProcessor, CriticLossProcessor
from fastrl_pipes.processors.targets import SoftTargetUpdater

ENVS = ["Pendulum-v1", "fastrl/Goal-v0", "fastrl/TwoStep-v0"]
SMALL = dict(hidden1=7, hidden2=5, bs=8, max_sz=60, warmup=10, batches=10, noise_steps=40, tau=0.05)


def small(env: str = "fastrl/Goal-v0", n: int = 1, **settings):
    "A DDPG learner with tiny networks"
    return ddpg(env, n=n, mode="single" if n == 1 else "sync", **{**SMALL, **settings})


def whole(learner, clocks: bool = False) -> dict:
    "Everything that a learner holds, without its clocks"
    recorder = learner.recorder.get_state()
    if not clocks:
        recorder["rows"] = [{k: v for k, v in row.items() if k not in ("seconds", "steps_per_second")} for row in recorder["rows"]]
    return {**snapshot(learner), "recorder": recorder}


def same(a, b, what: str = "") -> None:
    found = difference(a, b, "state")
    assert not found, f"{what} {found}"


def digest(state: dict) -> str:
    tensors: dict = {}
    plain = to_plain(state, tensors)
    h = hashlib.sha256(json.dumps(plain).encode())
    for key, t in tensors.items():
        h.update(key.encode() + t.numpy().tobytes())
    return h.hexdigest()


# --- what it holds ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env", ENVS)
def test_every_module_is_in_the_state_once_and_nothing_is_cloned(env):
    learner = small(env, batch_norm=True)
    modules = named_modules(learner)
    kinds = sorted(type(m).__name__ for m in modules.values())
    assert kinds == ["Actor", "Actor", "Adam", "Adam", "Critic", "Critic", "ReplayMemory"]
    assert len({id(m) for m in modules.values()}) == len(modules) and set(learner.get_state()["modules"]) == set(modules)
    acts = find_pipe(learner, SimpleModelRunner).model
    critic_loss, actor_loss = find_pipe(learner, CriticLossProcessor), find_pipe(learner, ActorLossProcessor)
    opts = {p.name: p for p in find_pipes(learner, BasicOptStepper)}
    targets = {p.name: p for p in find_pipes(learner, SoftTargetUpdater)}
    assert acts is actor_loss.actor is opts["actor_opt"].model is targets["actor_target"].model, "what acts is what learns"
    assert critic_loss.critic is actor_loss.critic is opts["critic_opt"].model is targets["critic_target"].model
    assert critic_loss.t_actor is targets["actor_target"].target_model and critic_loss.t_critic is targets["critic_target"].target_model
    learner.fit(2)
    assert find_pipe(learner, SimpleModelRunner).model is acts, "still, after learning"
    places = [t.data_ptr() for m in modules.values() if isinstance(m, nn.Module) for t in m.state_dict().values() if t.numel()]
    assert len(places) == len(set(places)), "networks share memory"
    for p in opts.values():
        assert {id(q) for g in p.opt.param_groups for q in g["params"]} == {id(q) for q in p.model.parameters()}


def test_acting_follows_learning():
    learner = small()
    learner.fit(1)
    observation = np.ones(2, np.float32)
    before = learner.predict(observation)
    with torch.no_grad():
        for p in find_pipe(learner, SimpleModelRunner).model.parameters():
            p.zero_()
    assert before != 0 and learner.predict(observation) == 0, "zeroed weights reach the chain that acts"


# --- save and load ---------------------------------------------------------------------------------------------------
USES = [dict(env=env) for env in ENVS] + [dict(n=3, nsteps=3), dict(repeat=3, batch_norm=True), dict(env="Pendulum-v1", n=2, nsteps=2, repeat=2, clip_critic_grad=0.5)]


@pytest.mark.parametrize("use", USES, ids=lambda u: "-".join(f"{k}={v}" for k, v in u.items()))
def test_save_and_load_bring_everything_back(use, tmp_path):
    learner, other = small(**use), small(**use)
    learner.fit(3)
    next(learner)
    assert learner.save(tmp_path / "c") == tmp_path / "c"
    before = whole(learner, clocks=True)
    same(whole(other.load(tmp_path / "c"), clocks=True), before)
    assert before["recorder"]["batch"] == 31 and len(before["recorder"]["rows"]) == 3
    memory = [p for p in named_modules(learner).values() if isinstance(p, ReplayMemory)]
    assert len(memory[0]) > 8
    sampler, twin = (find_pipe(x, ReplaySampler) for x in (learner, other))
    step = SimpleStep.random(1)
    for _ in range(5):
        same(copied(twin.forward(step)[0]), copied(sampler.forward(step)[0]), "the next batches:")


@pytest.mark.parametrize("use", USES, ids=lambda u: "-".join(f"{k}={v}" for k, v in u.items()))
def test_all_who_load_a_checkpoint_go_on_alike(use, tmp_path):
    learner, other = small(**use), small(**use)
    learner.fit(2)
    learner.save(tmp_path)
    learner.fit(1)
    learner.load(tmp_path)
    other.load(tmp_path)
    for x in (learner, other):
        x.fit(2)
    same(whole(other), whole(learner))
    assert len(other.recorder.rows) == 4 and other.env_steps == other.stepper.env_steps == learner.env_steps


CUTS = {"Pendulum": (dict(env="Pendulum-v1", n=2, nsteps=2), 50, 40), "Goal": (dict(nsteps=3, repeat=2), 45, 31),
        "every step": (dict(env="fastrl/Bandit-v0"), 25, 20), "bn": (dict(env="fastrl/Bandit-v0", batch_norm=True), 17, 9),
        "repeat": (dict(env="fastrl/Bandit-v0", repeat=3), 31, 12), "many": (dict(env="fastrl/Bandit-v0", n=3), 33, 30),
        "windows": (dict(env="fastrl/ConstantReward-v0", nsteps=3, warmup=0), 34, 30),
        "in the warm-up": (dict(env="fastrl/Bandit-v0", warmup=30), 20, 25)}


@pytest.mark.parametrize("name", CUTS)
def test_nothing_is_lost_by_a_cut(name, tmp_path):
    "N + M steps are N steps, a checkpoint, a new learner, and M steps"
    use, n, m = CUTS[name]
    straight, first, second = small(**use), small(**use), small(**use)
    for steps in (n, m):
        pull_until(straight, steps)
    pull_until(first, n)
    first.save(tmp_path)
    second.load(tmp_path)
    pull_until(second, m)
    same(whole(second), whole(straight))
    if name == "repeat":
        assert load_checkpoint(tmp_path)[0]["pipes"]["Repeat"]["left"] == 2, "batches were pending"
    if name == "in the warm-up":
        assert first.recorder.batch == 0 < second.recorder.batch


def pull_until(learner, env_steps):
    learner.fit(env_steps=env_steps)


def child(folder: str) -> None:
    "In another process: load, learn, say what became of it"
    torch.set_num_threads(1)
    learner = small(**USES[-1]).load(folder)
    loaded = digest(whole(learner))
    learner.fit(2)
    print(json.dumps([loaded, digest(whole(learner))]))


def test_another_process_goes_on_alike(tmp_path):
    learner, here = small(**USES[-1]), Path(__file__).parent
    learner.fit(2)
    learner.save(tmp_path)
    done = subprocess.run([sys.executable, "-c", f"import test_learner_state as t; t.child({str(tmp_path)!r})"], cwd=here, capture_output=True,
                          text=True, timeout=120, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])})
    assert done.returncode == 0, done.stderr[-2000:]
    loaded, learned = json.loads(done.stdout.splitlines()[-1])
    assert loaded == digest(whole(learner))
    learner.load(tmp_path)
    learner.fit(2)
    assert learned == digest(whole(learner))


def test_a_learner_can_be_saved_before_it_has_learned(tmp_path):
    learner, other = small(), small(seed=1)
    learner.save(tmp_path)
    with pytest.raises(CheckpointError, match="GymStepper"):
        other.load(tmp_path)
    same(whole(small().load(tmp_path)), whole(learner))


def test_saving_changes_nothing(tmp_path):
    learner, twin = small(n=2), small(n=2)
    for x in (learner, twin):
        x.fit(1)
    for i in range(3):
        learner.save(tmp_path / str(i))
        for x in (learner, twin):
            x.fit(1)
    same(whole(learner), whole(twin))


def test_what_shows_and_where_it_is_saved_is_no_part_of_the_state(tmp_path):
    "A run that was begun in a notebook goes on in a script"
    def build(**settings):
        actor, critic = Actor(2, 1, 7, 5), Critic(2, 1, 7, 5)
        return DDPGLearner(actor, critic, GymStepper("fastrl/Goal-v0", DDPGAgent(actor), mode="single", seed=0), bs=8, max_sz=60, batches=5, **settings)
    learner, other = build(logger_bases=[Logger()]), build(logger_bases=[])
    other.folder = tmp_path / "elsewhere"
    learner.fit(1)
    learner.save(tmp_path)
    same(whole(other.load(tmp_path)), whole(learner))


def test_factories_of_environments_can_be_resumed_by_another_process(tmp_path):
    "Their addresses are no settings"
    def build():
        def make():
            import gymnasium
            return gymnasium.make("fastrl/Goal-v0")
        actor, critic = Actor(2, 1, 7, 5), Critic(2, 1, 7, 5)
        return DDPGLearner(actor, critic, GymStepper([make, make], DDPGAgent(actor), mode="sync", seed=0), [], bs=8, max_sz=60, batches=5)
    learner, other = build(), build()
    learner.fit(1)
    learner.save(tmp_path)
    same(whole(other.load(tmp_path)), whole(learner))


def test_a_nest_of_any_values_comes_back(tmp_path):
    nest = {"zero": np.float32(0.5), "array0": np.array(3.5), "bool": np.array([True, False]), "empty": np.zeros((0, 3), np.float32),
            "strided": np.arange(12).reshape(3, 4)[:, ::2], "reversed": np.arange(4)[::-1], "t0": torch.tensor(2.5, dtype=torch.float64), "inf": float("-inf"), "nan": float("nan"),
            "big": 2**127 + 1, "none": None, "tuple": (1, [2, (3,)]), "keys": {0: "a", (1, 2): "b", "__kind__": 3}, "step": SimpleStep(reward=np.ones((1, 1)), state={"a": (np.ones(2),)}),
            "uint8": np.arange(3, dtype=np.uint8), "half": np.ones(2, np.float16), "shared": [torch.ones(2)] * 2}
    save_checkpoint(tmp_path, nest, {})
    came, _ = load_checkpoint(tmp_path)
    same(came, {**nest, "zero": 0.5})


def learned(learner) -> dict:
    "Networks and optimizers"
    return copied({k: m.state_dict() for k, m in named_modules(learner).items() if not isinstance(m, ReplayMemory)})


# --- reset -----------------------------------------------------------------------------------------------------------
def test_reset_restarts_the_streams_and_keeps_what_was_learned():
    learner = small(n=2, nsteps=2, batch_norm=True)
    learner.fit(3)
    kept = learned(learner)
    learner.reset(None)
    same(learned(learner), kept)
    assert learner.stepper.env_steps == 0 and len(find_pipe(learner, ReplaySampler).memory) == 0
    assert find_pipe(learner, BatchCollector).count == find_pipe(learner, EpisodeCollector).count == 0
    fresh = small(n=2, nsteps=2, batch_norm=True)
    fresh.start()
    for name, module in named_modules(fresh).items():
        if name in kept:
            module.load_state_dict(copied(kept[name]))
    for x in (learner, fresh):
        x.fit(1)
    states = snapshot(learner), snapshot(fresh)
    for state in states:
        state["pipes"]["GymStepper"]["envs"].pop("steps")  # of the environments' whole life
    same(*states, "as a new learner with the same parameters:")


def test_a_snapshot_can_be_gone_back_to():
    learner, twin = small(env="fastrl/Bandit-v0"), small(env="fastrl/Bandit-v0")
    learner.fit(2)
    state = snapshot(learner)
    learner.fit(2)
    learner.reset(state)
    learner.fit(2)
    twin.fit(4)
    same(snapshot(learner), snapshot(twin))


# --- interrupts ------------------------------------------------------------------------------------------------------
def press(when, times: int = 1):
    "Ctrl-C, for real, once `when()` is true"
    def wait():
        until = time.monotonic() + 20
        while not when() and time.monotonic() < until:
            time.sleep(0.001)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("where", ["learning", "warm-up", "a step that never ends"])
def test_ctrl_c_saves_a_checkpoint_and_the_learner_goes_on(where, tmp_path, capsys):
    use = dict(batches=10**9) if where == "learning" else dict(warmup=10**6, max_sz=10**6)
    learner, other = small(**use), small(**use)
    learner.folder = tmp_path / "interrupted"
    when = {"learning": lambda: learner.recorder.batch > 20, "warm-up": lambda: learner.env_steps > 30, "a step that never ends": lambda: learner.env_steps > 300}[where]
    handler = signal.getsignal(signal.SIGINT)
    thread = press(when)
    rows = learner.fit(10**6)
    thread.join()
    assert rows == [] and learner.interrupted and not learner.context.interrupted
    assert signal.getsignal(signal.SIGINT) is handler, "the handler is as it was"
    assert "interrupted after" in capsys.readouterr().out
    before = whole(learner)
    same(whole(other.load(learner.folder)), before, "the checkpoint:")
    updates = [p.opt.state[p.params[0]].get("step") for p in find_pipes(learner, BasicOptStepper)]
    assert updates == [None, None] if where != "learning" else updates[0] == updates[1] == before["recorder"]["batch"], "no update is half done"
    learner.batches = other.batches = 5
    if where == "learning":
        learner.load(learner.folder)
        assert len(learner.fit(2)) == 2 and not learner.interrupted
        other.fit(2)
        same(whole(learner), whole(other), "both go on alike:")


def test_a_second_ctrl_c_stops_at_once():
    class Presses(Logger):
        def on_epoch(self, row):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    learner = small()
    learner.loggers.append(Presses())
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        learner.fit(3)
    assert signal.getsignal(signal.SIGINT) is handler
    learner.loggers.clear()
    assert len(learner.fit(1)) == 1


def test_fit_in_a_thread_leaves_signals_alone():
    learner, rows = small(), []
    thread = threading.Thread(target=lambda: rows.extend(learner.fit(1)))
    thread.start()
    thread.join()
    assert len(rows) == 1


def test_a_budget_of_environment_steps_holds_in_the_warm_up():
    learner = small(warmup=50)
    learner.fit(env_steps=20)
    assert learner.env_steps == 20 and learner.recorder.batch == 0
    learner.fit(env_steps=40)
    assert learner.env_steps == 60 and learner.recorder.batch == 11


def test_a_pull_after_a_fit_is_not_bound_by_its_budget():
    learner = small(warmup=50)
    learner.fit(env_steps=20)
    assert len(next(learner)) == 8 and learner.env_steps == 50 and not learner.context.interrupted


# --- refusals --------------------------------------------------------------------------------------------------------
def files(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest, folder / manifest["files"]["state"], folder / manifest["files"]["tensors"]


def rewritten(folder, change):
    "The checkpoint with a change of its state, in good order otherwise"
    state, manifest = load_checkpoint(folder)
    change(state)
    info = {k: v for k, v in manifest.items() if k in ("learner", "env_steps", "epoch", "environments", "graph")}
    save_checkpoint(folder, state, info)


def cut(path, n=20):
    path.write_bytes(path.read_bytes()[:-n])


def edit(folder, **changes):
    manifest = files(folder)[0]
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in {**manifest, **changes}.items() if v is not None}))


DAMAGE = {
    "no folder": lambda f: shutil.rmtree(f),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "a manifest that is no JSON": lambda f: (f / "manifest.json").write_text("{"),
    "a manifest that is a list": lambda f: (f / "manifest.json").write_text("[1]"),
    "a manifest of bytes": lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "another format": lambda f: edit(f, format=99),
    "files that are no mapping": lambda f: edit(f, files=["a", "b"]),
    "a file elsewhere": lambda f: edit(f, files={"state": "../state.json", "tensors": "/etc/passwd"}),
    "no graph": lambda f: edit(f, graph=None),
    "a graph that is no mapping": lambda f: edit(f, graph=[]),
    "tensors cut short": lambda f: cut(files(f)[2]),
    "no tensors": lambda f: files(f)[2].unlink(),
    "state cut short": lambda f: cut(files(f)[1]),
    "state of the same size that is no JSON": lambda f: files(f)[1].write_bytes(b"{" * files(f)[1].stat().st_size),
    "tensors of the same size that are none": lambda f: files(f)[2].write_bytes(b"\x01" * files(f)[2].stat().st_size),
    "a state that is a list": lambda f: save_checkpoint(f, [1], {"graph": files(f)[0]["graph"]}),
    "no recorder": lambda f: rewritten(f, lambda s: s.pop("recorder")),
    "a recorder of another kind": lambda f: rewritten(f, lambda s: s["recorder"].pop("window")),
    "a network missing": lambda f: rewritten(f, lambda s: s["modules"].pop("critic_opt.opt")),
    "a tensor missing": lambda f: rewritten(f, lambda s: s["modules"]["SimpleModelRunner.model"].pop("layers.0.bias")),
    "a tensor of another shape": lambda f: rewritten(f, lambda s: s["modules"]["SimpleModelRunner.model"].update({"layers.0.bias": torch.zeros(3)})),
    "a tensor of another dtype": lambda f: rewritten(f, lambda s: s["modules"]["SimpleModelRunner.model"].update({"layers.0.bias": torch.zeros(7, dtype=torch.float64)})),
    "a tensor too many": lambda f: rewritten(f, lambda s: s["modules"]["SimpleModelRunner.model"].update({"more": torch.zeros(3)})),
    "moments of another shape": lambda f: rewritten(f, lambda s: s["modules"]["actor_opt.opt"]["state"][0].update(exp_avg=torch.zeros(3))),
    "groups missing": lambda f: rewritten(f, lambda s: s["modules"]["actor_opt.opt"].update(param_groups=[])),
    "a pipe missing": lambda f: rewritten(f, lambda s: s["pipes"].pop("BatchCollector")),
    "a pipe too many": lambda f: rewritten(f, lambda s: s["pipes"].update(Stranger={})),
    "a count missing": lambda f: rewritten(f, lambda s: s["pipes"]["EpocherCollector"].pop("count")),
    "a generator that is none": lambda f: rewritten(f, lambda s: s["pipes"]["ExperienceReplay"].update(generator=[1])),
    "rows of another ring": lambda f: rewritten(f, lambda s: s["modules"]["ReplayWriter.memory"].update(max_sz=61)),
    "rows of another kind": lambda f: rewritten(f, lambda s: s["modules"]["ReplayWriter.memory"].update(rows=torch.zeros(4, 2))),
    "a cursor outside": lambda f: rewritten(f, lambda s: s["modules"]["ReplayWriter.memory"].update(cursor=60)),
    "an unknown kind of value": lambda f: (lambda p, old: (p.write_text(old), edit(f, bytes={**files(f)[0]["bytes"], "state": len(old)})))(
        files(f)[1], files(f)[1].read_text().replace('"tensor"', '"pickle"', 1)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    learner = small()
    learner.fit(2)
    learner.save(folder)
    return folder


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(name, saved, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(saved, folder)
    learner, twin = small(), small()
    for x in (learner, twin):
        x.fit(1)
    DAMAGE[name](folder)
    position = learner.stepper.backend.observe().copy()
    before = whole(learner, clocks=True)
    with pytest.raises(CheckpointError):
        learner.load(folder)
    same(whole(learner, clocks=True), before, "the refused load changed")
    np.testing.assert_array_equal(learner.stepper.backend.observe(), position, "the environments were restarted")
    for x in (learner, twin):
        x.fit(1)
    same(whole(learner), whole(twin), "afterwards")


OTHERS = {"lr": dict(actor_lr=2e-3), "bs": dict(bs=9), "size": dict(hidden1=8), "tau": dict(tau=0.1), "replay": dict(max_sz=61), "batch norm": dict(batch_norm=True),
          "environment": dict(env="fastrl/Bandit-v0"), "rows": dict(n=2), "windows": dict(nsteps=2), "discount": dict(discount=0.9), "seed": dict(seed=3),
          "noise": dict(sigma=0.3), "repeat": dict(repeat=2)}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_other_settings_is_refused_and_changes_nothing(name, saved):
    learner, twin = small(**OTHERS[name]), small(**OTHERS[name])
    with pytest.raises(CheckpointError):
        learner.load(saved)
    for x in (learner, twin):
        x.fit(1)
    same(whole(learner), whole(twin), "the refused load changed")


def test_the_undamaged_one_is_accepted(saved):
    assert small().load(saved).recorder.batch == 20


# --- validation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("use", [dict(env="Pendulum-v1"), dict(n=3, nsteps=2), dict(batch_norm=True, repeat=2)], ids=str)
def test_training_is_the_same_with_and_without_looking(use, tmp_path):
    learner, twin = small(**use), small(**use)
    observation = np.full(learner.stepper.observation_space.shape, 0.3, np.float32)
    for i in range(3):
        for x in (learner, twin):
            x.fit(1)
        for deterministic in (True, False):
            first = learner.validate(3, deterministic, n=2)
            again = learner.validate(3, deterministic, n=2)
            if deterministic:
                same(first, again, "validation itself:")
            learner.predict(observation, deterministic)
        list(learner.agent.for_validation(False)([observation[None]]))
        learner.describe(), learner.mermaid(), learner.check(), learner.save(tmp_path), snapshot(learner)
        torch.rand(3 + i), np.random.rand(2)  # training draws from generators of its own
    same(whole(learner), whole(twin))


def test_validation_has_stages_of_its_own():
    learner = small()
    learner.fit(1)
    steps = learner.episodes(2)
    mine, theirs = ({id(p) for p in find_pipes(x, lambda p: True)} for x in (learner, steps))
    assert not mine & theirs
    assert find_pipe(steps, SimpleModelRunner).model is find_pipe(learner, SimpleModelRunner).model
    assert steps.backend is not learner.stepper.backend and steps.context is not learner.context and steps.context.recorder is None
    steps.close()
    next(learner)


# --- batch norm and modes --------------------------------------------------------------------------------------------
def buffers(*models):
    return [copied(dict(m.named_buffers())) for m in models]


def parts_of(learner):
    c, a = find_pipe(learner, CriticLossProcessor), find_pipe(learner, ActorLossProcessor)
    return a.actor, c.critic, c.t_actor, c.t_critic


def test_a_loss_moves_only_the_running_statistics_of_the_network_that_it_steps():
    learner = small(batch_norm=True)
    learner.fit(1)
    models = parts_of(learner)
    batch = copied(next(learner))
    for processor, moved in ((CriticLossProcessor, [1]), (ActorLossProcessor, [0])):
        for train in (True, False):
            for m in models[2:]:
                m.train(train)  # somebody left the targets in training mode
            before = buffers(*models)
            loss, out = find_pipe(learner, processor).forward(batch)
            assert out is batch and loss["model"] is models[moved[0]]
            after = buffers(*models)
            assert [i for i in range(4) if difference(before[i], after[i])] == moved
            assert all(x.training is train for m in models[2:] for x in m.modules()), "modes are as they were"


def test_an_update_is_what_the_paper_says_for_batch_norm_too():
    "Targets follow statistics like parameters; nobody else moves them"
    learner = small(batch_norm=True)
    learner.fit(1)
    actor, critic, t_actor, t_critic = parts_of(learner)
    before = [copied(m.state_dict()) for m in (t_actor, t_critic)]
    learner.context.recorder = None
    next(learner)
    for old, target, net in zip(before, (t_actor, t_critic), (actor, critic)):
        for key, value in target.state_dict().items():
            new = net.state_dict()[key]
            expected = torch.lerp(old[key], new, SMALL["tau"]) if value.is_floating_point() else new
            torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=key)


def test_acting_and_validating_move_no_statistics_and_no_modes():
    learner = small(batch_norm=True, n=2)
    learner.fit(1)
    models = parts_of(learner)
    frozen = next(m for m in models[0].modules() if isinstance(m, nn.BatchNorm1d))
    frozen.eval()  # a part that is kept in eval mode on purpose
    modes = [[m.training for m in model.modules()] for model in models]
    before = buffers(*models)
    learner.validate(2)
    learner.predict(np.zeros(2, np.float32))
    step = SimpleStep(state=np.ones((2, 2), np.float32), step_n=np.ones((2, 1), np.int64))
    runner = find_pipe(learner, SimpleModelRunner)
    acted = runner.forward(step).action
    same(buffers(*models), before)
    assert [[m.training for m in model.modules()] for model in models] == modes
    models[0].eval()
    with torch.no_grad():
        np.testing.assert_array_equal(acted, models[0](torch.ones(2, 2)).numpy())


@pytest.mark.parametrize("batch_norm", [False, True])
def test_targets_are_in_eval_mode_and_never_learn(batch_norm, tmp_path):
    learner = small(batch_norm=batch_norm)
    actor, critic, *targets = parts_of(learner)
    learner.fit(2)
    learner.save(tmp_path)
    for x in (learner, small(batch_norm=batch_norm).load(tmp_path)):
        actor, critic, *targets = parts_of(x)
        assert all(not m.training for t in targets for m in t.modules())
        assert all(not p.requires_grad and p.grad is None for t in targets for p in t.parameters())
        assert actor.training and critic.training
    torch.manual_seed(0)
    t = target_of(actor)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(t.parameters(), actor.parameters()))


def test_the_actors_loss_leaves_no_gradient_on_the_critic():
    learner = small()
    learner.fit(1)
    actor, critic, *_ = parts_of(learner)
    batch = copied(next(learner))
    before = copied([*critic.parameters()]), copied([*actor.parameters()])
    opt = next(p for p in find_pipes(learner, BasicOptStepper) if p.name == "actor_opt")
    opt.forward(find_pipe(learner, ActorLossProcessor).forward(batch)[0])
    assert all(p.grad is None for p in critic.parameters()) and all(p.requires_grad for p in critic.parameters())
    assert all(torch.equal(p, b) for p, b in zip(critic.parameters(), before[0]))
    assert any(not torch.equal(p, b) for p, b in zip(actor.parameters(), before[1]))


# --- other numbers ---------------------------------------------------------------------------------------------------
def in_double(batch_norm=True, n=2):
    torch.manual_seed(0)
    actor, critic = Actor(2, 1, 7, 5, batch_norm=batch_norm).double(), Critic(2, 1, 7, 5, batch_norm=batch_norm).double()
    stepper = GymStepper("fastrl/Goal-v0", DDPGAgent(actor, max_steps=40), n, "sync", seed=0, random_steps=10)
    return DDPGLearner(actor, critic, stepper, [], bs=8, max_sz=60, batches=10, nsteps=2, tau=0.05)


def test_float64_networks_work_end_to_end(tmp_path):
    learner = in_double()
    assert learner.context.dtype is torch.float64
    rows = learner.fit(3)
    assert all(np.isfinite(row[k]) for row in rows for k in ("critic_loss", "actor_loss"))
    batch = next(learner)
    for field in ("state", "action", "next_state", "reward", "discount"):
        assert getattr(batch, field).dtype is torch.float64, field
    assert batch.terminated.dtype is torch.bool
    for m in named_modules(learner).values():
        if isinstance(m, torch.optim.Optimizer):
            assert {v.dtype for s in m.state.values() for k, v in s.items() if k != "step"} == {torch.float64}
        elif isinstance(m, nn.Module):
            assert {t.dtype for t in m.state_dict().values() if t.is_floating_point()} == {torch.float64}
    assert learner.predict(np.zeros(2, np.float32)).dtype == learner.stepper.action_space.dtype
    assert learner.validate(2)["lengths"].tolist() == [20, 20]
    learner.save(tmp_path)
    other = in_double().load(tmp_path)
    same(whole(other), whole(learner))
    learner.load(tmp_path)
    for x in (learner, other):
        x.fit(1)
    same(whole(other), whole(learner))


def test_float32_and_float64_learn_the_same_to_rounding():
    wide, narrow = in_double(False), in_double(False)
    for m in named_modules(narrow).values():
        if isinstance(m, nn.Module):
            m.float()
    narrow.context.dtype = torch.float32
    bind(narrow, narrow.context)
    assert not wide.started and not narrow.started
    for x in (wide, narrow):
        x.fit(1)
    for a, b in zip(parts_of(wide), parts_of(narrow)):
        for p, q in zip(a.parameters(), b.parameters()):
            torch.testing.assert_close(p.float(), q, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_of_the_other_precision_is_refused(tmp_path):
    learner = in_double()
    learner.fit(1)
    learner.save(tmp_path)
    other = in_double()
    for m in named_modules(other).values():
        if isinstance(m, nn.Module):
            m.float()
    with pytest.raises(CheckpointError, match="float64.*float32"):
        other.load(tmp_path)
