"""`flatten(learner)` writes one plain script: run by itself, in a process of its own, it ends at the learner's parameters, to the bit."""
import ast
import importlib
import subprocess
import sys
from functools import partial

import gymnasium
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastrl_pipes.agents.core import ActionClip, ActionScaler, AgentHead, SimpleModelRunner
from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner, ddpg
from fastrl_pipes.cli import main
from fastrl_pipes.core import SimpleStep
from fastrl_pipes.envs.debug import Goal
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.exploration.noise import GaussianNoise
from fastrl_pipes.learner.flatten import flatten
from fastrl_pipes.learner.script import TEMPLATES, flattens
from fastrl_pipes.learner.head import LearnerHead
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.memory.experience_replay import ExperienceReplay
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.networks.targets import target_of
from fastrl_pipes.pipes.control import Every, Inlet, Repeat
from fastrl_pipes.pipes.core import Stage
from fastrl_pipes.pipes.graph import find_pipe
from fastrl_pipes.pipes.nstep import FirstLastMerger, NSkipper, NStepper
from fastrl_pipes.processors.dpg import ActorLossProcessor, CriticLossProcessor
from fastrl_pipes.processors.targets import SoftTargetUpdater

UPDATES = 300
ALLOWED = ("fastrl_pipes.networks.", "fastrl_pipes.envs.debug", "fastrl_pipes.envs.doubles")
SMALL = dict(hidden1=24, hidden2=16, bs=32, warmup=50, max_sz=400, noise_steps=150)


# --- learners --------------------------------------------------------------------------------------------------------
def nets(seed=3, sizes=(3, 1), dtype=torch.float32, **more):
    torch.manual_seed(seed)
    return [net(*sizes, 24, 16, **more).to(dtype) for net in (Actor, Critic)]


def acting(actor, noise=GaussianNoise, **more):
    return AgentHead(ActionScaler(ActionClip(noise(SimpleModelRunner(Inlet(), actor), **more))))


def gaussian(**more):
    actor, critic = nets()
    stepper = GymStepper("Pendulum-v1", acting(actor, sigma=0.3), seed=5, random_steps=40)
    return DDPGLearner(actor, critic, stepper, logger_bases=[], bs=32, tau=0.01, max_sz=500, **more)


def delayed(sync=1, tau=0.01):
    "The policy and its target at every second batch, as TD3 does; the critic's loss is taken further down than the actor's is made"
    actor, critic = nets(sizes=(2, 1))
    t_actor, t_critic = target_of(actor), target_of(critic)
    stepper = GymStepper(partial(Goal, length=15), acting(actor, min_epsilon=0.1, max_steps=200), n=2, mode="sync", seed=1)
    pipe = ExperienceReplay(stepper, 16, 300)
    pipe = CriticLossProcessor(pipe, critic, t_actor, t_critic)
    pipe = BasicOptStepper(pipe, critic, 1e-3, partial(torch.optim.Adam, eps=1e-6), name="critic_opt")

    def late(inlet):
        branch = ActorLossProcessor(inlet, critic, actor)
        branch = BasicOptStepper(branch, actor, 1e-3, torch.optim.SGD, do_zero_grad=False, name="actor_opt")
        return SoftTargetUpdater(branch, actor, 1, tau, t_actor, name="actor_target")
    pipe = Every(pipe, 2, late)
    return LearnerHead(SoftTargetUpdater(pipe, critic, sync, tau, t_critic, name="critic_target"), batches=10)


def all_losses_first():
    "Both losses are made before either optimizer stands: a loss goes down before its batch, so the actor's is that of the stepped critic"
    actor, critic = nets()
    t_actor, t_critic = target_of(actor), target_of(critic)
    pipe = ExperienceReplay(GymStepper("Pendulum-v1", DDPGAgent(actor), seed=1, random_steps=20), 16, 300)
    pipe = CriticLossProcessor(pipe, critic, t_actor, t_critic, loss=nn.SmoothL1Loss)
    pipe = ActorLossProcessor(pipe, critic, actor, clip_critic_grad=0.05)
    pipe = BasicOptStepper(BasicOptStepper(pipe, critic, 1e-3, name="critic_opt"), actor, 1e-3, name="actor_opt")
    pipe = SoftTargetUpdater(pipe, critic, 3, 1.0, t_critic, name="critic_target")
    return LearnerHead(SoftTargetUpdater(pipe, actor, 2, 0.5, t_actor, name="actor_target"), batches=10)


def skipping():
    actor, critic = nets()
    pipe = NSkipper(NStepper(GymStepper("Pendulum-v1", DDPGAgent(actor), n=2, mode="sync", seed=1), 3), 2)
    return DDPGLearner(actor, critic, FirstLastMerger(pipe, 0.9), logger_bases=[], bs=16, discount=0.9, tau=0.01)


LEARNERS = {
    "DDPG": (partial(ddpg, "Pendulum-v1", seed=2, **SMALL), {}),
    "Gaussian noise instead": (gaussian, dict(seed=3)),
    "three steps": (partial(ddpg, nsteps=3, **SMALL), {}),
    "two environments": (partial(ddpg, n=2, mode="sync", **SMALL), {}),
    "three steps of two environments": (partial(ddpg, "fastrl/Goal-v0", n=2, nsteps=3, mode="sync", repeat=2, **SMALL), {}),
    "batch norm, and a bound on the gradient": (partial(ddpg, batch_norm=True, clip_critic_grad=0.1, tau=0.05, **SMALL), {}),
    "Repeat behind the replay": (partial(gaussian, dp_augmentation_fns=[lambda pipe: Repeat(pipe, 2)]), dict(seed=3)),
    "a delayed policy": (delayed, dict(seed=3)),
    "losses first": (all_losses_first, dict(seed=3)),
    "skipped windows": (skipping, dict(seed=3)),
}


ALONE = list(LEARNERS)[:5]  # run in processes of their own


def parameters(learner):
    opts, targets = ([find_pipe(learner, f"{n}_{what}") for n in ("actor", "critic")] for what in ("opt", "target"))
    named = {"actor": opts[0].model, "critic": opts[1].model, "t_actor": targets[0].target_model, "t_critic": targets[1].target_model}
    return {f"{n}.{k}": v for n, net in named.items() for k, v in net.state_dict().items()}


def run(text, tmp_path, updates=UPDATES):
    "The script in a process of its own, and the parameters it ends at"
    keep = ("\n    from safetensors.torch import save_file\n"
            "    nets = {'actor': actor, 'critic': critic, 't_actor': t_actor, 't_critic': t_critic}\n"
            f"    save_file({{f'{{n}}.{{k}}': v.clone() for n, net in nets.items() for k, v in net.state_dict().items()}}, {str(tmp_path/'out.safetensors')!r})\n")
    (tmp_path/"script.py").write_text(text + keep)
    done = subprocess.run([sys.executable, "script.py", str(updates)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path/"out.safetensors")


def learned(learner, updates=UPDATES):
    before = {k: v.clone() for k, v in parameters(learner).items()}
    for _ in range(updates):
        next(learner)
    after = parameters(learner)
    moved = [k for k in after if after[k].is_floating_point() and not torch.equal(before[k], after[k])]
    assert len(moved) > len(after) / 2, "an empty comparison would be equal, too"
    return after


def run_here(text, tmp_path, updates=UPDATES):
    "The same in this process, which is quicker"
    space = {"__name__": "script"}
    try:
        exec(text, space)
        space["train"](updates)
    finally:
        torch.set_flush_denormal(False)
    return {f"{n}.{k}": v for n in ("actor", "critic", "t_actor", "t_critic") for k, v in space[n].state_dict().items()}


def check(learner, text, tmp_path, run=run_here):
    here, there = learned(learner), run(text, tmp_path)
    assert here.keys() == there.keys()
    for name in here:
        assert torch.equal(here[name], there[name]), f"{name} differs by {float((here[name] - there[name]).abs().max()):.3g}"


# --- the same to the bit ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", LEARNERS)
def test_the_script_ends_at_the_same_parameters_to_the_bit(kind, tmp_path):
    build, more = LEARNERS[kind]
    learner = build()
    text = flatten(learner, **more)
    only_allowed_imports(text)
    check(learner, text, tmp_path, run if kind in ALONE else run_here)


def test_float64_networks(tmp_path):
    actor, critic = nets(dtype=torch.float64)
    learner = DDPGLearner(actor, critic, GymStepper("Pendulum-v1", DDPGAgent(actor), seed=0), logger_bases=[], bs=16, tau=0.01)
    check(learner, flatten(learner, seed=3), tmp_path)


def test_a_mujoco_environment_with_float64_observations(tmp_path):
    pytest.importorskip("mujoco")
    learner = ddpg("Hopper-v5", **SMALL)
    check(learner, flatten(learner), tmp_path)


def test_parameters_from_a_file(tmp_path):
    actor, critic = Actor(3, 1, 8, 8), Critic(3, 1, 8, 8)
    learner = DDPGLearner(actor, critic, GymStepper("Pendulum-v1", DDPGAgent(actor), seed=0), logger_bases=[], bs=16, tau=0.01)
    text = flatten(learner, weights=tmp_path/"first.safetensors")
    check(learner, text, tmp_path)
    assert flatten(learner, weights=tmp_path/"first.safetensors") == text, "once the learner has begun, the file is used as it is"
    with pytest.raises(ValueError, match="'weights'.*the learner has begun"):
        flatten(learner, weights=tmp_path/"second.safetensors")


def test_networks_of_the_user(tmp_path, monkeypatch):
    "A class of a module of the user's own, which returns more than an action"
    (tmp_path/"my_networks.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Mine(nn.Module):\n    def __init__(self, width=8):\n        super().__init__()\n"
        "        self.a, self.b = nn.Linear(3, width), nn.Linear(width, 1)\n\n    def forward(self, state):\n        h = torch.tanh(self.a(state))\n        return torch.tanh(self.b(h)), h\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("my_networks")
    for more, expected in (((), "actor = Mine()"), ((12,), "actor = Mine(12)")):
        torch.manual_seed(4)
        actor, critic = mine.Mine(*more), Critic(3, 1, 8, 8)
        learner = DDPGLearner(actor, critic, GymStepper("Pendulum-v1", DDPGAgent(actor), seed=0), logger_bases=[], bs=16, tau=0.01)
        text = flatten(learner, seed=4, networks={"actor": "Mine(12)"} if more else None)
        assert expected in text and "actor(state)[0]" in text
        check(learner, text, tmp_path)


# --- readable --------------------------------------------------------------------------------------------------------
def only_allowed_imports(text):
    for node in ast.walk(ast.parse(text)):
        found = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        assert all(not m.startswith("fastrl_pipes") or m.startswith(ALLOWED) for m in found), found


def test_the_script_of_ddpg_is_short_and_says_which_line_of_the_paper_it_is_at():
    text = flatten(ddpg(**SMALL))
    lines = text.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 160
    for word in ("Alg. 1, l. 12", "l. 14", "l. 15", "OrnsteinUhlenbeck", "ExperienceReplay", "critic_target"):
        assert word in text
    only_allowed_imports(text)
    assert flatten(ddpg(**SMALL)) == text, "the same learner gives the same text"


def test_flattening_has_no_effect(tmp_path):
    plain, flat = (ddpg(seed=1, **SMALL) for _ in range(2))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    flatten(flat)
    assert torch.equal(torch.get_rng_state(), before) and not flat.started
    a, b = learned(plain, 60), learned(flat, 60)
    flatten(flat)
    assert all(torch.equal(a[k], b[k]) for k in a)


# --- errors ----------------------------------------------------------------------------------------------------------
class RewardScaler(Stage):
    "A stage of the user's own"

    def forward(self, item):
        return item.replace(reward=item.reward * 0.1) if isinstance(item, SimpleStep) else item


class QuietClip(ActionClip):
    pass


def with_scaler():
    actor, critic = nets()
    return DDPGLearner(actor, critic, RewardScaler(GymStepper("Pendulum-v1", DDPGAgent(actor), seed=0)), logger_bases=[], bs=16, tau=0.01)


def test_an_unknown_pipe_is_named_and_may_be_registered(tmp_path, monkeypatch):
    learner = with_scaler()
    with pytest.raises(LookupError, match=r"flatten: field 'RewardScaler' is a RewardScaler, which has no template, expected .*@flattens\(RewardScaler\)"):
        flatten(learner, seed=3)
    monkeypatch.setattr("fastrl_pipes.learner.script.TEMPLATES", dict(TEMPLATES))

    @flattens(RewardScaler)
    def lines(pipe, script):
        script.add('step = {**step, "reward": step["reward"] * 0.1}  # RewardScaler')
    check(learner, flatten(learner, seed=3), tmp_path)


def test_a_subclass_has_no_template_of_its_base():
    actor, critic = nets()
    stepper = GymStepper("Pendulum-v1", AgentHead(ActionScaler(QuietClip(SimpleModelRunner(Inlet(), actor)))), seed=0)
    with pytest.raises(LookupError, match="'QuietClip'.*ActionClip, which it derives from"):
        flatten(DDPGLearner(actor, critic, stepper, logger_bases=[], bs=16), seed=3)


def on(env, **more):
    actor, critic = nets()
    return DDPGLearner(actor, critic, GymStepper(env, DDPGAgent(actor), seed=0, **more), logger_bases=[], bs=16)


def of_parts():
    torch.manual_seed(3)
    actor, critic = Actor(3, 1, 8, 8, head_layer=lambda a, b: nn.Sequential(nn.Linear(a, 4), nn.Linear(4, b))), Critic(3, 1, 8, 8)
    return DDPGLearner(actor, critic, GymStepper("Pendulum-v1", DDPGAgent(actor), seed=0), logger_bases=[], bs=16)


@pytest.mark.parametrize("build, settings, error, words", [
    (partial(on, "Pendulum-v1"), {}, ValueError, ["'seed' is None", "weights='initial.safetensors'", "ddpg(...)"]),
    (partial(on, "Pendulum-v1"), dict(seed=8), ValueError, ["'actor and critic' begin at other parameters", "weights="]),
    (lambda: on(gymnasium.make("Pendulum-v1")), dict(seed=3), ValueError, ["'envs'", "live", "factory"]),
    (lambda: on(lambda: gymnasium.make("Pendulum-v1")), dict(seed=3), ValueError, ["'envs'", "lambda", "imported"]),
    (of_parts, dict(seed=3), LookupError, ["'actor'", "networks="]),
], ids=["no seed", "another seed", "a live environment", "a lambda", "a network of parts"])
def test_what_no_script_can_say_is_refused(build, settings, error, words):
    with pytest.raises(error) as caught:
        flatten(build(), **settings)
    for word in words:
        assert word in str(caught.value)


def test_every_template_is_of_a_class_that_exists():
    for dotted in TEMPLATES:
        module, _, name = dotted.rpartition(".")
        assert hasattr(importlib.import_module(module), name), dotted


# --- the command line ------------------------------------------------------------------------------------------------
def test_the_command_line_prints_the_script(capsys):
    assert main(["flatten", "ddpg", "--env", "Pendulum-v1", "--preset", "none", "--hidden1", "8", "--hidden2", "8"]) == 0
    text = capsys.readouterr().out
    assert "actor = Actor(3, 1, 8, 8)" in text
    ast.parse(text)
