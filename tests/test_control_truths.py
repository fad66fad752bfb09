"""TD3 and SAC, whole: where an episode ends, probes whose answer is known, what validation plays, resuming to the bit in the middle of a
policy's delay, and the tools that look into a stack."""
import json
import math
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from test_resume import in_a_new_process, parts, pull
from test_time import LENGTHS, Sum, counting, kept, rotated
from torch import nn

from fastrl_pipes.agents.core import PolicyRunner
from fastrl_pipes.agents.sac import SACAgent, SACLearner, sac
from fastrl_pipes.agents.td3 import SmoothedCriticLossProcessor, TD3Agent, TD3Learner, td3
from fastrl_pipes.core import SimpleStep
from fastrl_pipes.envs.debug import Bandit, ConstantReward, TwoBoxes, TwoStep, WideBox
from fastrl_pipes.envs.stepper import GymStepper
from fastrl_pipes.learner.head import LearnerHead
from fastrl_pipes.learner.optimizers import BasicOptStepper
from fastrl_pipes.learner.resume import load_run
from fastrl_pipes.memory.experience_replay import ExperienceReplay, ReplayWriter
from fastrl_pipes.networks.actor_critic import Actor
from fastrl_pipes.networks.ensemble import Critics
from fastrl_pipes.networks.policies import GaussianActor
from fastrl_pipes.networks.targets import target_of
from fastrl_pipes.networks.temperature import Temperature
from fastrl_pipes.pipes.control import Every
from fastrl_pipes.pipes.context import Context
from fastrl_pipes.pipes.walk import bind, named_modules, named_pipes
from fastrl_pipes.pipes.graph import find_pipe, find_pipes
from fastrl_pipes.pipes.guards import NotFinite
from fastrl_pipes.processors.dpg import ActorLossProcessor
from fastrl_pipes.processors.entropy import SoftActorLossProcessor, SoftCriticLossProcessor, TemperatureLossProcessor


def of_td3(env, sizes, hidden=(16, 16), seed=0, n=1, agent=None, lr=1e-3, **settings):
    torch.manual_seed(seed)
    actor = Actor(*sizes, *hidden)
    stepper = GymStepper(env, TD3Agent(actor, **(agent or {})), n, "sync" if n > 1 and not isinstance(env, list) else "auto", seed)
    return TD3Learner(actor, Critics(*sizes, hidden=hidden), stepper, [], lr, critic_lr=3 * lr, **settings)


def of_sac(env, sizes, hidden=(16, 16), seed=0, n=1, agent=None, lr=1e-3, **settings):
    torch.manual_seed(seed)
    actor = GaussianActor(*sizes, hidden)
    stepper = GymStepper(env, SACAgent(actor, **(agent or {})), n, "sync" if n > 1 and not isinstance(env, list) else "auto", seed)
    return SACLearner(actor, Critics(*sizes, hidden=hidden), stepper, [], lr, critic_lr=lr, alpha_lr=lr, **settings)


BOTH = pytest.mark.parametrize("make", [of_td3, of_sac], ids=["TD3", "SAC"])


# --- where an episode ends -------------------------------------------------------------------------------------------
class Says(nn.Module):
    "A policy that always draws the same action, with the same log-probability"

    def __init__(self, action, log_prob=None):
        super().__init__()
        self.action, self.log_prob = nn.Parameter(torch.tensor([[action]])), log_prob

    def forward(self, state, action=None, noise=None):
        said = self.action.expand(len(state), 1)
        log_prob = self.action * 0 + (0 if self.log_prob is None else self.log_prob)
        return said, log_prob.expand(len(state), 1), -log_prob.expand(len(state), 1)


def smoothed():
    return SmoothedCriticLossProcessor([], Sum(), Says(0.25), Sum(), discount=0.9, policy_noise=0.0), 2.25


def soft():
    return SoftCriticLossProcessor([], Sum(), Says(0.25, log_prob=-1.5), Temperature(0.2), Sum(), discount=0.9), 2.25 + 0.2 * 1.5


@pytest.mark.parametrize("build", [smoothed, soft])
def test_terminated_alone_stops_the_bootstrap(build):
    "By hand: Q(1, 0) = 1 is compared with 0.5 + 0.9 V'(2), or with 0.5 alone. A terminal state has no entropy left either"
    processor, value = build()
    bind(processor, Context(seed=0))
    processor.start()
    for terminated, truncated, y in ((0, 0, 0.5 + 0.9 * value), (0, 1, 0.5 + 0.9 * value), (1, 0, 0.5), (1, 1, 0.5)):
        one = torch.ones(1, 1)
        batch = SimpleStep(one, one * 0, one * 2, one * 0.5, one * terminated > 0, one * truncated > 0)
        loss, out = processor.forward(batch)
        assert out is batch
        torch.testing.assert_close(loss["loss"].detach(), torch.tensor((1 - y) ** 2))


@BOTH
def test_a_truncated_episode_goes_on_in_the_value(make):
    "Reward 1 for ever, truncated every 10 steps: V = 1 / (1 - 0.8) = 5; with truncation as an end it would be near 3.6. No temperature to speak of"
    of_its_own = dict(alpha=1e-6, lr=3e-3) if make is of_sac else {}
    learner = make(partial(ConstantReward, length=10), (1, 1), (32, 32), discount=0.8, tau=0.1, bs=64, batches=400, **of_its_own)
    learner.fit(1)
    critic = find_pipe(learner, "critic_opt").model
    with torch.no_grad():
        value = critic(torch.ones(2, 1), torch.tensor([[0.0], [0.5]]))
    torch.testing.assert_close(value, torch.full((2, 2, 1), 5.0), rtol=0.03, atol=0)


@BOTH
def test_truncation_in_a_target_is_refused_before_the_first_step(make, monkeypatch):
    kind = SmoothedCriticLossProcessor if make is of_td3 else SoftCriticLossProcessor
    bootstrap = kind.bootstrap
    monkeypatch.setattr(kind, "bootstrap", lambda self, batch, value: bootstrap(self, batch.replace(terminated=batch.done), value))
    with pytest.raises(ValueError, match=f"{kind.__name__}: field 'loss' changes with 'truncated'"):
        make("Pendulum-v1", (3, 1))


@BOTH
@pytest.mark.parametrize("n", [1, 4])
def test_every_row_of_an_nstep_replay_is_a_window_of_its_episode(make, n):
    "On environments that count: state s and successor s + k say how long the window was"
    learner = make(counting(n) if n > 1 else counting(1)[0], (1, 1), nsteps=3, discount=0.5, bs=8, max_sz=50, n=n)
    pull(learner, 70)
    batch = kept(learner)
    assert find_pipe(learner, ReplayWriter).memory.written > 70
    for state, successor, terminated, truncated, discount in zip(*(getattr(batch, f)[:, 0].tolist() for f in ("state", "next_state", "terminated", "truncated", "discount"))):
        i, episode, t = int(state) // 100_000, int(state) % 100_000 // 1000, int(state) % 1000
        length = rotated(i)[episode % len(LENGTHS)]
        k = min(3, length - t)
        assert (successor, discount) == (state + k, 0.5**k)
        assert (terminated, truncated) == ((t + k == length) and episode % 2 == 0, (t + k == length) and episode % 2 == 1)


# --- known optima ----------------------------------------------------------------------------------------------------
SIZES = {Bandit: (1, 1), TwoStep: (2, 1), WideBox: (1, 2), TwoBoxes: (1, 3)}


@pytest.mark.parametrize("make, env, updates, least", [
    (of_td3, Bandit, 300, -0.02), (of_td3, TwoStep, 600, 0.97), (of_td3, WideBox, 600, -0.06),
    (of_sac, Bandit, 300, -0.02), (of_sac, TwoStep, 500, 0.97), (of_sac, WideBox, 500, -0.08), (of_sac, TwoBoxes, 500, -0.08),
], ids=lambda v: getattr(v, "__name__", None))
def test_the_known_optimum_is_found(make, env, updates, least):
    "Optima are 0, 1, 0 and 0; the centre of the box gives -0.09, 0.75, -1.26 and -1.03"
    of_its_own = dict(agent=dict(sigma=0.3), tau=0.04, lr=1e-3) if make is of_td3 else dict(tau=0.02, lr=3e-3)
    learner = make(env, SIZES[env], (32, 32), bs=64, batches=updates, **of_its_own)
    learner.fit(1)
    assert learner.validate(episodes=1)["mean"] > least
    learner.close()


def test_the_temperature_finds_the_price_of_the_entropy_it_aims_at():
    """A bandit with reward -a^2, where the best policy of entropy H is close to a Gaussian: sigma^2 = exp(2 H - 1) / 2 pi. Its temperature is
    what a nat costs there, 2 sigma^2."""
    aim = -0.5
    learner = of_sac(partial(Bandit, target=0.0), (1, 1), (32, 32), lr=5e-3, bs=64, batches=400, target_entropy=aim, initial_alpha=0.1)
    learner.fit(1)
    processor = find_pipe(learner, SoftActorLossProcessor)
    with torch.no_grad():
        entropy = processor.actor(torch.ones(4000, 1), noise=torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)))[2].mean().item()
    assert entropy == pytest.approx(aim, abs=0.2)
    assert processor.temperature().item() == pytest.approx(math.exp(2 * aim - 1) / math.pi, rel=0.4)


# --- validation ------------------------------------------------------------------------------------------------------
def by_hand(act, episodes, seed=10_000):
    "Pendulum-v1 without any of our pipes"
    env, returns = gymnasium.make("Pendulum-v1"), []
    for i in range(episodes):
        observation, _ = env.reset(seed=seed + i)
        total, over = 0.0, False
        while not over:
            with torch.no_grad():
                action = 2 * act(torch.from_numpy(observation)[None])[0].numpy()
            observation, reward, terminated, truncated, _ = env.step(action)
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    return returns


@BOTH
def test_validation_plays_the_policy_without_noise(make):
    "SAC: tanh(mean), the mean itself would be another action; TD3: what the actor says"
    learner = make("Pendulum-v1", (3, 1), bs=16, batches=20)
    learner.fit(1)
    actor = find_pipe(learner, "actor_opt").model
    with torch.no_grad():
        for p in actor.parameters():
            p.mul_(1.5)  # far from zero, so that tanh matters
    means = (lambda s: torch.tanh(actor.layers(s)[:, :1])) if make is of_sac else actor
    found = learner.validate(episodes=3)
    np.testing.assert_allclose(sorted(found["returns"]), sorted(by_hand(means, 3)), rtol=1e-4)
    np.testing.assert_array_equal(found["returns"], learner.validate(episodes=3)["returns"])
    state = np.array([1.0, 0.0, 0.3], np.float32)
    assert learner.predict(state) == pytest.approx(2 * means(torch.from_numpy(state)[None])[0].detach().numpy(), rel=1e-5)
    noisy = learner.validate(episodes=3, deterministic=False)["returns"]
    assert (noisy != found["returns"]).any(), "with noise where one asks for it"
    assert {learner.predict(state, deterministic=False).item() for _ in range(5)} != {learner.predict(state).item()}


@BOTH
def test_training_is_the_same_to_the_bit_with_and_without_validation(make):
    def trained(validate):
        learner = make("Pendulum-v1", (3, 1), nsteps=2, bs=16, batches=25)
        for _ in range(3):
            learner.fit(1)
            if validate:
                learner.validate(episodes=2, deterministic=False)
                learner.validate(episodes=1)
                learner.predict(np.zeros(3, np.float32), deterministic=False)
        return [p for m in named_modules(learner).values() if isinstance(m, nn.Module) for p in m.parameters()] + [kept(learner).action]
    for a, b in zip(trained(True), trained(False), strict=True):
        assert torch.equal(a, b)


# --- resuming --------------------------------------------------------------------------------------------------------
SMALL = dict(seed=3, hidden1=9, hidden2=7, bs=16, max_sz=150, nsteps=3, warmup=30, batches=50)
BUILDERS = {"TD3": partial(td3, **SMALL, policy_delay=3), "TD3, 4": partial(td3, n=4, **SMALL, mode="sync", repeat=3),
            "SAC": partial(sac, **SMALL), "SAC, 4": partial(sac, n=4, **SMALL, mode="sync", repeat=2), "SAC, fixed": partial(sac, **SMALL, alpha=0.2)}
CUTS = (1, 8, 9, 10, 35)  # the policy's turn comes at 3, 6, 9, ...


@pytest.mark.parametrize("name", BUILDERS)
def test_resumes_to_the_bit_also_between_two_turns_of_the_policy(name, tmp_path):
    build = BUILDERS[name]
    straight, states = build(), {}
    for i in range(1, 60):
        next(straight)
        if i in CUTS:
            straight.save(tmp_path / str(i))
        states[i] = parts(straight) if i in {c + 20 for c in CUTS} else None
    for cut in CUTS:
        other = build().load(tmp_path / str(cut))
        if name == "TD3":
            assert find_pipe(other, Every).count == cut
        pull(other, 20)
        found = parts(other)
        differ = [part for part, digest in states[cut + 20].items() if found[part] != digest]
        assert found.keys() == states[cut + 20].keys() and not differ, f"cut at {cut}: {differ}"
        other.close()
    straight.close()


def test_a_count_that_is_forgotten_is_noticed(tmp_path, monkeypatch):
    "The branch would fire one batch late"
    learner = BUILDERS["TD3"]()
    pull(learner, 8)
    learner.save(tmp_path)
    pull(learner, 20)
    set_own = Every.set_own
    monkeypatch.setattr(Every, "set_own", lambda self, state: set_own(self, {**state, "count": 0}))
    other = BUILDERS["TD3"]().load(tmp_path)
    pull(other, 20)
    assert {k for k, v in parts(other).items() if v != parts(learner)[k]} >= {"modules actor_opt.opt", "pipes Every"}


def test_noise_that_is_forgotten_is_noticed(tmp_path, monkeypatch):
    learner = BUILDERS["SAC"]()
    pull(learner, 8)
    learner.save(tmp_path)
    pull(learner, 5)
    from fastrl_pipes.pipes.draws import Draws
    set_own = Draws.set_own
    monkeypatch.setattr(Draws, "set_own", lambda self, state: set_own(self, {**state, "generator": torch.Generator().get_state()}))
    other = BUILDERS["SAC"]().load(tmp_path)
    pull(other, 5)
    assert {k for k, v in parts(other).items() if v != parts(learner)[k]} >= {"modules critic_opt.opt", "pipes SoftActorLossProcessor", "pipes PolicyRunner"}


def test_runs_are_built_again_from_their_folders(tmp_path):
    "In a new process, from registered parts and settings alone"
    expected = {}
    for name in ("TD3", "SAC"):
        learner = BUILDERS[name]()
        pull(learner, 10)
        learner.save(tmp_path / name)
        here = load_run(tmp_path / name)
        for x in (learner, here):
            pull(x, 11)
        expected[name] = parts(learner)
        assert parts(here) == expected[name]
    code = f"""import test_resume as t
t.torch.set_num_threads(1)
for name in ("TD3", "SAC"):
    x = t.load_run({str(tmp_path)!r} + "/" + name)
    t.pull(x, 11)
    print("found", t.json.dumps(t.parts(x)))"""
    lines = [line for line in in_a_new_process(code).stdout.splitlines() if line.startswith("found")]
    assert [json.loads(line.removeprefix("found")) for line in lines] == [expected["TD3"], expected["SAC"]]


# --- looking into the stack ------------------------------------------------------------------------------------------
LEARNS = {of_td3: ["SmoothedCriticLossProcessor", "critic_loss", "critic_opt", "ActorLossProcessor", "actor_loss", "actor_opt", "critic_target", "actor_target"],
          of_sac: ["SoftCriticLossProcessor", "critic_loss", "critic_opt", "SoftActorLossProcessor", "actor_loss", "actor_opt", "TemperatureLossProcessor", "alpha_opt", "critic_target"]}


@BOTH
def test_check_goes_through_every_joint(make):
    flows = make("Pendulum-v1", (3, 1)).check()
    assert set(LEARNS[make]) <= set(flows) and all(flows[n].went for n in LEARNS[make] if "opt" not in n and n != "Every")
    if make is of_sac:
        assert [getattr(x, "log_prob", None) is not None for x in flows["TemperatureLossProcessor"].came if isinstance(x, SimpleStep)] == [True]


def test_a_mistake_in_the_delayed_branch_is_found():
    "A critic that the policy's loss cannot use, behind a branch that fires every second batch"
    class Stubborn(Critics):
        def forward(self, state, action, replica=None):
            return super().forward(state, torch.zeros_like(action), replica)
    torch.manual_seed(0)
    actor = Actor(3, 1, 8, 8)
    with pytest.raises(ValueError, match="ActorLossProcessor.*no gradient"):
        TD3Learner(actor, Stubborn(3, 1, hidden=(8,)), GymStepper("Pendulum-v1", TD3Agent(actor)), [])


@BOTH
def test_profile_has_a_row_for_every_pipe(make):
    learner = make("Pendulum-v1", (3, 1), bs=16)
    found = learner.profile(12)
    for name in LEARNS[make]:
        assert found[name].items > 0 and found[name].own > 0
    if make is of_td3:
        assert found["critic_target"].items == 6 and found["actor_target"].items == 6, "every second batch"


@BOTH
def test_a_guard_names_where_a_nan_arises_and_costs_no_bit(make):
    plain, guarded = make("Pendulum-v1", (3, 1), bs=16, batches=20), make("Pendulum-v1", (3, 1), bs=16, batches=20).guard()
    plain.fit(1), guarded.fit(1)
    assert {k: v for k, v in parts(plain).items() if k.startswith("modules")} == {k: v for k, v in parts(guarded).items() if k.startswith("modules")}
    with torch.no_grad():
        find_pipe(guarded, "critic_opt").model.layers[0].weight[0, 0, 0] = float("nan")
    with pytest.raises(NotFinite) as e:
        guarded.fit(1)
    assert e.value.pipe == ("SmoothedCriticLossProcessor" if make is of_td3 else "SoftCriticLossProcessor") and e.value.field == "loss"


def test_the_branch_is_described_and_drawn():
    learner = of_td3("Pendulum-v1", (3, 1), policy_delay=4)
    lines = learner.describe(shapes=False).splitlines()
    at = {name: next(i for i, line in enumerate(lines) if line.strip().startswith(name + "(")) for name in LEARNS[of_td3] + ["Every", "Inlet_2"]}
    inside = ["Inlet_2", "ActorLossProcessor", "actor_loss", "actor_opt", "critic_target", "actor_target"]
    assert [at[n] for n in ("SmoothedCriticLossProcessor", "critic_opt", *inside, "Every")] == sorted(at[n] for n in ("SmoothedCriticLossProcessor", "critic_opt", *inside, "Every"))
    assert all(lines[at[n]].startswith("    ") for n in inside) and not lines[at["Every"]].startswith(" ") and "n=4" in lines[at["Every"]]
    assert not lines[at["critic_opt"]].startswith(" ")
    drawing = learner.mermaid().splitlines()
    assert "    actor_target -.-> Every" in drawing and "    critic_opt --> Every" in drawing


def test_soft_learners_are_described_in_the_papers_order():
    learner = of_sac("Pendulum-v1", (3, 1))
    text = learner.describe()
    places = [text.index(f"\n{name}(") for name in LEARNS[of_sac]]
    assert places == sorted(places) and "log_prob float32[" in text and not find_pipes(learner, Every)
    assert not find_pipes(of_sac("Pendulum-v1", (3, 1), alpha=0.2), TemperatureLossProcessor), "a fixed temperature has no loss"
    assert {type(p) for p in find_pipes(of_td3("Pendulum-v1", (3, 1)), ActorLossProcessor)} == {ActorLossProcessor}
    assert "alpha_opt -->" in learner.mermaid() and isinstance(named_pipes(learner.agent)["PolicyRunner"], PolicyRunner)


# --- what makes no learner -------------------------------------------------------------------------------------------
REFUSED = {
    "a delay of 0": (partial(of_td3, policy_delay=0), ["Every: field 'n' is 0"]),
    "a negative noise": (partial(of_td3, policy_noise=-1), ["SmoothedCriticLossProcessor: field 'policy_noise' is -1"]),
    "a bound that is no number": (partial(of_td3, noise_clip="wide"), ["SmoothedCriticLossProcessor: field 'noise_clip' is 'wide'"]),
    "tau above 1": (partial(of_td3, tau=2), ["critic_target: field 'tau' is 2"]),
    "a discount above 1": (partial(of_sac, discount=1.5), ["SoftCriticLossProcessor: field 'discount' is 1.5"]),
    "a temperature of 0": (partial(of_sac, alpha=0), ["Temperature: field 'initial' is 0"]),
    "a temperature in words": (partial(of_sac, alpha="auto"), ["Temperature: field 'initial' is 'auto'", "a number", "None"]),
    "an entropy in words": (partial(of_sac, target_entropy="auto"), ["TemperatureLossProcessor: field 'target_entropy' is 'auto'"]),
    "noise of the agent": (partial(of_td3, agent=dict(sigma=-1)), ["GaussianNoise: field 'sigma' is -1"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_make_no_learner_are_refused_by_name(what):
    build, words = REFUSED[what]
    with pytest.raises((ValueError, TypeError)) as caught:
        build("Pendulum-v1", (3, 1))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@BOTH
def test_actions_that_are_no_box_are_refused(make):
    with pytest.raises(TypeError, match=r"(TD3|SAC)Learner: field 'action_space' is Discrete\(2\)"):
        make("CartPole-v1", (4, 1))


def test_pipes_at_the_wrong_place_are_refused():
    "Put together by hand: no target actor behind a branch; the critic as its own target; a temperature without a policy; another actor than the one that acts"
    torch.manual_seed(0)
    actor, critic, soft = Actor(3, 1, 8, 8), Critics(3, 1, hidden=(8,)), GaussianActor(3, 1, (8,))
    pipe = ExperienceReplay(GymStepper("Pendulum-v1", TD3Agent(actor), seed=0), 8)
    pipe = BasicOptStepper(SmoothedCriticLossProcessor(pipe, critic, actor, target_of(critic)), critic, 1e-3, filter=True)
    pipe = Every(pipe, 2, lambda inlet: BasicOptStepper(ActorLossProcessor(inlet, critic, actor), actor, 1e-3, filter=True, name="actor_opt"))
    with pytest.raises(ValueError, match="SmoothedCriticLossProcessor: field 't_actor' is the network that actor_opt steps"):
        LearnerHead(pipe)
    with pytest.raises(ValueError, match="SoftCriticLossProcessor: field 't_critic' is the critic itself"):
        SoftCriticLossProcessor([], critic, soft, Temperature(), critic)
    replay = ExperienceReplay(GymStepper("Pendulum-v1", SACAgent(soft), seed=0), 8)
    with pytest.raises(ValueError, match="TemperatureLossProcessor: field 'log_prob' is missing from the batch.*SoftActorLossProcessor"):
        LearnerHead(TemperatureLossProcessor(replay, Temperature()))
    with pytest.raises(ValueError, match="SACLearner: field 'PolicyRunner' acts with a GaussianActor that nobody steps"):
        SACLearner(GaussianActor(3, 1, (8,)), critic, GymStepper("Pendulum-v1", SACAgent(soft), seed=0), [])
