"""Taps and tapes: what runs from a record is what was recorded, to the bit, at every joint; and a tap changes nothing."""
import json
import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from contract_table import difference, env_steps
from torch import nn

from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner
from fastrl_pipes.core import SimpleStep, copied
from fastrl_pipes.envs.debug import Goal
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.loggers.collectors import BatchCollector, LossCollector
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.pipes.control import Every
from fastrl_pipes.pipes.walk import named_modules, named_pipes, snapshot
from fastrl_pipes.pipes.graph import find_pipe
from fastrl_pipes.pipes.nstep import NStepper
from fastrl_pipes.pipes.record import Network, Record, Unrecorded
from fastrl_pipes.pipes.tape import Tap, Tape, play, put_tap, remove_tap
from fastrl_pipes.processors.dpg import ActorLossProcessor

LEARNING = ("critic_opt", "actor_opt", "critic_target", "actor_target")


def learner(batches=100, seed=0, **settings):
    torch.manual_seed(seed)
    norm = settings.pop("batch_norm", False)
    actor, critic = Actor(4, 2, 16, 12, batch_norm=norm), Critic(4, 2, 16, 12, batch_norm=norm)
    stepper = GymStepper(partial(Goal, size=2, length=7), DDPGAgent(actor, max_steps=500), settings.pop("n", 1), "sync", seed)
    return DDPGLearner(actor, critic, stepper, [], **{"bs": 32, "max_sz": 300, "batches": batches, "tau": 0.05, **settings})


def learned(head):
    "Networks, targets, optimizers"
    return copied({f"{n}.{a}": m.state_dict() for n in LEARNING if find_all(head, n) for a, m in find_pipe(head, n).modules().items()})


def find_all(head, name):
    return name in named_pipes(head)


def same(a, b, what=""):
    found = difference(a, b)
    assert not found, f"{what} {found}"


# --- replaying gives the same parameters -----------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [{}, {"batch_norm": True, "nsteps": 3, "n": 3, "clip_critic_grad": 0.1}], ids=["plain", "batch norm, 3 steps"])
def test_a_tape_of_a_thousand_items_gives_the_same_parameters(settings):
    n = 300 if settings else 1000
    run = learner(n, **settings)
    tap = put_tap(run, "ExperienceReplay")
    before = learned(run)
    run.fit(1)
    assert len(tap.record) == n
    again = play(run)
    same(learned(again), before, "it begins where the record begins:")
    assert not again.stepper and again.loggers == []
    again.fit(1)
    same(learned(again), learned(run))
    assert difference(learned(run), before), "something was learned"
    assert not {id(m) for m in named_modules(again).values()} & {id(m) for m in named_modules(run).values()}
    with pytest.raises(StopIteration):
        next(again)
    again.reset(None)
    assert len(next(again)) == 32, "as often as one likes"


JOINTS = ["GymStepper", "EpisodeCollector", "NStepper", "FirstLastMerger", "ReplayWriter", "ExperienceReplay", "CriticLossProcessor", "critic_loss"]


@pytest.mark.parametrize("joint", JOINTS)
def test_at_every_joint_also_of_a_stack_that_runs(joint, tmp_path):
    run = learner(25, nsteps=2, n=2)
    run.fit(1)
    tap = put_tap(run, joint, tmp_path / "tape", grads=True)
    run.fit(1)
    expected = learned(run)
    for record in (tap.record, str(tap.record.flush().folder)):
        again = play(run, record, behind=None if record is tap.record else joint)
        again.fit(1)
        found = learned(again)
        same(found, {k: v for k, v in expected.items() if k in found}, f"from {record}:")
        assert len(found) == 8, "both networks, both targets, both optimizers, of which four pipes have two each"


def test_a_record_on_disk_runs_in_another_process(tmp_path):
    run = learner(40)
    tap = put_tap(run, "ExperienceReplay", tmp_path / "tape")
    run.fit(1)
    tap.record.flush()
    code = f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_tape import learner, learned, play
        import torch
        torch.set_num_threads(1)
        again = play(learner(40, seed=3), {str(tmp_path / 'tape')!r})
        again.fit(1)
        torch.save({{k: v for k, v in learned(again).items()}}, {str(tmp_path / 'there.pt')!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    same(torch.load(tmp_path / "there.pt", weights_only=False), learned(run))


def test_shared_networks_learn_on():
    run = learner(20)
    tap = put_tap(run, "ExperienceReplay")
    run.fit(1)
    before = learned(run)
    again = play(run, share=True)
    assert find_pipe(again, "critic_opt").model is find_pipe(run, "critic_opt").model
    same(learned(again), before, "as they are now:")
    again.fit(1)
    assert difference(learned(run)["critic_opt.model"], before["critic_opt.model"]) and len(tap.record) == 20


def test_a_branch_runs_from_a_tape():
    torch.manual_seed(0)
    actor, critic = Actor(3, 2, 8, 8), Critic(3, 2, 8, 8)
    steps = [SimpleStep.random(5, 3, 2, seed=i) for i in range(12)]
    pipe = Every(steps, 3, lambda inlet: BasicOptStepper(LossCollector(ActorLossProcessor(inlet, critic, actor)), actor, 1e-2, filter=True, name="actor_opt"))
    pipe = BatchCollector(pipe)
    tap = put_tap(pipe, "IterableSource")
    inside = put_tap(pipe, "ActorLossProcessor", name="inside")
    last = put_tap(pipe, "actor_opt", name="last")
    list(pipe)
    assert len(tap.record) == 12 and len(inside.record) == 8 and len(last.record) == 4 and pipe.source.branch is last
    assert inside.record.networks == {"ActorLossProcessor.actor"}
    again = play(pipe, tap.record)
    list(again)
    same(find_pipe(again, "actor_opt").model.state_dict(), actor.state_dict())
    assert remove_tap(pipe, last) is last.record and pipe.source.branch is find_pipe(pipe, "actor_opt")
    with pytest.raises(ValueError, match="inside.*IterableSource.*everything comes"):
        play(pipe, inside.record)


# --- a tap changes nothing -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("joints", [["Inlet", "SimpleModelRunner", "DDPGAgent"], ["GymStepper", "ReplayWriter", "CriticLossProcessor", "actor_target", "EpocherCollector"]])
@pytest.mark.parametrize("grads", [False, True])
def test_training_is_the_same_with_and_without_taps(joints, grads):
    plain, tapped = learner(60), learner(60)
    for i, joint in enumerate(joints):
        put_tap(tapped, joint, name=f"tap {i}", grads=grads)
    for run in (plain, tapped):
        run.fit(1)
    same(learned(tapped), learned(plain))
    taps = [p for p in named_pipes(tapped).values() if isinstance(p, Tap)]
    assert len(taps) == len(joints) and all(len(t.record) for t in taps)
    counts = [len(t.record) for t in taps]
    tapped.validate(3)
    assert [len(t.record) for t in taps] == counts, "validation has taps of its own"
    for t in taps:
        remove_tap(tapped, t)
    for run in (plain, tapped):
        run.fit(1)
    same(learned(tapped), learned(plain), "after the taps were taken out:")
    assert list(named_pipes(tapped)) == list(named_pipes(plain)) and [len(t.record) for t in taps] == counts


def test_a_tap_in_a_running_stack_is_bound_to_its_context():
    "Another context would not hear an interrupt, and would bind what runs to something new"
    run = learner(5)
    run.fit(1)
    contexts = {p.context for p in named_pipes(run).values()}
    tap = put_tap(run, "ReplayWriter")
    assert contexts == {run.context} == {p.context for p in named_pipes(run).values()} and tap.context is run.context
    assert tap.record.facts == {"joint": "ReplayWriter", "rows": 1, "seed": 0}


def test_no_state_is_copied_where_nobody_wants_it():
    run = learner(5)
    run.fit(1)
    assert put_tap(run, "GymStepper", state=False).record.began is None


# --- what is kept ----------------------------------------------------------------------------------------------------
def test_items_come_back_as_they_were(tmp_path):
    net = nn.Linear(2, 2)
    packed = torch.arange(12.0).reshape(4, 3)
    items = [SimpleStep(state={"a": np.ones((2, 3), np.uint8), "b": (torch.ones(2, 1, dtype=torch.float16), None)}, reward=packed[:, 1:2]), 7, "word", None, 1.5, float("nan"),
             (1, [True, {"x": np.float32(2)}], ()), {3: packed.T}, torch.ones(2, 3)[:, :1].expand(2, 3), np.zeros((0, 2)), np.asfortranarray(np.arange(6).reshape(2, 3)),
             *env_steps(3), {"loss": (net(torch.ones(1, 2)).sum()), "model": net, "other": object()}]
    tap = Tap(items, tmp_path / "tape")
    list(tap)
    read = Record.load(tap.record.flush().folder)
    for record in (tap.record, read, read.save(tmp_path / "copy")):
        assert len(record) == len(items)
        found = list(record)
        same(found[-1], {"loss": items[-1]["loss"].detach(), "model": Network("Linear"), "other": Unrecorded("object")})
        same(copied(list(Tape(record, {"Linear": net}))[:-1]), copied([*items[:6], (1, [True, {"x": 2.0}], ()), *items[7:-1]]))
    tape = Tape(read, {"Linear": net})
    tape.start()
    assert tape.next().reward.stride() == (3, 1), "laid out as it was: kernels may add up in another order"
    assert not list(Tape(read, {"Linear": net}))[-1]["loss"].requires_grad and list(Tape(read, {"Linear": net}))[-1]["model"] is net
    files = {p.suffix for p in (tmp_path / "tape").iterdir()}
    assert files == {".json", ".safetensors"}


def test_chunks_are_read_in_any_order(tmp_path):
    record = Record(tmp_path / "tape", chunk=3)
    for i in range(11):
        record.add(np.full(2, i))
    assert len(list((tmp_path / "tape").glob("items-*.json"))) == 3 and len(record) == 11
    assert [record[i][0] for i in (10, 0, 5, -1, -11, 3)] == [10, 0, 5, 10, 0, 3]
    for wrong in (11, -12):
        with pytest.raises(LookupError, match="Record.*item"):
            record[wrong]
    record.cut(4)
    assert [x[0] for x in record] == [0, 1, 2, 3] and [x[0] for x in Record.load(record.flush().folder)] == [0, 1, 2, 3]


def test_the_limit_is_kept_and_a_record_is_the_first_items():
    tap = Tap(env_steps(9), limit=4)
    list(tap)
    assert len(tap.record) == 4 and tap.seen == 9
    same(list(tap.record), env_steps(9)[:4])


@pytest.mark.parametrize("disk", [False, True])
def test_a_record_follows_its_stream_back(disk, tmp_path):
    tap = Tap(env_steps(12), tmp_path / "tape" if disk else None)
    tap.record.chunk = 2
    head = NStepper(tap, 2)
    for _ in range(3):
        next(head)
    state = snapshot(head)
    kept = [copied(x) for x in tap.record]
    next(head), next(head)
    head.reset(state)
    same([copied(x) for x in tap.record], kept)
    list(head)
    same([copied(x) for x in tap.record], env_steps(12))
    head.reset(None)
    assert len(tap.record) == 0
    list(head)
    same([copied(x) for x in tap.record], env_steps(12))


def test_a_record_in_another_process_begins_where_the_stream_goes_on():
    steps = env_steps(8)
    one, other = NStepper(Tap(steps), 1), NStepper(Tap(steps), 1)
    next(one), next(one)
    other.reset(snapshot(one))
    list(other)
    same(list(other.source.record), steps[2:])


# --- refused ---------------------------------------------------------------------------------------------------------
def test_a_folder_that_holds_a_record_is_not_written_over(tmp_path):
    tap = Tap(env_steps(3), tmp_path / "tape")
    list(tap)
    tap.record.flush()
    with pytest.raises(ValueError, match="holds a record"):
        Tap(env_steps(3), tmp_path / "tape")
    again = tap.rebuilt(*tap.sources)
    assert again.record.folder is None, "two taps never write into one folder"


def test_a_loss_without_gradients_cannot_be_stepped_from_a_tape():
    run = learner(5)
    put_tap(run, "CriticLossProcessor")
    run.fit(1)
    with pytest.raises(ValueError, match="critic_opt: field 'loss'.*no gradient"):
        next(play(run))


def test_a_tape_knows_its_networks():
    with pytest.raises(LookupError, match="Tape.*models.*'Linear'"):
        net = nn.Linear(1, 1)
        Tape([{"loss": torch.ones(()), "model": net}])


@pytest.mark.parametrize("joint", ["critic_opt", "ActorLossProcessor", "actor_opt", "critic_target"])
def test_a_network_that_is_changed_above_the_joint_does_not_come_from_the_tape(joint):
    run = learner(5)
    put_tap(run, joint, grads=True)
    run.fit(1)
    with pytest.raises(ValueError, match="play: field 'behind' is Tap, above which .* is changed"):
        play(run)


@pytest.mark.parametrize("joint, words", [("SimpleModelRunner", "GymStepper"), ("OrnsteinUhlenbeck", "GymStepper")])
def test_an_acting_chain_is_not_played_into_its_environment(joint, words):
    run = learner(5)
    put_tap(run, joint)
    run.fit(1)
    with pytest.raises(ValueError, match=f"play.*{words}"):
        play(run)


@pytest.mark.parametrize("wrong, error", [(lambda run: put_tap(run, "DDPGLearner"), LookupError), (lambda run: put_tap(run, "Replay"), LookupError),
                                          (lambda run: play(run), LookupError), (lambda run: play(run, "nowhere"), ValueError),
                                          (lambda run: put_tap(run, BatchCollector([])), LookupError), (lambda run: Tap([], limit=-1), ValueError),
                                          (lambda run: remove_tap(run, Tap([])), LookupError)])
def test_mistakes_are_named(wrong, error):
    with pytest.raises(error, match="field"):
        wrong(learner(5))


@pytest.mark.parametrize("damage", ["cut tensors", "no tensors", "no json", "bad json", "unknown kind", "unknown step", "missing leaf", "bad head", "other format", "pickle"])
def test_a_damaged_record_is_refused(damage, tmp_path):
    tap = Tap(env_steps(3), tmp_path / "tape")
    list(tap)
    folder = tap.record.flush().folder
    plain, tensors, head = folder / "items-000000.json", folder / "items-000000.safetensors", folder / "record.json"
    data = json.loads(plain.read_text())
    if damage == "cut tensors":
        tensors.write_bytes(tensors.read_bytes()[:-20])
    elif damage == "pickle":
        import pickle
        tensors.write_bytes(pickle.dumps({"0/0": 1}))
    elif damage in ("no tensors", "no json"):
        (tensors if damage == "no tensors" else plain).unlink()
    elif damage == "bad json":
        plain.write_text("{")
    elif damage == "unknown kind":
        plain.write_text(json.dumps({**data, "forms": [{"kind": "code", "items": []}]}))
    elif damage == "unknown step":
        plain.write_text(json.dumps({**data, "forms": [{**data["forms"][0], "of": "Popen"}]}))
    elif damage == "missing leaf":
        plain.write_text(json.dumps({**data, "items": [0] * 9}))
    else:
        head.write_text("[]" if damage == "bad head" else json.dumps({**json.loads(head.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="Record"):
        list(Record.load(folder))
