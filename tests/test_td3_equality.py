"""TD3 as a stack of pipes and as a plain loop: the same parameters, targets and Adam moments on the same batches with the same noise."""
import copy
from functools import partial

import pytest
import torch
from equality import (
    BS,
    HIDDEN,
    TOLERANCE,
    UPDATES,
    A,
    S,
    Tape,
    apart,
    as_batch,
    assert_equal,
    assert_moved,
    copied_weights,
    critics,
    in_order,
    kept,
    larger,
    noise_of,
    nothing_to_do,
    on_tape,
    tape_of,
    twins_of,
)
from reference_ddpg import moments, tensors
from reference_td3 import PlainTD3, Policy

from fastrl_pipes.agents.td3 import SmoothedCriticLossProcessor, TD3Agent, TD3Learner
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.networks.actor_critic import Actor
from fastrl_pipes.networks.targets import target_of
from fastrl_pipes.pipes.control import Every
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.walk import bind, traverse
from fastrl_pipes.pipes.graph import find_pipe
from fastrl_pipes.processors import dpg
from fastrl_pipes.processors.dpg import ActorLossProcessor, CriticLossProcessor
from fastrl_pipes.processors.targets import SoftTargetUpdater

BOTH = pytest.mark.parametrize("dtype", UPDATES, ids=str)
FAST = {torch.float64: 60, torch.float32: 10}


# --- the two sides ---------------------------------------------------------------------------------------------------
def networks(dtype, k=2):
    torch.manual_seed(3)
    return larger(Actor(S, A, *HIDDEN), 4000.0).to(dtype), critics(dtype, k)


def learners_stack(actor, critic, tape, **settings):
    return on_tape(TD3Learner(actor, critic, nothing_to_do(TD3Agent(actor)), logger_bases=[], **settings), SmoothedCriticLossProcessor, tape)


def merging_stack(actor, critic, tape, nsteps):
    "What the learner leaves to the samples: the discount of n steps, here told to the processor"
    t_actor, t_critic = target_of(actor), target_of(critic)

    class Spanning(SmoothedCriticLossProcessor):
        def __init__(self, source):
            super().__init__(source, critic, t_actor, t_critic)
            self.nsteps = nsteps

    def delayed(inlet):
        pipe = BasicOptStepper(ActorLossProcessor(inlet, critic, actor), actor, 1e-3, filter=True, name="actor_opt")
        pipe = SoftTargetUpdater(pipe, critic, 1, 0.005, t_critic, name="critic_target")
        return SoftTargetUpdater(pipe, actor, 1, 0.005, t_actor, name="actor_target")
    pipe = Every(BasicOptStepper(Spanning(tape), critic, 1e-3, filter=True, name="critic_opt"), 2, delayed)
    bind(pipe, Context(seed=4))
    return pipe


def networks_of(loop):
    return {"actor": tensors(loop.policy), "t_actor": tensors(loop.t_policy), "critic": tensors(loop.critics), "t_critic": tensors(loop.t_critics)}


def state_of_loop(loop):
    return {**networks_of(loop), "actor_adam": moments(loop.policy_opt, loop.policy), "critic_adam": moments(loop.critic_opt, loop.critics)}


def state_of_stack(head, actor, critic, like):
    found = {n: find_pipe(head, n) for n in ("critic_opt", "actor_opt", "critic_target", "actor_target")}
    parts = {"actor": tensors(actor), "t_actor": tensors(found["actor_target"].target_model), "actor_adam": moments(found["actor_opt"].opt, actor)}
    parts = {part: in_order(named, like[part]) for part, named in parts.items()}
    return {**parts, "critic": apart(tensors(critic)), "t_critic": apart(tensors(found["critic_target"].target_model)),
            "critic_adam": apart(moments(found["critic_opt"].opt, critic))}


def check(dtype, build=learners_stack, k=2, merged=False, weighted=False, length=None, spoil=None, for_stack=None, **for_loop):
    "Run both sides over the tape and compare; `spoil` puts a mistake into the stack"
    actor, critic = networks(dtype, k)
    tape = tape_of(dtype, length, merged, weighted)
    loop = PlainTD3(copied_weights(Policy(S, A, *HIDDEN), actor), twins_of(critic), **for_loop)
    start = kept(networks_of(loop))
    head = build(actor, critic, tape, **(for_stack or {}))
    reported = []
    if weighted:
        head.context.priorities = lambda index, error: reported.append((index.clone(), error.clone()))
    head.start()
    loop.generator = noise_of(head, SmoothedCriticLossProcessor)
    if spoil:
        spoil(head, actor, critic)
    errors = []
    for step in tape:
        next(head)
        errors.append(loop.update(as_batch(step)))
    with pytest.raises(StopIteration):
        next(head)
    expected = state_of_loop(loop)
    if not spoil:
        assert_moved(expected, start)
    assert_equal(state_of_stack(head, actor, critic, expected), expected, **TOLERANCE[dtype])
    if weighted:
        assert [i.tolist() for i, _ in reported] == [s.index.tolist() for s in tape], "each batch's errors once, under its own places"
        torch.testing.assert_close(torch.stack([e for _, e in reported]), torch.stack(errors), **TOLERANCE[dtype])


# --- the stack on a tape ---------------------------------------------------------------------------------------------
@BOTH
def test_the_learners_stack_equals_the_loop(dtype):
    check(dtype)


@BOTH
@pytest.mark.parametrize("k", [1, 5])
def test_any_number_of_critics(dtype, k):
    check(dtype, k=k, length=FAST[dtype])


@BOTH
@pytest.mark.parametrize("delay", [1, 3])
def test_any_delay_of_the_policy(dtype, delay):
    check(dtype, for_stack=dict(policy_delay=delay), policy_delay=delay, length=FAST[dtype])


@BOTH
def test_merged_samples_bring_their_own_discount(dtype):
    check(dtype, merged=True, discount=0.5, length=FAST[dtype])  # the loop's 0.5 is overruled, and so is the learner's 0.99


@BOTH
def test_nsteps_without_a_discount_in_the_sample(dtype):
    check(dtype, partial(merging_stack, nsteps=3), nsteps=3, length=FAST[dtype])


@BOTH
@pytest.mark.parametrize("k", [1, 2])
def test_weighted_samples_and_the_errors_that_are_reported(dtype, k):
    check(dtype, k=k, weighted=True, length=FAST[dtype])


@BOTH
def test_all_at_once(dtype):
    settings = dict(policy_noise=0.4, noise_clip=0.3, policy_delay=3, discount=0.9, tau=0.02, actor_lr=3e-4, critic_lr=2e-3)
    check(dtype, k=3, merged=True, weighted=True, length=2 * FAST[dtype], for_stack=settings, **settings)


def test_the_noise_is_that_of_a_generator_of_the_pipes_own():
    "Another seed of the run is other noise; torch's own generator is not asked"
    def final(seed, torchs):
        actor, critic = networks(torch.float64)
        stepper = nothing_to_do(TD3Agent(actor))
        stepper = GymStepper(stepper.settings["envs"], TD3Agent(actor), seed=seed)
        head = on_tape(TD3Learner(actor, critic, stepper, logger_bases=[]), SmoothedCriticLossProcessor, tape_of(torch.float64, 4))
        torch.manual_seed(torchs)
        list(head)
        return torch.cat([p.detach().flatten() for p in critic.parameters()])
    assert torch.equal(final(1, 1), final(1, 2)) and not torch.equal(final(1, 1), final(2, 1))


def test_the_bounds_bite():
    "Without this, a stack that clips neither noise nor action would pass"
    actor, critic = networks(torch.float64)
    noise = torch.randn(7 * BS, A, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2
    assert (noise.abs() > 0.5).any() and (noise.abs() < 0.5).any()
    said = torch.cat([actor(step.next_state) for step in tape_of(torch.float64, 7)])
    assert (said.abs() > 0.8).any() and (said.abs() < 0.5).any(), "some target actions lie near the bounds of the box, and some do not"


# --- the whole learner -----------------------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize("nsteps", [1, 3])
def test_the_whole_learner_on_pendulum_equals_the_loop_on_its_batches(dtype, nsteps):
    torch.manual_seed(1)
    updates = min(UPDATES[dtype], 300 // nsteps)
    actor, critic = larger(Actor(3, 1, *HIDDEN), 4000.0).to(dtype), critics(dtype, 2, 3, 1)
    settings = dict(tau=0.01, discount=0.95, critic_lr=5e-4)
    loop = PlainTD3(copied_weights(Policy(3, 1, *HIDDEN), actor), copy.deepcopy(twins_of(critic)), **settings)
    stepper = GymStepper("Pendulum-v1", TD3Agent(actor), seed=0, random_steps=30)
    learner = TD3Learner(actor, critic, stepper, logger_bases=[], bs=32, max_sz=1000, nsteps=nsteps, batches=updates, dp_augmentation_fns=[Tape], **settings)
    learner.start()
    loop.generator = noise_of(learner, SmoothedCriticLossProcessor)
    learner.fit(1)
    tape = find_pipe(learner, Tape).seen
    assert len(tape) == updates and tape[0].state.dtype is dtype
    for step in tape:
        loop.update(as_batch(step))
    expected = state_of_loop(loop)
    assert_equal(state_of_stack(learner, actor, critic, expected), expected, **TOLERANCE[dtype])
    learner.close()


# --- mistakes put back -----------------------------------------------------------------------------------------------
def the(head):
    return find_pipe(head, SmoothedCriticLossProcessor)


def changed(change):
    "The batch as the critics' loss sees it"
    def spoil(head, actor, critic):
        loss = the(head).loss
        the(head).loss = lambda batch: loss(change(batch))
    return spoil


def patched(module, name, value):
    "A function that the pipes call, by another one; the test takes it back"
    def spoil(head, actor, critic):
        PATCH.setattr(module, name, value)
    return spoil


def unclipped_action(head, actor, critic):
    pipe = the(head)
    pipe.next_action = lambda b: pipe.t_actor(b.next_state) + (pipe.normal(b.action) * pipe.policy_noise).clamp(-pipe.noise_clip, pipe.noise_clip)


def no_smoothing(head, actor, critic):
    the(head).next_action = lambda b: CriticLossProcessor.next_action(the(head), b)


def same_noise_in_every_row(head, actor, critic):
    pipe = the(head)
    normal = pipe.normal
    pipe.normal = lambda like: normal(like)[:1].expand_as(like)


def actor_on_the_second_critic(head, actor, critic):
    PATCH.setattr(dpg, "first_value", lambda c, s, a: c(s, a)[1])


def actor_on_the_smaller(head, actor, critic):
    PATCH.setattr(dpg, "first_value", lambda c, s, a: c(s, a).amin(0))


def targets_at_each_batch(head, actor, critic):
    "The two updaters stand behind the branch, not in it"
    opt, critics_target, actors_target, every = (find_pipe(head, n) for n in ("actor_opt", "critic_target", "actor_target", "Every"))
    every.branch = opt
    above = next(p for p in the_pipes(head) if p.source is every)
    critics_target.stand_on(every)
    above.stand_on(actors_target)


def the_pipes(head):
    return traverse(head)


def critics_wait_too(head, actor, critic):
    forward = find_pipe(head, "critic_opt").forward
    count = iter(range(10_000))
    find_pipe(head, "critic_opt").forward = lambda item: forward(item) if not isinstance(item, dict) or next(count) % 2 else ()


def policy_one_batch_too_early(head, actor, critic):
    find_pipe(head, Every).count = 1


def mean_over_the_critics(head, actor, critic):
    "The mean over critics where the box has one loss each: moments are half as large"
    loss = the(head).loss
    the(head).loss = lambda batch: loss(batch) / 2


MISTAKES = {  # what: (how it is put back, what `check` is told)
    "the noise is not clipped": (lambda h, a, c: setattr(the(h), "noise_clip", 10.0), {}),
    "the action with its noise is not clipped": (unclipped_action, {}),
    "no smoothing": (no_smoothing, {}),
    "one noise for the whole batch": (same_noise_in_every_row, {}),
    "the larger estimate": (patched(dpg, "least", lambda q: q.amax(0)), {}),
    "the mean of the estimates": (patched(dpg, "least", lambda q: q.mean(0)), {}),
    "the first estimate": (patched(dpg, "least", lambda q: q[0]), {}),
    "the actor in the place of its target": (lambda h, a, c: setattr(the(h), "t_actor", a), {}),
    "the critics in the place of their targets": (lambda h, a, c: setattr(the(h), "t_critic", c), {}),
    "truncation stops the bootstrap": (changed(lambda b: b.replace(terminated=b.done)), {}),
    "terminal rows bootstrap": (changed(lambda b: b.replace(terminated=b.terminated & False)), {}),
    "the successor's state is the state": (changed(lambda b: b.replace(next_state=b.state)), {}),
    "the sample's discount is ignored": (changed(lambda b: b.replace(discount=None)), dict(merged=True)),
    "the sample's weight is ignored": (changed(lambda b: b.replace(weight=None)), dict(weighted=True)),
    "one step's discount for n": (lambda h, a, c: setattr(the(h), "nsteps", 1), dict(build=partial(merging_stack, nsteps=3), nsteps=3)),
    "the actor learns from the second critic": (actor_on_the_second_critic, {}),
    "the actor learns from the smaller estimate": (actor_on_the_smaller, {}),
    "the actor learns at each batch": (lambda h, a, c: setattr(find_pipe(h, Every), "n", 1), {}),
    "the targets move at each batch": (targets_at_each_batch, {}),
    "the critics wait, too": (critics_wait_too, {}),
    "the policy is one batch too early": (policy_one_batch_too_early, {}),
    "the loss is the mean over the critics": (mean_over_the_critics, {}),
    "tau on the wrong side": (lambda h, a, c: setattr(find_pipe(h, "actor_target"), "tau", 0.995), {}),
}
PATCH, RIGHT = pytest.MonkeyPatch(), set()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_put_back_is_noticed(mistake):
    spoil, settings = MISTAKES[mistake]
    if str(settings) not in RIGHT:  # the right stack is equal after so few updates, too
        check(torch.float64, length=7, spoil=lambda *_: None, **settings)
        RIGHT.add(str(settings))
    try:
        with pytest.raises(AssertionError, match="not close"):
            check(torch.float64, length=7, spoil=spoil, **settings)
    finally:
        PATCH.undo()
