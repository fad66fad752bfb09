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
    assert_equal(state_of_stack(head, actor, critic, value, reference.joint), found, **TOLERANCE[dtype])


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
    "a low bound": (dict(max_exp_advantage=1.5), dict(max_weight=1.5), {}),
    "all at once": (dict(joint=True, reward_weights=(0.5, -2.0), temperature=0.5, target_update_period=2, discount=0.8),
                    dict(joint=True, weights=(0.5, -2.0), temperature=0.5, period=2, discount=0.8), dict(r=2, weighted=True)),
}


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_the_learners_stack_equals_the_loop(case, dtype):
    settings, loop, more = CASES[case]
    check(dtype, loop=loop, **settings, **more)
