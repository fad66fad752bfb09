"""Hysteretic DDPG, and DDPG with prioritised replay: where they differ from DDPG, and where they do not."""
import copy
from functools import partial

import numpy as np
import pytest
import torch
from reference_ddpg import PlainDDPG, moments, tensors

from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner, DDPGPerLearner, ddpg
from fastrl_pipes.agents.hddpg import HDDPGAgent, HDDPGLearner, HystereticCriticLossProcessor, hddpg
from fastrl_pipes.core import SampledStep
from fastrl_pipes.envs.doubles import NoOp
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.memory.experience_replay import ExperienceReplay
from fastrl_pipes.memory.prioritized import PrioritizedReplay
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.pipes.compare import replace
from fastrl_pipes.pipes.walk import bind
from fastrl_pipes.pipes.graph import find_pipe, find_pipes
from equality import A, BS, S, Tape, as_batch, tape_of

EXACT = dict(rtol=1e-9, atol=0.0)


def networks(dtype=torch.float64):
    torch.manual_seed(3)
    last = partial(torch.nn.init.uniform_, a=-0.1, b=0.1)
    return [net(S, A, 24, 16, final_layer_init_fn=lambda m: last(m.weight)).to(dtype) for net in (Actor, Critic)]


def on_tape(learner, kind, tape):
    find_pipe(learner, kind).stand_on(tape)
    bind(learner, learner.context)
    return learner


def stack(actor, critic, tape, **rates):
    env = partial(NoOp, obs_sz=S, action_sz=A)
    learner = HDDPGLearner(actor, critic, GymStepper(env, HDDPGAgent(actor)), logger_bases=[], critic_lr=1e-2, tau=0.001, **rates)
    return on_tape(learner, HystereticCriticLossProcessor, tape)


class PlainHysteretic(PlainDDPG):
    "The loop of DDPG whose critic's loss looks at the sign of each row's error"

    def __init__(self, *networks, up, down):
        super().__init__(*networks)
        self.up, self.down = up, down

    def update(self, batch):
        with torch.no_grad():
            y = batch.reward + 0.99 * (1 - batch.terminated.double()) * self.t_critic(batch.next_state, self.t_actor(batch.next_state))
        q, total = self.critic(batch.state, batch.action), 0.0
        for row in range(len(q)):
            error = y[row, 0] - q[row, 0]
            total = total + (self.up if error.item() > 0 else self.down) * error * error * (1 if batch.weight is None else batch.weight[row, 0])
        self.critic_opt.zero_grad()
        (total / len(q)).backward()
        self.critic_opt.step()
        self.actor_opt.zero_grad()
        (-self.critic(batch.state, self.actor(batch.state)).mean()).backward()
        self.actor_opt.step()
        with torch.no_grad():
            for net, target in ((self.critic, self.t_critic), (self.actor, self.t_actor)):
                for p, t in zip(net.parameters(), target.parameters()):
                    t += 0.001 * (p - t)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("up, down", [(1.0, 0.5), (0.3, 2.0), (1.0, 0.0)])
def test_the_stack_equals_a_loop_that_looks_at_each_error(up, down, weighted):
    actor, critic = networks()
    loop = PlainHysteretic(copy.deepcopy(actor), copy.deepcopy(critic), up=up, down=down)
    tape = tape_of(torch.float64, 60, weighted=weighted)
    head = stack(actor, critic, tape, q_increase_rate=up, q_decrease_rate=down)
    head.start()
    for step in tape:
        next(head)
        loop.update(as_batch(step))
    for net, plain in ((actor, loop.actor), (critic, loop.critic), (find_pipe(head, "critic_target").target_model, loop.t_critic)):
        for name, expected in tensors(plain).items():
            torch.testing.assert_close(tensors(net)[name].detach(), expected.detach(), **EXACT)
    for name, expected in moments(loop.critic_opt, loop.critic).items():
        torch.testing.assert_close(moments(find_pipe(head, "critic_opt").opt, critic)[name], expected, **EXACT)


def test_the_rate_is_not_squared():
    "A weight on the error in place of its square would give another gradient"
    batch = tape_of(torch.float64, 1)[0]
    actor, critic = networks()
    low = batch.replace(reward=batch.reward - 100)  # every error is negative
    full, part = (HystereticCriticLossProcessor([low], critic, copy.deepcopy(actor), copy.deepcopy(critic), q_decrease_rate=r) for r in (1.0, 0.25))
    assert next(part)["loss"].item() == pytest.approx(0.25 * next(full)["loss"].item(), rel=1e-12)


def test_with_equal_rates_it_is_ddpg():
    made = []
    for hysteretic in (True, False):
        actor, critic = networks()
        tape = tape_of(torch.float64, 30)
        env = partial(NoOp, obs_sz=S, action_sz=A)
        if hysteretic:
            head = stack(actor, critic, tape, q_increase_rate=1.0, q_decrease_rate=1.0)
        else:
            head = on_tape(DDPGLearner(actor, critic, GymStepper(env, DDPGAgent(actor)), logger_bases=[], critic_lr=1e-2, tau=0.001), "CriticLossProcessor", tape)
        list(head)
        made.append([*actor.parameters(), *critic.parameters()])
    for a, b in zip(*made):
        torch.testing.assert_close(a, b, **EXACT)


def test_both_polyak_knobs_are_an_error():
    actor, critic = networks()
    with pytest.raises(ValueError, match="HDDPGLearner: field 'tau' is 0.005 with a target_copy_freq of 2"):
        HDDPGLearner(actor, critic, GymStepper(partial(NoOp, obs_sz=S, action_sz=A), HDDPGAgent(actor)), logger_bases=[], target_copy_freq=2)


@pytest.mark.parametrize("rate", ["q_increase_rate", "q_decrease_rate"])
def test_a_negative_rate_is_an_error(rate):
    actor, critic = networks()
    with pytest.raises(ValueError, match=f"HystereticCriticLossProcessor: field '{rate}' is -0.5"):
        HDDPGLearner(actor, critic, GymStepper(partial(NoOp, obs_sz=S, action_sz=A), HDDPGAgent(actor)), logger_bases=[], **{rate: -0.5})


# --- prioritised replay under the same learner -----------------------------------------------------------------------
def small(**more):
    return dict(warmup=64, bs=BS, max_sz=500, hidden1=16, hidden2=16, batches=20, **more)


def errors_of(learner):
    "What the replay was told: index -> |y - Q| of the latest batch that had it"
    told, replay = {}, find_pipe(learner, PrioritizedReplay)
    update = replay.update

    def watched(index, error):
        told.update(zip(index.tolist(), error.tolist()))
        update(index, error)
    learner.context.priorities = watched
    return told


def swapped():
    "The one pipe of a learner that is there already; what stood behind the old writer stays"
    return replace(ddpg(**small()), ExperienceReplay, partial(PrioritizedReplay, bs=BS, max_sz=500, warmup=64), show=False)


@pytest.mark.parametrize("make", [lambda: ddpg(prioritized=True, **small()), lambda: ddpg(prioritized=True, **small(nsteps=3)), swapped],
                         ids=["one step", "three steps", "swapped"])
def test_errors_come_back_to_the_replay(make):
    learner = make()
    told = errors_of(learner)
    learner.start()
    batch = learner.next()
    assert isinstance(batch, SampledStep) and batch.weight.shape == (BS, 1) and batch.index.shape == (BS,)
    assert set(told) == set(batch.index.tolist()) and all(e >= 0 for e in told.values())
    tree = find_pipe(learner, PrioritizedReplay).tree
    chances = {i: float(tree.get(np.array([i]))[0]) for i in told}
    high, low = max(told, key=told.get), min(told, key=told.get)
    assert chances[high] > chances[low], "what surprised more is likelier"
    learner.close()


def test_the_learner_by_name_takes_the_same_pipe():
    actor, critic = Actor(3, 1, 16, 16), Critic(3, 1, 16, 16)
    learner = DDPGPerLearner(actor, critic, GymStepper("Pendulum-v1", DDPGAgent(actor), seed=0, random_steps=64), alpha=0.3, beta=0.7, beta_steps=50, logger_bases=[],
                             bs=BS, max_sz=500, warmup=64, batches=10)
    replay = find_pipe(learner, PrioritizedReplay)
    assert (replay.alpha, replay.beta, replay.beta_steps) == (0.3, 0.7, 50)
    learner.fit(3)
    assert replay.beta_now == 1.0 and len(find_pipes(learner, Tape)) == 0
    learner.close()


def test_it_learns_in_several_environments_and_continues_to_the_bit(tmp_path):
    def made():
        return hddpg(n=2, seed=5, **small())

    whole, first, second = made(), made(), made()
    whole.fit(env_steps=160)
    first.fit(env_steps=100)
    first.save(tmp_path/"run")
    second.load(tmp_path/"run")
    second.fit(env_steps=60)
    for a, b in zip(whole.get_state()["modules"].values(), second.get_state()["modules"].values(), strict=True):
        for key in a:
            if isinstance(a[key], torch.Tensor):
                assert torch.equal(a[key], b[key]), key
    for learner in (whole, first, second):
        learner.close()
