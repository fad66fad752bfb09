"""How much there is to read. A line counts where there is code in it: no blank lines, comments or docstrings. A signature counts as the lines it
would fill at 120 columns without its comments: one parameter stands on each line only for the sake of what is said about it."""
import ast
import inspect
import io
import math
import sys
import textwrap
import tokenize

import pytest
from every_learner import learners

from fastrl_pipes.agents import sac as sac_module
from fastrl_pipes.agents import td3 as td3_module
from fastrl_pipes.agents.sac import SACAgent, SACLearner, sac
from fastrl_pipes.agents.td3 import SmoothedCriticLossProcessor, TD3Agent, TD3Learner, td3
from fastrl_pipes.functional import policy_gradient
from fastrl_pipes.memory.experience_replay import ReplaySampler
from fastrl_pipes.memory.rows import RowLayout
from fastrl_pipes.networks.ensemble import BatchedLinear, Critics
from fastrl_pipes.networks.policies import GaussianActor
from fastrl_pipes.networks.temperature import Temperature
from fastrl_pipes.pipes.walk import traverse
from fastrl_pipes.processors import entropy

SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
DEFS = (ast.FunctionDef, ast.ClassDef)


# --- counting --------------------------------------------------------------------------------------------------------
def parsed(thing):
    "Source and syntax tree of a function, a class, or a code object"
    source = textwrap.dedent(inspect.getsource(thing))
    return source, ast.parse(source).body[0]


def docstring_of(node):
    first = node.body[0]
    return first if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str) else None


def code_lines(thing, header=True):
    "Lines of code; `header=False`: of the body alone"
    source, tree = parsed(thing)
    lines, quiet, headers = set(), set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, DEFS) and (doc := docstring_of(node)):
            quiet |= set(range(doc.lineno, doc.end_lineno + 1))
        if isinstance(node, ast.FunctionDef):
            quiet |= set(range(node.lineno, node.body[0].lineno))
            signature = ast.unparse(ast.FunctionDef(node.name, node.args, [ast.Pass()], [], node.returns, lineno=0)).splitlines()[0]
            headers += math.ceil(len(signature) / 120) if header or node is not tree else 0
    return len(lines - quiet) + headers


def test_the_count_is_right():
    def sample(
        a,  # a parameter

        b=1,  # another
    ):
        "A docstring"
        # a comment

        def inner(x):
            """Two lines
            of words"""
            return (x +
                    b)
        return inner(a)  # one line
    assert code_lines(sample) == 5 and code_lines(sample, header=False) == 4

    class Sample:
        "A docstring"
        field = 3  # one line

        def method(self):
            return "text # no comment"
    assert code_lines(Sample) == 4

    def long(first_of_the_parameters=1, second_of_the_parameters=2, third_of_the_parameters=3, fourth_of_the_parameters=4, fifth=5):
        return 1
    assert code_lines(long) == 3


# --- learners --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", learners())
def test_a_learners_body_has_at_most_forty_lines(name):
    assert code_lines(learners()[name], header=False) <= 40


def test_there_are_learners():
    assert {"DDPGLearner", "TD3Learner", "SACLearner"} <= set(learners())


def defined_in(module):
    return {name: thing for name, thing in vars(module).items() if (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__ == module.__name__}


def test_td3_adds_at_most_sixty_lines():
    "The smoothed loss, the agent and the learner: all that the module has but the builder of plain settings, and the kernel below"
    parts = [SmoothedCriticLossProcessor, TD3Agent, TD3Learner]
    assert {p.__name__ for p in parts} == set(defined_in(td3_module)) - {td3.__name__}
    assert sum(map(code_lines, [*parts, policy_gradient.smoothed_action])) <= 60


def test_sac_adds_at_most_a_hundred_and_twenty_lines():
    "The agent, the learner, the three losses, and what only they use below; the squashed policy counts with the update, further down"
    assert set(defined_in(sac_module)) - {sac.__name__} == {"SACAgent", "SACLearner"}
    parts = [SACAgent, SACLearner, entropy.SoftCriticLossProcessor, entropy.SoftActorLossProcessor, entropy.TemperatureLossProcessor,
             Temperature, policy_gradient.soft_policy_loss, policy_gradient.temperature_loss]
    assert sum(map(code_lines, parts)) <= 120


# --- one update ------------------------------------------------------------------------------------------------------
def called_in_an_update(learner):
    "Code objects of the package that run from the sampled batch to the new parameters; what only records (`loggers`) is left out"
    called, sampled = {}, False

    def watch(frame, event, arg):
        nonlocal sampled
        code = frame.f_code
        sampled = sampled or code is ReplaySampler.forward.__code__
        if event == "call" and sampled and frame.f_globals["__name__"].startswith("fastrl_pipes.") and not frame.f_globals["__name__"].startswith("fastrl_pipes.loggers."):
            called[code] = code.co_qualname
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        learner.next()
    finally:
        sys.setprofile(before)
    # lambdas and the like count with the function that they stand in; what a dataclass writes for itself, nobody reads
    return {code: name for code, name in called.items() if "<" not in code.co_name + code.co_filename and name != "LearnerHead.next"}


ON_THE_PATH = ["ReplaySampler.forward", "Fan.next", "Stage.next", "LossProcessor.forward", "TDLossProcessor.loss", "TDLossProcessor.bootstrap", "SoftCriticLossProcessor.target",
               "SoftActorLossProcessor.loss", "TemperatureLossProcessor.loss", "Draws.normal", "call_policy", "call_model", "GaussianActor.forward", "squashed_sample",
               "Critics.forward", "BatchedLinear.forward", "Temperature.forward", "least", "td_target", "td_loss", "soft_policy_loss", "temperature_loss",
               "SampledStep.of", "BasicOptStepper.forward", "SoftTargetUpdater.forward", "polyak_step"]


def test_one_sac_update_can_be_followed_in_350_lines():
    "What runs, found by watching it run; the stack itself; how the batch is cut out of the replay's rows; and of what layers the networks are"
    learner = sac(hidden1=8, hidden2=8, bs=8, warmup=10)
    for _ in range(3):
        next(learner)
    called = called_in_an_update(learner)
    assert set(ON_THE_PATH) <= set(called.values()), "otherwise the watch has missed it"
    around = [SACLearner, ReplaySampler._prepare, RowLayout.unpack, GaussianActor.__init__, Critics.__init__, BatchedLinear.__init__, Temperature.__init__]
    counted = {name: code_lines(code) for code, name in called.items()} | {thing.__qualname__: code_lines(thing) for thing in around}
    assert len(counted) == len(called) + len(around)
    total = sum(counted.values())
    assert 200 < total <= 350, f"{total} lines: {sorted(counted.items(), key=lambda c: -c[1])}"


def test_the_watch_sees_what_a_stage_in_between_adds():
    "A stage of the package put behind the replay is counted, one before it is not: that is acting"
    from fastrl_pipes.agents.core import ActionClip
    learner = sac(hidden1=8, hidden2=8, bs=8, warmup=10)
    opt = next(p for p in traverse(learner) if p.name == "critic_opt")
    opt.stand_on(ActionClip(opt.source))
    for _ in range(3):
        next(learner)
    learner.start()
    names = set(called_in_an_update(learner).values())
    assert "ActionClip.forward" in names and not {"GymStepper.next", "AgentHead.act"} & names
