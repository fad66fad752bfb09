"Networks of continuous control: ensembles are networks apart, policies keep their contract, and what breaks it is refused by name"
import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from gymnasium import spaces
from reference_ddpg import tensors
from test_check import Walk
from torch import nn

from fastrl_pipes.agents.core import PolicyRunner
from fastrl_pipes.agents.sac import SACAgent, SACLearner
from fastrl_pipes.core import SimpleStep
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.networks.calls import call_policy
from fastrl_pipes.networks.contracts import check_policy
from fastrl_pipes.networks.ensemble import BatchedLinear, Critics, Value, first_value
from fastrl_pipes.networks.policies import GaussianActor
from fastrl_pipes.networks.targets import target_of
from fastrl_pipes.networks.temperature import Temperature
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.walk import bind
from fastrl_pipes.pipes.graph import find_pipe
from fastrl_pipes.processors.entropy import SoftActorLossProcessor

S, A, B = 4, 2, 6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def inputs(dtype=torch.float32, rows=B):
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, S, generator=g, dtype=dtype), torch.rand(rows, A, generator=g, dtype=dtype) * 2 - 1


# --- ensembles -------------------------------------------------------------------------------------------------------
def apart(critics: Critics, activation=nn.ReLU) -> list[nn.Sequential]:
    "Each replica as layers of its own"
    made = []
    for i in range(critics.k):
        layers = []
        for batched in critics.layers:
            k, n_in, n_out = batched.weight.shape
            layer = nn.Linear(n_in, n_out, dtype=batched.weight.dtype)
            layer.weight.data, layer.bias.data = batched.weight.data[i].T.clone(), batched.bias.data[i, 0].clone()
            layers += [layer, activation()]
        made.append(nn.Sequential(*layers[:-1]))
    return made


@DTYPES
@pytest.mark.parametrize("k, hidden, width, activation", [(1, (8,), 1, nn.ReLU), (2, (16, 12), 1, nn.ReLU), (3, (5, 6, 7), 2, nn.Tanh), (5, (16, 16), 1, nn.ELU)])
def test_critics_are_networks_apart(dtype, k, hidden, width, activation):
    torch.manual_seed(1)
    critics = Critics(S, A, k, hidden, width, activation).to(dtype)
    state, action = inputs(dtype)
    action.requires_grad_()
    singles = apart(critics, activation)
    q, expected = critics(state, action), torch.stack([net(torch.cat([state, action], 1)) for net in singles])
    assert q.shape == (k, B, width) and q.dtype is dtype
    exact = dict(rtol=1e-12, atol=1e-13) if dtype is torch.float64 else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(q, expected, **exact)
    weigh = torch.randn(q.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    grads = dict(zip([*tensors(critics), "action"], torch.autograd.grad((q * weigh).sum(), [*critics.parameters(), action])))
    of_singles = torch.autograd.grad((expected * weigh).sum(), [p for net in singles for p in net.parameters()] + [action])
    torch.testing.assert_close(grads["action"], of_singles[-1], **exact)
    per_net = 2 * len(critics.layers)
    for i in range(k):
        for j in range(len(critics.layers)):
            weight, bias = of_singles[i * per_net + 2 * j:i * per_net + 2 * j + 2]
            torch.testing.assert_close(grads[f"layers.{j}.weight"][i], weight.T, **exact)
            torch.testing.assert_close(grads[f"layers.{j}.bias"][i, 0], bias, **exact)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_replica_alone(k):
    critics = Critics(S, A, k, (16, 12)).double()
    state, action = inputs(torch.float64)
    q = critics(state, action)
    for i in range(k):
        one = critics(state, action, replica=i)
        assert one.shape == (B, 1)
        torch.testing.assert_close(one, q[i], rtol=1e-12, atol=1e-13)
    first = first_value(critics, state, action)
    torch.testing.assert_close(first, q[0], rtol=1e-12, atol=1e-13)
    grads = torch.autograd.grad(first.sum(), list(critics.parameters()))
    assert all((g[1:] == 0).all() and g[0].abs().sum() > 0 for g in grads), "the others have no part in it"


def test_the_first_value_of_other_critics():
    state, action = inputs()
    single = nn.Bilinear(S, A, 1)
    assert torch.equal(first_value(single, state, action), single(state, action))

    class Stacked(nn.Module):
        def forward(self, state, action):
            return torch.stack([state[:, :1], action[:, :1]])
    assert torch.equal(first_value(Stacked(), state, action), state[:, :1])


def test_replicas_begin_apart_and_as_linear_layers_do():
    "Uniform in +-1/sqrt(inputs) for weights and biases, as nn.Linear; a replica knows nothing of the others"
    torch.manual_seed(0)
    critics = Critics(30, 10, 4, (300, 200))
    for layer, n in zip(critics.layers, (40, 300, 200)):
        bound = 1 / math.sqrt(n)
        for p in (layer.weight, layer.bias):
            assert p.abs().max() <= bound
            assert all(not torch.equal(p[i], p[j]) for i in range(4) for j in range(i))
        assert layer.weight.abs().max() > 0.98 * bound and layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06)
        assert abs(layer.weight.mean().item()) < 0.1 * bound
    torch.manual_seed(0)
    assert torch.equal(Critics(30, 10, 4, (300, 200)).layers[1].weight, critics.layers[1].weight), "from torch's generator"
    plain = nn.Linear(300, 200)
    assert plain.weight.std().item() == pytest.approx(critics.layers[1].weight.std().item(), rel=0.02)


def test_critics_have_targets_and_a_state():
    critics = Critics(S, A, 3, (8,))
    target, other = target_of(critics), Critics(S, A, 3, (8,))
    other.load_state_dict(critics.state_dict())
    for net in (target, other):
        assert torch.equal(net(*inputs()), critics(*inputs())) and not {t.data_ptr() for t in net.parameters()} & {t.data_ptr() for t in critics.parameters()}
    assert not any(p.requires_grad for p in target.parameters())
    assert len(list(critics.parameters())) == 4 and isinstance(critics.layers[0], BatchedLinear)


@pytest.mark.parametrize("make, field", [
    (lambda: Critics(0, 2), "state_sz"), (lambda: Critics(3, -1), "action_sz"), (lambda: Critics(3, 2, k=0), "k"), (lambda: Critics(3, 2, k=1.5), "k"),
    (lambda: Critics(3, 2, hidden=()), "hidden"), (lambda: Critics(3, 2, hidden=256), "hidden"), (lambda: Critics(3, 2, hidden=(256, 0)), r"hidden\[1\]"),
    (lambda: Critics(3, 2, reward_sz=0), "reward_sz"), (lambda: Value(0), "state_sz"), (lambda: Value(3, hidden=(4, "x")), r"hidden\[1\]"),
    (lambda: GaussianActor(3, 0), "action_sz"), (lambda: GaussianActor(3, 1, hidden=None), "hidden"), (lambda: GaussianActor(3, 1, log_std_bounds=(2, -20)), "log_std_bounds"),
    (lambda: Temperature(0.0), "initial"), (lambda: Temperature(-1), "initial"), (lambda: Temperature(float("nan")), "initial"),
])
def test_sizes_that_make_no_network_are_refused(make, field):
    with pytest.raises((ValueError, TypeError), match=rf"^(Critics|Value|GaussianActor|Temperature): field '{field}'"):
        make()


@DTYPES
def test_a_value_network(dtype):
    net = Value(S, (16, 8), reward_sz=3).to(dtype)
    v = net(inputs(dtype)[0])
    assert v.shape == (B, 3) and v.dtype is dtype
    assert [(m.in_features, m.out_features) for m in net.modules() if isinstance(m, nn.Linear)] == [(S, 16), (16, 8), (8, 3)]


@DTYPES
@pytest.mark.parametrize("alpha", [1.0, 0.2, 1e-8, 50.0])
def test_a_temperature(dtype, alpha):
    learned, fixed = Temperature(alpha, dtype=dtype), Temperature(alpha, learned=False, dtype=dtype)
    assert learned().shape == () and learned().dtype is dtype and learned().item() == pytest.approx(alpha, rel=1e-6 if dtype is torch.float32 else 1e-14)
    assert learned().requires_grad and not fixed().requires_grad and len(fixed.state_dict()) == 1, "a fixed one is in the checkpoint, too"
    grad, = torch.autograd.grad(learned(), learned.log_alpha)
    assert grad.item() == pytest.approx(alpha, rel=1e-6), "the optimizer moves log alpha: d alpha / d log alpha = alpha"


# --- policies --------------------------------------------------------------------------------------------------------
ACTORS = {"squashed": {}, "squashed, free": dict(free_std=True), "plain": dict(squash=False), "plain, free": dict(squash=False, free_std=True)}
actors = pytest.mark.parametrize("kind", ACTORS)


def actor_of(kind="squashed", dtype=torch.float32, **more):
    torch.manual_seed(4)
    net = GaussianActor(S, A, (16, 12), **ACTORS[kind], **more).to(dtype)
    with torch.no_grad():
        list(net.layers.parameters())[-2].mul_(5)
        if net.free_log_std is not None:
            net.free_log_std.copy_(torch.tensor([[-0.5, 0.3]]))
    return net


@DTYPES
@actors
def test_what_a_policy_gives(kind, dtype):
    net, (state, given) = actor_of(kind, dtype), inputs(dtype)
    noise = torch.randn(B, A, dtype=dtype)
    for out in (net(state), net(state, noise=noise), net(state, given), call_policy(net, state, given, noise)):
        action, log_prob, entropy, mode = out[:4]
        assert [tuple(x.shape) for x in (action, log_prob, entropy, mode)] == [(B, A), (B, 1), (B, 1), (B, A)]
        assert all(x.dtype is dtype and x.isfinite().all() for x in (action, log_prob, entropy, mode))
        assert mode.abs().max() < 1, "inside of the box, in each of them"


@actors
def test_a_given_action_is_scored_and_returned_unchanged(kind):
    net, (state, given) = actor_of(kind), inputs()
    given[0] = 1.0
    given[1] = -1.0
    before = given.clone()
    action, log_prob, *_ = net(state, given)
    assert action is given and torch.equal(given, before)
    assert log_prob.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(log_prob.sum(), list(net.parameters())))


@actors
def test_a_sample_is_scored_as_the_same_action_given(kind):
    net, (state, _) = actor_of(kind, torch.float64), inputs(torch.float64)
    noise = torch.randn(B, A, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    action, log_prob, *_ = net(state, noise=noise)
    torch.testing.assert_close(net(state, action.detach())[1], log_prob, rtol=1e-7, atol=1e-7)


@actors
def test_the_noise_that_is_given_is_the_noise_that_is_used(kind):
    net, (state, _) = actor_of(kind, torch.float64), inputs(torch.float64)
    noise = torch.randn(B, A, dtype=torch.float64)
    before = torch.get_rng_state()
    a, b = net(state, noise=noise)[0], net(state, noise=noise)[0]
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), before), "torch's own generator is not asked"
    torch.manual_seed(0)
    c = net(state)[0]
    torch.manual_seed(0)
    assert torch.equal(net(state)[0], c) and torch.equal(net(state, noise=torch.zeros_like(noise))[0], net(state)[3]), "no noise: the mode"
    assert not torch.equal(net(state)[0], net(state)[0])


@actors
def test_samples_are_reparameterised(kind):
    "d action / d parameters by finite differences, with the noise held"
    net, (state, _) = actor_of(kind, torch.float64), inputs(torch.float64, rows=3)
    noise = torch.randn(3, A, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weigh = torch.randn(3, A, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    params = list(net.parameters())

    def value():
        action, log_prob, *_ = net(state, noise=noise)
        return (action * weigh).sum() + log_prob.sum()
    grads = torch.autograd.grad(value(), params)
    for p, g in zip(params, grads):
        i = int(g.abs().argmax())
        with torch.no_grad():
            at = p.view(-1)[i].item()
            p.view(-1)[i] = at + 1e-6
            up = value().item()
            p.view(-1)[i] = at - 1e-6
            down = value().item()
            p.view(-1)[i] = at
        assert (up - down) / 2e-6 == pytest.approx(g.view(-1)[i].item(), rel=1e-5)


def test_entropies():
    "Of a plain Gaussian the exact one; a squashed one has none in closed form: minus the log-probability of the action stands for it"
    state, given = inputs(torch.float64)
    for kind in ("plain", "plain, free"):
        net = actor_of(kind, torch.float64)
        log_std = net.parameters_of(state)[1]
        expected = torch.distributions.Normal(torch.zeros_like(log_std), log_std.exp()).entropy().sum(1, keepdim=True)
        for out in (net(state), net(state, given)):
            torch.testing.assert_close(out[2], expected)
    net = actor_of(dtype=torch.float64)
    for out in (net(state), net(state, given)):
        assert torch.equal(out[2], -out[1])
    many = net(state[:1].expand(40_000, S), noise=torch.randn(40_000, A, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    mean, log_std = (x[:1].detach() for x in net.parameters_of(state[:1]))
    u = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None] * log_std.exp() + mean
    p = torch.distributions.Normal(mean, log_std.exp()).log_prob(u)
    exact = -torch.trapezoid(p.exp() * (p - torch.log1p(-torch.tanh(u) ** 2)), u, dim=0).sum()
    assert many[2].mean().item() == pytest.approx(exact.item(), abs=0.03)


def test_the_mode_is_tanh_of_the_mean_and_not_the_mean():
    for kind, squash in (("squashed", True), ("plain", False)):
        net, (state, _) = actor_of(kind), inputs()
        out = net.layers(state)[:, :A]
        assert torch.equal(net(state)[3], torch.tanh(out)) and out.abs().max() > 0.3
        assert torch.equal(net.parameters_of(state)[0], out if squash else torch.tanh(out))


def test_a_standard_deviation_of_its_own():
    net, (state, _) = actor_of("plain, free"), inputs()
    log_std = net.parameters_of(state)[1]
    assert torch.equal(log_std, torch.tensor([[-0.5, 0.3]]).expand(B, A)), "the same in every state"
    assert "free_log_std" in dict(net.named_parameters()) and net.layers[-1].out_features == A
    grad, = torch.autograd.grad(net(state, inputs()[1])[1].sum(), net.free_log_std)
    assert grad.shape == (1, A) and (grad != 0).all()
    fresh = GaussianActor(S, A, (8,), free_std=True)
    assert torch.equal(fresh.free_log_std.detach(), torch.zeros(1, A)) and GaussianActor(S, A, (8,)).free_log_std is None


@actors
def test_the_standard_deviation_is_bounded(kind):
    net, (state, _) = actor_of(kind, log_std_bounds=(-1.0, 0.2)), inputs()
    if net.free_log_std is None:
        state = state * 1000
        log_std = net.parameters_of(state)[1]
        assert (log_std == 0.2).any() and (log_std == -1).any()
    else:
        net.free_log_std.data = torch.tensor([[-9.0, 9.0]])
        log_std = net.parameters_of(state)[1]
        assert torch.equal(log_std[0], torch.tensor([-1.0, 0.2]))
    assert log_std.min() >= -1 and log_std.max() <= torch.tensor(0.2)
    assert GaussianActor(S, A).log_std_bounds == (-20, 2), "as in the papers' code"


# --- what breaks the contract ----------------------------------------------------------------------------------------
class Broken(nn.Module):
    "A right policy whose outputs are changed"

    def __init__(self, change=lambda *out: out, inside=None):
        super().__init__()
        self.inside, self.change = inside or actor_of(), change
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, state, action=None, noise=None):
        self.calls += 1
        return self.change(*self.inside(state, action, noise))


class Deaf(Broken):
    def forward(self, state):
        return self.change(*self.inside(state))


BREACHES = {  # what: (policy, must it score?, error, words)
    "one output": (lambda: Broken(lambda a, *_: a), False, TypeError, ["'actor'", "returns 1 output,", "action, log_prob and entropy", "DDPG or TD3"]),
    "two outputs": (lambda: Broken(lambda a, p, *_: (a, p)), False, TypeError, ["'actor'", "returns 2 outputs"]),
    "an action too wide": (lambda: Broken(lambda a, *more: (torch.cat([a, a], 1), *more)), False, ValueError, ["'actor: action' has shape [6, 4], expected [6, 2]"]),
    "a flat log_prob": (lambda: Broken(lambda a, p, *more: (a, p[:, 0], *more)), False, ValueError, ["'actor: log_prob' has shape [6], expected [6, 1]"]),
    "a log_prob for each dimension": (lambda: Broken(lambda a, p, *more: (a, p.expand(B, A), *more)), False, ValueError, ["'actor: log_prob' has shape [6, 2], expected [6, 1]"]),
    "a flat entropy": (lambda: Broken(lambda a, p, e, *more: (a, p, e[:, 0], *more)), False, ValueError, ["'actor: entropy' has shape [6], expected [6, 1]"]),
    "NaN": (lambda: Broken(lambda a, p, *more: (a, p * float("nan"), *more)), False, ValueError, ["'actor: log_prob'", "NaN"]),
    "infinity": (lambda: Broken(lambda a, p, e, *more: (a, p, e / 0, *more)), False, ValueError, ["'actor: entropy'", "infinity"]),
    "another dtype": (lambda: Broken(lambda a, p, *more: (a, p.double(), *more)), False, ValueError, ["'actor: log_prob'", "float64", "float32"]),
    "a sample without gradient": (lambda: Broken(lambda a, *more: (a.detach(), *more)), False, ValueError, ["'actor'", "samples without gradient", "rsample()"]),
    "a log_prob without gradient": (lambda: Broken(lambda a, p, *more: (a, p.detach(), *more)), False, ValueError, ["'actor'", "log_prob without gradient"]),
    "a squeeze drops the batch axis": (lambda: Broken(lambda a, p, *more: (a, p.squeeze()[..., None] if len(a) > 1 else p.squeeze(), *more)), False, ValueError,
                                       ["'actor: log_prob' has shape [], expected [1, 1]", "squeeze() in Broken"]),
    "another observation": (lambda: Broken(inside=GaussianActor(S + 1, A, (8,))), False, ValueError, ["'actor'", "does not take float32 [6, 4]", "forward(state, action=None)"]),
    "a given action is changed": (lambda: Broken(lambda a, *more: (a * 0.99, *more)), True, ValueError, ["'actor'", "changes the action", "as it was given"]),
    "scores without gradient": (lambda: Broken(lambda a, p, *more: (a, p if a.requires_grad else p.detach(), *more)), True, ValueError, ["'actor'", "scores an action without gradient"]),
    "takes no action": (Deaf, True, ValueError, ["'actor'", "action", "forward(state, action=None)"]),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_refused_by_name(breach):
    make, scored, error, words = BREACHES[breach]
    with pytest.raises(error) as caught:
        check_policy("SoftActorLossProcessor", "actor", make(), inputs()[0], A, scored)
    for word in ["SoftActorLossProcessor: field ", *words]:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("make", [lambda: GaussianActor(S, A, (8,), squash=False), lambda: GaussianActor(S, A, (8,), squash=False, free_std=True),
                                  lambda: Broken(lambda a, *more: (a * 2, *more)), lambda: Broken(lambda a, *more: (torch.atanh(a), *more))])
def test_soft_policies_that_leave_the_box_are_refused(make):
    "SAC takes Q of what it samples: outside of the box no action was ever tried, and clipping would make the log-probability wrong"
    check_policy("me", "actor", make(), inputs()[0], A)  # as advantage-weighted regression may have it
    with pytest.raises(ValueError, match=r"SoftActorLossProcessor: field 'actor' \(\w+\) is not bounded: a sample is .*samples in \[-1, 1\].*tanh"):
        sac_on(make(), Still)


def test_right_policies_pass_and_nothing_is_touched():
    for net in (Broken(), *map(actor_of, ACTORS)):
        before, grads = copy.deepcopy(net.state_dict()), [p.grad for p in net.parameters()]
        net.train()
        generator = torch.get_rng_state()
        found = check_policy("me", "actor", net, inputs()[0], A, scored=True, unit=not isinstance(net, GaussianActor) or net.squash)
        assert found.shape == (B, A) and not found.requires_grad
        assert torch.equal(torch.get_rng_state(), generator) and net.training
        assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values())), "buffers, too"
        assert grads == [p.grad for p in net.parameters()]
    check_policy("me", "actor", Deaf(), inputs()[0], A)  # who need not score need not take an action
    check_policy("me", "actor", actor_of(dtype=torch.float64), inputs(torch.float64)[0], A, scored=True)


def sac_on(actor, env=Walk, critic=None, **stepper):
    stepper = GymStepper(env, SACAgent(actor), seed=0, mode="sync", **stepper)
    return SACLearner(actor, Critics(S, A, hidden=(8,)) if critic is None else critic, stepper, [], bs=8, batches=5)


class Still(Walk):
    "A Walk that sees S numbers and takes A"

    def __init__(self):
        super().__init__()
        self.observation_space, self.action_space = spaces.Box(-2, 2, (S,), np.float32), spaces.Box(-1, 1, (A,), np.float32)
        made.append(self)

    def see(self):
        return np.resize(super().see(), S).astype(np.float32)


made: list = []


@pytest.mark.parametrize("change, words", [
    (lambda a, *_: a, ["PolicyRunner", "returns 1 output"]),
    (lambda a, p, *more: (a, p[:, 0], *more), ["PolicyRunner", "log_prob' has shape ["]),
    (lambda a, *more: (a.detach(), *more), ["PolicyRunner", "samples without gradient"]),
    (lambda a, p, *more: (a[:, :1], p, *more), ["PolicyRunner", "action' has shape ["]),
])
def test_a_learner_refuses_them_before_the_first_step(change, words):
    made.clear()
    with pytest.raises((ValueError, TypeError)) as caught:
        sac_on(Broken(change), Still)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not any("step" in env.touched for env in made)


# --- named observations ----------------------------------------------------------------------------------------------
class ArmPolicy(nn.Module):
    "Looks at one field of two, which it names"

    def __init__(self):
        super().__init__()
        self.inside = actor_of()

    def forward(self, arm, action=None, noise=None):
        return self.inside(arm, action, noise)


class Both(nn.Module):
    "Names two fields, in an order of its own, and draws for itself"

    def __init__(self):
        super().__init__()
        self.inside = actor_of()

    def forward(self, legs, arm, action=None):
        return self.inside(arm + legs, action)


class ArmCritics(Critics):
    def forward(self, arm, action, replica=None):
        return super().forward(arm, action, replica)


def test_a_policy_takes_the_fields_that_its_arguments_name():
    state, given = inputs()
    noise = torch.randn(B, A)
    named = {"camera": torch.zeros(B, 3), "arm": state, "legs": torch.ones(B, S)}
    for net in (ArmPolicy(), Both()):
        plain = net.inside
        seen = state + (named["legs"] if isinstance(net, Both) else 0)
        assert torch.equal(call_policy(net, named, given)[1], plain(seen, given)[1]) and call_policy(net, named, given)[0] is given
        check_policy("me", "actor", net, named, A, scored=True)
    assert torch.equal(call_policy(ArmPolicy(), named, noise=noise)[0], actor_of()(state, noise=noise)[0])
    torch.manual_seed(2)
    a = call_policy(Both(), named, noise=noise)[0]
    assert a.shape == (B, A), "who takes no noise draws for itself"


def test_fields_and_arguments_that_are_missing_are_named():
    state, given = inputs()
    with pytest.raises(LookupError, match=r"ArmPolicy: field 'arm' is an argument of forward, expected one of the observation's fields \['legs'\]"):
        call_policy(ArmPolicy(), {"legs": state})
    with pytest.raises(LookupError, match="Deaf: field 'action' is no argument of forward"):
        call_policy(Deaf(), state, given)
    with pytest.raises(ValueError, match="PolicyRunner: field 'actor'.*ArmPolicy.*'arm'"):
        check_policy("PolicyRunner", "actor", ArmPolicy(), {"legs": state}, A)


class Named(Still):
    "`Still`, seen as two named parts"

    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict(camera=spaces.Box(0, 255, (4, 4), np.uint8), arm=self.observation_space)

    def see(self):
        return {"camera": np.full((4, 4), 7, np.uint8), "arm": super().see()}


def test_a_soft_learner_on_named_observations():
    torch.manual_seed(0)
    actor, critic = ArmPolicy(), ArmCritics(S, A, hidden=(8,))
    learner = sac_on(actor, Named, critic, n=2)
    before = [p.detach().clone() for net in (actor, critic) for p in net.parameters()]
    learner.fit(1)
    assert all(not torch.equal(a, b) for a, b in zip(before, [p for net in (actor, critic) for p in net.parameters()]))
    assert learner.validate(episodes=2)["returns"].shape == (2,)
    assert find_pipe(learner, SoftActorLossProcessor).actor is actor
    learner.close()


# --- acting ----------------------------------------------------------------------------------------------------------
@DTYPES
def test_the_runner_samples_or_takes_the_mode(dtype):
    net, steps = actor_of(dtype=dtype), [SimpleStep(state=inputs()[0].numpy().astype(np.float32 if dtype is torch.float32 else np.float64)) for _ in range(300)]
    space = spaces.Box(-1, 1, (A,), np.float32)

    def run(deterministic, seed=3, name=None):
        pipe = PolicyRunner(steps, net, deterministic, name)
        bind(pipe, Context(seed=seed, action_space=space))
        torch.manual_seed(0)
        return np.stack([s.action for s in pipe])
    mode = net(torch.from_numpy(steps[0].state))[3].detach().numpy()
    assert np.allclose(run(True), mode[None], atol=1e-6) and run(True).dtype == steps[0].state.dtype
    a = run(False)
    assert np.array_equal(a, run(False)) and not np.array_equal(a, run(False, seed=4)) and not np.array_equal(a, run(False, name="of another name"))
    assert not np.array_equal(a[0], a[1]) and np.abs(a).max() <= 1
    u, (mean, log_std) = np.arctanh(a.astype(float)), (x.detach().numpy() for x in net.parameters_of(torch.from_numpy(steps[0].state)))
    z = (u - mean) / np.exp(log_std)
    assert abs(z.mean()) < 0.06 and z.std() == pytest.approx(1, abs=0.05), "3,600 draws of the policy's own distribution"


def test_for_validation_the_mode_unless_asked_otherwise():
    net = actor_of()
    agent = SACAgent(net)
    bind(agent, Context(seed=1, observation_space=spaces.Box(-2, 2, (S,), np.float32), action_space=spaces.Box(-1, 1, (A,), np.float32)))
    for deterministic in (True, False):
        runner = find_pipe(agent.for_validation(deterministic), PolicyRunner)
        assert runner.deterministic is deterministic and runner.model is net and runner is not find_pipe(agent, PolicyRunner)
    assert find_pipe(agent, PolicyRunner).deterministic is False
    always = partial(PolicyRunner, deterministic=True)
    assert always([], net).validating(False, []).deterministic, "one that never explores does not begin to"
