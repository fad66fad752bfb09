"Kernels of continuous control: against numerical integration, direct minimisation, other people's distributions, numbers worked by hand, and plain loops"
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats
from torch import distributions as D

from fastrl_pipes.functional.gaussian import gaussian_entropy, gaussian_log_prob, squashed_log_prob, squashed_sample
from fastrl_pipes.functional.policy_gradient import smoothed_action, soft_policy_loss, temperature_loss
from fastrl_pipes.functional.regression import advantage_weights, expectile_loss, hysteretic_weights
from fastrl_pipes.functional.td import least, td_loss, td_target

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# (mean, sigma) before tanh: standard, narrow, very narrow, wide, shifted, narrow and shifted, wide and shifted
GAUSSIANS = [(0.0, 1.0), (0.3, 0.05), (-0.7, 1e-3), (0.0, 2.5), (2.0, 0.5), (-3.0, 0.05), (1.5, 4.0)]
gaussians = pytest.mark.parametrize("mean, sigma", GAUSSIANS)


def row(*values, dtype=torch.float64):
    return torch.tensor([values], dtype=dtype)


def column(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)[:, None]


def density(mean, sigma):
    "a -> pi(a) of one dimension"
    def at(a):
        a = torch.as_tensor(np.atleast_1d(a))[:, None]
        return squashed_log_prob(torch.full_like(a, mean), torch.full_like(a, math.log(sigma)), a)[:, 0].exp().numpy()
    return at


def mass(mean, sigma, low, high):
    "Of the Gaussian, between two numbers before tanh: what the squashed one has between their images"
    return stats.norm.cdf(high, mean, sigma) - stats.norm.cdf(low, mean, sigma)


# --- log-probabilities against integrals -----------------------------------------------------------------------------
@gaussians
def test_the_squashed_density_integrates_to_one(mean, sigma):
    "In the action's own units. What lies beyond |u| = 12 (a within 8e-11 of the bounds) is told by the Gaussian"
    low, high = max(-12.0, mean - 9 * sigma), min(12.0, mean + 9 * sigma)
    u = np.linspace(low, high, 40_001)
    a = np.tanh(u)
    whole = integrate.trapezoid(density(mean, sigma)(a), a)
    assert whole == pytest.approx(mass(mean, sigma, low, high), rel=2e-5)
    assert whole == pytest.approx(1, abs=1e-4) or (mean, sigma) == (1.5, 4.0), "the widest alone reaches further"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(-2, 2), st.floats(0.1, 3), st.floats(-0.999, 0.99), st.floats(1e-3, 1))
def test_any_interval_has_the_mass_that_the_gaussian_has_there(mean, sigma, low, width):
    high = min(low + width, 0.9995)
    found, _ = integrate.quad(lambda a: density(mean, sigma)(a)[0], low, high, points=[p for p in [math.tanh(mean)] if low < p < high] or None, limit=200)
    assert found == pytest.approx(mass(mean, sigma, math.atanh(low), math.atanh(high)), rel=1e-6, abs=1e-8)


def test_in_two_dimensions():
    x, w = np.polynomial.legendre.leggauss(160)
    a = torch.from_numpy(np.stack(np.meshgrid(x, x), -1).reshape(-1, 2))
    mean, log_std = row(0.4, -0.2).expand_as(a), row(-0.9, -0.6).expand_as(a)
    p = squashed_log_prob(mean, log_std, a).exp()
    assert p.shape == (len(a), 1)
    assert float((p[:, 0] * torch.from_numpy(np.outer(w, w).ravel())).sum()) == pytest.approx(1, abs=1e-6)
    alone = [squashed_log_prob(mean[:, i:i + 1], log_std[:, i:i + 1], a[:, i:i + 1]) for i in (0, 1)]
    torch.testing.assert_close(p.log(), alone[0] + alone[1], rtol=1e-12, atol=1e-12)


@gaussians
def test_samples_fall_where_the_density_says(mean, sigma):
    "Kolmogorov and Smirnov, 20,000 samples, and the mean of -log pi against the integral of -pi log pi"
    noise = torch.randn(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    action, log_prob = squashed_sample(torch.full_like(noise, mean), torch.full_like(noise, math.log(sigma)), noise)
    inside = action[action.abs() < 1].numpy()
    assert len(inside) > 19_990 and stats.kstest(inside, lambda a: stats.norm.cdf(np.arctanh(a), mean, sigma)).pvalue > 1e-3
    u = np.linspace(mean - 9 * sigma, mean + 9 * sigma, 20_001)
    p = stats.norm.pdf(u, mean, sigma)
    entropy = integrate.trapezoid(p * (np.log(4) - 2 * np.logaddexp(u, -u) - np.log(p)), u)  # -log pi = log(1 - tanh^2) - log N
    assert float(-log_prob.mean()) == pytest.approx(entropy, abs=5 * float(log_prob.std()) / 20_000**0.5)


# --- against torch's distributions -----------------------------------------------------------------------------------
def squashed(mean, log_std):
    return D.Independent(D.TransformedDistribution(D.Normal(mean, log_std.exp()), [D.TanhTransform(cache_size=1)]), 1)


@DTYPES
def test_the_squashed_gaussian_is_torchs_transformed_one(dtype):
    g = torch.Generator().manual_seed(0)
    mean, log_std, noise = (torch.randn(500, 3, generator=g, dtype=torch.float64) for _ in range(3))
    mean, log_std, noise = mean.to(dtype), (log_std / 2 - 0.5).to(dtype), noise.to(dtype)
    action, log_prob = squashed_sample(mean, log_std, noise)
    other = squashed(mean, log_std)
    torch.testing.assert_close(action, torch.tanh(mean + log_std.exp() * noise), rtol=0, atol=0)
    loose = dict(rtol=1e-9, atol=1e-9) if dtype is torch.float64 else dict(rtol=2e-3, atol=2e-3)  # torch's inverse loses digits near the bounds
    torch.testing.assert_close(log_prob[:, 0], other.log_prob(action), **loose)
    torch.testing.assert_close(squashed_log_prob(mean, log_std, action)[:, 0], other.log_prob(action), **loose)
    assert action.dtype is dtype and log_prob.dtype is dtype and log_prob.shape == (500, 1)


@DTYPES
def test_the_plain_gaussian_is_torchs(dtype):
    g = torch.Generator().manual_seed(0)
    mean, log_std, value = (torch.randn(200, 3, generator=g, dtype=dtype) for _ in range(3))
    other = D.Independent(D.Normal(mean, log_std.exp()), 1)
    torch.testing.assert_close(gaussian_log_prob(mean, log_std, value)[:, 0], other.log_prob(value), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gaussian_entropy(log_std)[:, 0], other.entropy(), rtol=1e-5, atol=1e-5)


def test_by_hand():
    half_log = 0.5 * math.log(2 * math.pi)
    assert gaussian_log_prob(row(1.0), row(math.log(2)), row(3.0)).item() == pytest.approx(-0.5 - math.log(2) - half_log)
    assert gaussian_log_prob(row(0.0, 0.0), row(0.0, 0.0), row(1.0, 2.0)).item() == pytest.approx(-2.5 - 2 * half_log), "summed over dimensions"
    assert gaussian_entropy(row(0.0, math.log(3))).item() == pytest.approx(1 + 2 * half_log + math.log(3))
    assert squashed_log_prob(row(0.0), row(0.0), row(0.0)).item() == pytest.approx(-half_log), "at 0 the slope of tanh is 1"
    u = math.atanh(0.6)
    assert squashed_log_prob(row(0.0), row(0.0), row(0.6)).item() == pytest.approx(-u * u / 2 - half_log - math.log(1 - 0.36))
    action, log_prob = squashed_sample(row(0.5), row(math.log(0.2)), row(-1.5))
    assert action.item() == pytest.approx(math.tanh(0.2))
    assert log_prob.item() == pytest.approx(-1.125 - math.log(0.2) - half_log - math.log(1 - math.tanh(0.2) ** 2))


# --- at the bounds ---------------------------------------------------------------------------------------------------
@DTYPES
@pytest.mark.parametrize("bound", [-1.0, 1.0])
@gaussians
def test_at_the_bounds_everything_is_finite(dtype, bound, mean, sigma):
    mean = torch.tensor([[mean, mean]], dtype=dtype, requires_grad=True)
    log_std = torch.full((1, 2), math.log(sigma), dtype=dtype, requires_grad=True)
    action = torch.tensor([[bound, 0.1]], dtype=dtype)
    log_prob = squashed_log_prob(mean, log_std, action)
    grads = torch.autograd.grad(log_prob.sum(), [mean, log_std])
    assert log_prob.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert action[0, 0] == bound, "what is scored is left alone"
    near = action.clone()
    near[0, 0] = bound * (1 - torch.finfo(dtype).eps)
    torch.testing.assert_close(squashed_log_prob(mean, log_std, near), log_prob, rtol=1e-6, atol=0)  # the bound counts as the number next to it


@DTYPES
@pytest.mark.parametrize("u", [-1e4, -300.0, -20.0, 20.0, 89.0, 1e4])
def test_samples_far_outside_have_exact_log_probabilities(dtype, u):
    "tanh is 1 to the last digit there; log pi = log N - 2 (log 2 - |u|), as 1 - tanh^2 = 4 exp(-2|u|)"
    mean, log_std, noise = (row(x, dtype=dtype).requires_grad_() for x in (u, math.log(0.5), 1.0))
    action, log_prob = squashed_sample(mean, log_std, noise)
    u = abs(u + 0.5)
    expected = -0.5 - math.log(0.5) - 0.5 * math.log(2 * math.pi) - 2 * math.log(2) + 2 * u
    assert action.abs().item() <= 1 and log_prob.item() == pytest.approx(expected, rel=1e-5)
    slope, of_std = torch.autograd.grad(log_prob, [mean, log_std])
    assert abs(slope.item()) == pytest.approx(2, rel=1e-5) and of_std.isfinite().all(), "2 tanh(u)"


def test_float32_is_as_good_as_its_actions_are():
    "Log-probabilities of float32 actions, near the bounds too, against the same actions in float64"
    a = torch.tanh(torch.linspace(-7, 7, 2001))[:, None]
    for mean, sigma in GAUSSIANS[:1] + GAUSSIANS[3:5]:
        single = squashed_log_prob(torch.full_like(a, mean), torch.full_like(a, math.log(sigma)), a)
        a64 = a.double()
        double = squashed_log_prob(torch.full_like(a64, mean), torch.full_like(a64, math.log(sigma)), a64)
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=2e-3)


def test_the_sample_and_its_score_agree():
    g = torch.Generator().manual_seed(3)
    mean, noise = (torch.randn(1000, 2, generator=g, dtype=torch.float64) for _ in range(2))
    log_std = torch.rand(1000, 2, generator=g, dtype=torch.float64) * 3 - 2
    action, log_prob = squashed_sample(mean, log_std, noise)
    torch.testing.assert_close(squashed_log_prob(mean, log_std, action), log_prob, rtol=1e-6, atol=1e-6)


def test_gradients_of_the_reparameterised_sample():
    g = torch.Generator().manual_seed(2)
    inputs = [torch.randn(3, 2, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    noise = torch.randn(3, 2, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m, s: squashed_sample(m, s, noise), inputs)
    action = torch.rand(3, 2, generator=g, dtype=torch.float64) * 1.8 - 0.9
    assert torch.autograd.gradcheck(lambda m, s: squashed_log_prob(m, s, action), inputs)


# --- regressions -----------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=12), st.floats(0.02, 0.98), st.integers(0, 3))
def test_the_expectile_is_what_a_direct_minimisation_finds(values, tau, kind):
    "The m that minimises the loss of x - m, by Brent's method; its defining property: tau (x - m)+ and (1 - tau) (m - x)+ balance"
    x = column(*values)
    weight = torch.rand(len(x), 1, generator=torch.Generator().manual_seed(kind), dtype=torch.float64) + 0.1 if kind else None
    found = optimize.minimize_scalar(lambda m: expectile_loss(x - m, tau, weight).item(), bounds=(min(values) - 1, max(values) + 1), method="bounded", options=dict(xatol=1e-9)).x
    w = torch.ones_like(x) if weight is None else weight
    balance = (w * torch.where(x > found, tau, 1 - tau) * (x - found)).sum().item()
    assert abs(balance) < 1e-4 * (1 + float(x.abs().max()))
    if tau == 0.5 and weight is None:
        assert found == pytest.approx(np.mean(values), abs=1e-5)


def test_expectiles_of_a_known_distribution():
    "Of a uniform sample on [0, 1] the expectile m solves tau (1 - m)^2 = (1 - tau) m^2"
    x = ((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)[:, None]
    for tau in (0.1, 0.5, 0.7, 0.9):
        grid = np.linspace(0, 1, 401)
        losses = [expectile_loss(x - m, tau).item() for m in grid]
        exact = math.sqrt(tau) / (math.sqrt(tau) + math.sqrt(1 - tau))
        assert grid[int(np.argmin(losses))] == pytest.approx(exact, abs=0.0026)


def test_expectile_loss_by_hand_and_by_a_loop():
    u = column(2.0, -1.0, 0.0, -4.0)
    assert expectile_loss(u, 0.8).item() == pytest.approx((0.8 * 4 + 0.2 * 1 + 0 + 0.2 * 16) / 4)
    assert expectile_loss(u, 0.5).item() == pytest.approx(0.5 * u.square().mean().item()), "half the mean square"
    weight, wide = column(1.0, 0.5, 2.0, 0.0), torch.cat([u, -u, u / 2], 1)
    expected = sum((0.7 if wide[b, r] >= 0 else 0.3) * wide[b, r] ** 2 * weight[b, 0] for b in range(4) for r in range(3)) / 12
    torch.testing.assert_close(expectile_loss(wide, 0.7, weight), expected)


@pytest.mark.parametrize("tau", [0.0, 1.0, -0.2, 1.5, float("nan")])
def test_an_expectile_outside_of_the_unit_interval_is_refused(tau):
    with pytest.raises(ValueError, match="expectile_loss: field 'expectile' is"):
        expectile_loss(column(1.0), tau)


def test_advantage_weights_by_hand():
    u = column(0.0, math.log(2), -math.log(4), 1e6, -1e6).requires_grad_()
    weights = advantage_weights(u, 1.0)
    torch.testing.assert_close(weights[:, 0], torch.tensor([1, 2, 0.25, 100, 0], dtype=torch.float64))
    assert not weights.requires_grad, "a constant: the policy's loss must not teach the value network"
    torch.testing.assert_close(advantage_weights(u, 0.5)[:3, 0], torch.tensor([1, 4, 1 / 16], dtype=torch.float64))
    torch.testing.assert_close(advantage_weights(u, 1.0, 1.0)[:, 0], torch.tensor([1, 1, 0.25, 1, 0], dtype=torch.float64))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=6), st.floats(0.01, 100), st.floats(1, 1e6), st.sampled_from([torch.float32, torch.float64]))
def test_advantage_weights_are_the_loop_and_never_overflow(values, temperature, bound, dtype):
    weights = advantage_weights(column(*values, dtype=dtype), temperature, bound)
    assert weights.dtype is dtype and weights.shape == (len(values), 1) and weights.isfinite().all()
    for w, u in zip(weights[:, 0].tolist(), values):
        exact = bound if u / temperature > math.log(bound) else math.exp(u / temperature)
        assert w == pytest.approx(exact, rel=1e-4 if dtype is torch.float32 else 1e-9, abs=1e-30)


def test_hysteretic_weights_by_hand_and_by_a_loop():
    error = torch.tensor([[[1.0, -1.0], [0.5, 0.0]], [[-3.0, 2.0], [1e-30, -1e-30]]], requires_grad=True)
    weights = hysteretic_weights(error, 1.0, 0.25)
    assert not weights.requires_grad and weights.shape == error.shape
    for i in np.ndindex(*error.shape):
        assert error[i] == 0 or weights[i].item() == (1.0 if error[i] > 0 else 0.25)
    assert hysteretic_weights(error, 0.0, 0.0).abs().sum() == 0


# --- targets and losses of critics -----------------------------------------------------------------------------------
def test_targets_of_vector_rewards_are_the_loop():
    g = torch.Generator().manual_seed(0)
    reward, value = torch.randn(6, 3, generator=g), torch.randn(6, 3, generator=g)
    terminated, discount = torch.rand(6, 1, generator=g) < 0.5, torch.rand(6, 1, generator=g)
    y = td_target(reward, discount, terminated, value)
    for b, r in np.ndindex(6, 3):
        assert y[b, r].item() == pytest.approx((reward[b, r] + (0 if terminated[b, 0] else discount[b, 0] * value[b, r])).item(), rel=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 4), st.integers(1, 5), st.integers(1, 3), st.sampled_from(["none", "rows", "each"]), st.integers(0, 10_000))
def test_td_loss_is_the_loop(k, rows, width, weighing, seed):
    "k = 0: a single critic, [B, R]"
    g = torch.Generator().manual_seed(seed)
    shape = (k, rows, width) if k else (rows, width)
    q, y = torch.randn(shape, generator=g, dtype=torch.float64), torch.randn(rows, width, generator=g, dtype=torch.float64)
    weight = {"none": None, "rows": torch.rand(rows, 1, generator=g, dtype=torch.float64), "each": torch.rand(shape, generator=g, dtype=torch.float64)}[weighing]
    expected = 0.0
    for i in range(max(k, 1)):
        for b, r in np.ndindex(rows, width):
            of = (i, b, r) if k else (b, r)
            w = 1.0 if weight is None else weight[b, 0].item() if weighing == "rows" else weight[of].item()
            expected += w * (q[of].item() - y[b, r].item()) ** 2 / (rows * width)
    assert td_loss(q, y, weight).item() == pytest.approx(expected, rel=1e-9)
    huber = sum(torch.nn.functional.smooth_l1_loss(one, y).item() for one in (q if k else [q]))
    assert td_loss(q, y, loss=torch.nn.functional.smooth_l1_loss).item() == pytest.approx(huber, rel=1e-9)


def test_each_replica_learns_at_the_rate_of_one():
    "The gradient of a critic is the same alone and among five: the loss is a sum over replicas, not a mean"
    q, y = torch.randn(5, 4, 1, requires_grad=True), torch.randn(4, 1)
    together, = torch.autograd.grad(td_loss(q, y), q)
    for i in range(5):
        one = q[i].detach().requires_grad_()
        torch.testing.assert_close(together[i], torch.autograd.grad(td_loss(one, y), one)[0])


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_least_is_the_loop(k):
    q = torch.randn(k, 4, 2, requires_grad=True)
    found = least(q)
    assert found.shape == (4, 2)
    for b, r in np.ndindex(4, 2):
        assert found[b, r].item() == min(q[i, b, r].item() for i in range(k))
    grad, = torch.autograd.grad(found.sum(), q)
    assert (grad.sum(0) == 1).all() and ((grad == 0) | (grad == 1)).all(), "the gradient goes to the smallest alone"
    single = torch.randn(3, 1)
    assert least(single) is single


# --- policies' losses ------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 3), st.floats(0, 2), st.floats(0, 1), st.integers(0, 10_000))
def test_smoothed_action_is_the_loop(rows, width, sigma, clip, seed):
    g = torch.Generator().manual_seed(seed)
    action, noise = torch.rand(rows, width, generator=g, dtype=torch.float64) * 2 - 1, torch.randn(rows, width, generator=g, dtype=torch.float64)
    found = smoothed_action(action, noise, sigma, clip)
    for b, i in np.ndindex(rows, width):
        moved = action[b, i].item() + max(-clip, min(clip, sigma * noise[b, i].item()))
        assert found[b, i].item() == pytest.approx(max(-1.0, min(1.0, moved)), abs=1e-12)


def test_smoothed_action_by_hand():
    found = smoothed_action(row(0.0, 0.0, 0.9, -0.9, 0.5), row(1.0, 4.0, 2.0, -2.0, -1.0), 0.2, 0.5)
    torch.testing.assert_close(found, row(0.2, 0.5, 1.0, -1.0, 0.3))  # noise, clipped noise, clipped actions


def test_soft_policy_loss_by_hand_and_its_gradients():
    log_prob, q = column(-1.0, 2.0).requires_grad_(), column(3.0, 5.0).requires_grad_()
    loss = soft_policy_loss(log_prob, q, 0.5)
    assert loss.item() == pytest.approx(((-0.5 - 3) + (1 - 5)) / 2)
    to_log_prob, to_q = torch.autograd.grad(loss, [log_prob, q])
    assert to_log_prob[:, 0].tolist() == [0.25, 0.25] and to_q[:, 0].tolist() == [-0.5, -0.5]
    torch.testing.assert_close(soft_policy_loss(log_prob, q, torch.tensor(0.5, dtype=torch.float64)), loss)


def test_temperature_loss_by_hand_and_its_gradient():
    alpha, log_prob = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), column(-1.0, 2.0, 0.5).requires_grad_()
    loss = temperature_loss(alpha, log_prob, -2.0)
    assert loss.item() == pytest.approx(-0.3 * (0.5 - 2.0))
    to_alpha, to_log_prob = torch.autograd.grad(loss, [alpha, log_prob], allow_unused=True)
    assert to_alpha.item() == pytest.approx(1.5) and to_log_prob is None, "entropy -0.5 is above the target -2: descending lowers alpha"
    assert loss.shape == ()


# --- broken shapes ---------------------------------------------------------------------------------------------------
def ones(*shape):
    return torch.ones(*shape)


REFUSED = {
    "gaussian_log_prob": [(ones(3, 2), ones(3, 2), ones(3, 1)), (ones(3, 2), ones(2), ones(3, 2)), (ones(2), ones(3, 2), ones(3, 2))],
    "squashed_sample": [(ones(3, 2), ones(3, 2), ones(3)), (ones(3, 2), ones(1, 2), ones(3, 2)), (ones(3, 2), ones(3, 2), ones(1, 2))],
    "squashed_log_prob": [(ones(3, 2), ones(3, 2), ones(2, 2)), (ones(3, 1), ones(3, 2), ones(3, 2))],
    "expectile_loss": [(ones(3, 1), 0.7, ones(3)), (ones(3, 2), 0.7, ones(3, 2)), (ones(3, 1), 0.7, ones(1, 1))],
    "advantage_weights": [(ones(3), 1.0), (ones(3, 2), 1.0), (ones(2, 3, 1), 1.0), (ones(3, 1), 0.0), (ones(3, 1), -1.0), (ones(3, 1), 1.0, 0.5)],
    "hysteretic_weights": [(ones(3, 1), -0.1, 1.0), (ones(3, 1), 1.0, -0.1)],
    "least": [(ones(3),), (ones(2, 2, 3, 1),)],
    "td_loss": [(ones(3, 1), ones(3)), (ones(3), ones(3, 1)), (ones(2, 3, 1), ones(2, 3, 1)), (ones(2, 3, 1), ones(2, 1)), (ones(3, 1), ones(3, 1), ones(3)),
                (ones(2, 3, 1), ones(3, 1), ones(2, 1)), (ones(2, 3, 2), ones(3, 2), ones(3, 2))],
    "td_target": [(ones(3, 2), 0.9, ones(3, 2) > 0, ones(3, 2)), (ones(3, 2), 0.9, ones(3, 1) > 0, ones(3, 1)), (ones(3, 2), ones(3, 2), ones(3, 1) > 0, ones(3, 2))],
    "smoothed_action": [(ones(3, 2), ones(3, 1), 0.2, 0.5), (ones(3, 2), ones(2), 0.2, 0.5)],
    "soft_policy_loss": [(ones(3, 1), ones(3), 0.2), (ones(3), ones(3, 1), 0.2), (ones(3, 1), ones(2, 3, 1), 0.2), (ones(3, 2), ones(3, 2), 0.2)],
    "temperature_loss": [(torch.tensor(1.0), ones(3), -1.0), (torch.tensor(1.0), ones(3, 2), -1.0)],
}


@pytest.mark.parametrize("kernel", REFUSED)
def test_what_would_broadcast_is_refused_by_name(kernel):
    for args in REFUSED[kernel]:
        with pytest.raises(ValueError, match=f"^{kernel}: field '"):
            globals()[kernel](*args)
