"""A NaN or an infinity is named where it arises, and nothing that was learned is touched. Nothing is left on the hot path."""
from functools import partial

import numpy as np
import pytest
import torch
from contract_table import difference
from test_tape import learner
from torch import nn

from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner
from fastrl_pipes.core import SimpleStep, copied
from fastrl_pipes.envs.debug import Goal
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.errors import WorkerError
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.pipes.core import Fan, Stage
from fastrl_pipes.pipes.walk import named_modules, traverse
from fastrl_pipes.pipes.graph import find_pipe
from fastrl_pipes.pipes.guards import NotFinite, guard


class Sick(Goal):
    "Goal, whose 60th step returns a NaN or an infinity"
    FIELD, VALUE = "observation", np.nan
    steps = 0

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        if self.steps == 60:
            if self.FIELD == "observation":
                obs = obs.copy()
                obs[1] = self.VALUE
            else:
                reward = self.VALUE
        return obs, reward, terminated, truncated, info


def in_sick(field, value, check):
    torch.manual_seed(0)
    actor, critic = Actor(4, 2, 16, 12), Critic(4, 2, 16, 12)
    env = type("Sick", (Sick,), {"FIELD": field, "VALUE": value})
    stepper = GymStepper(partial(env, size=2, length=7), DDPGAgent(actor), seed=0, check=check)
    return DDPGLearner(actor, critic, stepper, [], bs=32, batches=100, max_sz=300)


def learned(run):
    "Networks, targets, optimizers, and what the replay holds"
    return copied({k: m.state_dict() for k, m in named_modules(run).items()})


# --- observations and rewards ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("field, value", [("observation", np.nan), ("observation", np.inf), ("reward", np.nan), ("reward", -np.inf)])
def test_what_the_environment_gets_wrong(field, value, tmp_path):
    "With `check=False` the stepper lets it pass; the guard names the stepper"
    run, twin = in_sick(field, value, check=False), in_sick(field, 0.0, check=False)
    saved = run.save(tmp_path / "checkpoint")
    files = {p: p.read_bytes() for p in saved.iterdir()}
    run.guard()
    with pytest.raises(NotFinite) as e:
        run.fit(1)
    where = "next_state" if field == "observation" else "reward"
    assert (e.value.pipe, e.value.field, e.value.env_steps, e.value.batches) == ("GymStepper", where, 60, 60 - 32)
    assert f"GymStepper: field '{where}' has {value}" in str(e.value) and "environment step 60, after 28 batches" in str(e.value)
    for _ in range(28):
        next(twin)
    assert not difference(learned(run), learned(twin)), "learned up to the step before, and nothing of it is in the replay"
    assert all(torch.isfinite(t).all() for m in named_modules(run).values() if isinstance(m, nn.Module) for t in m.state_dict().values())
    assert {p: p.read_bytes() for p in saved.iterdir()} == files
    run.save(tmp_path / "after")
    again = in_sick(field, value, check=False).load(tmp_path / "after")
    assert not difference({k: v for k, v in learned(again).items()}, learned(run))


@pytest.mark.parametrize("field", ["observation", "reward"])
def test_the_steppers_own_check_names_environment_and_step(field):
    run = in_sick(field, np.nan, check=True)
    with pytest.raises(WorkerError, match=f"environment 0 .*step 60.*{field}"):
        run.fit(1)
    assert all(torch.isfinite(t).all() for m in named_modules(run).values() if isinstance(m, nn.Module) for t in m.state_dict().values())


def test_without_a_guard_it_is_in_every_weight():
    "What the guard is for"
    run = in_sick("reward", np.nan, check=False)
    run.fit(1)
    assert not torch.isfinite(torch.cat([p.flatten() for p in find_pipe(run, "actor_opt").model.parameters()])).any()


# --- inside of the stack ---------------------------------------------------------------------------------------------
class Spoil(Stage):
    "Writes a value into a field of item number `at`; in place, or in an array of its own"

    def __init__(self, source, at=40, field="state", value=np.inf, in_place=False, name=None):
        super().__init__(source, name)
        self.at, self.field, self.value, self.in_place = at, field, value, in_place

    def restart(self):
        self.count = 0

    def forward(self, item):
        if isinstance(item, SimpleStep):
            self.count += 1
            if self.count == self.at:
                x = getattr(item, self.field)
                x = x if self.in_place else x.clone() if isinstance(x, torch.Tensor) else x.copy()
                x.reshape(-1)[-1] = self.value
                if x.dim() if isinstance(x, torch.Tensor) else False:
                    x[-1, -1] = self.value
                return item.replace(**{self.field: x})
        return item


@pytest.mark.parametrize("joint", ["EpisodeCollector", "RollingTerminatedRewardCollector", "ExperienceReplay", "SimpleModelRunner", "ActionClip"])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_pipe_that_made_it_is_named(joint, in_place):
    from fastrl_pipes.pipes.compare import replace
    field = "action" if joint in ("SimpleModelRunner", "ActionClip") else "state"

    def spoiled(source):
        return Spoil(replaced(source), 40, field, np.nan, in_place and joint != "SimpleModelRunner")
    run = learner(100)
    pipe = find_pipe(run, joint)
    replaced = lambda source: pipe.rebuilt(source)
    run = replace(run, joint, spoiled, show=False)
    before = None
    with pytest.raises(NotFinite) as e, guard(run):
        for _ in range(100):
            before = learned(run)
            next(run)
    assert (e.value.pipe, e.value.field) == ("Spoil", field)
    now = learned(run)
    assert not difference({k: v for k, v in now.items() if "memory" not in k}, {k: v for k, v in before.items() if "memory" not in k})


class NaNGradient(nn.Module):
    "A critic whose gradient is NaN from backward number `at` on, while what it returns is sound"

    def __init__(self, critic, at):
        super().__init__()
        self.critic, self.at, self.count = critic, at, 0

    def forward(self, state, action):
        q = self.critic(state, action)
        if q.requires_grad and any(p.requires_grad for p in self.parameters()):
            q.register_hook(self.spoil)
        return q

    def spoil(self, grad):
        self.count += 1
        return grad * float("nan") if self.count >= self.at else grad


@pytest.mark.parametrize("at, opt", [(9, "critic_opt"), (10, "actor_opt")])
def test_a_gradient_is_caught_before_the_step(at, opt):
    torch.manual_seed(0)
    actor, critic = Actor(4, 2, 16, 12), NaNGradient(Critic(4, 2, 16, 12), at)
    stepper = GymStepper(partial(Goal, size=2, length=7), DDPGAgent(actor), seed=0)
    run = DDPGLearner(actor, critic, stepper, [], bs=32, batches=100, max_sz=300)
    critic.count = 0  # the check at construction may take gradients, too
    with guard(run), pytest.raises(NotFinite) as e:
        for _ in range(100):
            before = learned(run)
            next(run)
    assert e.value.pipe == opt and e.value.field.startswith("gradient of " + ("critic." if opt == "critic_opt" else "model.")) and e.value.batches == 4
    mine = ("SimpleModelRunner", "actor_opt", "actor_target", "CriticLossProcessor.t") if opt == "actor_opt" else ("SimpleModelRunner", "Critic", "critic_opt", "actor")
    now = learned(run)
    assert not difference({k: v for k, v in now.items() if k.startswith(mine)}, {k: v for k, v in before.items() if k.startswith(mine)})
    assert all(p.grad is None for p in find_pipe(run, opt).params)


class Losses(Fan):
    "A loss for each batch, made by `make(batch)`"

    def __init__(self, source, make, model, name=None):
        super().__init__(source, name)
        self.make, self.model = make, model

    def forward(self, item):
        return {"loss": self.make(item), "model": self.model}, item

    def modules(self):
        return {"model": self.model}


def steps(n=5):
    return [SimpleStep.random(4, 3, 2, seed=i) for i in range(n)]


def test_a_loss():
    net = nn.Linear(3, 1)
    pipe = BasicOptStepper(Losses(steps(), lambda b: torch.log(net(b.state).mean() * 0 - 1), net), net, 0.1)
    before = copied(net.state_dict())
    with guard(pipe), pytest.raises(NotFinite, match="Losses: field 'loss' has nan, expected finite numbers"):
        list(pipe)
    assert not difference(copied(net.state_dict()), before)


def test_gradients_that_a_loss_brings_with_it():
    net = nn.Linear(3, 1)

    class Compiled(Losses):
        def forward(self, item):
            return {"loss": torch.ones(()), "model": net, "grads": [torch.ones(1, 3), torch.full((1,), float("inf"))]}, item
    with guard(pipe := BasicOptStepper(Compiled(steps(), None, net), net, 0.1)), pytest.raises(NotFinite, match=r"Compiled: field 'grads.1' has inf at \[0\]"):
        list(pipe)


def test_parameters_after_a_step():
    net = nn.Linear(3, 1)
    pipe = BasicOptStepper(Losses(steps(), lambda b: net(b.state).mean() * 1e30, net), net, 1e30, torch.optim.SGD)
    with guard(pipe), pytest.raises(NotFinite, match="BasicOptStepper: field 'parameter model.weight after the step'"):
        list(pipe)


def test_gradients_that_add_up_are_dropped():
    net = nn.Linear(3, 1)
    pipe = BasicOptStepper(Losses(steps(), lambda b: (net(b.state) * 0).sum().sqrt(), net), net, 0.1, do_zero_grad=False)  # 0, whose slope is infinite
    with guard(pipe), pytest.raises(NotFinite, match="gradient of model"):
        list(pipe)
    assert pipe.get_own()["grads"] == [None, None]


def test_large_numbers_are_finite():
    net = nn.Linear(3, 1)
    pipe = BasicOptStepper(Losses([SimpleStep(state=torch.full((2, 3), 3e37), reward=np.full((2, 1), 1e300))], lambda b: net(b.state).mean(), net), net, 1e-38)
    with guard(pipe):
        assert len(list(pipe)) == 2


def test_fields_that_may_hold_them_are_let_by():
    nan = SimpleStep(state=torch.full((2, 3), float("nan")), reward=np.ones((2, 1)))
    with guard(pipe := Spoil([nan])), pytest.raises(NotFinite, match="IterableSource: field 'state'"):
        next(pipe)
    with guard(pipe := Spoil([nan]), ignore=("state",)):
        next(pipe)


@pytest.mark.parametrize("item, field", [({"a": {"b": torch.tensor([1.0, float("inf")])}}, "a.b"), ((np.ones(2), np.array([[np.nan]])), "1"), (torch.tensor(float("nan")), "item"),
                                         (np.array([1 + 1j, np.nan]), "item"), (SimpleStep(state={"x": (np.ones(2), np.full(3, -np.inf))}), "state.x.1")])
def test_every_kind_of_item(item, field):
    with guard(pipe := Spoil([item])), pytest.raises(NotFinite) as e:
        next(pipe)
    assert e.value.field == field
    sound = [np.ones(2, int), np.array(["word"]), torch.ones(2, dtype=torch.bool), "nan", None, float("inf"), torch.zeros(0)]
    with guard(pipe := Spoil(sound)):
        assert len(list(pipe)) == len(sound)


# --- off -------------------------------------------------------------------------------------------------------------
def in_place(run):
    "What a stack calls: methods set on one object alone, and the cached `next` of sources"
    pipes = [*traverse(run), run.stepper.backend]
    hooks = [(len(o._optimizer_step_pre_hooks), len(o._optimizer_step_post_hooks)) for m in named_modules(run).values() if isinstance(o := m, torch.optim.Optimizer)]
    return [{k for k, v in vars(p).items() if callable(v) and k in ("next", "act", "forward", "step", "observe")} for p in pipes], hooks, \
        [p._pull == p.source.next for p in traverse(run) if p.source is not None], run.stepper._act == run.agent.act


def test_off_there_is_nothing_on_the_path():
    run = learner(10)
    run.fit(1)
    before = in_place(run)
    assert not any(before[0]) and all(before[2]) and before[3] and set(before[1]) == {(0, 0)}
    run.guard()
    assert all(in_place(run)[0][:-1]) and set(in_place(run)[1]) == {(1, 1)}
    run.fit(1)
    run.guard(ignore=("image",))
    assert set(in_place(run)[1]) == {(1, 1)}, "once, not twice"
    run.guard(False)
    assert in_place(run) == before
    run.guard(False)
    with pytest.raises(KeyError), guard(run):
        raise KeyError
    assert in_place(run) == before


def test_training_is_the_same_to_the_bit():
    plain, guarded = learner(60), learner(60).guard()
    plain.fit(1), guarded.fit(1)
    assert not difference(learned(plain), learned(guarded))
    guarded.guard(False)
    plain.fit(1), guarded.fit(1)
    assert not difference(learned(plain), learned(guarded))


def test_on_a_restarted_stream_it_goes_on_looking():
    run = learner(5).guard()
    run.fit(1)
    run.reset(None)
    with torch.no_grad():
        for p in find_pipe(run, "SimpleModelRunner").model.parameters():
            p.fill_(float("nan"))
    with pytest.raises(NotFinite, match="SimpleModelRunner: field 'action' has nan"):
        run.fit(1)
