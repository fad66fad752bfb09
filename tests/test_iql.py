"""Implicit Q-learning and behaviour cloning: equal to a plain loop, every option with its effect, offline and then online, and refused where something is wrong."""
import copy
from functools import partial

import pytest
import torch
from reference_iql import PlainIQL, Policy, mlp

from fastrl_pipes.agents.iql import IQLLearner
from fastrl_pipes.core import MergedStep, SampledStep, SimpleStep, copied
from fastrl_pipes.networks.ensemble import Critics, Value
from fastrl_pipes.networks.policies import GaussianActor
from fastrl_pipes.pipes.core import IterableSource
from fastrl_pipes.pipes.graph import find_pipe
from fastrl_pipes.processors.iql import IQLActorLossProcessor, IQLCriticLossProcessor, IQLValueLossProcessor

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
