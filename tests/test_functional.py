"Kernels against numbers worked by hand and against brute-force loops"
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastrl_pipes.functional.averaging import polyak
from fastrl_pipes.functional.policy_gradient import dpg_loss
from fastrl_pipes.functional.returns import nstep_return
from fastrl_pipes.functional.td import td_target

unit = st.floats(0, 1)
finite = st.floats(-1e3, 1e3)


def column(*values, **kwargs):
    return torch.tensor(values, **kwargs)[:, None]


# polyak

def test_polyak_by_hand():
    targets, sources = [torch.tensor([0.0, 10.0]), column(2.0)], [torch.tensor([4.0, 10.0]), column(-2.0)]
    polyak(targets, sources, 0.25)
    assert targets[0].tolist() == [1.0, 10.0] and targets[1].tolist() == [[1.0]]
    assert sources[0].tolist() == [4.0, 10.0], "sources are only read"


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.just(2), st.integers(1, 4), st.integers(1, 4)), elements=finite), unit)
def test_polyak_is_the_loop_over_elements(pair, tau):
    target, source = torch.from_numpy(pair[0].copy()), torch.from_numpy(pair[1])
    polyak([target], [source], tau)
    for row in range(target.shape[0]):
        for col in range(target.shape[1]):
            assert target[row, col].item() == pytest.approx(tau * pair[1, row, col] + (1 - tau) * pair[0, row, col], abs=1e-9)


@pytest.mark.parametrize("tau", [0, 1, 0.0, 1.0])
def test_polyak_at_its_ends_is_exact(tau):
    target, source = torch.randn(50), torch.randn(50)
    before = target.clone()
    polyak([target], [source], tau)
    assert target.equal(source if tau else before)


def test_polyak_copies_integers_between_floats():
    targets = [torch.zeros(2), torch.tensor(3), torch.zeros(1, dtype=torch.float64), torch.tensor([False])]
    polyak(targets, [torch.ones(2), torch.tensor(7), torch.ones(1, dtype=torch.float64), torch.tensor([True])], 0.5)
    assert targets[0].tolist() == [0.5, 0.5] and targets[1] == 7 and targets[2].tolist() == [0.5] and targets[3].item() is True


def test_polyak_of_integers_alone_and_of_nothing():
    counter = torch.tensor(0)
    polyak([counter], [torch.tensor(4)], 0.1)
    polyak([], [], 0.1)
    assert counter == 4


def test_polyak_leaves_no_history_and_writes_in_place():
    net, target = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).requires_grad_(False)
    address = target.weight.data_ptr()
    polyak(list(target.parameters()), list(net.parameters()), 0.5)
    assert target.weight.grad_fn is None and target.weight.data_ptr() == address and not target.weight.requires_grad


@pytest.mark.parametrize("tau", [-0.1, 1.1, float("nan"), 2])
def test_polyak_refuses_a_tau_outside_of_the_unit_interval(tau):
    with pytest.raises(ValueError, match="polyak: field 'tau' is"):
        polyak([torch.zeros(1)], [torch.ones(1)], tau)


@pytest.mark.parametrize("tau", ["0.1", None, True])
def test_polyak_refuses_a_tau_that_is_no_number(tau):
    with pytest.raises(TypeError, match="polyak: field 'tau' is"):
        polyak([torch.zeros(1)], [torch.ones(1)], tau)


def test_polyak_refuses_lists_that_do_not_pair_up_before_anything_moves():
    targets = [torch.zeros(2), torch.zeros(3)]
    with pytest.raises(ValueError, match=r"field 'sources\[1\]' has shape \[1\], expected \[3\]"):
        polyak(targets, [torch.ones(2), torch.ones(1)], 0.5)
    with pytest.raises(ValueError, match="field 'sources' has 1 tensors, expected 2"):
        polyak(targets, [torch.ones(2)], 0.5)
    assert not targets[0].any() and not targets[1].any()


# nstep_return

def test_nstep_return_by_hand():
    total, left = nstep_return([np.array([[1.0]]), np.array([[2.0]]), np.array([[4.0]])], 0.5)
    assert total.tolist() == [[3.0]] and left == 0.125, "1 + 2/2 + 4/4: the first reward is not discounted"


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)), elements=finite), unit)
def test_nstep_return_is_the_loop_over_time(window, discount):
    before = window.copy()
    total, left = nstep_return(list(window), discount)
    k, rows, width = window.shape
    for w in range(rows):
        for r in range(width):
            expected, weight = 0.0, 1.0
            for t in range(k):
                expected += weight * window[t, w, r]
                weight *= discount
            assert total[w, r] == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert left == pytest.approx(weight) and np.array_equal(window, before)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nstep_return_agrees_between_numpy_and_torch_and_keeps_the_dtype(k, dtype):
    window = list(np.random.default_rng(k).normal(size=(k, 4, 2)).astype(dtype))
    for discount in (0.9, np.float64(0.9)):
        a, left = nstep_return(window, discount)
        b, _ = nstep_return([torch.from_numpy(r) for r in window], discount)
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-6)
        assert a.dtype == dtype and b.numpy().dtype == dtype and type(left) is float and left == 0.9**k


def test_nstep_return_of_integer_rewards_does_not_round():
    assert nstep_return([np.array([[1]]), np.array([[1]])], 0.5)[0].tolist() == [[1.5]]


@pytest.mark.parametrize("window, names", [
    ([np.zeros(4)], r"field 'rewards\[0\]' has shape \[4\], expected \[W, R\]"),
    ([np.zeros((4, 1)), np.zeros((3, 1))], r"field 'rewards\[0\]' has shape \[4, 1\], expected \[3, 1\]"),
    ([np.zeros(4), np.zeros((4, 1))], r"field 'rewards\[0\]' has shape \[4\], expected \[4, 1\]"),
    ([np.zeros((4, 1)), np.zeros((1, 1)), np.zeros((4, 1))], r"field 'rewards\[1\]' has shape \[1, 1\]"),
    ([], "field 'rewards' is empty"),
])
def test_nstep_return_refuses_broken_windows(window, names):
    with pytest.raises(ValueError, match="nstep_return: " + names):
        nstep_return(window, 0.9)


@pytest.mark.parametrize("discount", [-0.1, 1.01, float("nan")])
def test_nstep_return_refuses_a_discount_outside_of_the_unit_interval(discount):
    with pytest.raises(ValueError, match="field 'discount' is"):
        nstep_return([np.zeros((1, 1))], discount)


# td_target

def test_td_target_by_hand():
    y = td_target(column(1.0, 1.0), 0.5, column(False, True), column(10.0, 10.0))
    assert y.tolist() == [[6.0], [1.0]]


@pytest.mark.parametrize("flag", [torch.bool, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_td_target_is_the_loop_over_elements(flag, per_row, width, dtype):
    g = torch.Generator().manual_seed(0)
    reward = torch.randn(6, width, generator=g)
    value = torch.randn(6, width, generator=g).to(dtype)
    terminated = (torch.rand(6, 1, generator=g) < 0.5).to(flag)
    discount = torch.rand(6, 1, generator=g) if per_row else 0.9
    y = td_target(reward, discount, terminated, value)
    assert y.dtype is dtype and y.shape == (6, width)
    for b in range(6):
        gamma = discount[b].item() if per_row else discount
        for r in range(width):
            expected = reward[b, r].item() + gamma * (1 - float(terminated[b])) * value[b, r].item()
            assert y[b, r].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_td_target_keeps_what_a_terminal_row_does_not_use_out():
    y = td_target(column(1.0, 2.0), 0.9, column(False, True), column(1.0, float("nan")))
    assert y[1].item() == 2.0


def test_td_target_reads_only():
    args = column(1.0, 2.0), column(0.9, 0.9), column(False, True), column(3.0, 4.0)
    before = [a.clone() for a in args]
    td_target(*args)
    assert all(a.equal(b) for a, b in zip(args, before))


def test_td_target_of_a_truncated_episode_bootstraps():
    "A constant reward for ever is worth r / (1 - gamma), and the target of that value is that value"
    value = torch.full((4, 1), 10.0, dtype=torch.float64)
    torch.testing.assert_close(td_target(torch.ones(4, 1), 0.9, torch.zeros(4, 1, dtype=torch.bool), value), value)


def test_td_target_of_a_merged_window_is_that_of_its_steps():
    rewards, value = [column(1.0), column(2.0), column(3.0)], column(5.0)
    go = column(False)
    one_by_one = value
    for r in reversed(rewards):
        one_by_one = td_target(r, 0.9, go, one_by_one)
    total, left = nstep_return(rewards, 0.9)
    torch.testing.assert_close(td_target(total, torch.full((1, 1), left), go, value), one_by_one)


GOOD = dict(reward=torch.ones(4, 1), discount=0.9, terminated=torch.zeros(4, 1, dtype=torch.bool), next_value=torch.ones(4, 1))


@pytest.mark.parametrize("field, wrong", [
    ("reward", torch.ones(4)), ("reward", torch.ones(4, 1, 1)),
    ("next_value", torch.ones(4)), ("next_value", torch.ones(4, 2)), ("next_value", torch.ones(1, 1)), ("next_value", torch.ones(4, 4)),
    ("terminated", torch.zeros(4, dtype=torch.bool)), ("terminated", torch.zeros(1, 1)), ("terminated", torch.zeros(4, 2)),
    ("discount", torch.ones(4)), ("discount", torch.tensor(0.9)), ("discount", torch.ones(1, 1)),
    ("discount", 1.5), ("discount", -0.1), ("discount", float("nan")),
])
def test_td_target_refuses_what_would_broadcast_and_names_it(field, wrong):
    with pytest.raises(ValueError, match=f"td_target: field '{field}' (has shape|is)"):
        td_target(**{**GOOD, field: wrong})


# dpg_loss

def test_dpg_loss_by_hand():
    assert dpg_loss(column(1.0, 2.0, 6.0)).item() == -3.0


def test_dpg_loss_is_the_loop_over_samples():
    "Every sample counts: the gradient is the mean of the gradients of single samples"
    torch.manual_seed(0)
    actor = torch.nn.Linear(3, 2).double()
    critic = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    states = torch.randn(7, 3, dtype=torch.float64)

    def gradient(s):
        return torch.autograd.grad(dpg_loss(critic(torch.cat((s, actor(s)), 1))), actor.weight)[0]

    slow = torch.zeros_like(actor.weight)
    for i in range(7):  # eq. 6 as written: dQ/da times dmu/dtheta
        s = states[i]
        a = actor(s).detach().requires_grad_()
        dq_da, = torch.autograd.grad(critic(torch.cat((s, a))).sum(), a)
        slow -= torch.outer(dq_da, s) / 7
    torch.testing.assert_close(gradient(states), slow)


@pytest.mark.parametrize("q", [torch.zeros(8), torch.zeros(8, 2), torch.zeros(()), torch.zeros(8, 1, 1)])
def test_dpg_loss_refuses_what_is_not_one_column(q):
    with pytest.raises(ValueError, match=r"dpg_loss: field 'q' has shape .* expected \[B, 1\]"):
        dpg_loss(q)
