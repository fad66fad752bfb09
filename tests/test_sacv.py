"""SAC with a state-value network: the stack of pipes against a plain loop, the signals it records, and what its ancestor got wrong."""
import gymnasium
import numpy as np
import pytest
import torch
from equality import (
    HIDDEN, TOLERANCE, UPDATES, A, S, apart, as_batch, assert_equal, assert_moved, copied_weights, critics, in_order, kept, larger, noise_of,
    nothing_to_do, on_tape, tape_of, twins_of,
)
from reference_ddpg import moments, tensors
from reference_sac import SquashedPolicy
from reference_sacv import PlainSACV, VNetwork

from fastrl_pipes.agents.sacv import SACVAgent, SACVLearner, sacv
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.networks.ensemble import Critics, Value
from fastrl_pipes.networks.policies import GaussianActor
from fastrl_pipes.pipes.graph import find_pipe, find_pipes
from fastrl_pipes.processors.entropy import SoftActorLossProcessor, SoftValueLossProcessor, ValueCriticLossProcessor

BOTH = pytest.mark.parametrize("dtype", UPDATES, ids=str)


def networks(dtype, k=2):
    torch.manual_seed(3)
    return larger(GaussianActor(S, A, HIDDEN), 4.0).to(dtype), critics(dtype, k), larger(Value(S, HIDDEN)).to(dtype)


def networks_of(loop):
    return {"actor": tensors(loop.policy), "critic": tensors(loop.critics), "value": tensors(loop.value), "t_value": tensors(loop.t_value)}


def state_of_loop(loop):
    return {**networks_of(loop), "actor_adam": moments(loop.policy_opt, loop.policy), "critic_adam": moments(loop.critic_opt, loop.critics),
            "value_adam": moments(loop.value_opt, loop.value)}


def state_of_stack(head, actor, critic, value, like):
    opts = {p.name: p.opt for p in find_pipes(head, BasicOptStepper)}
    parts = {"actor": in_order(tensors(actor), like["actor"]), "critic": apart(tensors(critic)), "value": in_order(tensors(value), like["value"]),
             "t_value": in_order(tensors(find_pipe(head, "value_target").target_model), like["t_value"]),
             "actor_adam": in_order(moments(opts["actor_opt"], actor), like["actor_adam"]), "critic_adam": apart(moments(opts["critic_opt"], critic)),
             "value_adam": in_order(moments(opts["value_opt"], value), like["value_adam"])}
    return parts


def check(dtype, k=2, merged=False, weighted=False, length=None, spoil=None, **settings):
    "Run both sides over the tape and compare parameters, target, moments and signals; `spoil` puts a mistake into the stack"
    actor, critic, value = networks(dtype, k)
    tape = tape_of(dtype, length, merged, weighted)
    loop = PlainSACV(copied_weights(SquashedPolicy(S, A, *HIDDEN), actor), twins_of(critic), copied_weights(VNetwork(S, *HIDDEN), value), **settings)
    start = kept(networks_of(loop))
    head = SACVLearner(actor, critic, value, nothing_to_do(SACVAgent(actor)), logger_bases=[], max_sz=20_000, **settings)
    head = on_tape(head, SoftActorLossProcessor, tape)
    head.start()
    loop.noise = noise_of(head, SoftActorLossProcessor)
    if spoil:
        spoil(head)
    told = []
    for step in tape:
        next(head)
        told.append(loop.update(as_batch(step)))
    expected = state_of_loop(loop)
    if not spoil:
        assert_moved(expected, start)
    assert_equal(state_of_stack(head, actor, critic, value, expected), expected, **TOLERANCE[dtype])
    row = head.recorder.read()
    for name in told[0]:
        assert row[name] == pytest.approx(np.mean([t[name] for t in told]), rel=1e-3), name
    assert {"policy_mean", "policy_log_std"} <= set(row)


@BOTH
def test_the_learners_stack_equals_the_loop(dtype):
    check(dtype)


@BOTH
def test_all_at_once(dtype):
    check(dtype, k=3, merged=True, weighted=True, length=10, reward_scale=5.0, discount=0.9, tau=0.02, actor_lr=1e-3, critic_lr=2e-3, value_lr=3e-3)


def test_without_signals_the_parameters_are_the_same():
    made = []
    for signals in (True, False):
        actor, critic, value = networks(torch.float64)
        head = on_tape(SACVLearner(actor, critic, value, nothing_to_do(SACVAgent(actor)), logger_bases=[], max_sz=20_000, signals=signals),
                       SoftActorLossProcessor, tape_of(torch.float64, 20))
        list(head)
        made.append([p for net in (actor, critic, value) for p in net.parameters()])
        assert ("q1" in head.recorder.read()) is signals
    assert all(torch.equal(a, b) for a, b in zip(*made))


def scale_twice(head):
    find_pipe(head, ValueCriticLossProcessor).reward_scale = 2.0


def value_of_this_state(head):
    pipe = find_pipe(head, ValueCriticLossProcessor)
    target = pipe.target
    pipe.target = lambda batch: target(batch.replace(next_state=batch.state))


def value_in_the_place_of_its_target(head):
    pipe = find_pipe(head, ValueCriticLossProcessor)
    pipe.t_value = find_pipe(head, SoftValueLossProcessor).value


def value_without_entropy(head):
    pipe = find_pipe(head, SoftValueLossProcessor)
    loss = pipe.loss
    pipe.loss = lambda batch: loss(batch.replace(log_prob=torch.zeros_like(batch.log_prob)))


def truncation_stops(head):
    pipe = find_pipe(head, ValueCriticLossProcessor)
    loss = pipe.loss
    pipe.loss = lambda batch: loss(batch.replace(terminated=batch.done))


def noise_drawn_twice(head):
    pipe = find_pipe(head, SoftActorLossProcessor)
    normal = pipe.normal
    pipe.normal = lambda like: (normal(like), normal(like))[1]


MISTAKES = [scale_twice, value_of_this_state, value_in_the_place_of_its_target, value_without_entropy, truncation_stops, noise_drawn_twice]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_a_mistake_put_back_is_noticed(mistake):
    check(torch.float64, length=7)
    with pytest.raises(AssertionError, match="not close"):
        check(torch.float64, length=7, spoil=mistake)


def test_evaluation_takes_tanh_of_the_mean():
    "The ancestor handed out the mean itself"
    torch.manual_seed(0)
    actor = larger(GaussianActor(3, 1, HIDDEN), 30.0)
    agent, obs = SACVAgent(actor), np.array([0.3, -0.2, 1.0], np.float32)
    mean, _ = actor.parameters_of(torch.from_numpy(obs)[None])
    assert abs(mean.item()) > 1, "else the two could hardly be told apart"
    assert agent.predict(obs) == pytest.approx(torch.tanh(mean).item(), abs=1e-6)


def test_discrete_actions_are_refused():
    actor, critic, value = GaussianActor(4, 2, HIDDEN), Critics(4, 2, 2, HIDDEN), Value(4, HIDDEN)
    with pytest.raises(TypeError, match=r"SACVLearner: field 'action_space' is Discrete\(2\), expected a Box"):
        SACVLearner(actor, critic, value, GymStepper("CartPole-v1", SACVAgent(actor)), logger_bases=[])


def test_the_value_networks_pipe_stands_behind_the_policys():
    actor, critic, value = networks(torch.float32)
    learner = SACVLearner(actor, critic, value, nothing_to_do(SACVAgent(actor)), logger_bases=[], max_sz=20_000)
    pipe = SoftValueLossProcessor(tape_of(torch.float32, 1), value)
    with pytest.raises(ValueError, match="SoftValueLossProcessor: field 'value' is missing from the batch"):
        pipe.probe(tape_of(torch.float32, 1)[0])
    learner.close()


def test_a_run_continues_to_the_bit(tmp_path):
    def made():
        return sacv(warmup=40, bs=16, max_sz=500, hidden1=16, hidden2=16, batches=20, seed=5)

    whole, first, second = made(), made(), made()
    whole.fit(env_steps=120)
    first.fit(env_steps=70)
    first.save(tmp_path/"run")
    second.load(tmp_path/"run")
    second.fit(env_steps=50)
    a, b = whole.get_state()["modules"], second.get_state()["modules"]
    assert a.keys() == b.keys()
    for name in a:
        for key, x in a[name].items():
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, b[name][key]), f"{name}.{key}"
    for learner in (whole, first, second):
        learner.close()


def test_it_runs_in_several_environments():
    learner = sacv(n=3, warmup=30, bs=16, max_sz=500, hidden1=16, hidden2=16)
    learner.fit(env_steps=90)
    assert isinstance(gymnasium.spec("Pendulum-v1").max_episode_steps, int) and learner.env_steps == 90
    learner.close()
