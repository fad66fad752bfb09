"""What the tests of equality share: a tape of batches, networks of both sides with the same weights, and what is compared.

The stack keeps its critics as one batched network, the loop as k networks apart: `apart` turns names and tensors of the first
into those of the second, for values and for Adam's moments alike."""
from __future__ import annotations

import copy
from functools import partial

import torch
from reference_ddpg import tensors
from reference_td3 import Batch, QNetwork

from fastrl_pipes.core import MergedStep, SampledStep, SimpleStep, copied, spawn_seed
from fastrl_pipes.envs.doubles import NoOp
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.networks.ensemble import Critics
from fastrl_pipes.pipes.core import Stage
from fastrl_pipes.pipes.walk import bind
from fastrl_pipes.pipes.graph import find_pipe

S, A, BS, HIDDEN = 5, 2, 16, (24, 16)
UPDATES = {torch.float64: 300, torch.float32: 10}
TOLERANCE = {torch.float64: dict(rtol=1e-9, atol=0.0), torch.float32: dict(rtol=1e-4, atol=1e-6)}


# --- batches ---------------------------------------------------------------------------------------------------------
def tape_of(dtype, length=None, merged=False, weighted=False) -> list[SimpleStep]:
    "Batches with terminated and truncated rows; merged ones carry the discount of 1 to 3 steps, weighted ones places and weights"
    g, tape = torch.Generator().manual_seed(7), []
    for i in range(length or UPDATES[dtype]):
        end = torch.rand(BS, 1, generator=g)
        step = SimpleStep(state=torch.randn(BS, S, generator=g), action=torch.rand(BS, A, generator=g) * 2 - 1, next_state=torch.randn(BS, S, generator=g),
                          reward=torch.randn(BS, 1, generator=g), terminated=end < 0.2, truncated=end > 0.8)
        if merged:
            step = MergedStep(*SimpleStep._values(step), discount=0.9 ** torch.randint(1, 4, (BS, 1), generator=g))
        if weighted:
            step = SampledStep.of(step, weight=torch.rand(BS, 1, generator=g), index=torch.arange(BS) + BS * i)
        tape.append(step.to(dtype=dtype))
    ended, cut = (torch.cat([getattr(s, f) for s in tape]) for f in ("terminated", "truncated"))
    assert ended.any() and cut.any() and not (ended & cut).all()
    return tape


def as_batch(step) -> Batch:
    "For a loop"
    return Batch(step.state, step.action, step.next_state, step.reward, step.terminated, getattr(step, "discount", None), getattr(step, "weight", None))


class Tape(Stage):
    "Keeps what the sampler drew"

    def restart(self):
        self.seen = []

    def forward(self, item):
        self.seen.append(copied(item))
        return item


def on_tape(learner, processor, tape):
    "A learner whose first loss processor stands on the tape, in the place of environment, windows and replay"
    find_pipe(learner, processor).stand_on(tape)
    bind(learner, learner.context)
    assert not learner.stepper, "no environment is left in the stack"
    return learner


def nothing_to_do(agent):
    "A stepper for `agent` whose environment does no work"
    return GymStepper(partial(NoOp, obs_sz=S, action_sz=A), agent, seed=11)


def noise_of(head, processor) -> torch.Generator:
    "What a pipe draws its noise with, once more"
    pipe = find_pipe(head, processor)
    assert pipe.context.seed is not None, "without a seed of the run nothing could be compared"
    return torch.Generator().manual_seed(spawn_seed(pipe.context.seed, type(pipe).__name__, str(pipe)))


# --- networks --------------------------------------------------------------------------------------------------------
def larger(net, factor=3.0):
    "Larger last weights than usual, so that no gradient is a rounding error from the first update on"
    with torch.no_grad():
        list(net.parameters())[-2].mul_(factor)
    return net


def critics(dtype, k, state_sz=S, action_sz=A, hidden=HIDDEN) -> Critics:
    return larger(Critics(state_sz, action_sz, k, hidden)).to(dtype)


def twins_of(net: Critics) -> list[QNetwork]:
    "k networks apart with the weights of the batched one"
    first, *_, last = net.layers
    made = []
    for i in range(net.k):
        q = QNetwork(first.weight.shape[1] - 1, 1, first.weight.shape[2], last.weight.shape[1]).to(first.weight.dtype)
        q.load_state_dict({name.removeprefix(f"{i}."): t for name, t in apart(tensors(net)).items() if name.startswith(f"{i}.")})
        made.append(q)
    return made


def apart(batched: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    "Tensors of a batched network under the names and in the shapes of networks apart"
    k, found = batched[next(n for n in batched if "weight" in n)].shape[0], {}
    for i in range(k):
        for name, t in batched.items():
            _, layer, kind, *of_adam = name.split(".")
            if t.ndim:
                t_i = t.detach()[i].T if kind == "weight" else t.detach()[i, 0]
            else:
                t_i = t
            found[".".join([str(i), f"l{int(layer) + 1}", kind, *of_adam])] = t_i
    return found


def copied_weights(plain, net):
    "The loop's policy with the weights of the stack's, layer by layer"
    linears = [m for m in net.modules() if isinstance(m, torch.nn.Linear)]
    made = [m for m in plain.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        for field in ("weight", "bias"):
            values = [getattr(m, field) for m in linears]
            if len(made) == len(linears) + 1:  # two heads in place of one of twice the width
                values[-1:] = values[-1].chunk(2)
            for m, value in zip(made, values, strict=True):
                getattr(m, field).copy_(value)
    return plain.to(linears[0].weight.dtype)


# --- comparing -------------------------------------------------------------------------------------------------------
def in_order(named: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    "A policy's tensors under the loop's names: both list their layers in the same order"
    values = list(named.values())
    if len(values) < len(like):  # the last layer of the stack's policy is two of the loop's
        n = (len(like) - len(values))
        tail = values[-n:]
        values[-n:] = [x.chunk(2)[h] if x.ndim else x for h in range(2) for x in tail]
    return dict(zip(like, values, strict=True))


def assert_equal(stack: dict[str, dict], loop: dict[str, dict], rtol, atol):
    "Part for part, tensor for tensor"
    assert stack.keys() == loop.keys()
    for part in loop:
        assert stack[part].keys() == loop[part].keys() and loop[part]
        for name, expected in loop[part].items():
            torch.testing.assert_close(stack[part][name].detach().to(expected.dtype), expected.detach(), rtol=rtol, atol=atol,
                                       msg=lambda text: f"{part}.{name}: {text}")  # noqa: B023, called at once


def assert_moved(loop: dict[str, dict], start: dict[str, dict]):
    "Every part that learns is far from where it began: an empty comparison would be equal, too"
    for part, before in start.items():
        moved = sum(float((loop[part][n] - before[n]).detach().abs().sum()) for n in before)
        assert moved > 1e-3, part


def kept(parts: dict[str, dict]) -> dict[str, dict]:
    return copy.deepcopy({part: {n: t.detach() for n, t in named.items()} for part, named in parts.items()})
