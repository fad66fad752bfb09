"""What the seed page promises: its names, its parameters with their defaults, the numbers that it prints, its way of composing."""
import inspect
import math
import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import fastrl_pipes.agents.ddpg as page
from fastrl_pipes.agents.ddpg import *  # noqa: F403, the page's own line
from fastrl_pipes.pipes.graph import find_pipes

PI = inspect.Parameter.empty  # no default on the page
TABLE = {  # name: the page's parameters in its order, with its defaults
    "init_xavier_uniform_weights": dict(m=PI, bias=0.01),
    "init_kaiming_normal_weights": dict(m=PI, bias=0.01),
    "init_uniform_weights": dict(m=PI, bound=PI),
    "ddpg_conv2d_block": dict(state_sz=PI, filters=32, activation_fn=nn.ReLU, ignore_warning=False),
    "Critic": dict(state_sz=PI, action_sz=PI, hidden1=400, hidden2=300, head_layer=nn.Linear, activation_fn=nn.ReLU, weight_init_fn=page.init_kaiming_normal_weights,
                   final_layer_init_fn=(page.init_uniform_weights, {"bound": 1e-4}), conv_block=None, batch_norm=False),
    "Actor": dict(state_sz=PI, action_sz=PI, hidden1=400, hidden2=300, head_layer=nn.Linear, activation_fn=nn.ReLU, weight_init_fn=page.init_kaiming_normal_weights,
                  final_layer_init_fn=(page.init_uniform_weights, {"bound": 1e-4}), conv_block=None, batch_norm=False),
    "pipe_to_device": dict(pipe=PI, device=PI, debug=False),
    "OrnsteinUhlenbeck": dict(source=PI, action_sz=PI, mu=0, theta=0.15, sigma=0.2, min_epsilon=PI, max_epsilon=1, max_steps=PI,
                              decrement_on_val=False, explore_on_val=False, ret_original=False),
    "ExplorationComparisonLogger": dict(source=PI),
    "ActionUnbatcher": dict(source=PI),
    "ActionClip": dict(source=PI, clip_min=PI, clip_max=PI),
    "DDPGAgent": dict(model=PI, logger_bases=None, min_epsilon=0.2, max_epsilon=1, max_steps=100, dp_augmentation_fns=None),
    "BasicOptStepper": dict(source=PI, model=PI, lr=PI, opt=PI, filter=False, do_zero_grad=True),
    "LossCollector": dict(source=PI, title="loss", filter=False, main_buffers=None),
    "SoftTargetUpdater": dict(source=PI, model=PI, target_sync=1, tau=0.001),
    "get_target_model": dict(model=PI, pipe=PI, model_cls=PI, target_updater_cls=(page.SoftTargetUpdater,), debug=False),
    "CriticLossProcessor": dict(source=PI, critic=PI, t_actor=PI, t_critic=None, discount=0.99, nsteps=1, loss=nn.MSELoss),
    "ActorLossProcessor": dict(source=PI, critic=PI, actor=PI, clip_critic_grad=None),
    "DDPGLearner": dict(actor=PI, critic=PI, dls=PI, logger_bases=None, actor_lr=1e-3, actor_opt=torch.optim.Adam, critic_lr=1e-2, critic_opt=torch.optim.Adam,
                        critic_target_copy_freq=1, actor_target_copy_freq=1, tau=0.001, bs=128, max_sz=10000, nsteps=1, device=None, batches=None,
                        dp_augmentation_fns=None, debug=False),
    "ProgressBarLogger": dict(epoch_on_pipe=page.EpocherCollector, batch_on_pipe=page.BatchCollector),
}
OTHERS = ["SimpleStep", "GymStepper", "NStepper", "NStepFlattener", "NSkipper", "FirstLastMerger", "ExperienceReplay", "SimpleModelRunner", "StepFieldSelector",
          "NumpyConverter", "EpisodeCollector", "RollingTerminatedRewardCollector", "EpocherCollector", "BatchCollector"]


# --- names and parameters --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*TABLE, *OTHERS])
def test_a_star_import_brings_the_name(name):
    assert name in page.__all__ and globals()[name] is getattr(page, name)


@pytest.mark.parametrize("name", TABLE)
def test_parameters_come_in_the_pages_order_with_its_defaults(name):
    ours = [p for p in inspect.signature(getattr(page, name)).parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    pages = TABLE[name]
    assert [p.name for p in ours][:len(pages)] == list(pages), "what is ours comes after the page's"
    for p in ours:
        expected = pages.get(p.name, PI)
        if isinstance(expected, tuple) and len(expected) == 2:
            assert (p.default.func, p.default.keywords) == expected
        elif expected is not PI:
            assert p.default == expected and (expected is None) == (p.default is None)
        assert p.name in pages or p.default is not PI, "what the page does not know has a default"


# --- networks --------------------------------------------------------------------------------------------------------
def test_the_critics_number():
    torch.manual_seed(0)
    critic = page.Critic(4, 2)
    state, action = torch.randn(1, 4), torch.randn(1, 2)
    critic.eval()
    with torch.no_grad():
        assert str(critic(state, action)) == "tensor([[0.0083]])"


def test_the_actors_numbers():
    torch.manual_seed(0)
    actor = page.Actor(4, 2)
    state = torch.randn(1, 4)
    with torch.no_grad():
        assert str(actor(state)) == "tensor([[0.0101, 0.0083]])"


def test_initialisers_touch_linear_layers_only():
    for init, bias in ((page.init_xavier_uniform_weights, 0.01), (page.init_kaiming_normal_weights, 0.01), (lambda m: page.init_uniform_weights(m, 0.5), None)):
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(64, 64), nn.BatchNorm1d(64))
        before = {k: v.clone() for k, v in net.state_dict().items()}
        net.apply(init)
        changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == ({"1.weight"} if bias is None else {"1.weight", "1.bias"})
        assert bias is None or (net[1].bias == torch.tensor(bias)).all()
    assert net[1].weight.abs().max() <= 0.5 and net[1].weight.abs().max() > 0.45


def test_actor_and_critic_use_what_they_are_given():
    "The ancestor's actor ignored `weight_init_fn`"
    def ones(m):
        if isinstance(m, nn.Linear):
            nn.init.ones_(m.weight)
    for net in (page.Actor, page.Critic):
        layers = [m for m in net(3, 2, 5, 7, weight_init_fn=ones, final_layer_init_fn=nn.Identity()).modules() if isinstance(m, nn.Linear)]
        assert all((layer.weight == 1).all() for layer in layers) and [layer.out_features for layer in layers][:2] == [5, 7]
        assert isinstance(net(3, 2, batch_norm=True).apply(lambda m: None), nn.Module)
        assert any(isinstance(m, nn.BatchNorm1d) for m in net(3, 2, batch_norm=True).modules())


def test_images():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block, features = page.ddpg_conv2d_block((3, 32, 32))
    convolutions = [m for m in block if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [32, 32, 32] and not any("Pool" in type(m).__name__ for m in block)
    assert isinstance(block[-1], nn.Flatten) and any(isinstance(m, nn.BatchNorm2d) for m in block)
    images, actions = torch.zeros(2, 3, 32, 32), torch.zeros(2, 2)
    assert block(images).shape == (2, features)
    with pytest.warns(UserWarning, match="channels"):
        page.ddpg_conv2d_block((4, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page.ddpg_conv2d_block((4, 32, 32), ignore_warning=True)
    critic, actor = (net((3, 32, 32), 2, conv_block=page.ddpg_conv2d_block) for net in (page.Critic, page.Actor))
    assert critic(images, actions).shape == (2, 1) and actor(images).shape == (2, 2)
    linear = [m.in_features for m in critic.modules() if isinstance(m, nn.Linear)]
    assert linear == [features, 400 + 2, 300], "actions join at the second linear layer"


# --- the agent -------------------------------------------------------------------------------------------------------
def test_exploration_fades_to_the_original_actions():
    "The page's cell: 50 repeats of a batch of 4, epsilon from 1 to 0 over 200 steps"
    torch.manual_seed(0)
    batch = torch.randn(4, 2)
    pipe = page.OrnsteinUhlenbeck([batch] * 50, min_epsilon=0, max_steps=200, action_sz=2, ret_original=True)
    pipe = page.ExplorationComparisonLogger(pipe)
    explored = list(pipe)
    assert len(explored) == len(pipe.explored) == len(pipe.original) == 50
    apart = [float(np.abs(e - o).max()) for e, o in zip(pipe.explored, pipe.original)]
    assert all(np.array_equal(o, batch.numpy()) for o in pipe.original)
    assert max(apart[:25]) > 0.2 and np.mean(apart[40:]) < np.mean(apart[:40]) / 2 and 0 < apart[-1] < 0.05
    assert next(iter(page.OrnsteinUhlenbeck([batch], min_epsilon=0, max_epsilon=0, max_steps=200, action_sz=2))).equal(batch)
    figure = pipe.show()
    assert isinstance(figure, Figure) and [len(ax.lines) for ax in figure.axes] == [2, 2], "one panel a dimension, both lines in it"
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [e[0, 0] for e in pipe.explored])


def test_after_max_steps_nothing_is_added():
    batch = torch.zeros(4, 2)
    actions = list(page.OrnsteinUhlenbeck([batch] * 60, min_epsilon=0, max_steps=200, action_sz=2))
    assert all(a.equal(batch) for a in actions[50:]) and not actions[0].equal(batch)


def test_the_agent_yields_numpy():
    torch.manual_seed(0)
    actor = page.Actor(4, 2)
    agent = page.DDPGAgent(actor, min_epsilon=0, max_epsilon=0)
    steps = [page.SimpleStep.random(1, 4, 2), page.SimpleStep.random(3, 4, 2)]
    for step in steps:
        for action in page.DDPGAgent(actor, min_epsilon=0, max_epsilon=0)([step]):
            assert isinstance(action, np.ndarray) and action.shape == (len(step), 2)
            with torch.no_grad():
                np.testing.assert_allclose(action, actor(step.state).numpy(), atol=1e-6)
    for action in agent([np.zeros((1, 4), np.float32)] * 2):
        assert isinstance(action, np.ndarray) and action.shape == (1, 2)


def test_the_agent_compares_and_is_augmented():
    agent = page.DDPGAgent(page.Actor(4, 2), [page.ExplorationComparisonLogger], dp_augmentation_fns=[page.ActionUnbatcher])
    actions = list(agent([page.SimpleStep.random(1, 4, 2) for _ in range(5)]))
    assert all(np.abs(a).max() <= 1 for a in actions)
    logger, = find_pipes(agent, page.ExplorationComparisonLogger)
    assert len(logger.explored) == 5 and not np.array_equal(logger.explored, logger.original)
    assert isinstance(logger.show(title="Explored"), Figure)


def test_clip_and_unbatch():
    assert [a.tolist() for a in page.ActionClip([torch.tensor([[-3.0, 0.5]])], -1, 1)] == [[[-1.0, 0.5]]]
    assert [a.tolist() for a in page.ActionUnbatcher([np.array([[1.0, 2.0]])])] == [[1.0, 2.0]]


# --- the learner's parts ---------------------------------------------------------------------------------------------
def test_an_optimizer_steps_on_a_bare_loss_and_passes_everything_else():
    net = nn.Linear(2, 1)
    batches = [torch.ones(3, 2), "something", torch.ones(3, 2)]

    def losses():
        for batch in batches:
            if isinstance(batch, torch.Tensor):
                yield {"loss": net(batch).mean()}
            yield batch
    before = net.weight.detach().clone()
    passed = list(page.BasicOptStepper(losses(), net, 0.1, torch.optim.SGD, filter=True))
    assert passed[1] == batches[1] and torch.equal(passed[0], batches[0]) and torch.equal(passed[2], batches[2]) and len(passed) == 3
    torch.testing.assert_close(net.weight.detach(), before - 2 * 0.1)
    assert [type(i).__name__ for i in page.BasicOptStepper(losses(), net, 0.1)] == ["dict", "Tensor", "str", "dict", "Tensor"]


def test_gradients_add_up_when_they_are_not_zeroed():
    net, x = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    before = net.weight.item()
    list(page.BasicOptStepper(({"loss": net(x).sum()} for _ in range(3)), net, 0.1, torch.optim.SGD, do_zero_grad=False))
    assert net.weight.item() == pytest.approx(before - 0.1 * (1 + 2 + 3), abs=1e-6)


def test_losses_are_collected_shown_and_filtered():
    losses = [{"loss": torch.tensor(float(i))} for i in range(40)]
    buffers = []
    pipe = page.LossCollector([*losses, "batch"], title="critic", main_buffers=buffers)
    assert len(list(pipe)) == 41 and [float(x) for x in buffers] == list(range(40))
    figure = pipe.show(title="Losses of the critic")
    assert isinstance(figure, Figure) and figure.axes[0].get_title() == "Losses of the critic"
    drawn = figure.axes[0].lines[0].get_ydata()
    assert len(drawn) and all(b > a for a, b in zip(drawn, drawn[1:])) and 0 <= min(drawn) and max(drawn) <= 39
    assert list(page.LossCollector([*losses, "batch"], filter=True)) == ["batch"]


def test_the_pages_stack_with_updaters_upstream():
    "Targets are made upstream and found by `get_target_model`; the critic's is found without being asked for"
    torch.manual_seed(0)
    actor, critic = page.Actor(4, 2), page.Critic(4, 2)
    batches = [page.SimpleStep.random(16, 4, 2, seed=i) for i in range(3)]
    pipe = page.SoftTargetUpdater(batches, critic, tau=0.5)
    pipe = page.SoftTargetUpdater(pipe, actor)
    t_actor, t_critic = page.get_target_model(actor, pipe, page.Actor), page.get_target_model(critic, pipe, page.Critic)
    assert t_actor is not actor and t_critic is not critic and all(torch.equal(a, b) for a, b in zip(t_actor.parameters(), actor.parameters()))
    pipe = page.CriticLossProcessor(pipe, critic, t_actor)
    assert pipe.t_critic is t_critic
    pipe = page.LossCollector(pipe, title="critic loss")
    pipe = page.BasicOptStepper(pipe, critic, 1e-3, filter=True)
    pipe = page.ActorLossProcessor(pipe, critic, actor, clip_critic_grad=1)
    pipe = page.BasicOptStepper(pipe, actor, 1e-3, filter=True)
    start = [p.detach().clone() for p in critic.parameters()]
    next(pipe)
    after = [p.detach().clone() for p in critic.parameters()]
    assert all(torch.equal(t, s) for t, s in zip(t_critic.parameters(), start)), "the first move was from equal to equal"
    assert not any(torch.equal(a, s) for a, s in zip(after, start))
    next(pipe)
    for t, s, a in zip(t_critic.parameters(), start, after):
        torch.testing.assert_close(t, (s + a) / 2)
    assert sum(1 for _ in pipe) == 1 and page.pipe_to_device(pipe, "cpu") is pipe


def test_a_target_is_found_by_identity_before_its_class():
    first, second, third = (page.Critic(4, 2) for _ in range(3))
    pipe = page.SoftTargetUpdater(page.SoftTargetUpdater([], first, name="one"), second, name="two")
    found = page.get_target_model(second, pipe, page.Critic)
    assert torch.equal(next(found.parameters()), next(second.parameters())) and not torch.equal(next(found.parameters()), next(first.parameters()))
    with pytest.raises(LookupError, match="one.*two.*exactly one"):
        page.get_target_model(third, pipe, page.Critic)
    with pytest.raises(LookupError, match="exactly one"):
        page.get_target_model(third, page.SoftTargetUpdater([], first))


def test_the_whole_stack_moves_and_says_so(capsys):
    pipe = page.BasicOptStepper(page.SoftTargetUpdater([], net := page.Critic(4, 2)), net, 1e-3)
    page.pipe_to_device(pipe, "meta", debug=True)
    assert next(net.parameters()).device.type == "meta" and "SoftTargetUpdater" in capsys.readouterr().out


# --- the learner -----------------------------------------------------------------------------------------------------
def test_the_pages_learner(capsys):
    "Pendulum with the page's pipes: windows of two, every second one, first and last merged"
    torch.manual_seed(0)
    actor, critic = page.Actor(3, 1, 16, 16), page.Critic(3, 1, 16, 16)
    pipe = page.GymStepper("Pendulum-v1", page.DDPGAgent(actor, max_steps=200), seed=0)
    pipe = page.FirstLastMerger(page.NSkipper(page.NStepper(pipe, 2), 2))
    bar = page.ProgressBarLogger(epoch_on_pipe=page.EpocherCollector, batch_on_pipe=page.BatchCollector)
    learner = page.DDPGLearner(actor, critic, [pipe], [bar], bs=16, max_sz=20000, nsteps=2, batches=60, debug=True)
    described = capsys.readouterr().out
    for name in ("GymStepper", "NStepper", "NSkipper", "FirstLastMerger", "ExperienceReplay", "CriticLossProcessor", "ActorLossProcessor", "discount"):
        assert name in described
    rows = learner.fit(2)
    shown = capsys.readouterr().out
    assert [row["batch"] for row in rows] == [60, 120] and [row["epoch"] for row in rows] == [1, 2]
    assert all(math.isfinite(row[c]) for row in rows for c in ("critic_loss", "actor_loss"))
    for column in ("critic_loss", "actor_loss", "episode", "rolling_reward", "epoch", "batch"):
        assert column in rows[0] and column.replace("_", " ") in shown
    assert learner.validate(episodes=1)["returns"].shape == (1,)
    assert rows[-1]["env_steps"] == pytest.approx(2 * (120 + 16), abs=4), "every second step begins a sample"
