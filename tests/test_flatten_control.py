"""`flatten` of TD3, both SACs and the hysteretic DDPG: what each script learns is what its stack learns, to the bit."""
import ast
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file
from torch import nn

from fastrl_pipes.agents.core import ActionClip, ActionScaler, AgentHead, PolicyRunner
from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner
from fastrl_pipes.agents.hddpg import HDDPGAgent, HDDPGLearner, hddpg
from fastrl_pipes.agents.iql import IQLAgent, IQLLearner
from fastrl_pipes.agents.sac import SACAgent, SACLearner, sac
from fastrl_pipes.agents.sacv import sacv
from fastrl_pipes.agents.td3 import TD3Agent, TD3Learner, td3
from fastrl_pipes.cli import main
from fastrl_pipes.core import SampledStep, SimpleStep
from fastrl_pipes.envs.debug import Goal
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.learner.flatten import flatten
from fastrl_pipes.learner.head import LearnerHead
from fastrl_pipes.learner.joint import JointOptStepper
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.learner.script import TEMPLATES, flattens
from fastrl_pipes.memory.experience_replay import ExperienceReplay
from fastrl_pipes.memory.dataset import memory_from_dataset
from fastrl_pipes.memory.offline import OfflineReplay
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.networks.ensemble import Critics, Value
from fastrl_pipes.networks.initializers import init_uniform_weights, keep_weights
from fastrl_pipes.networks.policies import GaussianActor
from fastrl_pipes.networks.targets import target_of
from fastrl_pipes.networks.temperature import Temperature
from fastrl_pipes.pipes.control import Every, Inlet
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.core import Stage
from fastrl_pipes.pipes.graph import find_pipes
from fastrl_pipes.processors.entropy import SoftActorLossProcessor, SoftCriticLossProcessor, TemperatureLossProcessor
from fastrl_pipes.processors.imitation import CloningLossProcessor
from fastrl_pipes.processors.targets import SoftTargetUpdater

UPDATES = 150
ALLOWED = ("fastrl_pipes.networks.", "fastrl_pipes.envs.debug", "fastrl_pipes.envs.doubles")
SMALL = dict(hidden1=24, hidden2=16, bs=32, warmup=50, max_sz=300)


# --- learners --------------------------------------------------------------------------------------------------------
def soft(sizes=(3, 1), k=2, dtype=torch.float32, single=False, **policy):
    torch.manual_seed(3)
    return [net.to(dtype) for net in (GaussianActor(*sizes, hidden=(24, 16), **policy), Critic(*sizes, 24, 16, weight_init_fn=keep_weights) if single else Critics(*sizes, k=k, hidden=(24, 16)))]


def sac_of(env="Pendulum-v1", nets=None, stepper=None, replay=None, **more):
    actor, critic = nets or soft()
    more = {"bs": 32, "max_sz": 300, **more, **({"replay": replay} if replay else {})}
    return SACLearner(actor, critic, GymStepper(env, SACAgent(actor), seed=5, random_steps=40, **(stepper or {})), [], **more)


def td3_of(actor_settings=None, k=2, **more):
    torch.manual_seed(3)
    actor, critic = Actor(2, 1, 24, 16, **(actor_settings or {})), Critics(2, 1, k=k, hidden=(24, 16), activation_fn=nn.Tanh)
    stepper = GymStepper(partial(Goal, length=15), TD3Agent(actor, 0.3), n=2, mode="sync", seed=1)
    return TD3Learner(actor, critic, stepper, [], **{"bs": 32, "max_sz": 300, **more})


def ensemble_in_ddpg(k=2):
    "DDPG's own losses with k critics"
    torch.manual_seed(3)
    actor, critic = Actor(3, 1, 24, 16), Critics(3, 1, k=k, hidden=(24, 16))
    return DDPGLearner(actor, critic, GymStepper("Pendulum-v1", DDPGAgent(actor), seed=1), logger_bases=[], bs=32, tau=0.01)


def delayed_soft_policy():
    "Policy and temperature at every second batch; what the policy finds travels to the temperature inside of the branch. Acting takes the mode"
    actor, critic = soft(free_std=True, log_std_bounds=(-5.0, 1.0))
    t_critic, temperature = target_of(critic), Temperature(0.3)
    agent = AgentHead(ActionScaler(ActionClip(PolicyRunner(Inlet(), actor, deterministic=True))))

    def late(inlet):
        pipe = SoftActorLossProcessor(inlet, critic, actor, temperature)
        pipe = TemperatureLossProcessor(pipe, temperature, 0.5)
        return BasicOptStepper(BasicOptStepper(pipe, temperature, 1e-3, name="alpha_opt"), actor, 1e-3, name="actor_opt")
    pipe = ExperienceReplay(GymStepper("Pendulum-v1", agent, seed=1, random_steps=20), 32, 300)
    pipe = SoftCriticLossProcessor(pipe, critic, actor, temperature, t_critic, loss=nn.SmoothL1Loss)
    pipe = Every(BasicOptStepper(pipe, critic, 1e-3, name="critic_opt"), 2, late)
    return LearnerHead(SoftTargetUpdater(pipe, critic, 1, 0.01, t_critic, name="critic_target"), batches=10)


def iql_of(r=1, dls=None, dtype=torch.float32, k=2, **more):
    "Acts and learns from what it meets; from recorded data where `dls` gives batches"
    torch.manual_seed(3)
    sizes = (3, 1) if dls is None else (3, 2)
    actor = GaussianActor(*sizes, hidden=(24, 16), squash=False, log_std_bounds=(-5.0, 2.0), free_std=True).to(dtype)
    critic, value = Critics(*sizes, k=k, hidden=(24, 16), reward_sz=r).to(dtype), Value(3, hidden=(24, 16), reward_sz=r).to(dtype)
    dls = GymStepper("Pendulum-v1", IQLAgent(actor, 0.1), seed=5) if dls is None else dls
    more = more if isinstance(dls, OfflineReplay) else {"replay": lambda pipe: ExperienceReplay(pipe, 32, 300), **more}
    return IQLLearner(actor, critic, value, dls, [], **more)


def cloning(actor):
    pipe = ExperienceReplay(GymStepper("Pendulum-v1", seed=1), 32, 300)
    return LearnerHead(BasicOptStepper(CloningLossProcessor(pipe, actor), actor, 1e-3, name="actor_opt"), batches=10)


LEARNERS = {
    "TD3": (partial(td3, seed=2, **SMALL), {}),
    "SAC": (partial(sac, seed=2, **SMALL), {}),
    "SAC with V": (partial(sacv, seed=2, reward_scale=2.0, **SMALL), {}),
    "hysteretic DDPG": (partial(hddpg, seed=2, q_decrease_rate=0.3, **SMALL), {}),
    "TD3, three steps of two environments, three critics": (partial(td3_of, k=3, nsteps=3, policy_delay=3), dict(seed=3)),
    "TD3, one critic, weights that begin otherwise": (partial(td3_of, dict(weight_init_fn=keep_weights, final_layer_init_fn=partial(init_uniform_weights, bound=0.003), activation_fn=nn.Tanh), k=1), dict(seed=3)),
    "SAC, fixed temperature, three steps, one critic of an ensemble": (partial(sac, alpha=0.2, nsteps=3, critics=1, **SMALL), {}),
    "SAC, a single critic, another target entropy": (lambda: sac_of(nets=soft(single=True), target_entropy=-0.3), dict(seed=3)),
    "SAC, three critics, two environments, two batches a step": (partial(sac, "fastrl/Goal-v0", n=2, critics=3, mode="sync", repeat=2, **SMALL), {}),
    "SAC in float64, three steps": (lambda: sac_of(nets=soft(dtype=torch.float64), nsteps=3), dict(seed=3)),
    "SAC with V, three steps, without signals": (partial(sacv, nsteps=3, signals=False, **SMALL), {}),
    "IQL": (iql_of, dict(seed=3)),
    "IQL, three steps, one optimizer, a single replica, signals": (partial(iql_of, nsteps=3, joint=True, k=1, signals=True, temperature=0.3, max_exp_advantage=2.0), dict(seed=3)),
    "IQL in float64, three critics, copied targets": (partial(iql_of, dtype=torch.float64, k=3, target_update_tau=1.0, target_update_period=5), dict(seed=3)),
    "cloning of a stochastic policy": (lambda: cloning(soft()[0]), dict(seed=3)),
    "cloning of a deterministic policy": (lambda: cloning((torch.manual_seed(3), Actor(3, 1, 24, 16))[1]), dict(seed=3)),
    "DDPG of two critics": (ensemble_in_ddpg, dict(seed=3)),
    "a delayed soft policy": (delayed_soft_policy, dict(seed=3)),
}
ALONE = ["SAC"]  # run in a process of its own


def parameters(learner):
    "Every network under the name that the script gives it"
    opts, targets = find_pipes(learner, BasicOptStepper), find_pipes(learner, SoftTargetUpdater)
    named = {{"alpha_opt": "temperature"}.get(str(p), str(p).removesuffix("_opt")): p.model for p in opts if not isinstance(p, JointOptStepper)}
    named |= {n: m for p in find_pipes(learner, JointOptStepper) for n, m in zip(("value", "critic", "actor"), p.models)}
    named |= {"t_" + str(p).removesuffix("_target"): p.target_model for p in targets}
    return {f"{n}.{k}": v for n, net in named.items() for k, v in net.state_dict().items()}


def learned(learner, updates):
    before = {k: v.clone() for k, v in parameters(learner).items()}
    for _ in range(updates):
        next(learner)
    after = parameters(learner)
    assert [k for k in after if torch.equal(before[k], after[k])] == [], "an empty comparison would be equal, too"
    return after


def run_here(text, names, updates):
    space = {"__name__": "script"}
    try:
        exec(text, space)
        space["train"](updates)
    finally:
        torch.set_flush_denormal(False)
    return {f"{n}.{k}": v for n in names for k, v in space[n].state_dict().items()}


def run_alone(text, names, updates, tmp_path):
    "In a process of its own"
    keep = (f"\n    from safetensors.torch import save_file\n    nets = {{{', '.join(f'{n!r}: {n}' for n in names)}}}\n"
            f"    save_file({{f'{{n}}.{{k}}': v.clone() for n, net in nets.items() for k, v in net.state_dict().items()}}, {str(tmp_path/'out.safetensors')!r})\n")
    (tmp_path/"script.py").write_text(text + keep)
    done = subprocess.run([sys.executable, "script.py", str(updates)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path/"out.safetensors")


def check(learner, text, tmp_path=None, updates=UPDATES):
    here = learned(learner, updates)
    names = sorted({k.partition(".")[0] for k in here})
    there = run_here(text, names, updates) if tmp_path is None else run_alone(text, names, updates, tmp_path)
    assert here.keys() == there.keys()
    for name in here:
        assert torch.equal(here[name], there[name]), f"{name} differs by {float((here[name] - there[name]).abs().max()):.3g}"


def only_networks_are_ours(text):
    for node in ast.walk(ast.parse(text)):
        found = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
        assert all(not m.startswith("fastrl_pipes") or m.startswith(ALLOWED) for m in found), found


# --- the same to the bit ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", LEARNERS)
def test_the_script_ends_at_the_same_parameters_to_the_bit(kind, tmp_path):
    build, more = LEARNERS[kind]
    learner = build()
    text = flatten(learner, **more)
    only_networks_are_ours(text)
    check(learner, text, tmp_path if kind in ALONE else None)


@pytest.mark.parametrize("build", [sac, td3])
def test_a_mujoco_environment(build):
    pytest.importorskip("mujoco")
    learner = build("Hopper-v5", **SMALL)
    check(learner, flatten(learner), updates=60)


def test_a_wrong_line_is_noticed():
    "The comparison can fail: with another generator, or the maximum of the critics, parameters differ"
    for old, new in (("torch.minimum(q", "torch.maximum(q"), ("torch.minimum(next_q", "torch.maximum(next_q"), ("actor_rng = torch.Generator().manual_seed(", "actor_rng = torch.Generator().manual_seed(1 + ")):
        learner = sac(**SMALL)
        text = flatten(learner)
        assert text.count(old) == 1
        with pytest.raises(AssertionError, match="differs by"):
            check(learner, text.replace(old, new), updates=3)


# --- weighted samples ------------------------------------------------------------------------------------------------
class Weighted(Stage):
    "Samples with places and weights, as a prioritised replay hands them on; keeps the errors that are reported"

    def announce(self, context: Context):
        self.errors = []
        context.announce(str(self), priorities=self.heard)

    def heard(self, index, td_error):
        self.errors.append((index + 0, td_error + 0))

    def forward(self, item):
        if not isinstance(item, SimpleStep):
            return item
        n = len(item.reward)
        return SampledStep.of(item, index=torch.arange(n), weight=torch.linspace(0.2, 1, n)[:, None].to(item.reward.dtype))


def weighted_replay(*args, **kwargs):
    return Weighted(ExperienceReplay(*args, **kwargs))


def weighted_lines(pipe, script):
    script.title(pipe, "places and weights")
    script.add("places, weight = torch.arange(len(reward)), torch.linspace(0.2, 1, len(reward))[:, None].to(reward.dtype)")
    script.helpers["heard"] = ["errors = []", "", "", "def heard(index, td_error):", "    errors.append((index + 0, td_error + 0))"]
    script.fields["index"], script.priorities = "places", "heard"


def hysteretic(replay):
    torch.manual_seed(3)
    actor, critic = Actor(3, 1, 24, 16), Critics(3, 1, hidden=(24, 16))
    return HDDPGLearner(actor, critic, GymStepper("Pendulum-v1", HDDPGAgent(actor), seed=1), [], bs=32, max_sz=300, replay=replay)


@pytest.mark.parametrize("kind, build, seed", [
    ("two critics", lambda: sac_of(replay=weighted_replay), 3),
    ("one critic, float64", lambda: sac_of(nets=soft(single=True, dtype=torch.float64), replay=weighted_replay), 3),
    ("smoothed", lambda: td3_of(replay=weighted_replay), 3),
    ("hysteretic", lambda: hysteretic(replay=weighted_replay), 3),
    ("IQL", lambda: iql_of(replay=lambda pipe: weighted_replay(pipe, 32, 300)), 3),
], ids=lambda x: x if isinstance(x, str) else "")
def test_weighted_samples_and_reports_of_their_errors(kind, build, seed, monkeypatch):
    learner = build()
    monkeypatch.setattr("fastrl_pipes.learner.script.TEMPLATES", dict(TEMPLATES))
    flattens(Weighted)(lambda pipe, script: script.add("index, weight = torch.arange(len(reward)), torch.ones(len(reward), 1)"))
    with pytest.raises(ValueError, match="has errors to report, and the replay's template does not say to whom"):
        flatten(learner, seed=seed)
    flattens(Weighted)(weighted_lines)
    text, space = flatten(learner, seed=seed), {"__name__": "script"}
    here = {k: v.clone() for k, v in learned(learner, 50).items()}
    try:
        exec(text, space)
        space["train"](50)
    finally:
        torch.set_flush_denormal(False)
    for name, value in here.items():
        net, _, key = name.partition(".")
        assert torch.equal(value, space[net].state_dict()[key]), name
    errors = find_pipes(learner, Weighted)[0].errors
    assert len(errors) == len(space["errors"]) == 50
    for (i, e), (j, f) in zip(errors, space["errors"]):
        assert torch.equal(i, j) and torch.equal(e, f) and e.shape == (32,) and e.max() > 0


def test_without_a_listener_there_are_no_reports(monkeypatch):
    "IQL may keep its errors to itself; samples still have weights"
    learner = iql_of(replay=lambda pipe: weighted_replay(pipe, 32, 300), calculate_priority=False)
    monkeypatch.setattr("fastrl_pipes.learner.script.TEMPLATES", dict(TEMPLATES))
    flattens(Weighted)(weighted_lines)
    text = flatten(learner, seed=3)
    assert "heard(" not in text.split("def train")[1] and "* weight).mean()" in text
    check(learner, text, updates=20)


# --- recorded data ---------------------------------------------------------------------------------------------------
def test_vector_rewards_from_recorded_data(tmp_path, monkeypatch):
    "Two gains and a cost"
    minari = pytest.importorskip("minari")
    from fastrl_pipes.memory.growing import GrowingDataset
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path/"datasets"))
    rng, box, actions = np.random.default_rng(0), spaces.Box(-1, 1, (3,)), spaces.Box(-2, 2, (2,))
    growing = GrowingDataset("some/data-v0", box, actions, None, "hdf5", None)
    growing.add([minari.data_collector.EpisodeBuffer(observations=rng.uniform(-1, 1, (t + 1, 3)).astype(np.float32), actions=rng.uniform(-2, 2, (t, 2)).astype(np.float32),
                                                     rewards=rng.standard_normal((t, 3)).astype(np.float32), terminations=np.arange(t) == t - 1, truncations=np.zeros(t, bool)) for t in (9, 30, 21)])
    for more in ({}, dict(joint=True, signals=True)):
        learner = iql_of(3, OfflineReplay(memory_from_dataset("some/data-v0"), 32, 1), reward_weights=(1.0, -0.5, 2.0), **more)
        text = flatten(learner, seed=3)
        assert "worth = torch.tensor([1.0, -0.5, 2.0])" in text and "sign = torch.tensor([1.0, -1.0, 1.0])" in text and text.count("torch.tensor([") == 2
        check(learner, text, updates=60)


# --- readable --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("build, most, words", [
    (td3, 150, ["Fujimoto 2018, Alg. 1", "clamp(-0.5, 0.5)", "torch.minimum(next_q[0], next_q[1])", "replica=0", "if every % 2 == 0:", "weight_init_fn=keep_weights", "lr=0.001"]),
    (sac, 150, ["Haarnoja 2018b, eq. 5", "eq. 7", "eq. 18", "actor(next_state, noise=torch.randn(action.shape", "log_prob.detach().mean() - 1)", "temperature = Temperature()"]),
    (partial(sac, alpha=0.2), 145, ["temperature = Temperature(initial=0.2, learned=False)"]),
    (sacv, 150, ["Haarnoja 2018a, eq. 5", "eq. 8", "value = Value(3, hidden=(24, 16))"]),
    (hddpg, 150, ["Matignon 2007, eq. 4", "positive * 1.0 + (1 - positive) * 0.5"]),
])
def test_the_script_is_short_and_names_the_equations(build, most, words):
    text = flatten(build(**SMALL))
    assert text == flatten(build(**SMALL)), "the same learner gives the same text"
    lines = text.splitlines()
    assert len(lines) <= most and max(map(len, lines)) <= 180
    for word in words:
        assert word in text, word
    if build is not sac:
        assert "alpha_opt" not in text


def test_the_script_of_a_learner_that_has_begun():
    "The temperature has moved, and the script begins where the learner did"
    first, second = sac(**SMALL), sac(**SMALL)
    for _ in range(3):
        next(first)
    assert flatten(first) == flatten(second)


# --- errors ----------------------------------------------------------------------------------------------------------
class Silent(GaussianActor):
    "A policy that takes no noise"

    def forward(self, state, action=None):
        return super().forward(state, action)


def leaky():
    torch.manual_seed(3)
    return GaussianActor(3, 1, hidden=(24, 16), activation_fn=partial(nn.LeakyReLU, 0.3)), Critics(3, 1, hidden=(24, 16))


def begun_by_lambda(**more):
    return td3_of(dict(weight_init_fn=lambda m: None), **more)


def silent():
    torch.manual_seed(3)
    return Silent(3, 1, hidden=(24, 16)), Critics(3, 1, hidden=(24, 16))


@pytest.mark.parametrize("build, settings, error, words", [
    (lambda: sac_of(nets=silent()), dict(networks={"actor": "Silent(3, 1, hidden=(24, 16))"}), ValueError, ["'actor' is a Silent, whose forward takes no noise", "forward(state, action=None, noise=None)"]),
    (lambda: sac_of(nets=leaky()), {}, LookupError, ["'actor' has (1): LeakyReLU(negative_slope=0.3), expected (1): LeakyReLU(negative_slope=0.01)", "networks={'actor': 'GaussianActor(...)'}"]),
    (begun_by_lambda, {}, ValueError, ["'weight_init_fn' is begun_by_lambda.<locals>.<lambda>, which cannot be imported"]),
], ids=["a policy without noise", "an activation with settings", "weights that begin by a lambda"])
def test_what_no_script_can_say_is_refused(build, settings, error, words):
    with pytest.raises(error) as caught:
        flatten(build(), seed=3, **settings)
    for word in words:
        assert word in str(caught.value)


def test_how_weights_begin_does_not_matter_where_they_are_loaded(tmp_path):
    learner = begun_by_lambda()
    check(learner, flatten(learner, weights=tmp_path/"first.safetensors"), updates=20)


def test_an_activation_with_settings_is_said_by_hand():
    learner = sac_of(nets=leaky())
    check(learner, flatten(learner, seed=3, networks={"actor": "GaussianActor(3, 1, hidden=(24, 16), activation_fn=lambda: nn.LeakyReLU(0.3))"}), updates=20)


# --- the command line ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm, line", [("td3", "actor = Actor(3, 1, 8, 8, weight_init_fn=keep_weights, final_layer_init_fn=keep_weights)"), ("sac", "actor = GaussianActor(3, 1, hidden=(8, 8))")])
def test_the_command_line_prints_the_script(algorithm, line, capsys):
    assert main(["flatten", algorithm, "--env", "Pendulum-v1", "--preset", "none", "--hidden1", "8", "--hidden2", "8", "--bs", "16", "--warmup", "30"]) == 0
    text = capsys.readouterr().out
    assert line in text.splitlines()
    settings = dict(hidden1=8, hidden2=8, bs=16, warmup=30)
    check({"td3": td3, "sac": sac}[algorithm]("Pendulum-v1", **settings), text, updates=20)
