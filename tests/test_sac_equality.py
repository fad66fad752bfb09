"""SAC as a stack of pipes and as a plain loop: the same parameters, targets, Adam moments and temperature on the same batches with the same noise."""
from functools import partial

import pytest
import torch
from equality import (
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
from reference_sac import PlainSAC, SquashedPolicy

from fastrl_pipes.agents.sac import SACAgent, SACLearner
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.functional import policy_gradient
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.networks import policies
from fastrl_pipes.networks.policies import GaussianActor
from fastrl_pipes.networks.targets import target_of
from fastrl_pipes.networks.temperature import Temperature
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.walk import bind, traverse
from fastrl_pipes.pipes.graph import find_pipe, find_pipes
from fastrl_pipes.processors import entropy
from fastrl_pipes.processors.entropy import SoftActorLossProcessor, SoftCriticLossProcessor, TemperatureLossProcessor
from fastrl_pipes.processors.targets import SoftTargetUpdater

BOTH = pytest.mark.parametrize("dtype", UPDATES, ids=str)
FAST = {torch.float64: 60, torch.float32: 10}


# --- the two sides ---------------------------------------------------------------------------------------------------
def networks(dtype, k=2):
    torch.manual_seed(3)
    return larger(GaussianActor(S, A, HIDDEN), 4.0).to(dtype), critics(dtype, k)


def learners_stack(actor, critic, tape, **settings):
    return on_tape(SACLearner(actor, critic, nothing_to_do(SACAgent(actor)), logger_bases=[], **settings), SoftCriticLossProcessor, tape)


def own_stack(actor, critic, tape, nsteps):
    "The same pipes put together by hand, for what `SACLearner` leaves to the samples: the discount of n steps"
    t_critic, temperature = target_of(critic), Temperature().to(next(actor.parameters()).dtype)
    pipe = SoftCriticLossProcessor(tape, critic, actor, temperature, t_critic, nsteps=nsteps)
    pipe = BasicOptStepper(pipe, critic, 3e-4, filter=True, name="critic_opt")
    pipe = SoftActorLossProcessor(pipe, critic, actor, temperature)
    pipe = BasicOptStepper(pipe, actor, 3e-4, filter=True, name="actor_opt")
    pipe = TemperatureLossProcessor(pipe, temperature)
    pipe = BasicOptStepper(pipe, temperature, 3e-4, filter=True, name="alpha_opt")
    pipe = SoftTargetUpdater(pipe, critic, 1, 0.005, t_critic, name="critic_target")
    bind(pipe, Context(seed=4))
    return pipe


def networks_of(loop):
    return {"actor": tensors(loop.policy), "critic": tensors(loop.critics), "t_critic": tensors(loop.t_critics), "temperature": tensors(loop.temperature)}


def state_of_loop(loop):
    found = {**networks_of(loop), "actor_adam": moments(loop.policy_opt, loop.policy), "critic_adam": moments(loop.critic_opt, loop.critics)}
    return {**found, "alpha_adam": moments(loop.alpha_opt, loop.temperature)} if loop.learned else found


def state_of_stack(head, actor, critic, like):
    temperature = find_pipe(head, SoftActorLossProcessor).temperature
    opts = {p.name: p.opt for p in find_pipes(head, BasicOptStepper)}
    parts = {"actor": in_order(tensors(actor), like["actor"]), "critic": apart(tensors(critic)),
             "t_critic": apart(tensors(find_pipe(head, "critic_target").target_model)), "temperature": tensors(temperature),
             "actor_adam": in_order(moments(opts["actor_opt"], actor), like["actor_adam"]), "critic_adam": apart(moments(opts["critic_opt"], critic))}
    return {**parts, "alpha_adam": moments(opts["alpha_opt"], temperature)} if "alpha_opt" in opts else parts


def check(dtype, build=learners_stack, k=2, merged=False, weighted=False, length=None, spoil=None, for_stack=None, **for_loop):
    "Run both sides over the tape and compare; `spoil` puts a mistake into the stack"
    actor, critic = networks(dtype, k)
    tape = tape_of(dtype, length, merged, weighted)
    loop = PlainSAC(copied_weights(SquashedPolicy(S, A, *HIDDEN), actor), twins_of(critic), **for_loop)
    start = kept(networks_of(loop))
    head = build(actor, critic, tape, **(for_stack or {}))
    reported = []
    if weighted:
        head.context.priorities = lambda index, error: reported.append((index.clone(), error.clone()))
    head.start()
    loop.target_noise, loop.policy_noise = noise_of(head, SoftCriticLossProcessor), noise_of(head, SoftActorLossProcessor)
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
        assert_moved(expected, {part: named for part, named in start.items() if part != "temperature" or loop.learned})
    assert_equal(state_of_stack(head, actor, critic, expected), expected, **TOLERANCE[dtype])
    if weighted:
        assert [i.tolist() for i, _ in reported] == [s.index.tolist() for s in tape], "each batch's errors once, under its own places"
        torch.testing.assert_close(torch.stack([e for _, e in reported]), torch.stack(errors), **TOLERANCE[dtype])
    return loop


# --- the stack on a tape ---------------------------------------------------------------------------------------------
@BOTH
def test_the_learners_stack_equals_the_loop(dtype):
    check(dtype)


@BOTH
@pytest.mark.parametrize("k", [1, 5])
def test_any_number_of_critics(dtype, k):
    check(dtype, k=k, length=FAST[dtype])


@BOTH
@pytest.mark.parametrize("alpha", [0.2, 3.0])
def test_a_fixed_temperature(dtype, alpha):
    loop = check(dtype, length=FAST[dtype], for_stack=dict(alpha=alpha), alpha=alpha)
    assert loop.temperature.log_alpha.exp().item() == pytest.approx(alpha, rel=1e-6)


@BOTH
@pytest.mark.parametrize("target_entropy", [-5.0, 0.0, 1.3])
def test_a_target_entropy_that_is_given(dtype, target_entropy):
    settings = dict(target_entropy=target_entropy, alpha_lr=1e-2)
    check(dtype, length=FAST[dtype], for_stack=settings, **settings)


def test_the_temperature_follows_the_entropy_it_aims_at():
    "What the two-sided equality cannot say: too little entropy raises it, too much lowers it"
    low, high = (check(torch.float64, length=20, for_stack=dict(target_entropy=h), target_entropy=h).temperature.log_alpha.item() for h in (-20.0, 20.0))
    assert low < 0 < high


@BOTH
def test_merged_samples_bring_their_own_discount(dtype):
    check(dtype, merged=True, discount=0.5, length=FAST[dtype])  # the loop's 0.5 is overruled, and so is the learner's 0.99


@BOTH
def test_nsteps_without_a_discount_in_the_sample(dtype):
    check(dtype, partial(own_stack, nsteps=3), nsteps=3, length=FAST[dtype])


@BOTH
@pytest.mark.parametrize("k", [1, 2])
def test_weighted_samples_and_the_errors_that_are_reported(dtype, k):
    check(dtype, k=k, weighted=True, length=FAST[dtype])


@BOTH
def test_all_at_once(dtype):
    settings = dict(initial_alpha=0.3, target_entropy=-1.0, discount=0.9, tau=0.02, actor_lr=1e-3, critic_lr=2e-3, alpha_lr=3e-3)
    check(dtype, k=3, merged=True, weighted=True, length=2 * FAST[dtype], for_stack=settings, **settings)


def test_the_papers_factor_of_a_half_moves_nothing_but_adams_epsilon():
    "Eq. 5 has 1/2 before the square. With half the epsilon the loop that has it, too, ends at the same parameters"
    made = []
    for half in (False, True):
        actor, critic = networks(torch.float64)
        noise = [torch.Generator().manual_seed(i) for i in (1, 2)]
        made.append(PlainSAC(copied_weights(SquashedPolicy(S, A, *HIDDEN), actor), twins_of(critic), *noise, half=half))
        for step in tape_of(torch.float64, 50):
            made[-1].update(as_batch(step))
    assert_equal(networks_of(made[1]), networks_of(made[0]), **TOLERANCE[torch.float64])


# --- the whole learner -----------------------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize("nsteps", [1, 3])
def test_the_whole_learner_on_pendulum_equals_the_loop_on_its_batches(dtype, nsteps):
    torch.manual_seed(1)
    updates = min(UPDATES[dtype], 300 // nsteps)
    actor, critic = larger(GaussianActor(3, 1, HIDDEN), 4.0).to(dtype), critics(dtype, 2, 3, 1)
    settings = dict(tau=0.01, discount=0.95, critic_lr=5e-4)
    loop = PlainSAC(copied_weights(SquashedPolicy(3, 1, *HIDDEN), actor), twins_of(critic), **settings)
    stepper = GymStepper("Pendulum-v1", SACAgent(actor), seed=0, random_steps=30)
    learner = SACLearner(actor, critic, stepper, logger_bases=[], bs=32, max_sz=1000, nsteps=nsteps, batches=updates, dp_augmentation_fns=[Tape], **settings)
    learner.start()
    loop.target_noise, loop.policy_noise = noise_of(learner, SoftCriticLossProcessor), noise_of(learner, SoftActorLossProcessor)
    learner.fit(1)
    tape = find_pipe(learner, Tape).seen
    assert len(tape) == updates and tape[0].state.dtype is dtype
    for step in tape:
        loop.update(as_batch(step))
    expected = state_of_loop(loop)
    assert_equal(state_of_stack(learner, actor, critic, expected), expected, **TOLERANCE[dtype])
    learner.close()


# --- mistakes put back -----------------------------------------------------------------------------------------------
PATCH, RIGHT = pytest.MonkeyPatch(), set()


def of_critic(head):
    return find_pipe(head, SoftCriticLossProcessor)


def of_actor(head):
    return find_pipe(head, SoftActorLossProcessor)


def changed(which, change):
    "The batch as a loss sees it"
    def spoil(head, actor, critic):
        pipe = which(head)
        loss = pipe.loss
        pipe.loss = lambda batch: loss(change(batch))
    return spoil


def patched(module, name, value):
    "A function that the pipes call, by another one; the test takes it back"
    return lambda head, actor, critic: PATCH.setattr(module, name, value)


def without_entropy_in_the_target(head, actor, critic):
    PATCH.setattr(of_critic(head), "temperature", lambda: 0.0)


def entropy_is_subtracted(head, actor, critic):
    temperature = of_critic(head).temperature
    PATCH.setattr(of_critic(head), "temperature", lambda: -temperature())


def temperatures_sign(head, actor, critic):
    kernel = policy_gradient.temperature_loss
    PATCH.setattr(entropy, "temperature_loss", lambda *args: -kernel(*args))


def log_alpha_in_the_loss(head, actor, critic):
    "-log alpha (log pi + H), as many implementations have it: the same sign of the gradient, another size"
    temperature = find_pipe(head, TemperatureLossProcessor).temperature
    kernel = policy_gradient.temperature_loss
    PATCH.setattr(entropy, "temperature_loss", lambda alpha, *args: kernel(temperature.log_alpha, *args))


def target_entropys_sign(head, actor, critic):
    find_pipe(head, TemperatureLossProcessor).target_entropy = float(A)


def temperature_learns_from_the_policys_loss(head, actor, critic):
    "alpha is not detached in the policy's loss, whose gradient for it is added to its own"
    pipe = of_actor(head)
    loss = pipe.loss

    def with_alpha(batch):
        kernel = entropy.soft_policy_loss
        PATCH.setattr(entropy, "soft_policy_loss", lambda log_prob, q, alpha: kernel(log_prob, q, pipe.temperature()))
        found, computed = loss(batch)
        PATCH.setattr(entropy, "soft_policy_loss", kernel)
        pipe.leaked, = torch.autograd.grad(found, pipe.temperature.log_alpha, retain_graph=True)
        return found, computed
    pipe.loss = with_alpha
    stepper = find_pipe(head, "alpha_opt")
    gradients = stepper._gradients
    stepper._gradients = lambda loss: [g + pipe.leaked for g in gradients(loss)]


def two_samples_in_the_policys_loss(head, actor, critic):
    "log pi of one sample, Q of another: the noise is drawn again between the two"
    def call(model, state, noise=None):
        _, log_prob, *more = policies_call(model, state, noise=noise)
        action, *_ = policies_call(model, state, noise=pipe.normal(noise) if torch.is_grad_enabled() else noise)
        return action, log_prob, *more
    pipe, policies_call = of_actor(head), entropy.call_policy
    PATCH.setattr(entropy, "call_policy", call)


def sample_without_gradient(head, actor, critic):
    "The gradient goes through log pi alone"
    policies_call = entropy.call_policy

    def call(model, state, noise=None):
        action, *more = policies_call(model, state, noise=noise)
        return action.detach(), *more
    PATCH.setattr(entropy, "call_policy", call)


def actions_of_the_batch_in_the_target(head, actor, critic):
    policies_call = entropy.call_policy

    def call(model, state, noise=None):
        out = policies_call(model, state, noise=noise)
        return out if torch.is_grad_enabled() else (out[3], *out[1:])
    PATCH.setattr(entropy, "call_policy", call)


def no_tanh_correction(head, actor, critic):
    sample = policies.squashed_sample
    PATCH.setattr(policies, "squashed_sample", lambda mean, log_std, noise: (sample(mean, log_std, noise)[0], policies.gaussian_log_prob(mean, log_std, mean + log_std.exp() * noise)))


def std_is_not_clamped(head, actor, critic):
    PATCH.setattr(actor, "log_std_bounds", (-20.0, 0.0))


def one_log_prob_per_dimension(head, actor, critic):
    "The mean over dimensions in the place of their sum"
    sample = policies.squashed_sample

    def mean(*args):
        action, log_prob = sample(*args)
        return action, log_prob / action.shape[1]
    PATCH.setattr(policies, "squashed_sample", mean)


def least_of(fn, only=None):
    "Another choice among the estimates: `only` in the critics' loss (no gradient), or in the actor's"
    def spoil(head, actor, critic):
        right = entropy.least
        PATCH.setattr(entropy, "least", lambda q: fn(q) if only in (None, torch.is_grad_enabled()) else right(q))
    return spoil


def the_actor_first(head, actor, critic):
    "The policy is stepped on the critics before their update"
    names = ("SoftCriticLossProcessor", "critic_loss", "critic_opt", "SoftActorLossProcessor", "actor_loss", "actor_opt", "TemperatureLossProcessor")
    critics_loss, _, critics_opt, actors_loss, _, actors_opt, above = (find_pipe(head, n) for n in names)
    source = critics_loss.source
    actors_loss.stand_on(source)
    critics_loss.stand_on(actors_opt)
    above.stand_on(critics_opt)


def the_temperature_first(head, actor, critic):
    "The policy's next loss sees the temperature of the batch before: it is stepped one batch too late"
    opt = find_pipe(head, "alpha_opt")
    held, forward = [], opt.forward

    def late(item):
        if isinstance(item, dict) and item.get("model") is opt.model:
            held.append(item)
            return forward(held.pop(0)) if len(held) > 1 else ()
        return forward(item)
    opt.forward = late


def targets_at_every_second_batch(head, actor, critic):
    find_pipe(head, "critic_target").target_sync = 2


MISTAKES = {  # what: (how it is put back, what `check` is told)
    "the larger estimate": (least_of(lambda q: q.amax(0)), {}),
    "the larger estimate, for the target alone": (least_of(lambda q: q.amax(0), False), {}),
    "the first critic, for the policy": (least_of(lambda q: q[0], True), {}),
    "the mean of the critics, for the policy": (least_of(lambda q: q.mean(0), True), {}),
    "no entropy in the target": (without_entropy_in_the_target, {}),
    "entropy with the wrong sign in the target": (entropy_is_subtracted, {}),
    "the critics in the place of their targets": (lambda h, a, c: setattr(of_critic(h), "t_critic", c), {}),
    "a target actor, which SAC does not have": (lambda h, a, c: setattr(of_critic(h), "actor", target_of(a)), {}),
    "the mode of the policy in the target": (actions_of_the_batch_in_the_target, {}),
    "truncation stops the bootstrap": (changed(of_critic, lambda b: b.replace(terminated=b.done)), {}),
    "terminal rows bootstrap": (changed(of_critic, lambda b: b.replace(terminated=b.terminated & False)), {}),
    "the successor's state is the state": (changed(of_critic, lambda b: b.replace(next_state=b.state)), {}),
    "the sample's discount is ignored": (changed(of_critic, lambda b: b.replace(discount=None)), dict(merged=True)),
    "the sample's weight is ignored": (changed(of_critic, lambda b: b.replace(weight=None)), dict(weighted=True)),
    "one step's discount for n": (lambda h, a, c: setattr(of_critic(h), "nsteps", 1), dict(build=partial(own_stack, nsteps=3), nsteps=3)),
    "the policy learns from successors": (changed(of_actor, lambda b: b.replace(state=b.next_state)), {}),
    "log pi without the correction of tanh": (no_tanh_correction, {}),
    "log pi is a mean over dimensions": (one_log_prob_per_dimension, {}),
    "another bound of log sigma": (std_is_not_clamped, {}),
    "drawn again between Q and log pi": (two_samples_in_the_policys_loss, {}),
    "a sample without gradient": (sample_without_gradient, {}),
    "the temperature's loss with the wrong sign": (temperatures_sign, {}),
    "log alpha in the place of alpha": (log_alpha_in_the_loss, {}),
    "the target entropy with the wrong sign": (target_entropys_sign, {}),
    "alpha is not detached in the policy's loss": (temperature_learns_from_the_policys_loss, {}),
    "a fixed temperature that is not the one given": (lambda h, a, c: of_actor(h).temperature.log_alpha.data.add_(0.1), dict(for_stack=dict(alpha=0.2), alpha=0.2)),
    "the policy before the critics": (the_actor_first, {}),
    "the temperature one batch too late": (the_temperature_first, {}),
    "targets at every second batch": (targets_at_every_second_batch, {}),
    "tau on the wrong side": (lambda h, a, c: setattr(find_pipe(h, "critic_target"), "tau", 0.995), {}),
}


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


def test_every_network_that_acts_is_the_one_that_learns():
    actor, critic = networks(torch.float64)
    head = SACLearner(actor, critic, nothing_to_do(SACAgent(actor)), logger_bases=[])
    assert {id(p.model) for p in traverse(head.agent) if hasattr(p, "model")} == {id(actor)} and of_actor(head).actor is actor is of_critic(head).actor
