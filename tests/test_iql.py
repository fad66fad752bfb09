"""Implicit Q-learning and behaviour cloning: equal to a plain loop, every option with its effect, offline and then online, and refused where something is wrong."""
import copy
import inspect
from functools import partial

import pytest
import torch
from reference_iql import PlainIQL, Policy, mlp

from fastrl_pipes.agents.bc import BCAgent, BCLearner
from fastrl_pipes.agents.iql import EpsilonPolicyRunner, IQLAgent, IQLLearner, iql
from fastrl_pipes.cli import DEFAULT_EPOCHS, main
from fastrl_pipes.core import MergedStep, SampledStep, SimpleStep, copied
from fastrl_pipes.envs.debug import Goal
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.errors import CheckpointError
from fastrl_pipes.learner.handover import take_over
from fastrl_pipes.learner.head import LearnerHead
from fastrl_pipes.learner.joint import JointOptStepper
from fastrl_pipes.learner.offline import go_online
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.learner.resume import load_run
from fastrl_pipes.loggers.sinks import read_rows
from fastrl_pipes.memory.experience_replay import ExperienceReplay, ReplayWriter
from fastrl_pipes.memory.replay_memory import ReplayMemory
from fastrl_pipes.memory.offline import MixedReplay, OfflineReplay
from fastrl_pipes.networks.actor_critic import Actor
from fastrl_pipes.networks.ensemble import Critics, Value
from fastrl_pipes.networks.policies import GaussianActor
from fastrl_pipes.pipes.compare import diff
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.core import IterableSource
from fastrl_pipes.pipes.walk import bind
from fastrl_pipes.pipes.graph import find_pipe, find_pipes
from fastrl_pipes.pipes.nstep import FirstLastMerger, NStepper
from fastrl_pipes.processors.imitation import CloningLossProcessor
from fastrl_pipes.processors.iql import IQLActorLossProcessor, IQLCriticLossProcessor, IQLValueLossProcessor
from fastrl_pipes.processors.targets import SoftTargetUpdater

S, A, BS, HIDDEN = 5, 2, 16, (24, 16)
UPDATES = {torch.float64: 300, torch.float32: 10}
TOLERANCE = {torch.float64: dict(rtol=1e-9, atol=0.0), torch.float32: dict(rtol=1e-4, atol=1e-6)}
BOTH = pytest.mark.parametrize("dtype", UPDATES, ids=str)


# --- the two sides ---------------------------------------------------------------------------------------------------
def networks(dtype=torch.float32, k=2, r=1, seed=3):
    torch.manual_seed(seed)
    return (GaussianActor(S, A, HIDDEN, squash=False, log_std_bounds=(-5.0, 2.0), free_std=True).to(dtype), Critics(S, A, k, HIDDEN, r).to(dtype),
            Value(S, HIDDEN, r).to(dtype))


def tape_of(dtype=torch.float32, r=1, merged=False, weighted=False, length=None):
    "Batches from a seeded generator, with terminated and truncated rows; merged ones carry the discount of 1 to 3 steps, weighted ones weights and places"
    g, tape = torch.Generator().manual_seed(7), []
    for i in range(length or UPDATES[dtype]):
        end = torch.rand(BS, 1, generator=g)
        fields = dict(state=torch.randn(BS, S, generator=g), action=torch.rand(BS, A, generator=g) * 2 - 1, next_state=torch.randn(BS, S, generator=g),
                      reward=torch.randn(BS, r, generator=g), terminated=end < 0.2, truncated=end > 0.8)
        discount, weight = 0.9 ** torch.randint(1, 4, (BS, 1), generator=g), torch.rand(BS, 1, generator=g)
        step = MergedStep(**fields, discount=discount) if merged else SimpleStep(**fields)
        if weighted:
            step = SampledStep.of(step, weight=weight, index=torch.arange(i, i + BS))
        tape.append(step.to(dtype=dtype))
    return tape


def plain_networks(actor, critic, value):
    "The same numbers in the loop's own networks"
    k, r = critic.k, value.layers[-1].out_features
    policy, critics, plain = Policy(S, A, HIDDEN), [mlp((S + A, *HIDDEN, r)) for _ in range(k)], mlp((S, *HIDDEN, r))
    policy.layers.load_state_dict(actor.layers.state_dict())
    plain.load_state_dict(value.layers.state_dict())
    dtype = next(value.parameters()).dtype
    for net in (policy, plain, *critics):
        net.to(dtype)
    for i, net in enumerate(critics):
        for layer, batched in zip([m for m in net if isinstance(m, torch.nn.Linear)], critic.layers):
            layer.weight.data.copy_(batched.weight.data[i].T)
            layer.bias.data.copy_(batched.bias.data[i, 0])
    return policy, critics, plain


def of_policy(get):
    return {f"layers.{n}": get(p) for n, p in get.net.layers.named_parameters()} | {"log_std": get(getattr(get.net, "free_log_std", getattr(get.net, "log_std", None))).flatten()}


class Read:
    "Reads a parameter, or one of its moments"

    def __init__(self, net, opt=None, key=None):
        self.net, self.opt, self.key = net, opt, key

    def __call__(self, p):
        return p.detach() if self.opt is None else self.opt.state[p][self.key]


def of_stacked(critics):
    "The loop's critics in the form of the ensemble"
    found = {}
    for i, layers in enumerate(zip(*[[m for m in c.net if isinstance(m, torch.nn.Linear)] for c in critics])):
        found[f"layers.{i}.weight"] = torch.stack([read(m.weight).T for read, m in zip(critics, layers)])
        found[f"layers.{i}.bias"] = torch.stack([read(m.bias)[None] for read, m in zip(critics, layers)])
    return found


MOMENTS = ("exp_avg", "exp_avg_sq")


def state_of_stack(head, actor, critic, value, joint=False):
    opts = {n: find_pipe(head, "joint_opt" if joint else f"{n}_opt").opt for n in ("actor", "critic", "value")}
    target = find_pipe(head, "critic_target").target_model
    found = {"actor": of_policy(Read(actor)), "critic": dict(critic.named_parameters()), "value": dict(value.layers.named_parameters()), "target": dict(target.named_parameters())}
    for key in MOMENTS:
        found |= {f"actor_{key}": of_policy(Read(actor, opts["actor"], key)), f"critic_{key}": {n: opts["critic"].state[p][key] for n, p in critic.named_parameters()},
                  f"value_{key}": {n: opts["value"].state[p][key] for n, p in value.layers.named_parameters()}}
    return found


def state_of_loop(loop):
    v, q, pi = loop.optimizers * 3 if loop.joint else loop.optimizers
    found = {"actor": of_policy(Read(loop.policy)), "critic": of_stacked([Read(c) for c in loop.critics]), "value": dict(loop.value.named_parameters()),
             "target": of_stacked([Read(t) for t in loop.targets])}
    for key in MOMENTS:
        found |= {f"actor_{key}": of_policy(Read(loop.policy, pi, key)), f"critic_{key}": of_stacked([Read(c, q, key) for c in loop.critics]),
                  f"value_{key}": {n: v.state[p][key] for n, p in loop.value.named_parameters()}}
    return found


def assert_equal(stack, loop, rtol, atol):
    assert stack.keys() == loop.keys()
    for part in loop:
        assert stack[part].keys() == loop[part].keys()
        for name, expected in loop[part].items():
            torch.testing.assert_close(stack[part][name].detach(), expected.detach(), rtol=rtol, atol=atol, msg=lambda text: f"{part}.{name}: {text}")  # noqa: B023, called at once


def check(dtype, k=2, r=1, merged=False, weighted=False, length=None, spoil=None, loop=None, **settings):
    "Run both sides over the tape and compare; `loop` are the loop's settings, `spoil` puts a mistake into the stack"
    actor, critic, value = networks(dtype, k, r)
    joint = settings.get("joint", False)
    reference = PlainIQL(*plain_networks(actor, critic, value), **(loop or {}))
    begun = copied(state_of_stack_before(actor, critic, value))
    tape = tape_of(dtype, r, merged, weighted, length)
    head = IQLLearner(actor, critic, value, IterableSource(tape), [], **settings)
    if spoil:
        spoil(head, actor, critic, value)
    for step in tape:
        next(head)
        reference.update(step.state, step.action, step.reward, step.next_state, step.terminated, getattr(step, "discount", None), getattr(step, "weight", None))
    with pytest.raises(StopIteration):
        next(head)
    found = state_of_loop(reference)
    if not spoil:
        for part, before in begun.items():
            assert sum(float((found[part][n] - before[n]).detach().abs().sum()) for n in before) > 1e-3, f"{part} has not moved"
    assert_equal(state_of_stack(head, actor, critic, value, joint), found, **TOLERANCE[dtype])


def state_of_stack_before(actor, critic, value):
    return {"actor": of_policy(Read(actor)), "critic": dict(critic.named_parameters()), "value": dict(value.layers.named_parameters()), "target": dict(critic.named_parameters())}


CASES = {  # what: (settings of the stack, settings of the loop, of the tape and the networks)
    "defaults": ({}, {}, {}),
    "joint": (dict(joint=True), dict(joint=True), {}),
    "of the paper": (dict(target_update_tau=0.005, temperature=1 / 3, expectile=0.7), dict(tau=0.005, temperature=1 / 3, expectile=0.7), {}),
    "targets that move every third batch": (dict(target_update_period=3), dict(period=3), {}),
    "three critics, gains and costs": (dict(reward_weights=(1.0, -0.5, 0.25)), dict(weights=(1.0, -0.5, 0.25)), dict(k=3, r=3)),
    "one critic": ({}, {}, dict(k=1)),
    "merged samples": (dict(discount=0.9), dict(discount=0.5), dict(merged=True)),  # their own discounts count: neither of the two
    "weighted samples": ({}, {}, dict(weighted=True)),
    "a low bound": (dict(max_exp_advantage=1.02), dict(max_weight=1.02), {}),
    "all at once": (dict(joint=True, reward_weights=(0.5, -2.0), temperature=0.5, target_update_period=2, discount=0.8),
                    dict(joint=True, weights=(0.5, -2.0), temperature=0.5, period=2, discount=0.8), dict(r=2, weighted=True)),
}


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_the_learners_stack_equals_the_loop(case, dtype):
    settings, loop, more = CASES[case]
    check(dtype, loop=loop, **settings, **more)


def test_the_bound_bites():
    "Without this, a stack without the bound would pass its test"
    with pytest.raises(AssertionError, match="actor"):
        check(torch.float64, length=7, loop=dict(max_weight=1.02))


# --- mistakes put back -----------------------------------------------------------------------------------------------
def processor(head, cls):
    return find_pipe(head, cls)


def batches_changed(head, cls, change):
    "Wrap `loss` of a processor: `change` takes and returns the batch"
    p = find_pipe(head, cls)
    loss = p.loss
    p.loss = lambda batch: loss(change(batch))


def policy_first(head, actor, critic, value):
    "The policy is stepped on the value before its update; what it needs of the value's processor is computed once more"
    names = "IQLValueLossProcessor", "IQLCriticLossProcessor", "critic_opt", "IQLActorLossProcessor", "actor_opt", "critic_target"
    value_loss, critic_loss, critic_opt, actor_loss, actor_opt, target = (find_pipe(head, n) for n in names)
    source = value_loss.source
    value_loss.stand_on(actor_opt)
    worth = IQLValueLossProcessor(source, value, target.target_model)
    worth.forward = lambda item: worth.__class__.forward(worth, item)[1:]
    actor_loss.stand_on(worth)
    target.stand_on(critic_opt)


MISTAKES = {  # what: (how it is put back, what `check` is told)
    "the critics themselves in place of their targets": (lambda h, a, c, v: setattr(processor(h, IQLValueLossProcessor), "t_critic", c), {}),
    "targets that never move (as its ancestor's did offline)": (lambda h, a, c, v: setattr(find_pipe(h, "critic_target"), "target_sync", 10**9), {}),
    "targets that move at every batch": (lambda h, a, c, v: setattr(find_pipe(h, "critic_target"), "target_sync", 1), dict(target_update_period=2, loop=dict(period=2))),
    "the expectile's other side": (lambda h, a, c, v: setattr(processor(h, IQLValueLossProcessor), "expectile", 0.2), {}),
    "the largest replica": (lambda h, a, c, v: setattr(processor(h, IQLValueLossProcessor).worth, "sign", torch.tensor([-1.0], dtype=torch.float64)), {}),
    "costs as gains": (lambda h, a, c, v: setattr(processor(h, IQLValueLossProcessor).worth, "sign", torch.ones(2, dtype=torch.float64)),
                       dict(r=2, reward_weights=(1.0, -1.0), loop=dict(weights=(1.0, -1.0)))),
    "components that are not weighted": (lambda h, a, c, v: setattr(processor(h, IQLActorLossProcessor).worth, "_worth", torch.ones(2, dtype=torch.float64)),
                                         dict(r=2, reward_weights=(1.0, 0.5), loop=dict(weights=(1.0, 0.5)))),
    "the critics learn from V(s)": (lambda h, a, c, v: batches_changed(h, IQLCriticLossProcessor, lambda b: b.replace(next_state=b.state)), {}),
    "truncation stops the bootstrap": (lambda h, a, c, v: batches_changed(h, IQLCriticLossProcessor, lambda b: b.replace(terminated=b.done)), {}),
    "terminal rows bootstrap": (lambda h, a, c, v: batches_changed(h, IQLCriticLossProcessor, lambda b: b.replace(terminated=b.terminated & False)), {}),
    "the sample's discount is ignored": (lambda h, a, c, v: batches_changed(h, IQLCriticLossProcessor, lambda b: b.replace(discount=None)), dict(merged=True)),
    "samples that all count alike": (lambda h, a, c, v: batches_changed(h, IQLActorLossProcessor, lambda b: b.replace(weight=None)), dict(weighted=True)),
    "the temperature multiplies": (lambda h, a, c, v: setattr(processor(h, IQLActorLossProcessor), "temperature", 2.0), dict(temperature=0.5, loop=dict(temperature=0.5))),
    "no bound": (lambda h, a, c, v: setattr(processor(h, IQLActorLossProcessor), "max_exp_advantage", 1e9), dict(max_exp_advantage=1.02, loop=dict(max_weight=1.02))),
    "the policy before the value": (policy_first, {}),
    "one step each in place of a joint one": (lambda h, a, c, v: None, dict(loop=dict(joint=True))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_put_back_is_noticed(mistake):
    spoil, settings = MISTAKES[mistake]
    if mistake != "one step each in place of a joint one":
        check(torch.float64, length=7, spoil=lambda *_: None, **settings)  # the right stack is equal after so few updates, too
    with pytest.raises(AssertionError, match="not close"):
        check(torch.float64, length=7, spoil=spoil, **settings)


# --- kernels by hand -------------------------------------------------------------------------------------------------
class Table(torch.nn.Module):
    "Returns what it was given, whatever it is asked"

    def __init__(self, said):
        super().__init__()
        self.said = torch.nn.Parameter(torch.tensor(said))

    def forward(self, state, action=None):
        return self.said


def test_gains_and_costs_by_hand():
    "Two replicas, a gain and a cost: the smaller gain 1 and the larger cost 4, of values 2 and 3, so u = (-1, 1), and both are on the bad side"
    q, v = Table([[[1.0, 4.0]], [[3.0, 2.0]]]), Table([[2.0, 3.0]])
    batch = SimpleStep(state=torch.zeros(1, S), action=torch.zeros(1, A), next_state=torch.zeros(1, S), reward=torch.zeros(1, 2), terminated=torch.zeros(1, 1, dtype=bool))
    loss, passed = IQLValueLossProcessor([batch], v, q, expectile=0.9, reward_weights=(2.0, -0.5))
    assert passed.value.tolist() == [[1.0, 4.0]] and torch.isclose(loss["loss"], torch.tensor(0.1))
    actor = networks()[0]
    told = next(iter(IQLActorLossProcessor([passed], actor, v, reward_weights=(2.0, -0.5), signals=True)))["signals"]
    assert told["advantage"] == 2.0 * -1 - 0.5 * 1


def test_costs_may_be_written_either_way():
    "A cost with the weight -1, and the same number as a negative gain: mirrored critics and values, the same policy, to the bit"
    found = []
    for weights in ((1.0, -1.0), (1.0, 1.0)):
        actor, critic, value = networks(r=2)
        sign = torch.tensor([1.0, weights[1]])
        with torch.no_grad():
            for p in (critic.layers[-1].weight, critic.layers[-1].bias):
                p *= sign
            value.layers[-1].weight *= sign[:, None]
            value.layers[-1].bias *= sign
        tape = [b.replace(reward=b.reward * sign) for b in tape_of(r=2, length=20)]
        list(IQLLearner(actor, critic, value, IterableSource(tape), [], reward_weights=weights))
        found.append([p.detach().clone() for p in actor.parameters()] + [value.layers[-1].weight.detach() * sign[:, None]])
    assert all(torch.equal(a, b) for a, b in zip(*found))


# --- every option has its effect -------------------------------------------------------------------------------------
def learned(tape=None, r=1, length=6, **settings):
    "What a few updates with these settings come to"
    actor, critic, value = networks(r=r)
    head = IQLLearner(actor, critic, value, IterableSource(tape or tape_of(r=r, length=length)), [], **settings)
    list(head)
    nets = {"actor": actor, "critic": critic, "value": value, "target": find_pipe(head, "critic_target").target_model}
    return {n: [p.detach().clone() for p in m.parameters()] for n, m in nets.items()}


def differ(a, b):
    return {n for n in a if any(not torch.equal(x, y) for x, y in zip(a[n], b[n]))}


OPTIONS = {  # option: (settings, which networks are others after one batch, and after some)
    "actor_lr": (dict(actor_lr=1e-3), {"actor"}, {"actor"}),
    "value_lr": (dict(value_lr=1e-3), {"value", "critic", "actor", "target"}, {"value", "critic", "actor", "target"}),
    "critic_lr": (dict(critic_lr=1e-3), {"critic", "target"}, {"critic", "target", "value", "actor"}),
    "opt": (dict(opt=torch.optim.SGD), {"actor", "critic", "value", "target"}, {"actor", "critic", "value", "target"}),
    "target_update_tau": (dict(target_update_tau=0.5), {"target"}, {"target", "value", "critic", "actor"}),
    "target_update_period": (dict(target_update_period=2), {"target"}, {"target", "value", "critic", "actor"}),
    "temperature": (dict(temperature=0.2), {"actor"}, {"actor"}),
    "max_exp_advantage": (dict(max_exp_advantage=1.01), {"actor"}, {"actor"}),
    "expectile": (dict(expectile=0.5), {"value", "critic", "actor"}, {"value", "critic", "actor", "target"}),
    "discount": (dict(discount=0.5), {"critic", "target"}, {"critic", "target", "value", "actor"}),
    "joint": (dict(joint=True), {"critic", "actor", "target"}, {"critic", "actor", "value", "target"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_has_its_effect_and_no_other(option):
    settings, at_once, later = OPTIONS[option]
    assert differ(learned(length=1), learned(length=1, **settings)) == at_once
    assert differ(learned(), learned(**settings)) == later


def test_reward_weights_have_their_effect():
    base = learned(r=2, reward_weights=(1.0, 1.0))
    assert differ(base, learned(r=2, reward_weights=(1.0, 0.5))) == {"actor"}, "a weight says what a component is worth to the policy"
    assert differ(base, learned(r=2, reward_weights=(1.0, -1.0))) == {"actor", "critic", "value", "target"}, "its sign says which side is the better one"


def test_signals_are_recorded_and_change_nothing():
    actor, critic, value = networks()
    head = IQLLearner(actor, critic, value, IterableSource(tape_of(length=6)), [], signals=True, batches=6)
    row = head.fit(epochs=1)[0]
    for name in ("v", "q_target", "below_v", "q1", "q2", "td_error1", "td_error2", "advantage", "exp_advantage", "at_the_bound", "data_log_prob", "policy_log_std"):
        assert row[name] == row[name], name
    assert 0 < row["below_v"] < 1 and row["exp_advantage"] > 0 and row["policy_log_std"] < 0
    assert not differ(learned(), {**learned(), "actor": [p.detach() for p in actor.parameters()], "value": [p.detach() for p in value.parameters()]})


@pytest.mark.parametrize("tell", [True, False])
def test_a_prioritised_replay_is_told_the_errors_if_asked_to(tell):
    told = []
    actor, critic, value = networks(torch.float64)
    tape = tape_of(torch.float64, weighted=True, length=2)
    with torch.no_grad():
        b = tape[0]
        y_of = copy.deepcopy(value)
    head = IQLLearner(actor, critic, value, IterableSource(tape), [], calculate_priority=tell, value_lr=0.0)
    head.context.priorities = lambda index, error: told.append((index, error))
    with torch.no_grad():
        y = b.reward + 0.99 * ~b.terminated * y_of(b.next_state)
        expected = (critic(b.state, b.action) - y).abs().mean((0, 2))
    next(head)
    if tell:
        (index, error), = told
        assert torch.equal(index, b.index)
        torch.testing.assert_close(error, expected)
    assert bool(told) is tell


# --- the joint step --------------------------------------------------------------------------------------------------
def test_a_joint_step_is_that_of_the_sum_and_rates_are_of_each():
    actor, critic, value = networks(torch.float64)
    nets = [copy.deepcopy(value), copy.deepcopy(actor)]
    b = tape_of(torch.float64, length=1)[0]

    def losses(v, pi):
        return v(b.state).square().mean(), -pi(b.state, b.action)[1].mean()
    items = [{"loss": loss, "model": m} for loss, m in zip(losses(value, actor), (value, actor))]
    total, passed = JointOptStepper([*items, b], [value, actor], [1e-2, 1e-3])
    assert torch.equal(passed.state, b.state) and total["loss"] == sum(i["loss"] for i in items) and total["stepped"]
    opt = torch.optim.Adam([{"params": nets[0].parameters(), "lr": 1e-2}, {"params": nets[1].parameters(), "lr": 1e-3}])
    sum(losses(*nets)).backward()
    opt.step()
    for here, there in zip((value, actor), nets):
        for p, q in zip(here.parameters(), there.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


def test_a_joint_step_waits_for_the_batch_and_needs_a_loss():
    value, b = networks()[2], tape_of(length=1)[0]
    before = copied(value.state_dict())
    pipe = JointOptStepper([b, {"loss": value(b.state).mean(), "model": value}], [value], 1e-2)
    assert next(pipe) is not None
    with pytest.raises(StopIteration):  # the loss was taken, and no batch came
        next(pipe)
    assert all(torch.equal(before[k], v) for k, v in value.state_dict().items())


# --- offline, and then online ----------------------------------------------------------------------------------------
WALK = partial(Goal, length=20)  # observation [2]: place and goal; action [1]; the nearer the better


def filled(n=600, seed=0, nsteps=1):
    "A replay with what random actions do in `Goal`"
    memory = ReplayMemory(n)
    pipe = GymStepper(WALK, n=4, mode="sync", seed=seed)
    pipe = ReplayWriter(pipe if nsteps == 1 else FirstLastMerger(NStepper(pipe, nsteps)), memory)
    while memory.size < n:
        next(pipe)
    return memory


def small(seed=0, epsilon=0.0):
    torch.manual_seed(seed)
    actor = GaussianActor(2, 1, (16, 16), squash=False, log_std_bounds=(-5.0, 2.0), free_std=True)
    return actor, Critics(2, 1, 2, (16, 16)), Value(2, (16, 16)), GymStepper(WALK, IQLAgent(actor, epsilon), seed=1)


def offline(memory=None, **settings):
    actor, critic, value, stepper = small()
    return IQLLearner(actor, critic, value, (OfflineReplay(memory or filled(), 32, seed=0), stepper), [], **{"batches": 20, **settings})


def online(memory, start_from=None, **settings):
    "What `go_online` makes, built by hand"
    actor, critic, value, stepper = small(9)
    replay = partial(MixedReplay, data=memory, ratio=0.5, bs=32, max_sz=500)
    return IQLLearner(actor, critic, value, stepper, [], replay=replay, start_from=start_from, **{"batches": 20, **settings})


def nets_of(head):
    return {"actor": find_pipe(head, IQLActorLossProcessor).actor, "critic": find_pipe(head, IQLCriticLossProcessor).critic,
            "value": find_pipe(head, IQLValueLossProcessor).value, "target": find_pipe(head, "critic_target").target_model}


def parameters(head):
    return {f"{n}.{k}": v.detach().clone() for n, m in nets_of(head).items() for k, v in m.state_dict().items()}


def steps_of(head):
    return {n: int(next(iter(find_pipe(head, f"{n}_opt").opt.state.values()))["step"]) for n in ("actor", "critic", "value")}


def test_offline_the_targets_follow_the_critics():
    "Each update moves every target by tau towards its critic: what never happened in this method's ancestor while nothing was stepped"
    learner = offline(target_update_tau=0.1)
    target, critic = nets_of(learner)["target"], nets_of(learner)["critic"]
    begun = copied(target.state_dict())
    for _ in range(30):
        before = copied(target.state_dict())
        next(learner)
        for name, p in critic.state_dict().items():
            torch.testing.assert_close(target.state_dict()[name], before[name] + 0.1 * (p - before[name]))
    assert all(not torch.equal(begun[k], v) for k, v in target.state_dict().items())
    assert learner.env_steps == 0 and learner.stepper is None


def test_offline_learning_is_validated_in_an_environment_of_its_own():
    learner = offline()
    before = parameters(learner)
    found = learner.validate(episodes=5)
    assert found["returns"].shape == (5,) and set(found["lengths"]) == {20}
    assert all(torch.equal(before[k], v) for k, v in parameters(learner).items())


def test_a_learner_of_data_acts_in_the_units_of_the_environment_that_it_validates_in():
    actor = GaussianActor(3, 1, (8,), squash=False, free_std=True)
    with torch.no_grad():
        actor.layers[-1].bias.fill_(9.0)  # the mode is 1, in policy units
    memory = ReplayMemory(40)
    writer = ReplayWriter(GymStepper("Pendulum-v1", seed=0), memory)
    for _ in range(40):
        next(writer)
    learner = BCLearner(actor, (OfflineReplay(memory, 8), GymStepper("Pendulum-v1", BCAgent(actor))), [])
    assert learner.predict(memory.gather(torch.arange(1)).state[0].numpy()).tolist() == pytest.approx([2.0], abs=1e-4)


def test_online_begins_exactly_where_offline_ended_and_goes_on():
    memory = filled()
    learner = offline(memory)
    learner.fit(epochs=2)
    before = parameters(learner)
    here = go_online(learner, GymStepper(WALK, IQLAgent(nets_of(learner)["actor"]), seed=3), ratio=0.5, max_sz=500)
    assert {k: v is nets_of(learner)[k] for k, v in nets_of(here).items()} == dict.fromkeys(("actor", "critic", "value", "target"), True)
    assert all(torch.equal(before[k], v) for k, v in parameters(here).items()) and set(steps_of(here).values()) == {40}
    rows = here.fit(env_steps=100)
    assert here.env_steps == 100 and rows[-1]["episode"] == 5
    pulled = 100 - find_pipe(here, MixedReplay).online_bs + 1
    assert set(steps_of(here).values()) == {40 + pulled}, "the moments' clocks go on"
    assert all(not torch.equal(before[k], v) for k, v in parameters(here).items()), "everything goes on learning, the targets too"


def test_a_batch_online_holds_its_part_of_the_data():
    memory = filled()
    memory._views[list(memory.layout.dtype.names).index("reward")][:] = 77.0
    learner = offline(memory)
    here = go_online(learner, GymStepper(WALK, IQLAgent(nets_of(learner)["actor"]), seed=3), ratio=0.25)
    assert (next(here).reward == 77.0).sum() == 8


def test_both_ways_online_are_the_same_stack_and_the_same_run():
    "By `go_online`, and by a learner that is built on the environment and starts from the other: equal to the bit"
    memory = filled()
    actor, critic, value, _ = small()
    learner = IQLLearner(actor, critic, value, OfflineReplay(memory, 32, seed=0), [], batches=20)
    learner.fit(epochs=2)
    other = online(memory, start_from=learner)
    here = go_online(learner, GymStepper(WALK, IQLAgent(nets_of(learner)["actor"]), seed=1), max_sz=500)
    assert not diff(here, other)
    for head in (here, other):
        head.fit(env_steps=60)
    assert all(torch.equal(a, b) for a, b in zip(parameters(here).values(), parameters(other).values()))


def test_a_checkpoint_to_start_from(tmp_path):
    "Networks, targets and moments come from the offline run's files; the learning rate is the new run's"
    memory = filled()
    learner = offline(memory)
    learner.fit(epochs=2)
    learner.save(tmp_path)
    here = online(memory, start_from=tmp_path, actor_lr=1e-5)
    assert all(torch.equal(v, parameters(learner)[k]) for k, v in parameters(here).items())
    assert set(steps_of(here).values()) == {40}
    a, b = (find_pipe(h, "actor_opt").opt for h in (learner, here))
    assert all(torch.equal(x["exp_avg_sq"], y["exp_avg_sq"]) for x, y in zip(a.state.values(), b.state.values()))
    assert b.param_groups[0]["lr"] == 1e-5
    here.fit(env_steps=30)


def test_cloning_may_be_the_start_of_a_policy():
    memory = filled()
    actor, critic, value, stepper = small()
    clone = BCLearner(copy.deepcopy(actor), OfflineReplay(memory, 32, seed=0), [], batches=20)
    clone.fit(epochs=1)
    learner = IQLLearner(actor, critic, value, OfflineReplay(memory, 32, seed=0), [])
    with pytest.raises(CheckpointError, match="partly=True"):
        take_over(learner, clone)
    assert "actor_opt.model" in take_over(learner, clone, partly=True)
    assert all(torch.equal(p, q) for p, q in zip(actor.parameters(), find_pipe(clone, CloningLossProcessor).actor.parameters()))


def test_nothing_is_taken_over_where_one_network_does_not_fit():
    memory = filled()
    actor, critic, value, _ = small()
    old = IQLLearner(actor, critic, value, OfflineReplay(memory, 32), [])
    actor, critic, value, _ = small(5)
    value = Value(2, (17, 16))
    new = IQLLearner(actor, critic, value, OfflineReplay(memory, 32), [])
    before = parameters(new)
    with pytest.raises(CheckpointError, match="value"):
        take_over(new, old)
    assert all(torch.equal(before[k], v) for k, v in parameters(new).items())


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("where", ["offline", "online"])
def test_a_run_continues_to_the_bit(where, joint, tmp_path):
    memory = filled()

    def build():
        return offline(memory, joint=joint, signals=joint) if where == "offline" else online(memory, joint=joint)
    whole, first = build(), build()
    for head in (whole, first):
        for _ in range(17):
            next(head)
    first.save(tmp_path)
    second = build()
    second.load(tmp_path)
    for head in (whole, second):
        for _ in range(23):
            next(head)
    a, b = parameters(whole), parameters(second)
    assert all(torch.equal(a[k], b[k]) for k in a)


# --- acting ----------------------------------------------------------------------------------------------------------
def acted(epsilon, deterministic, rows=400):
    actor = GaussianActor(2, 1, (8,), squash=False, free_std=True)
    chain = IQLAgent(actor, epsilon).for_validation(deterministic)
    bind(chain, Context(seed=0))
    chain.start()
    state = torch.zeros(rows, 2)
    out = chain.act(SimpleStep(state=state.numpy(), step_n=torch.zeros(rows, 1).numpy())).action
    return torch.as_tensor(out), actor(state)[3].clamp(-1, 1).detach()


def test_epsilon_greedy_samples_now_and_then_and_in_validation_only():
    for epsilon, share in ((0.0, 1.0), (0.25, 0.75), (1.0, 0.0)):
        action, mode = acted(epsilon, True)
        assert abs(float((action == mode).float().mean()) - share) < 0.08
    action, mode = acted(0.0, False)
    assert float((action == mode).float().mean()) < 0.01, "while it acts it samples"
    stepper = GymStepper(WALK, IQLAgent(small()[0], 0.0), seed=0)
    runner = find_pipe(stepper.agent, "EpsilonPolicyRunner")
    assert not runner.deterministic


def test_epsilon_greedy_changes_what_validation_finds():
    found = []
    for epsilon in (0.0, 0.0, 0.9):
        actor, critic, value, stepper = small(epsilon=epsilon)
        found.append(IQLLearner(actor, critic, value, (OfflineReplay(filled(50), 8), stepper), []).validate(4)["mean"])
    assert found[0] == found[1] != found[2]


# --- problems with known answers -------------------------------------------------------------------------------------
def solved(rows, discount=0.9, updates=1500, **settings):
    "Learn from a table of (state, action, reward, next_state, terminated, times), all of it in each batch"
    table = [r[:5] for r in rows for _ in range(r[5])]
    one_hot = torch.eye(2)
    batch = SimpleStep(state=torch.stack([one_hot[r[0]] for r in table]), action=torch.tensor([[r[1]] for r in table]), reward=torch.tensor([[float(r[2])] for r in table]),
                       next_state=torch.stack([one_hot[r[3]] for r in table]), terminated=torch.tensor([[r[4]] for r in table]), truncated=torch.zeros(len(table), 1, dtype=torch.bool))
    torch.manual_seed(0)
    actor = GaussianActor(2, 1, (32,), squash=False, log_std_bounds=(-5.0, 2.0), free_std=True)
    critic, value = Critics(2, 1, 2, (32,)), Value(2, (32,))
    head = IQLLearner(actor, critic, value, IterableSource([batch] * updates), [], 5e-3, 1e-2, 1e-2, discount=discount, **settings)
    list(head)
    with torch.no_grad():
        return value(one_hot)[:, 0].tolist(), critic(batch.state, batch.action).mean(0)[:, 0], actor(one_hot)[3][:, 0].tolist(), batch


def test_a_bandit_the_best_action_that_the_data_has():
    "Three actions, of worth 0, 1 and 0.4. Their 0.8-expectile is 0.7333, and the policy's mean their mean with the weights exp((r - 0.7333) / 0.2)"
    rows = [(0, -0.6, 0, 0, True, 5), (0, 0.1, 1, 0, True, 5), (0, 0.5, 0.4, 0, True, 5)]
    v, q, mode, batch = solved(rows, temperature=0.2)
    assert v[0] == pytest.approx(0.7333, abs=0.01)
    torch.testing.assert_close(q, batch.reward[:, 0], rtol=0, atol=0.02)
    assert mode[0] == pytest.approx(0.1144, abs=0.02), "near 0.1; the mean of the data is 0"


@pytest.mark.parametrize(("expectile", "v1", "better"), [(0.95, 0.6786, 0.5), (0.5, 0.1, -0.5)])
def test_a_chain_what_no_episode_of_the_data_does_is_put_together(expectile, v1, better):
    """From the first state 0.5 leads on, -0.5 ends with 0.3; in the second 0.5 ends with 1, and is rarely done. Followed by what the data does, 0.5 is worth 0.09 in the first state;
    followed by what it does best, 0.61 (the 0.95-expectile of 1 in ten is 0.6786): only who looks at the best puts the two halves together."""
    rows = [(0, 0.5, 0, 1, False, 20), (0, -0.5, 0.3, 0, True, 20), (1, 0.5, 1, 0, True, 2), (1, -0.5, 0, 0, True, 18)]
    v, q, mode, _ = solved(rows, expectile=expectile, temperature=0.05)
    assert v[1] == pytest.approx(v1, abs=0.02) and q[0].item() == pytest.approx(0.9 * v1, abs=0.02) and q[25].item() == pytest.approx(0.3, abs=0.02)
    assert mode[0] == pytest.approx(better, abs=0.08)


# --- cloning ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["gaussian", "deterministic"])
def test_cloning_equals_a_plain_loop(kind):
    torch.manual_seed(0)
    actor = GaussianActor(S, A, HIDDEN, squash=False, free_std=True) if kind == "gaussian" else Actor(S, A, *HIDDEN)
    actor.double()
    plain, tape = copy.deepcopy(actor), tape_of(torch.float64, weighted=True, length=60)
    opt = torch.optim.Adam(plain.parameters(), lr=1e-3, foreach=False, fused=False)
    for b in tape:
        each = -plain(b.state, b.action)[1] if kind == "gaussian" else (plain(b.state) - b.action).square().mean(1, keepdim=True)
        opt.zero_grad()
        (b.weight * each).mean().backward()
        opt.step()
    learner = BCLearner(actor, IterableSource(tape), [], actor_lr=1e-3)
    list(learner)
    for p, q in zip(actor.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=0)


def test_cloning_finds_what_the_data_does():
    "Actions are tanh(s) plus noise of 0.1: the likeliest Gaussian says so"
    g = torch.Generator().manual_seed(0)
    state = torch.randn(512, 1, generator=g)
    batch = SimpleStep(state=state, action=torch.tanh(state) + 0.1 * torch.randn(512, 1, generator=g), reward=torch.zeros(512, 1))
    torch.manual_seed(0)
    actor = GaussianActor(1, 1, (32,), squash=False, free_std=True)
    list(BCLearner(actor, IterableSource([batch] * 600), [], actor_lr=1e-2))
    _, _, _, mode, _, log_std = actor(state)
    assert (mode - torch.tanh(state)).abs().mean() < 0.03 and log_std.exp()[0, 0].item() == pytest.approx(0.1, abs=0.01)


def test_cloning_continues_to_the_bit_and_tells_its_signals(tmp_path):
    memory = filled()

    def build():
        actor = small()[0]
        return BCLearner(actor, (OfflineReplay(memory, 32, seed=0), GymStepper(WALK, BCAgent(actor))), [], signals=True, batches=20)
    whole, first = build(), build()
    whole.fit(epochs=2)
    row = first.fit(epochs=1)[0]
    assert row["distance"] > 0 and row["policy_log_std"] == row["policy_log_std"]
    first.save(tmp_path)
    second = build()
    second.load(tmp_path)
    second.fit(epochs=1)
    for p, q in zip(find_pipe(whole, CloningLossProcessor).actor.parameters(), find_pipe(second, CloningLossProcessor).actor.parameters()):
        assert torch.equal(p, q)
    assert whole.validate(3)["mean"] == second.validate(3)["mean"]


def test_a_deterministic_clone_acts_without_noise():
    actor = Actor(2, 1, 8, 8)
    stepper = GymStepper(WALK, BCAgent(actor), seed=0)
    step = next(stepper)
    torch.testing.assert_close(torch.as_tensor(step.action), actor(torch.as_tensor(step.state)).detach())


# --- what is refused, and with which words ---------------------------------------------------------------------------
def iql_on(dls=None, actor=None, critic=None, value=None, **settings):
    nets = small()[:3]
    actor, critic, value = (given or made for given, made in zip((actor, critic, value), nets))
    return IQLLearner(actor, critic, value, OfflineReplay(filled(40), 8) if dls is None else dls, [], **settings)


def vector_memory():
    memory = ReplayMemory(40)
    g = torch.Generator().manual_seed(0)
    memory.write(SimpleStep(state=torch.randn(40, 2, generator=g), action=torch.rand(40, 1, generator=g), next_state=torch.randn(40, 2, generator=g),
                            reward=torch.randn(40, 2, generator=g), terminated=torch.zeros(40, 1, dtype=torch.bool), truncated=torch.zeros(40, 1, dtype=torch.bool)))
    return memory


def discrete_memory():
    memory = ReplayMemory(40)
    memory.write(SimpleStep(state=torch.randn(40, 2), action=torch.zeros(40, 1, dtype=torch.int64), next_state=torch.randn(40, 2), reward=torch.zeros(40, 1),
                            terminated=torch.zeros(40, 1, dtype=torch.bool), truncated=torch.zeros(40, 1, dtype=torch.bool)))
    return memory


def vectors(reward_weights, r=2):
    return iql_on(OfflineReplay(vector_memory(), 8), critic=Critics(2, 1, 2, (8,), r), value=Value(2, (8,), r), reward_weights=reward_weights)


WRONG = {  # what: (how, error, words of its message)
    "vector rewards without weights": (lambda: vectors(None), ValueError, ["IQLValueLossProcessor", "'reward_weights' is None, expected 2"]),
    "weights of another width": (lambda: vectors((1.0, 2.0, 3.0)), ValueError, ["'reward_weights' has 3 numbers, expected 2"]),
    "critics of one component": (lambda: vectors((1.0, 2.0), r=1), ValueError, ["'value' has shape", "2]"]),
    "weights that are all zero": (lambda: vectors((0.0, 0.0)), ValueError, ["'reward_weights'", "at least one that is not zero"]),
    "a weight that is no number": (lambda: vectors((1.0, float("nan"))), ValueError, ["'reward_weights[1]' is nan"]),
    "no value network": (lambda: IQLLearner(*small()[:2], None, OfflineReplay(filled(40), 8), []), TypeError, ["IQLValueLossProcessor", "'value' is None, expected an nn.Module"]),
    "a value that sees the action": (lambda: iql_on(value=Critics(2, 1, 2, (8,))), ValueError, ["IQLValueLossProcessor", "'value'", "Critics"]),
    "a flat value": (lambda: iql_on(value=Flat()), ValueError, ["'value' has shape", "did it drop the last axis?"]),
    "a deterministic policy": (lambda: iql_on(actor=Actor(2, 1, 8, 8)), (TypeError, ValueError), ["IQLActorLossProcessor", "'actor'"]),
    "an expectile of 1": (lambda: iql_on(expectile=1.0), ValueError, ["'expectile' is 1.0", "0.5 is the mean"]),
    "no temperature": (lambda: iql_on(temperature=0.0), ValueError, ["'temperature' is 0.0"]),
    "a bound below 1": (lambda: iql_on(max_exp_advantage=0.5), ValueError, ["'max_exp_advantage' is 0.5"]),
    "discrete actions": (lambda: iql_on(OfflineReplay(discrete_memory(), 8)), TypeError, ["'action' is int64", "of a Box"]),
    "a policy of another width": (lambda: iql_on(actor=GaussianActor(2, 3, (8,), squash=False)), ValueError, ["IQLActorLossProcessor", "'actor: action'", "3"]),
    "a replay where the data is recorded": (lambda: iql_on(replay=partial(MixedReplay, data=filled(40))), ValueError, ["'replay'", "hands on batches already"]),
    "windows where the data is recorded": (lambda: iql_on(nsteps=3), ValueError, ["'nsteps' is 3", "memory_from_dataset(data, nsteps="]),
    "an actor before the value": (lambda: next(iter(LearnerHead(BasicOptStepper(IQLActorLossProcessor(OfflineReplay(filled(40), 8), small()[0], small()[2]), small()[0], 1e-3)))),
                                  ValueError, ["IQLActorLossProcessor", "'value' is missing from the batch", "behind an IQLValueLossProcessor"]),
    "rates for other networks": (lambda: JointOptStepper([], [small()[0]], [1e-3, 1e-3]), ValueError, ["'lr' has 2 rates", "1"]),
    "no networks to step": (lambda: JointOptStepper([], [], 1e-3), TypeError, ["'models'", "a list of networks"]),
    "an epsilon above 1": (lambda: IQLAgent(small()[0], 1.5), ValueError, ["EpsilonPolicyRunner", "'epsilon' is 1.5"]),
    "a start from nothing": (lambda: iql_on(start_from=3), TypeError, ["'source' is 3", "a learner, or the folder of a checkpoint"]),
    "a start from an empty folder": (lambda: iql_on(start_from="no/such/folder"), CheckpointError, ["manifest.json"]),
    "online from no data": (lambda: go_online(LearnerHead(SoftTargetUpdater(ExperienceReplay(GymStepper(WALK), 4), small()[1])), GymStepper(WALK)), LookupError, ["go_online", "sample recorded data"]),
    "cloning itself": (lambda: BCLearner(small()[0], small()[3], []), ValueError, ["BCLearner", "recorded data", "learns nothing"]),
    "cloning choices": (lambda: BCLearner(small()[0], OfflineReplay(discrete_memory(), 8), []), TypeError, ["CloningLossProcessor", "'action' is int64"]),
    "environment steps of data": (lambda: iql_on().fit(env_steps=10), ValueError, ["'env_steps' is 10, expected epochs"]),
    "an environment of another size": (lambda: iql_on((OfflineReplay(filled(40), 8), GymStepper("Pendulum-v1", IQLAgent(small()[0])))), ValueError, ["EpsilonPolicyRunner", "does not take float32"]),
}


class Flat(torch.nn.Module):
    "A value of shape [B]"

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, state):
        return self.layer(state)[:, 0]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_refused_by_name(wrong):
    make, error, words = WRONG[wrong]
    with pytest.raises(error) as e:
        make()
    for word in words:
        assert word in str(e.value), str(e.value)


# --- the command line ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    "A data set of twenty episodes of `fastrl/Goal-v0`, random actions"
    pytest.importorskip("minari")
    from fastrl_pipes.learner.dataset_writer import DatasetWriter
    folder = tmp_path_factory.mktemp("data") / "goal"
    writer = DatasetWriter(GymStepper("fastrl/Goal-v0", seed=0), folder)
    while writer.finished < 20:
        next(writer)
    writer.close()
    return str(folder)


SMALL = ("--env", "fastrl/Goal-v0", "--hidden1", "8", "--hidden2", "8", "--bs", "16", "--batches", "10", "--verdict-episodes", "2")


@pytest.mark.parametrize("algorithm", ["iql", "bc"])
def test_the_command_line_learns_from_data_and_goes_on(algorithm, recorded, tmp_path, capsys):
    out = tmp_path / "run"
    run = ["train", algorithm, "--data", recorded, *SMALL]
    assert main([*run, "--epochs", "2", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 epochs" in said and "OfflineReplay" in said and "Verdict: mean return" in said
    rows = read_rows(out / "metrics.csv")
    assert [r["batch"] for r in rows] == [10, 20] and all(r["env_steps"] == 0 for r in rows)
    assert main(["train", "--resume", str(out), "--epochs", "3"]) == 0 and len(read_rows(out / "metrics.csv")) == 3
    assert main(["play", str(out), "--episodes", "2"]) == 0 and "mean return" in capsys.readouterr().out
    assert load_run(out / "checkpoint").batches_seen == 30


def test_the_command_line_counts_epochs_of_data_unless_told_otherwise(recorded, tmp_path, capsys):
    run = ["train", "iql", "--data", recorded, *SMALL]
    assert main([*run, "--print-config"]) == 0
    config = capsys.readouterr().out
    assert f"epochs: {DEFAULT_EPOCHS}" in config and "env_steps: null" in config
    assert main([*run, "--online", "true", "--print-config"]) == 0 and "epochs: null" in capsys.readouterr().out
    assert main([*run, "--env-steps", "100", "--out", str(tmp_path / "a")]) == 2
    assert "expected --epochs; iql learns from data here" in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert main(["train", "bc", *SMALL]) == 2 and "'--data' is missing" in capsys.readouterr().err
    assert main([*run, "--ratio", "0.2", "--out", str(tmp_path / "b")]) == 2 and "or online=True" in capsys.readouterr().err


def test_the_command_line_goes_online_from_a_checkpoint(recorded, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", "iql", "--data", recorded, *SMALL, "--epochs", "2", "--out", str(first)]) == 0
    online = ["--online", "true", "--start-from", str(first / "checkpoint"), "--env-steps", "60", "--ratio", "0.25", "--n", "2", "--repeat", "2", "--max-sz", "50", "--warmup", "20"]
    assert main(["train", "iql", "--data", recorded, *SMALL, *online, "--seed", "4", "--out", str(second)]) == 0
    learner = load_run(second / "checkpoint")
    sampler = find_pipe(learner, MixedReplay)
    assert (sampler.offline_bs, sampler.memory.size, sampler.least, learner.stepper.n, learner.env_steps) == (4, 50, 20, 2, 60)
    assert set(steps_of(learner).values()) == {20 + learner.batches_seen}, "the moments of the offline run went on"


@pytest.mark.parametrize("setting", [dict(num_critic_replicas=3), dict(joint=True), dict(epsilon_greedy=0.5), dict(nsteps=2), dict(target_update_period=2), dict(signals=True), dict(discount=0.5)], ids=str)
def test_a_setting_of_the_builder_reaches_its_pipe(setting, recorded):
    (name, given), = setting.items()
    learner = iql("fastrl/Goal-v0", recorded, hidden1=8, hidden2=8, bs=16, batches=5, **setting)
    learner.fit(epochs=1)
    found = {"num_critic_replicas": lambda: find_pipe(learner, IQLCriticLossProcessor).critic.k, "joint": lambda: bool(find_pipes(learner, JointOptStepper)),
             "epsilon_greedy": lambda: find_pipe(learner.agent, EpsilonPolicyRunner).epsilon, "nsteps": lambda: 2 if (next(learner).discount < 0.99).any() else 1,
             "target_update_period": lambda: find_pipe(learner, "critic_target").target_sync, "signals": lambda: "advantage" in learner.recorder.rows[-1],
             "discount": lambda: find_pipe(learner, IQLCriticLossProcessor).discount}
    assert found[name]() == given


def test_rewards_of_several_components_from_the_builder(recorded):
    with pytest.raises(ValueError, match="'reward_weights' has 2 numbers, expected 1"):
        iql("fastrl/Goal-v0", recorded, reward_weights=(1.0, -1.0))


def test_bodies_are_short():
    "At most forty lines: signature and docstring apart"
    for fn in (IQLLearner, BCLearner):
        lines = inspect.getsource(fn).splitlines()
        body = lines[next(i for i, line in enumerate(lines) if line.startswith(") ->")) + 2:]
        assert len([line for line in body if line.strip()]) <= 40
