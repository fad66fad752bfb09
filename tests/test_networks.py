"Networks: the printed numbers, starts, shapes, dtypes, modes, and targets of their own"
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fastrl_pipes.functional.averaging import polyak
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.networks.conv import BytesToUnit, ddpg_conv2d_block
from fastrl_pipes.networks.initializers import init_kaiming_normal_weights, init_uniform_weights, init_xavier_uniform_weights
from fastrl_pipes.networks.targets import target_of

STARTS = [init_xavier_uniform_weights, init_kaiming_normal_weights, partial(init_uniform_weights, bound=0.5)]
IMAGE = (3, 20, 24)


def linears(net):
    return [m for m in net.modules() if isinstance(m, nn.Linear)]


# the page's numbers

def test_the_critic_prints_the_page_s_number():
    torch.manual_seed(0)
    critic = Critic(4, 2)
    state, action = torch.randn(1, 4), torch.randn(1, 2)
    critic.eval()
    assert str(critic(state, action).detach()) == "tensor([[0.0083]])"


def test_the_actor_prints_the_page_s_numbers():
    torch.manual_seed(0)
    actor = Actor(4, 2)
    state = torch.randn(1, 4)
    assert str(actor(state).detach()) == "tensor([[0.0101, 0.0083]])"


# initializers

@pytest.mark.parametrize("start", STARTS)
def test_starts_touch_linear_layers_only(start):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Embedding(5, 3), nn.GRUCell(3, 3), nn.Linear(4, 4))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.apply(start)
    changed = {k for k, v in net.state_dict().items() if not v.equal(before[k])}
    assert changed == ({"4.weight"} if isinstance(start, partial) else {"4.weight", "4.bias"})


def test_starts_have_the_stated_spread():
    layer = nn.Linear(300, 200)
    init_kaiming_normal_weights(layer, bias=0.5)
    assert layer.weight.std().item() == pytest.approx((2 / 300) ** 0.5, rel=0.02) and (layer.bias == 0.5).all()
    init_xavier_uniform_weights(layer)
    assert layer.weight.abs().max().item() == pytest.approx((6 / 500) ** 0.5, rel=0.01) and (layer.bias == 0.01).all()
    init_uniform_weights(layer, 1e-3)
    assert 0.99e-3 < layer.weight.abs().max() <= 1e-3 and (layer.bias == 0.01).all(), "the bias is untouched"
    assert layer.weight.requires_grad and layer.weight.is_leaf


@pytest.mark.parametrize("start", STARTS)
def test_starts_bear_layers_without_bias(start):
    start(nn.Linear(3, 3, bias=False))


def test_a_negative_bound_is_refused():
    with pytest.raises(ValueError, match="init_uniform_weights: field 'bound' is -1"):
        init_uniform_weights(nn.Linear(2, 2), -1)


# convolutions

@pytest.mark.parametrize("size", [(1, 15, 15), (3, 16, 33), (3, 64, 64), (2, 84, 84)])
def test_the_block_says_how_many_features_it_gives(size):
    block, n = ddpg_conv2d_block(size)
    assert block(torch.rand(2, *size)).shape == (2, n)


def test_the_block_is_three_convolutions_of_32_filters_without_pooling():
    block, _ = ddpg_conv2d_block(IMAGE)
    assert [m.out_channels for m in block if isinstance(m, nn.Conv2d)] == [32, 32, 32]
    assert [m.kernel_size for m in ddpg_conv2d_block(IMAGE, filters=7)[0] if isinstance(m, nn.Conv2d)] == [(3, 3)] * 3
    assert not any("Pool" in type(m).__name__ for m in block)
    assert sum(isinstance(m, nn.Tanh) for m in ddpg_conv2d_block(IMAGE, activation_fn=nn.Tanh)[0]) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_are_images_in_the_unit_interval(dtype):
    block = ddpg_conv2d_block(IMAGE)[0].to(dtype).eval()
    images = torch.randint(0, 256, (2, *IMAGE), dtype=torch.uint8)
    features = block(images)
    assert features.dtype is dtype
    torch.testing.assert_close(features, block(images.to(dtype) / 255))
    assert BytesToUnit()(torch.tensor([255], dtype=torch.uint8)).item() == 1.0
    assert not list(BytesToUnit().state_dict()), "a constant is no state"


def test_many_channels_warn_once_unless_told_not_to():
    with pytest.warns(UserWarning, match="field 'state_sz' .* 9 channels"):
        ddpg_conv2d_block((9, 64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddpg_conv2d_block((9, 64, 64), ignore_warning=True)
        ddpg_conv2d_block(IMAGE)


@pytest.mark.parametrize("size, names", [
    (4, "is 4"), ((64, 64), r"is \(64, 64\)"), ((3, 14, 64), r"\[1\]' is 14"), ((64, 64, 3), r"\[2\]' is 3"), ((0, 64, 64), r"\[0\]' is 0"),
    ((3, 64.0, 64), r"\[1\]' is 64.0"),
])
def test_sizes_that_are_no_image_are_refused(size, names):
    with pytest.raises((TypeError, ValueError), match="ddpg_conv2d_block: field 'state_sz.*" + names):
        ddpg_conv2d_block(size)


# actor and critic

@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [5, IMAGE])
def test_shapes_ranges_and_dtypes(size, dtype, batch_norm):
    settings = dict(conv_block=ddpg_conv2d_block) if isinstance(size, tuple) else {}
    actor = Actor(size, 2, 32, 16, batch_norm=batch_norm, **settings).to(dtype)
    critic = Critic(size, 2, 32, 16, batch_norm=batch_norm, **settings).to(dtype)
    state = torch.randint(0, 256, (6, *size), dtype=torch.uint8) if settings else 100 * torch.randn(6, size, dtype=dtype)
    action = actor(state)
    q = critic(state, action)
    assert action.shape == (6, 2) and action.dtype is dtype and action.abs().max() < 1
    assert q.shape == (6, 1) and q.dtype is dtype
    grads = torch.autograd.grad(q.sum(), [*actor.parameters()])
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("make, widths", [
    (lambda: Actor(4, 2), [(4, 400), (400, 300), (300, 2)]),
    (lambda: Critic(4, 2), [(6, 400), (400, 300), (300, 1)]),
    (lambda: Critic(np.int64(4), 2, 8, 9), [(6, 8), (8, 9), (9, 1)]),
    (lambda: Critic(IMAGE, 2, 8, 9, conv_block=ddpg_conv2d_block), [(64, 8), (10, 9), (9, 1)]),
])
def test_where_the_action_joins(make, widths):
    assert [(m.in_features, m.out_features) for m in linears(make())] == widths


def test_batch_norm_stands_on_the_state_and_before_the_action():
    def norms(net):
        return [m.num_features for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms(Actor(4, 2, batch_norm=True)) == [4, 400, 300]
    assert norms(Critic(4, 2, batch_norm=True)) == [4]
    assert norms(Critic(IMAGE, 2, batch_norm=True, conv_block=ddpg_conv2d_block)) == [3, 400]
    assert norms(Actor(4, 2)) == norms(Critic(4, 2)) == []


@pytest.mark.parametrize("make", [Actor, Critic])
def test_the_starts_that_are_given_are_used(make):
    seen = []
    net = make(4, 2, weight_init_fn=lambda m: seen.append(m), final_layer_init_fn=partial(init_uniform_weights, bound=1e-4))
    assert set(linears(net)) <= set(seen) and net in seen
    filled = make(4, 2, weight_init_fn=partial(init_xavier_uniform_weights, bias=0.3))
    assert all((m.bias == 0.3).all() for m in linears(filled)), "the head keeps the first start's bias"
    *hidden, head = linears(filled)
    assert head.weight.abs().max() <= 1e-4 < hidden[-1].weight.abs().max() <= (6 / 700) ** 0.5


@pytest.mark.parametrize("make", [Actor, Critic])
def test_head_and_activation_are_replaceable(make):
    net = make(4, 2, head_layer=partial(nn.Linear, bias=False), activation_fn=nn.Tanh)
    assert linears(net)[-1].bias is None and not any(isinstance(m, nn.ReLU) for m in net.modules())


def test_the_order_of_parameters_is_that_of_the_layers():
    assert [n for n, _ in Critic(4, 2).named_parameters()] == [f"layers.{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")]
    assert [n for n, _ in Actor(4, 2).named_parameters()] == [f"layers.{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")]


def test_one_pair_is_shared_and_the_function_is_not():
    pair = ddpg_conv2d_block(IMAGE)
    a, b = (Actor(IMAGE, 2, 8, 8, conv_block=pair) for _ in range(2))
    assert a.layers[0] is b.layers[0]
    a, b = (Actor(IMAGE, 2, 8, 8, conv_block=ddpg_conv2d_block) for _ in range(2))
    assert a.layers[0] is not b.layers[0]


@pytest.mark.parametrize("make", [Actor, Critic])
@pytest.mark.parametrize("wrong, field", [
    (dict(state_sz=0), "state_sz"), (dict(state_sz=4.0), "state_sz"), (dict(state_sz=True), "state_sz"), (dict(state_sz=IMAGE), "state_sz"),
    (dict(action_sz=-1), "action_sz"), (dict(action_sz=(2,)), "action_sz"), (dict(hidden1=0), "hidden1"), (dict(hidden2=1.5), "hidden2"),
    (dict(conv_block=ddpg_conv2d_block), "state_sz"), (dict(state_sz=IMAGE, conv_block=nn.Flatten()), "conv_block"),
    (dict(state_sz=IMAGE, conv_block=(nn.Flatten(), 0)), "conv_block"), (dict(state_sz=IMAGE, conv_block=3), "conv_block"),
])
def test_arguments_that_do_not_fit_are_refused_by_name(make, wrong, field):
    with pytest.raises((TypeError, ValueError), match=f"{make.__name__}: field '{field}.* expected"):
        make(**{**dict(state_sz=4, action_sz=2), **wrong})


def test_an_image_without_convolutions_is_told_what_to_do():
    with pytest.raises(TypeError, match="conv_block=ddpg_conv2d_block"):
        Actor(IMAGE, 2)


# targets

def net_with_everything():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


def tensors(net):
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def in_one_vector(net):
    "Every tensor of the network as a view of one flat vector"
    floats = [t for t in tensors(net).values() if t.is_floating_point()]
    flat = torch.cat([t.detach().reshape(-1) for t in floats])
    for t, part in zip(floats, flat.split([t.numel() for t in floats])):
        t.data = part.view(t.shape)
    return net


@pytest.mark.parametrize("prepare", [lambda n: n, lambda n: n.share_memory(), in_one_vector, lambda n: n.double()])
def test_a_target_is_equal_and_owns_its_memory(prepare):
    net = prepare(net_with_everything())
    net(torch.randn(5, 3, dtype=net[0].weight.dtype))
    target = target_of(net)
    assert type(target) is type(net)
    mine, theirs = tensors(target), tensors(net)
    assert list(mine) == list(theirs)
    for name, t in mine.items():
        assert t.equal(theirs[name]) and t.dtype is theirs[name].dtype and t is not theirs[name]
        assert t.untyped_storage().data_ptr() != theirs[name].untyped_storage().data_ptr() and not t.is_shared()
    assert len({t.untyped_storage().data_ptr() for t in mine.values()}) == len(mine), "each tensor by itself"
    with torch.no_grad():
        for t in theirs.values():
            t.zero_()
    assert all(t.any() for name, t in mine.items() if name == "0.weight" or "running_var" in name or "batches" in name)


def test_a_target_is_in_eval_mode_without_gradients_and_its_source_is_as_before():
    net = net_with_everything()
    net[3].weight.requires_grad_(False)
    net(torch.randn(5, 3)).sum().backward()
    target = target_of(net)
    assert not any(m.training for m in target.modules()) and all(m.training for m in net.modules())
    assert not any(p.requires_grad or p.grad is not None for p in target.parameters())
    assert [p.requires_grad for p in net.parameters()] == [True] * 4 + [False, True] and net[0].weight.grad is not None


def test_layers_that_are_tied_stay_tied():
    layer = nn.Linear(3, 3)
    target = target_of(nn.Sequential(layer, layer))
    assert target[0] is target[1]


def test_a_target_follows_parameters_and_buffers():
    net = net_with_everything()
    target = target_of(net)
    net(torch.randn(5, 3) + 10)
    polyak([*target.parameters(), *target.buffers()], [*net.parameters(), *net.buffers()], 1.0)
    assert all(t.equal(tensors(net)[name]) for name, t in tensors(target).items())


def test_only_modules_have_targets():
    with pytest.raises(TypeError, match="target_of: field 'net' is"):
        target_of("critic")
