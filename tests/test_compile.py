"""`learner.compile()`: the same parameters as without, for every learner of the package; to the bit when resumed; and what does not compile says so."""
import copy
import json
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from equality import TOLERANCE, UPDATES, A, S, critics, nothing_to_do, on_tape, tape_of

from fastrl_pipes.agents.bc import BCLearner
from fastrl_pipes.agents.ddpg import DDPGAgent, DDPGLearner
from fastrl_pipes.agents.hddpg import HDDPGAgent, HDDPGLearner
from fastrl_pipes.agents.iql import IQLAgent, IQLLearner
from fastrl_pipes.agents.sac import SACAgent, SACLearner, sac
from fastrl_pipes.agents.sacv import SACVAgent, SACVLearner
from fastrl_pipes.agents.td3 import TD3Agent, TD3Learner, td3
from fastrl_pipes.cli import main
from fastrl_pipes.core import SimpleStep, leaves
from fastrl_pipes.agents.core import SimpleModelRunner
from fastrl_pipes.learner.head import LearnerHead
from fastrl_pipes.learner.optimizers import BasicOptStepper, DirectStep, has_direct_step
from fastrl_pipes.learner.registry import algorithm_names, get_algorithm
from fastrl_pipes.learner.resume import load_run
from fastrl_pipes.networks.actor_critic import Actor, Critic
from fastrl_pipes.networks.ensemble import Critics, Value
from fastrl_pipes.networks.policies import GaussianActor
from fastrl_pipes.pipes.compiled import _DECOMPOSED, CompiledCall, _narrow_products, _unboxed
from fastrl_pipes.pipes.products import by_onednn, has_onednn
from fastrl_pipes.pipes.walk import snapshot
from fastrl_pipes.pipes.draws import Draws
from fastrl_pipes.pipes.graph import find_pipe, find_pipes
from fastrl_pipes.processors.core import LossProcessor
from fastrl_pipes.processors.entropy import SoftCriticLossProcessor
from fastrl_pipes.processors.td import TDLossProcessor

HIDDEN = (24, 16)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself


# --- learners on a tape ----------------------------------------------------------------------------------------------
def policy(dtype, **more):
    return GaussianActor(S, A, HIDDEN, **more).to(dtype)


def ddpg_on(dtype, kind=DDPGLearner, agent=DDPGAgent, **more):
    actor = Actor(S, A, *HIDDEN, batch_norm=more.pop("batch_norm", False)).to(dtype)
    critic = Critic(S, A, *HIDDEN).to(dtype)
    return kind(actor, critic, nothing_to_do(agent(actor)), logger_bases=[], bs=16, **more)


def td3_on(dtype, **more):
    actor = Actor(S, A, *HIDDEN).to(dtype)
    return TD3Learner(actor, critics(dtype, 2), nothing_to_do(TD3Agent(actor)), [], **more)


def sac_on(dtype, k=2, **more):
    actor = policy(dtype)
    return SACLearner(actor, critics(dtype, k), nothing_to_do(SACAgent(actor)), logger_bases=[], **more)


def sacv_on(dtype, **more):
    actor = policy(dtype)
    return SACVLearner(actor, critics(dtype, 2), Value(S, HIDDEN).to(dtype), nothing_to_do(SACVAgent(actor)), logger_bases=[], **more)


def iql_on(dtype, **more):
    actor = policy(dtype, squash=False, log_std_bounds=(-5.0, 2.0), free_std=True)
    return IQLLearner(actor, Critics(S, A, 2, HIDDEN).to(dtype), Value(S, HIDDEN).to(dtype), nothing_to_do(IQLAgent(actor)), [], **more)


def bc_on(dtype, gaussian=True):
    actor = policy(dtype, squash=False, log_std_bounds=(-5.0, 2.0), free_std=True) if gaussian else Actor(S, A, *HIDDEN).to(dtype)
    return BCLearner(actor, (tape_of(dtype, 1), nothing_to_do(IQLAgent(actor) if gaussian else DDPGAgent(actor))), [])


LEARNERS = {
    "ddpg": ddpg_on,
    "ddpg, batch norm": partial(ddpg_on, batch_norm=True, actor_opt=partial(torch.optim.Adam, eps=1e-3), critic_opt=partial(torch.optim.Adam, eps=1e-3)),
    "hddpg": partial(ddpg_on, kind=HDDPGLearner, agent=HDDPGAgent),
    "td3": td3_on,
    "sac": sac_on,
    "sac, fixed temperature, three critics": partial(sac_on, k=3, alpha=0.2),
    "sacv": sacv_on,
    "iql": iql_on,
    "iql, joint, signals": partial(iql_on, joint=True, signals=True),
    "bc": bc_on,
    "bc, deterministic": partial(bc_on, gaussian=False),
}


def learned(kind, dtype, compiled, updates, weighted=False, **options):
    torch.manual_seed(3)
    learner = LEARNERS[kind](dtype)
    on_tape(learner, lambda p: isinstance(p, LossProcessor) and p is find_pipes(learner, LossProcessor)[0], tape_of(dtype, updates, weighted=weighted))
    if compiled:
        learner.compile(**options)
    learner.start()
    for _ in range(updates):
        learner.next()
    return learner


def state_of(learner):
    state = snapshot(learner)
    return {path: x for path, x in leaves(state["modules"])}


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys() and len(found) > 8
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def tolerance(kind, dtype):
    "A bias in front of batch norm has no gradient but rounding, which Adam would blow up: hence its epsilon above, and here an absolute allowance for what is left"
    return {**TOLERANCE[dtype], "atol": 1e-11} if "batch norm" in kind and dtype is torch.float64 else TOLERANCE[dtype]


def test_every_algorithm_is_there():
    ours = {name for name in algorithm_names() if get_algorithm(name).build.__module__.startswith("fastrl_pipes.")}
    assert ours == {name.split(",")[0] for name in LEARNERS}


def both(kind, dtype, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stays eager.*")
        compiled = learned(kind, dtype, True, UPDATES[dtype], **options)
    losses = find_pipes(compiled, LossProcessor)
    assert losses and all(p._compiled is not None and p._compiled.seconds > 0 for p in losses), "nothing was compiled"
    assert all(has_direct_step(p.opt) for p in find_pipes(compiled, BasicOptStepper)), "an optimizer steps as before"
    return state_of(compiled), state_of(learned(kind, dtype, False, UPDATES[dtype]))


@pytest.mark.parametrize("dtype", UPDATES, ids=str)
@pytest.mark.parametrize("kind", LEARNERS)
def test_the_graphs_learn_what_eager_learns(kind, dtype):
    "The graphs as they are traced, without the compiler's code, which takes long to make"
    found, expected = both(kind, dtype, backend="eager")
    assert_close(found, expected, **tolerance(kind, dtype))


@pytest.mark.parametrize("dtype, kind", [(torch.float64, "sac"), (torch.float32, "td3"), *(pytest.param(d, k, marks=pytest.mark.slow) for k in LEARNERS for d in UPDATES)], ids=str)
def test_compiled_learns_what_eager_learns(kind, dtype):
    found, expected = both(kind, dtype)
    assert_close(found, expected, **tolerance(kind, dtype))


@pytest.mark.parametrize("kind", ["ddpg", "td3", "sac"])
def test_weighted_samples(kind):
    "Importance weights count, and errors are told to a prioritised replay"
    told = {}
    for compiled in (True, False):
        torch.manual_seed(3)
        learner = LEARNERS[kind](torch.float64)
        on_tape(learner, find_pipes(learner, LossProcessor)[0].__class__, tape_of(torch.float64, 20, weighted=True))
        learner.context.priorities = lambda index, error, key=compiled: told.setdefault(key, []).append(error.clone())
        if compiled:
            learner.compile(backend="eager")
        learner.start()
        for _ in range(20):
            learner.next()
    assert len(told[True]) == 20
    torch.testing.assert_close(torch.stack(told[True]), torch.stack(told[False]), rtol=1e-9, atol=1e-12)


# --- acting ----------------------------------------------------------------------------------------------------------
SMALL = dict(hidden1=24, hidden2=16, bs=16, warmup=40, max_sz=300, seed=2)


@pytest.mark.parametrize("build", [sac, td3])
@pytest.mark.parametrize("n", [1, 3])
def test_a_compiled_chain_acts_as_before(build, n):
    states, actions = torch.randn(20, n, 3, generator=torch.Generator().manual_seed(0)).numpy(), []
    for compiled in (False, True):
        learner = build("Pendulum-v1", n=n, mode="sync", **SMALL)
        if compiled:
            learner.compile(backend="eager")
        learner.start()
        actions.append(torch.stack([torch.from_numpy(learner.agent.act(SimpleStep(state=s, step_n=np.ones((n, 1), np.int64))).action.copy()) for s in states]))
        runner = find_pipe(learner.agent, lambda p: isinstance(p, SimpleModelRunner))
        assert (runner._compiled is not None and runner._compiled.seconds > 0) == compiled
    torch.testing.assert_close(*actions, rtol=1e-4, atol=1e-6)
    assert actions[0].shape == (20, n, 1) and actions[0].std() > 0.01


def test_a_whole_run_is_as_before():
    "Twenty updates of a whole stack on Pendulum; its replay holds the same transitions up to rounding"
    states = []
    for compiled in (False, True):
        learner = sac("Pendulum-v1", **SMALL)
        if compiled:
            learner.compile(backend="eager")
        learner.start()
        for _ in range(20):
            learner.next()
        states.append(state_of(learner))
    assert_close(states[1], states[0], rtol=1e-3, atol=1e-4)


# --- resumed ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("sizes", "options"), [({}, {}), pytest.param(dict(hidden1=64, hidden2=64, bs=128, warmup=130), {"products": "onednn"}, marks=pytest.mark.skipif(not has_onednn(), reason="this PyTorch was built without oneDNN"))], ids=["small", "oneDNN"])
def test_a_compiled_run_resumes_compiled_to_the_bit(sizes, options, tmp_path, monkeypatch):
    went = []
    monkeypatch.setattr("fastrl_pipes.pipes.compiled.by_onednn", lambda graph, example: went.append(by_onednn(graph, example)) or went[-1])
    through = sac("Pendulum-v1", **SMALL | sizes).compile(**options)
    through.fit(env_steps=160)
    through.save(tmp_path)
    through.fit(env_steps=40)
    once = sum(went)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compiled.*")
        again = load_run(tmp_path)
    assert again.compiled and again.compile_options == options
    again.fit(env_steps=40)
    expected, found = state_of(through), state_of(again)
    assert found.keys() == expected.keys() and all(torch.equal(torch.as_tensor(found[k]), torch.as_tensor(expected[k])) for k in expected)
    assert again.compile_seconds.keys() == through.compile_seconds.keys() and len(again.compile_seconds) == 4
    assert sum(went) == 2 * once and (once > 0) == bool(options), "otherwise oneDNN had nothing to do"


def test_a_run_goes_on_with_what_it_was_compiled_with_but_runs_no_words_of_a_checkpoint(tmp_path):
    learner = sac("Pendulum-v1", **SMALL).compile(backend="eager", products="blas", **{"cpp.cxx": ("false",)})
    learner.fit(env_steps=60)
    learner.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["compile_options"] == {"backend": "eager", "products": "blas", "cpp.cxx": "('false',)"}
    with pytest.warns(UserWarning, match=r"was compiled with .*cpp\.cxx.* and is with \{'backend': 'eager', 'products': 'blas'\} now, which may change"):
        again = load_run(tmp_path)
    assert again.compile_options == {"backend": "eager", "products": "blas"}
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "compile_options": ["backend"]}))
    with pytest.warns(UserWarning, match=r"was compiled with \['backend'\]"):
        assert load_run(tmp_path).compile_options == {}


def test_a_run_with_onednn_goes_on_without_where_there_is_none(tmp_path, monkeypatch):
    if not has_onednn():
        pytest.skip("this PyTorch was built without oneDNN")
    learner = sac("Pendulum-v1", **SMALL).compile(backend="eager", products="onednn")
    learner.fit(env_steps=60)
    learner.save(tmp_path)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="was compiled with .*onednn.* and is with {'backend': 'eager'} now"):
        again = load_run(tmp_path)
    again.fit(env_steps=20)
    assert again.compiled


def test_an_option_that_nobody_has_is_refused_before_the_first_step():
    learner = sac("Pendulum-v1", **SMALL)
    with pytest.raises(LookupError, match=r"CompiledCall: field 'options' has 'prodcts', expected 'backend', 'products' or an option of torch's compiler; did you mean 'products'\?"):
        learner.compile(prodcts="onednn")
    assert not learner.compiled and learner.compile_options == {} and learner.recorder.env_steps == 0
    assert learner.compile(products="blas", cpp_wrapper=False).compile_options == {"products": "blas", "cpp_wrapper": False}


def test_the_command_line_compiles_and_goes_on_compiled(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CompiledCall.__init__, "__defaults__", (None, None, "eager", "auto"))  # no compiler: this is about the wiring
    run = ["train", "sac", "--env", "Pendulum-v1", "--preset", "none", "--hidden1", "8", "--hidden2", "8", "--bs", "8", "--warmup", "20", "--batches", "20", "--verdict-episodes", "1", "--out", str(tmp_path / "run")]
    assert main([*run, "--env-steps", "60", "--compile", "true"]) == 0
    assert "to compile." in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "checkpoint" / "manifest.json").read_text())["compiled"] is True
    assert load_run(tmp_path / "run" / "checkpoint").compiled
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compiled.*")
        assert main(["train", "--resume", str(tmp_path / "run"), "--env-steps", "90"]) == 0


def test_loading_into_a_learner_that_is_not_compiled_says_so(tmp_path):
    learner = sac("Pendulum-v1", **SMALL).compile(backend="eager")
    learner.fit(env_steps=60)
    learner.save(tmp_path)
    with pytest.warns(UserWarning, match="the run was compiled and is not now"):
        sac("Pendulum-v1", **SMALL).load(tmp_path)


# --- what does not compile -------------------------------------------------------------------------------------------
class Looks(TDLossProcessor):
    "Asks what is in a tensor, which no graph can"
    NETWORKS = ("critic",)

    def target(self, batch):
        return batch.reward if float(batch.reward.sum()) > 1e9 else batch.reward * 0.5


def looking(compiled):
    torch.manual_seed(0)
    critic = Critics(S, A, 2, HIDDEN).double()
    pipe = BasicOptStepper(Looks(tape_of(torch.float64, 10), critic, name="looks"), critic, 1e-3, filter=True)
    learner = LearnerHead(pipe)
    return learner.compile() if compiled else learner


def test_what_does_not_compile_warns_once_by_name_and_goes_on():
    eager, compiled = looking(False), looking(True)
    with pytest.warns(UserWarning) as said:
        for head in (eager, compiled):
            head.start()
            for _ in range(10):
                head.next()
    stays = [str(w.message) for w in said if "stays eager" in str(w.message)]
    assert len(stays) == 1 and stays[0].startswith("looks: does not compile and stays eager (")
    a, b = state_of(eager), state_of(compiled)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0.0)


class LooksAtNoise(Draws, Looks):
    "Draws, and then asks what is in it"

    def target(self, batch):
        return batch.reward + (self.normal(batch.reward) if float(batch.reward.sum()) > 1e9 else 0.0) + self.normal(batch.reward)


def test_what_does_not_compile_draws_what_it_would_have_drawn():
    states = []
    for compiled in (False, True):
        torch.manual_seed(0)
        critic = Critics(S, A, 2, HIDDEN).double()
        pipe = BasicOptStepper(LooksAtNoise(tape_of(torch.float64, 10), critic), critic, 1e-3, filter=True)
        learner = LearnerHead(pipe)
        learner.context.seed = 5
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if compiled:
                learner.compile()
            learner.start()
            for _ in range(10):
                learner.next()
        assert pipe.source._compiled is None
        states.append(state_of(learner))
    torch.testing.assert_close(states[1], states[0], rtol=1e-12, atol=0.0)


def test_an_optimizer_without_a_direct_step_warns_by_name():
    actor = Actor(S, A, *HIDDEN)
    learner = TD3Learner(actor, critics(torch.float32, 2), nothing_to_do(TD3Agent(actor)), [], critic_opt=torch.optim.SGD)
    with pytest.warns(UserWarning, match="critic_opt: SGD steps as before"):
        learner.compile()


def test_another_width_of_batch_is_another_graph():
    torch.manual_seed(0)
    learner = LEARNERS["sac"](torch.float64)
    tape = tape_of(torch.float64, 4)
    on_tape(learner, SoftCriticLossProcessor, [tape[0], tape[1].map(lambda x: x[:5]), tape[2]])
    learner.compile(backend="eager").start()
    for _ in range(3):
        learner.next()
    assert len(find_pipe(learner, SoftCriticLossProcessor)._compiled._graphs) == 2


# --- what is done to a graph before it is compiled, and how it is called ------------------------------------------------
SHAPES = [((5, 7), (7, 3)), ((5, 1), (1, 7)), ((5, 7), (7, 1)), ((1, 7), (7, 1)), ((1, 7), (7, 5)), ((1, 1), (1, 1)), ((2, 5, 7), (2, 7, 3)), ((2, 5, 1), (2, 1, 7)), ((2, 5, 7), (2, 7, 1)), ((2, 1, 7), (2, 7, 5))]


@pytest.mark.parametrize(("left", "right"), SHAPES, ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["as it is", "turned"])
def test_a_product_that_is_taken_apart_is_the_same_product(left, right, turned):
    from torch.fx.experimental.proxy_tensor import make_fx
    x, w = torch.randn(left, dtype=torch.float64), torch.randn(right, dtype=torch.float64)
    x = x.mT.contiguous().mT if turned else x
    graph = make_fx(lambda x, w: x @ w, decomposition_table=_DECOMPOSED)(x, w)
    torch.testing.assert_close(graph(x, w), x @ w, rtol=1e-12, atol=1e-12)
    left_to_the_library = any(n.target in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) for n in graph.graph.nodes)
    assert left_to_the_library == (left[-1] > 1 and (right[-1] > 1 or left[-2] == 1)), "vectors are loops"


def test_a_narrow_gradient_of_a_weight_is_contiguous_all_the_same():
    from torch.fx.experimental.proxy_tensor import make_fx
    g, x = torch.randn(64, 40, dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64)
    graph = make_fx(lambda g, x: g.mT @ x, decomposition_table=_DECOMPOSED)(g, x)
    assert any(n.target is torch.ops.aten.clone.default for n in graph.graph.nodes), "otherwise the rule was not used"
    assert graph(g, x).is_contiguous()
    torch.testing.assert_close(graph(g, x), g.mT @ x, rtol=1e-12, atol=1e-12)


CUTS = {
    "columns": (lambda x, w: torch.mm(x[0], w[0])[:, 1:3], 2), "from the second on": (lambda x, w: torch.mm(x[0], w[0])[:, 1:], 3), "of a sum of replicas": (lambda x, w: torch.bmm(x, w).sum(0, keepdim=True).view(5, 4)[:, 2:], 2),
    "rows": (lambda x, w: torch.mm(x[0], w[0])[1:3], 4), "a sum over columns": (lambda x, w: torch.bmm(x, w).sum(2)[:, 1:3], 4), "twice": (lambda x, w: (lambda y: y[:, 1:3] + y[:, :2])(torch.mm(x[0], w[0])), 4),
    "of a sum that is wanted whole too": (lambda x, w: (lambda y: y[:, 1:3] + y.sum())(torch.bmm(x, w).sum(0)), 4),
    "another shape": (lambda x, w: torch.mm(x[0], w[0]).view(10, 2)[:, 1:], 4), "all": (lambda x, w: torch.mm(x[0], w[0])[:], 4),
}


@pytest.mark.parametrize(("fn", "width"), CUTS.values(), ids=CUTS)
def test_columns_that_nobody_uses_are_not_made_and_all_others_are(fn, width):
    from torch.fx.experimental.proxy_tensor import make_fx
    x, w = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 7, 4, dtype=torch.float64)
    graph = make_fx(fn)(x, w)
    _narrow_products(graph.graph)
    graph.recompile()
    torch.testing.assert_close(graph(x, w), fn(x, w), rtol=1e-12, atol=0)
    widths = []

    class Look(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            out = super().call_function(target, args, kwargs)
            if target in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                widths.append(out.shape[-1])
            return out
    Look(graph).run(x, w)
    assert widths == [width]


def test_the_inside_of_what_the_compiler_makes_is_called():
    net = torch.nn.Linear(3, 2)
    call = CompiledCall(lambda x: (net(x) ** 2).mean(), {"net": net}, net)
    x = torch.randn(4, 3)
    grads, loss = call(x)
    (graph,) = call._graphs.values()
    assert "_unboxed" not in graph.call.__qualname__, "the layers around it are back, which costs some 3% of an update"
    torch.testing.assert_close((grads, loss), ([*torch.autograd.grad((net(x) ** 2).mean(), list(net.parameters()))], (net(x) ** 2).mean().detach()))
    again = call(x)
    assert torch.equal(again[1], loss) and again[1].data_ptr() != loss.data_ptr()


def test_a_graph_is_for_a_mode_and_a_width_whichever_came_before():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2, track_running_stats=False), torch.nn.Dropout(0.0))
    call, x = CompiledCall(lambda x: net(x) + net.training, {"net": net}, backend="eager"), torch.randn(4, 3)
    for mode, rows, graphs in ((True, x, 1), (True, x, 1), (False, x, 2), (True, x, 2), (True, torch.randn(5, 3), 3), (True, torch.randn(4, 3), 3), (True, x, 3)):
        net.train(mode)
        torch.testing.assert_close(call(rows), net(rows).detach() + mode)
        assert len(call._graphs) == graphs


def test_a_direct_step_takes_each_gradient_to_its_parameter():
    one, two = (torch.nn.Linear(3, 2, dtype=torch.float64) for _ in range(2))
    two.load_state_dict(one.state_dict())
    groups = [{"params": [one.bias], "lr": 0.1}, {"params": [one.weight], "lr": 0.01}]  # not the order of the gradients
    plain, opt, direct = torch.optim.Adam([{"params": [two.bias], "lr": 0.1}, {"params": [two.weight], "lr": 0.01}]), torch.optim.Adam(groups, fused=True), DirectStep([one.weight, one.bias])
    for i in range(4):
        grads = [torch.randn_like(one.weight), torch.randn_like(one.bias)]
        (one.weight.grad, one.bias.grad), (two.weight.grad, two.bias.grad) = grads, grads
        plain.step()
        if not direct(opt, grads):
            assert i == 0
            opt.step()
    torch.testing.assert_close([*one.parameters()], [*two.parameters()], rtol=1e-12, atol=0)


def test_gradients_are_on_the_parameters_while_somebody_may_look():
    net, seen = torch.nn.Linear(2, 1), []
    pipe = BasicOptStepper([{"loss": net(torch.ones(1, 2)).sum(), "model": net} for _ in range(5)], net, 0.1)
    assert next(pipe) and next(pipe) and net.weight.grad is None
    handle = pipe.opt.register_step_pre_hook(lambda *_: seen.append(net.weight.grad.clone()))
    assert next(pipe) and torch.equal(seen[0], torch.ones(1, 2)) and net.weight.grad is None
    handle.remove()
    assert next(pipe) and len(seen) == 1 and pipe.opt.state[net.weight]["step"] == 4


def test_gradients_that_add_up_are_stepped_by_the_kernel_as_torch_steps_them():
    torch.manual_seed(0)
    one = torch.nn.Linear(2, 1, dtype=torch.float64)
    two, calls = copy.deepcopy(one), []
    rows = torch.randn(5, 3, 2, dtype=torch.float64)
    pipe = BasicOptStepper(({"loss": one(x).pow(2).sum(), "model": one} for x in rows), one, 0.1, do_zero_grad=False)
    direct, opt = pipe._direct, torch.optim.Adam(two.parameters(), lr=0.1)
    pipe._direct = lambda *args: calls.append(direct(*args)) or calls[-1]
    for x in rows:
        two(x).pow(2).sum().backward()
        opt.step()
        assert next(pipe)["stepped"]
    torch.testing.assert_close([one.weight, one.bias, one.weight.grad], [two.weight, two.bias, two.weight.grad], rtol=1e-12, atol=0)
    assert calls == [False, True, True, True, True]


def test_cpp_calls_what_a_loss_is_made_of_and_python_a_policy(monkeypatch):
    net, x, asked = torch.nn.Linear(3, 1), torch.randn(4, 3), []
    monkeypatch.setattr("fastrl_pipes.pipes.compiled._compiled", lambda graph, example, options: asked.append(options["cpp_wrapper"]) or _unboxed(graph))
    for stepped, options in ((net, {}), (None, {}), (net, {"cpp_wrapper": False}), (None, {"cpp_wrapper": True})):
        CompiledCall(lambda x: net(x).pow(2).sum(), {"net": net}, stepped, **options)(x)
    assert asked == [True, False, False, True]


def test_a_direct_step_notices_that_the_state_is_another():
    net = torch.nn.Linear(2, 2)
    params = list(net.parameters())
    opt, direct = torch.optim.Adam(net.parameters(), fused=True), DirectStep(params)

    def step():
        done = direct(opt, [torch.ones_like(p) for p in params])
        if not done:
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step()
        return done
    assert [step() for _ in range(3)] == [False, True, True]
    assert all(s["step"] == 3 for s in opt.state.values())
    opt.state.clear()
    assert [step() for _ in range(2)] == [False, True] and all(s["step"] == 2 for s in opt.state.values())
    more = torch.nn.Parameter(torch.zeros(2))
    opt.add_param_group({"params": [more]})
    more.grad = torch.ones(2)
    assert [step() for _ in range(2)] == [False, False], "nobody gave a gradient for it"
    opt.state.pop(more)
    params.append(more)
    assert [step() for _ in range(2)] == [False, True] and opt.state[more]["step"] == 2 and opt.state[net.weight]["step"] == 6
    assert more.abs().min() > 0
    opt.load_state_dict(opt.state_dict())
    assert step() and opt.state[net.weight]["step"] == 7
