"""The stack of pipes and a plain loop give the same parameters, targets and Adam moments on the same batches."""
import copy
from functools import partial

import pytest
import torch
from reference_ddpg import Batch, PlainDDPG, moments, tensors

from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner
from fastrl_pipes.core import MergedStep, SimpleStep, copied
from fastrl_pipes.envs.doubles import NoOp
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.networks.targets import target_of
from fastrl_pipes.pipes.core import Stage
from fastrl_pipes.pipes.walk import bind
from fastrl_pipes.pipes.graph import find_pipe
from fastrl_pipes.processors.dpg import ActorLossProcessor, CriticLossProcessor
from fastrl_pipes.processors.targets import SoftTargetUpdater

S, A, BS = 5, 2, 16
# A bias before a batch norm has no gradient but rounding, of which Adam makes steps of about 1e-12: only there is an absolute
# difference allowed in float64. In float32 they would be steps of 1e-5, so that there Adam's epsilon is larger with batch norm.
EXACT, ROUGH, BATCH_NORM = dict(rtol=1e-9, atol=0.0), dict(rtol=1e-4, atol=1e-6), dict(rtol=1e-9, atol=1e-11)
UPDATES = {torch.float64: 300, torch.float32: 10}
TOLERANCE = {torch.float64: EXACT, torch.float32: ROUGH}
BOTH = pytest.mark.parametrize("dtype", UPDATES, ids=str)


# --- the two sides ---------------------------------------------------------------------------------------------------
def tape_of(dtype, merged=False, length=None):
    "Batches from a seeded generator, with terminated and truncated rows; merged ones carry the discount of 1 to 3 steps"
    g = torch.Generator().manual_seed(7)
    tape = []
    for _ in range(length or UPDATES[dtype]):
        end = torch.rand(BS, 1, generator=g)
        fields = dict(state=torch.randn(BS, S, generator=g), action=torch.rand(BS, A, generator=g) * 2 - 1, next_state=torch.randn(BS, S, generator=g),
                      reward=torch.randn(BS, 1, generator=g), terminated=end < 0.2, truncated=end > 0.8)
        step = SimpleStep(**fields)
        if merged:
            step = MergedStep(**fields, discount=0.9 ** torch.randint(1, 4, (BS, 1), generator=g))
        tape.append(step.to(dtype=dtype))
    ended, cut = (torch.cat([getattr(s, f) for s in tape]) for f in ("terminated", "truncated"))
    assert ended.any() and cut.any() and not (ended & cut).all()
    return tape


def networks(dtype, batch_norm=False):
    "Larger last weights than usual, so that the actor's gradient is no rounding error from the first update on"
    torch.manual_seed(3)
    last = partial(torch.nn.init.uniform_, a=-0.1, b=0.1)
    made = [net(S, A, 24, 16, batch_norm=batch_norm, final_layer_init_fn=lambda m: last(m.weight)) for net in (Actor, Critic)]
    return [m.to(dtype) for m in made]


def learners_stack(actor, critic, tape, **settings):
    "The stack as `DDPGLearner` composes it, with the tape in the place of environment, windows and replay"
    env = partial(NoOp, obs_sz=S, action_sz=A)
    learner = DDPGLearner(actor, critic, GymStepper(env, DDPGAgent(actor)), logger_bases=[], **settings)
    find_pipe(learner, CriticLossProcessor).stand_on(tape)
    bind(learner, learner.context)
    assert not learner.stepper, "no environment is left in the stack"
    return learner


def own_stack(actor, critic, tape, nsteps=1, tau=0.001, sync=1, discount=0.99):
    "The same pipes put together by hand, for what `DDPGLearner` does not offer"
    t_actor, t_critic = target_of(actor), target_of(critic)
    pipe = CriticLossProcessor(tape, critic, t_actor, t_critic, discount, nsteps)
    pipe = BasicOptStepper(pipe, critic, 1e-2, filter=True, name="critic_opt")
    pipe = ActorLossProcessor(pipe, critic, actor)
    pipe = BasicOptStepper(pipe, actor, 1e-3, filter=True, name="actor_opt")
    pipe = SoftTargetUpdater(pipe, critic, sync, tau, t_critic, name="critic_target")
    return SoftTargetUpdater(pipe, actor, sync, tau, t_actor, name="actor_target")


def as_batch(step):
    return Batch(step.state, step.action, step.next_state, step.reward, step.terminated, getattr(step, "discount", None))


def state_of_stack(head, actor, critic):
    found = {n: find_pipe(head, n) for n in ("critic_opt", "actor_opt", "critic_target", "actor_target")}
    return {"actor": tensors(actor), "critic": tensors(critic),
            "t_actor": tensors(found["actor_target"].target_model), "t_critic": tensors(found["critic_target"].target_model),
            "actor_adam": moments(found["actor_opt"].opt, actor), "critic_adam": moments(found["critic_opt"].opt, critic)}


def state_of_loop(loop):
    return {"actor": tensors(loop.actor), "critic": tensors(loop.critic), "t_actor": tensors(loop.t_actor), "t_critic": tensors(loop.t_critic),
            "actor_adam": moments(loop.actor_opt, loop.actor), "critic_adam": moments(loop.critic_opt, loop.critic)}


def assert_equal(stack, loop, rtol, atol):
    for part in loop:
        assert stack[part].keys() == loop[part].keys()
        for name, expected in loop[part].items():
            torch.testing.assert_close(stack[part][name].detach().to(expected.dtype), expected.detach(), rtol=rtol, atol=atol,
                                       msg=lambda text: f"{part}.{name}: {text}")  # noqa: B023, called at once


def assert_moved(loop, start):
    "Every parameter, target and moment is far from where it began: an empty comparison would be equal, too"
    for part, before in (("actor", start["actor"]), ("critic", start["critic"]), ("t_actor", start["actor"]), ("t_critic", start["critic"])):
        now = state_of_loop(loop)[part]
        assert sum(float((now[n] - before[n]).detach().abs().sum()) for n in before if before[n].is_floating_point()) > 1e-3, part


def check(dtype, build, batch_norm=False, merged=False, length=None, spoil=None, **for_loop):
    "Run both sides over the tape and compare; `spoil` puts a mistake into the stack"
    actor, critic = networks(dtype, batch_norm)
    start = {"actor": copied(tensors(actor)), "critic": copied(tensors(critic))}
    loop = PlainDDPG(copy.deepcopy(actor), copy.deepcopy(critic), **for_loop)
    tape = tape_of(dtype, merged, length)
    head = build(actor, critic, tape)
    head.start()
    if spoil:
        spoil(head, actor, critic)
    for step in tape:
        next(head)
        loop.update(as_batch(step))
    with pytest.raises(StopIteration):
        next(head)
    if not spoil:
        assert_moved(loop, start)
    allowed = BATCH_NORM if batch_norm and dtype is torch.float64 else TOLERANCE[dtype]
    assert_equal(state_of_stack(head, actor, critic), state_of_loop(loop), **allowed)


# --- the stack on a tape ---------------------------------------------------------------------------------------------
@BOTH
def test_the_learners_stack_equals_the_loop(dtype):
    check(dtype, learners_stack)


def calm(dtype):
    "Adam's epsilon, for the learner and for the loop"
    eps = 1e-8 if dtype is torch.float64 else 1e-3
    adam = partial(torch.optim.Adam, eps=eps)
    return dict(actor_opt=adam, critic_opt=adam), dict(eps=eps)


@BOTH
def test_with_batch_norm_running_statistics_are_equal_too(dtype):
    for_stack, for_loop = calm(dtype)
    check(dtype, partial(learners_stack, tau=0.05, **for_stack), batch_norm=True, tau=0.05, **for_loop)


@BOTH
def test_merged_samples_bring_their_own_discount(dtype):
    check(dtype, learners_stack, merged=True, discount=0.5)  # the loop's 0.5 is overruled, and so is the learner's 0.99


@BOTH
def test_nsteps_without_a_discount_in_the_sample(dtype):
    check(dtype, partial(own_stack, nsteps=3), nsteps=3)


@BOTH
def test_soft_targets_that_move_every_second_batch(dtype):
    check(dtype, partial(own_stack, tau=0.05, sync=2), tau=0.05, critic_sync=2, actor_sync=2)


@BOTH
def test_targets_copied_at_frequencies_of_their_own(dtype):
    check(dtype, partial(learners_stack, tau=1.0, critic_target_copy_freq=2, actor_target_copy_freq=3), tau=1.0, critic_sync=2, actor_sync=3)


@BOTH
def test_clipped_critic_gradient(dtype):
    check(dtype, partial(learners_stack, clip_critic_grad=0.02), clip_critic_grad=0.02)


@BOTH
def test_all_at_once(dtype):
    settings = dict(actor_lr=3e-4, critic_lr=2e-3, tau=0.01, clip_critic_grad=0.05)
    for_stack, for_loop = calm(dtype)
    check(dtype, partial(learners_stack, discount=0.9, **settings, **for_stack), batch_norm=True, merged=True, discount=0.9, **settings, **for_loop)


def test_the_clip_bites():
    "Without this, an unclipped stack would pass the test of the clip"
    loops = [PlainDDPG(*networks(torch.float64), clip_critic_grad=c) for c in (None, 0.02)]
    for loop in loops:
        for step in tape_of(torch.float64, length=3):
            loop.update(as_batch(step))
    with pytest.raises(AssertionError, match="actor"):
        assert_equal(state_of_loop(loops[0]), state_of_loop(loops[1]), **EXACT)


# --- the whole learner -----------------------------------------------------------------------------------------------
class Tape(Stage):
    "Keeps what the sampler drew"

    def restart(self):
        self.seen = []

    def forward(self, item):
        self.seen.append(copied(item))
        return item


@BOTH
@pytest.mark.parametrize("nsteps", [1, 3])
def test_the_whole_learner_on_pendulum_equals_the_loop_on_its_batches(dtype, nsteps):
    torch.manual_seed(1)
    actor, critic = (net(3, 1, 32, 24).to(dtype) for net in (Actor, Critic))
    settings = dict(tau=0.005, critic_lr=1e-3, discount=0.95)
    loop = PlainDDPG(copy.deepcopy(actor), copy.deepcopy(critic), **settings)
    stepper = GymStepper("Pendulum-v1", DDPGAgent(actor), seed=0, random_steps=30)
    learner = DDPGLearner(actor, critic, stepper, logger_bases=[], bs=32, nsteps=nsteps, batches=UPDATES[dtype], dp_augmentation_fns=[Tape], **settings)
    learner.fit(1)
    tape = find_pipe(learner, Tape).seen
    assert len(tape) == UPDATES[dtype] and tape[0].state.dtype is dtype
    for step in tape:
        loop.update(as_batch(step))
    assert_equal(state_of_stack(learner, actor, critic), state_of_loop(loop), **TOLERANCE[dtype])
    learner.close()


# --- mistakes put back -----------------------------------------------------------------------------------------------
def replaced(pipe, name, change):
    "Wrap `loss` of a processor: `change` takes and returns the batch"
    processor = find_pipe(pipe, name)
    loss = processor.loss
    processor.loss = lambda batch: loss(change(batch))


def actors_turn_first(head, actor, critic):
    "The actor is stepped on the critic before its update: the loss of the actor goes to the critic's place"
    names = "CriticLossProcessor", "critic_opt", "ActorLossProcessor", "actor_opt", "critic_target"
    critic_loss, critic_opt, actor_loss, actor_opt, targets = (find_pipe(head, n) for n in names)
    actor_loss.stand_on(critic_loss.source)
    critic_loss.stand_on(actor_opt)
    targets.stand_on(critic_opt)


def parameters_alone(head, actor, critic):
    for updater, model in ((find_pipe(head, "critic_target"), critic), (find_pipe(head, "actor_target"), actor)):
        updater._targets, updater._sources = ([p.data for p in m.parameters()] for m in (updater.target_model, model))


def bound_of_a_sum(head, actor, critic):
    processor = find_pipe(head, "ActorLossProcessor")
    processor.clip_critic_grad *= BS


MISTAKES = {  # what: (how it is put back, what `check` is told)
    "no target actor": (lambda h, a, c: setattr(find_pipe(h, CriticLossProcessor), "t_actor", a), {}),
    "no target critic": (lambda h, a, c: setattr(find_pipe(h, CriticLossProcessor), "t_critic", c), {}),
    "truncation stops the bootstrap": (lambda h, a, c: replaced(h, CriticLossProcessor, lambda b: b.replace(terminated=b.done)), {}),
    "terminal rows bootstrap": (lambda h, a, c: replaced(h, CriticLossProcessor, lambda b: b.replace(terminated=b.terminated & False)), {}),
    "the successor's state is the state": (lambda h, a, c: replaced(h, CriticLossProcessor, lambda b: b.replace(next_state=b.state)), {}),
    "the sample's discount is ignored": (lambda h, a, c: replaced(h, CriticLossProcessor, lambda b: b.replace(discount=None)), dict(merged=True)),
    "one step's discount for n": (lambda h, a, c: setattr(find_pipe(h, CriticLossProcessor), "nsteps", 1), dict(build=partial(own_stack, nsteps=3), nsteps=3)),
    "the actor learns from the first sample": (lambda h, a, c: replaced(h, ActorLossProcessor, lambda b: b.map(lambda x: x[:1])), {}),
    "the actor before the critic": (actors_turn_first, {}),
    "the actor's loss moves the critic's statistics": (lambda h, a, c: setattr(find_pipe(h, ActorLossProcessor), "_others", []), dict(batch_norm=True)),
    "running statistics are not followed": (parameters_alone, dict(batch_norm=True)),
    "gradients add up": (lambda h, a, c: setattr(find_pipe(h, "critic_opt"), "do_zero_grad", False), {}),
    "targets move one batch too early": (lambda h, a, c: setattr(find_pipe(h, "critic_target"), "count", 1),
                                         dict(build=partial(own_stack, sync=2), critic_sync=2, actor_sync=2)),
    "tau on the wrong side": (lambda h, a, c: setattr(find_pipe(h, "actor_target"), "tau", 0.999), {}),
    "the clip's bound is that of a sum": (bound_of_a_sum, dict(build=partial(learners_stack, clip_critic_grad=0.02), clip_critic_grad=0.02)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_put_back_is_noticed(mistake):
    spoil, settings = MISTAKES[mistake]
    settings = {"build": learners_stack, **settings}
    check(torch.float64, length=7, spoil=lambda *_: None, **settings)  # the right stack is equal after so few updates, too
    with pytest.raises(AssertionError, match="not close"):
        check(torch.float64, length=7, spoil=spoil, **settings)
