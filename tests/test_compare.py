"""`diff` finds what was changed and nothing else; `replace` swaps one pipe anywhere and leaves the old stack alone."""
from functools import partial

import numpy as np
import pytest
import torch
from contract_table import difference, env_steps
from test_tape import learned, learner
from torch import nn

from fastrl_pipes.agents.core import ActionClip
from fastrl_pipes.core import SimpleStep, copied
from fastrl_pipes.envs.debug import Goal
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.exploration.noise import GaussianNoise, OrnsteinUhlenbeck
from fastrl_pipes.learner.head import LearnerHead
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.loggers.collectors import (
    BatchCollector,
    EpisodeCollector,
    LossCollector,
)
from fastrl_pipes.memory.experience_replay import ExperienceReplay, ReplaySampler, ReplayWriter
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.pipes.compare import diff, replace
from fastrl_pipes.pipes.control import Every, Repeat
from fastrl_pipes.pipes.core import Foreign, Stage
from fastrl_pipes.pipes.walk import named_modules, named_pipes, traverse
from fastrl_pipes.pipes.graph import find_pipe, find_pipes
from fastrl_pipes.pipes.rebuild import rebuild
from fastrl_pipes.pipes.record import Record
from fastrl_pipes.pipes.tape import Tape, put_tap
from fastrl_pipes.processors.dpg import ActorLossProcessor, CriticLossProcessor
from fastrl_pipes.processors.targets import SoftTargetUpdater


class RewardClip(Stage):
    "Rewards in [-1, 1]"

    def forward(self, item):
        return item.replace(reward=item.reward.clip(-1, 1)) if isinstance(item, SimpleStep) else item


def kinds(found):
    return [(d.kind, d.name, d.field) for d in found]


# --- diff of stacks --------------------------------------------------------------------------------------------------
def test_two_learners_from_one_recipe_do_not_differ():
    a, b = learner(), learner(seed=0)
    assert not diff(a, b) and str(diff(a, b)) == "no difference" and diff(a, b) == []
    a.fit(1)
    assert not diff(a, b), "what was learned is state, not a setting"


@pytest.mark.parametrize("settings, expected", [
    ({"tau": 0.1}, [("setting", "critic_target", "tau"), ("setting", "actor_target", "tau")]),
    ({"bs": 16}, [("setting", "ExperienceReplay", "bs")]),
    ({"actor_opt": torch.optim.SGD}, [("setting", "actor_opt", "opt")]),
    ({"critic_lr": 0.3, "batches": 7}, [("setting", "critic_opt", "lr"), ("setting", "DDPGLearner", "batches")]),
    ({"nsteps": 3}, [("pipe", "NStepper", ""), ("pipe", "FirstLastMerger", "")]),
    ({"seed": 4}, [("setting", "GymStepper", "seed")]),
    ({"batch_norm": True}, [("network", "SimpleModelRunner", "model"), ("network", "CriticLossProcessor", "critic"), ("network", "CriticLossProcessor", "t_actor"),
                            ("network", "CriticLossProcessor", "t_critic")]),
])
def test_every_setting_that_differs_is_found_and_no_other(settings, expected):
    assert sorted(kinds(diff(learner(), learner(**settings)))) == sorted(expected)


def no_target(a):
    find_pipe(a, CriticLossProcessor).t_actor = find_pipe(a, "actor_opt").model


def wrong_target(a):
    find_pipe(a, CriticLossProcessor).t_critic = find_pipe(a, CriticLossProcessor).critic


def set_by_hand(a):
    find_pipe(a, "actor_target").tau = 0.95


def out_of_order(a):
    "The critic's target moves before its step"
    target, opt, loss = (find_pipe(a, n) for n in ("critic_target", "critic_opt", "critic_loss"))
    find_pipe(a, "actor_target").stand_on(target.source)
    target.stand_on(loss)
    opt.stand_on(target)


def no_clip(a):
    find_pipe(a, "ActionScaler").stand_on(find_pipe(a, "ActionClip").source)


def tapped(a):
    put_tap(a, "ReplayWriter")


@pytest.mark.parametrize("bug, expected", [(no_target, ("network", "CriticLossProcessor", "t_actor")), (wrong_target, ("network", "CriticLossProcessor", "t_critic")),
                                           (set_by_hand, ("setting", "actor_target", "tau")), (out_of_order, ("order", "critic_target", "")),
                                           (no_clip, ("pipe", "ActionClip", "")), (tapped, ("pipe", "Tap", ""))])
def test_a_bug_planted_by_hand_is_found(bug, expected):
    good, bad = learner(), learner()
    bug(bad)
    found = diff(good, bad)
    assert expected in kinds(found), found
    assert len(found) <= 3
    back = diff(bad, good)
    assert expected in kinds(back) and len(back) == len(found)


def test_differences_are_data_and_words():
    only, = diff(learner(), learner(tau=0.05, bs=16))
    assert (only.kind, only.name, only.field, only.a, only.b) == ("setting", "ExperienceReplay", "bs", 32, 16)
    assert str(only) == "~ ExperienceReplay: bs is 32, in b 16"
    one = BatchCollector(EpisodeCollector([]))
    assert str(diff(one, BatchCollector([]))) == "- EpisodeCollector()" and str(diff(BatchCollector([]), one)) == "+ EpisodeCollector()"
    swapped = str(diff(EpisodeCollector([], name="c"), BatchCollector([], name="c")))
    assert swapped == "- c: EpisodeCollector()\n+ c: BatchCollector()"


def test_functions_are_compared_by_what_they_do():
    a, b = (GymStepper(partial(Goal, size=n)) for n in (2, 3))
    assert kinds(diff(a, b)) == [("setting", "GymStepper", "envs")] and not diff(a, GymStepper(partial(Goal, size=2)))
    x, y, z = (Every([], 2, f) for f in (lambda i: Repeat(i, 2), lambda i: Repeat(i, 2), lambda i: Repeat(i, 3)))
    assert kinds(diff(x, y)) == [] and kinds(diff(x, z)) == [("setting", "Repeat", "n"), ("setting", "Every", "build")]


# --- diff of tapes ---------------------------------------------------------------------------------------------------
def test_the_first_field_where_two_runs_part():
    runs = learner(30), learner(30, critic_lr=0.02)
    records = []
    for run in runs:
        records.append(put_tap(run, "ActorLossProcessor").record)
        run.fit(1)
    first, = diff(*records)
    assert (first.kind, first.name, first.field) == ("item", "item 0", "loss") and first.a != first.b
    for run, record in zip(runs, records):
        assert not diff(record, record)


def test_both_values_are_told(tmp_path):
    def steps(**wrong):
        made = env_steps(6)
        for name, value in wrong.items():
            getattr(made[4], name)[1, 0] = value
        return made
    a, b = Record.of(steps()), Record.of(steps(reward=np.nan))
    for x, y in ((a, b), (Tape(a), Tape(b)), (str(a.save(tmp_path / "a").folder), b)):
        first, = diff(x, y)
        assert (first.name, first.field, first.a) == ("item 4", "reward[1, 0]", float(steps()[4].reward[1, 0])) and np.isnan(first.b)
    assert not diff(b, Record.of(steps(reward=np.nan)))
    shorter, = diff(a, Record.of(steps()[:3]))
    assert (shorter.kind, shorter.a, shorter.b) == ("length", 6, 3)
    first, = diff(a, Record.of([*steps()[:2], steps()[2].replace(reward=steps()[2].reward[:1]), *steps()[3:]]))
    assert (first.name, first.field, first.a, first.b) == ("item 2", "reward", "float32 [2, 1]", "float32 [1, 1]")
    first, = diff(a, Record.of([steps()[0].replace(image=np.ones(2))]))
    assert (first.field, first.a) == ("image", None)
    for x, y, field in (((1, 2), (1, 3), "[1]"), ({"a": 1}, {"a": 1, "b": 2}, "b"), ("x", 3, "type"), ({"a": (1, np.ones(2))}, {"a": (1, np.zeros(2))}, "a[1][0]"), ((1,), (1, 2), "length")):
        assert diff(Record.of([x]), Record.of([y]))[0].field == field


def test_what_cannot_be_compared_is_refused():
    for a, b in ((Record(), learner()), (3, learner()), (learner(), [1])):
        with pytest.raises(TypeError, match="diff: field"):
            diff(a, b)


# --- replace ---------------------------------------------------------------------------------------------------------
def everything(run):
    return copied({k: m.state_dict() for k, m in named_modules(run).items()})


@pytest.mark.parametrize("name, new, changes, expected", [
    ("critic_opt", None, {"lr": 0.5}, [("setting", "critic_opt", "lr")]),
    ("OrnsteinUhlenbeck", partial(GaussianNoise, sigma=0.3), {}, [("pipe", "OrnsteinUhlenbeck", ""), ("pipe", "GaussianNoise", "")]),
    ("ActionClip", None, {"clip_max": 0.5}, [("setting", "ActionClip", "clip_max")]),
    ("ActionClip", lambda source: source, {}, [("pipe", "ActionClip", "")]),
    ("EpisodeCollector", lambda source: RewardClip(EpisodeCollector(source)), {}, [("pipe", "RewardClip", "")]),
    ("ExperienceReplay", None, {"repeat": 2, "bs": 8}, [("setting", "ExperienceReplay", "bs"), ("setting", "ExperienceReplay", "repeat"), ("pipe", "Repeat", "")]),
    ("ReplayWriter", RewardClip, {}, [("pipe", "RewardClip", "")]),
    (GymStepper, lambda agent: GymStepper(partial(Goal, size=2, length=9), agent, 3, "sync", 0), {}, [("setting", "GymStepper", "envs"), ("setting", "GymStepper", "n")]),
    ("critic_loss", partial(LossCollector, title="td"), {}, [("setting", "critic_loss", "title")]),
    ("actor_target", None, {"tau": 1.0}, [("setting", "actor_target", "tau")]),
    ("DDPGLearner", None, {"batches": 3}, [("setting", "DDPGLearner", "batches")]),
])
def test_one_pipe_is_swapped_and_the_old_stack_stays_as_it_was(name, new, changes, expected, capsys):
    old, twin = learner(20), learner(20)
    for run in (old, twin):
        run.fit(1)
    before = everything(old)
    made = replace(old, name, new, **changes)
    assert isinstance(made, LearnerHead) and made is not old and sorted(kinds(diff(old, made))) == sorted(expected)
    assert capsys.readouterr().out.strip() == str(diff(old, made))
    assert not difference(everything(old), before), "nothing is learned or forgotten by it"
    networks = [{id(m) for m in named_modules(x).values() if isinstance(m, nn.Module)} for x in (old, made)]
    assert networks[0] == networks[1] and len(networks[0]) == 4
    for run in (old, twin):
        run.fit(1)
    assert not difference(everything(old), everything(twin)), "the old stack learns on as if nothing had happened"
    made.fit(1)
    made.validate(1)
    assert difference(learned(made)["critic_opt.model"], before["CriticLossProcessor.critic"])
    assert not {id(p) for p in traverse(old)} & {id(p) for p in traverse(made)}


def test_the_replay_is_not_shared():
    old = learner(20)
    old.fit(1)
    ring = find_pipe(old, ExperienceReplay).memory
    rows, size = ring.rows.clone(), ring.size
    made = replace(old, "critic_opt", lr=0.1, show=False)
    new = find_pipe(made, ExperienceReplay)
    assert new.memory is not ring and new.memory is find_pipe(made, ReplayWriter).memory and len(new.memory) == 0 and new.memory.max_sz == ring.max_sz
    made.fit(1)
    assert ring.size == size and torch.equal(ring.rows, rows) and len(new.memory) > 0


@pytest.mark.parametrize("given", [False, True])
def test_writer_and_sampler_apart_share_one_new_memory(given):
    memory = ReplayMemory(30)
    if given:
        pipe = ExperienceReplay(env_steps(12), 4, memory=memory)
        assert pipe.memory is memory, "an empty memory is a memory"
    else:
        pipe = ReplaySampler(Repeat(ReplayWriter(env_steps(12), memory), 2), memory, 4)
    put_tap(pipe, "ReplayWriter")
    first = len(list(pipe))
    other = replace(pipe, type(pipe), bs=5, show=False)
    mine = find_pipe(other, ReplayWriter).memory
    assert mine is other.memory is not memory and mine.max_sz == 30 and find_pipe(other, "Tap")
    assert len(list(other)) > 0 and len(memory) == 24 == len(mine) and first


def test_two_writers_to_one_memory_still_share_one():
    memory = ReplayMemory(30)
    pipe = ReplaySampler(ReplayWriter(ReplayWriter(env_steps(4), memory), memory), memory, 4)
    other = replace(pipe, "ReplaySampler", bs=2, show=False)
    assert {id(p.memory) for p in traverse(other) if hasattr(p, "memory")} == {id(other.memory)} and other.memory is not memory


def test_a_memory_that_is_only_read_is_data_and_shared():
    memory = ReplayMemory(30)
    list(ReplayWriter(env_steps(5), memory))
    pipe = ReplaySampler([SimpleStep()] * 3, memory, 4)
    assert replace(pipe, "ReplaySampler", bs=2, show=False).memory is memory and len(memory) == 10


def test_a_mapped_memory_gets_a_file_of_its_own(tmp_path):
    memory = ReplayMemory(20, path=tmp_path / "rows.bin")
    pipe = ExperienceReplay(env_steps(8), 4, memory=memory)
    list(pipe)
    before = (tmp_path / "rows.bin").read_bytes()
    other = replace(pipe, "ExperienceReplay", bs=3, show=False)
    list(other)
    assert other.memory.path != memory.path and (tmp_path / "rows.bin").read_bytes() == before


def delayed():
    torch.manual_seed(0)
    actor, critic = Actor(3, 2, 8, 8), Critic(3, 2, 8, 8)

    def build(inlet):
        inner = Every(inlet, 2, lambda i: ActionClip(i, -0.5, 0.5, name="clip"), name="inner")
        return BasicOptStepper(LossCollector(ActorLossProcessor(inner, critic, actor), name="actor_loss"), actor, 1e-2, filter=True, name="actor_opt")
    pipe = SoftTargetUpdater(Every([SimpleStep.random(5, 3, 2, seed=i) for i in range(12)], 3, build, name="outer"), actor, name="target")
    return BatchCollector(pipe), actor


@pytest.mark.parametrize("name, new, changes", [("actor_opt", None, {"lr": 0.5}), ("clip", None, {"clip_max": 0.1}), ("inner", None, {"n": 1}), ("outer", None, {"n": 2}),
                                                ("actor_loss", lambda s: BatchCollector(LossCollector(s)), {})])
def test_inside_of_branches(name, new, changes):
    pipe, actor = delayed()
    other = replace(pipe, name, new, show=False, **changes)
    assert diff(pipe, other) and {d.name for d in diff(pipe, other)} <= {name, "LossCollector", "BatchCollector", "BatchCollector_2"}
    before = copied(actor.state_dict())
    assert len(list(other)) == 12
    assert difference(actor.state_dict(), before), "the branch is wired: its optimizer steps"
    assert all(p.started for p in traverse(other)) and not any(p.started for p in traverse(pipe))
    again = replace(other, "target", tau=0.5, show=False)
    assert not [d for d in diff(other, again) if d.name != "target"], "what was swapped before stays swapped"


def test_optimizers_go_on_with_a_copy_of_their_moments():
    old = learner(10)
    old.fit(1)
    made = replace(old, "critic_opt", lr=0.1, show=False)
    opts = {n: (find_pipe(old, n).opt, find_pipe(made, n).opt) for n in ("actor_opt", "critic_opt")}
    assert all(a is not b for a, b in opts.values())
    assert not difference(*(copied(o.state_dict()) for o in opts["actor_opt"])) and opts["critic_opt"][1].state_dict()["state"] == {}
    assert opts["critic_opt"][1].param_groups[0]["lr"] == 0.1


def test_targets_stay_the_same_ones_also_where_a_pipe_made_its_own():
    torch.manual_seed(0)
    critic, t_actor = Critic(3, 2, 8, 8), Actor(3, 2, 8, 8)
    pipe = SoftTargetUpdater([SimpleStep.random(5, 3, 2, seed=i) for i in range(5)], critic, tau=0.5)
    pipe = BasicOptStepper(CriticLossProcessor(pipe, critic, t_actor), critic, 1e-2, filter=True)
    list(pipe)
    target = find_pipe(pipe, SoftTargetUpdater).target_model
    other = replace(pipe, "CriticLossProcessor", discount=0.5, show=False)
    assert find_pipe(other, SoftTargetUpdater).target_model is target is find_pipe(other, CriticLossProcessor).t_critic
    copies = {}
    apart = rebuild(pipe, copies=copies)[id(pipe)]
    mine = find_pipe(apart, SoftTargetUpdater).target_model
    assert mine is find_pipe(apart, CriticLossProcessor).t_critic is copies[id(target)] and not difference(mine.state_dict(), target.state_dict())
    list(apart)
    assert difference(mine.state_dict(), target.state_dict())


def test_a_mistake_is_found_before_the_first_step_and_leaves_nothing_open():
    old, closed = learner(), []

    class Flat(Stage):
        def forward(self, item):
            return item.replace(state=item.state[:, :1])

        def probe(self, item):
            return (self.forward(item),)

    class Watched(GymStepper):
        def close(self):
            closed.append(self)
            super().close()
    old = replace(old, "GymStepper", lambda agent: Watched(partial(Goal, size=2, length=7), agent, seed=0), show=False)
    with pytest.raises(ValueError, match="Flat: field 'next_state'"):
        replace(old, "EpisodeCollector", Flat)
    assert len(closed) == 1 and closed[0] is not old.stepper
    next(old)


def test_what_can_be_begun_only_once_is_refused():
    for source in (iter(env_steps(3)), (s for s in env_steps(3))):
        with pytest.raises(TypeError, match="rebuild.*begun anew"):
            replace(BatchCollector(EpisodeCollector(source)), "EpisodeCollector", RewardClip)


def test_a_node_that_is_not_ours_is_refused():
    from contract_table import ListNode
    with pytest.raises(TypeError, match="rebuild.*ListNode"):
        replace(BatchCollector(EpisodeCollector(Foreign(ListNode([])))), "EpisodeCollector", RewardClip)


def test_a_live_environment_that_two_stacks_would_step_is_told():
    pipe = EpisodeCollector(BatchCollector(GymStepper(Goal(size=2))))
    with pytest.warns(UserWarning, match="GymStepper.*same live environment"):
        replace(pipe, "BatchCollector", RewardClip, show=False)


@pytest.mark.parametrize("wrong, error", [(lambda r: replace(r, "Median", RewardClip), LookupError), (lambda r: replace(r, "critic_opt"), TypeError),
                                          (lambda r: replace(r, "critic_opt", RewardClip, lr=1), TypeError), (lambda r: replace(r, "critic_opt", rate=1), TypeError),
                                          (lambda r: replace(r, "critic_loss", lambda s: None), TypeError), (lambda r: replace(r, "DDPGLearner", RewardClip), LookupError),
                                          (lambda r: replace(r, LossCollector, RewardClip), LookupError)])
def test_mistakes_are_named(wrong, error):
    with pytest.raises(error, match="field"):
        wrong(learner())


def test_names_are_kept_for_records_and_checkpoints():
    made = replace(learner(), "critic_loss", lambda s: RewardClip(s), show=False)
    assert isinstance(find_pipe(made, "critic_loss"), RewardClip)
    assert find_pipes(made, OrnsteinUhlenbeck) and list(named_pipes(made)) == list(named_pipes(learner()))
