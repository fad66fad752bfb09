"Who makes the matrix products of a compiled graph"

from functools import partial

import pytest
import test_compile
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastrl_pipes.pipes import products
from fastrl_pipes.pipes.compiled import CompiledCall
from fastrl_pipes.pipes.products import asks_onednn, by_onednn, has_onednn, mkl_holds_back, product

aten = torch.ops.aten
needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this PyTorch was built without oneDNN")

# (what, shapes of x and weight, what is done with them)
LAYOUTS = {
    "as they lie": ((96, 80), (80, 112), lambda x, w: x @ w),
    "a layer's weight": ((96, 80), (112, 80), lambda x, w: x @ w.mT),
    "a weight's gradient": ((80, 96), (80, 112), lambda x, w: x.mT @ w),
    "both turned": ((80, 96), (112, 80), lambda x, w: x.mT @ w.mT),
    "every other column": ((96, 160), (80, 224), lambda x, w: x[:, ::2] @ w[:, ::2]),
    "a stack": ((2, 96, 80), (2, 80, 112), lambda x, w: torch.bmm(x, w)),
    "a stack's gradient": ((3, 80, 96), (3, 80, 112), lambda x, w: torch.bmm(x.mT, w)),
    "one for all of a stack": ((96, 80), (2, 80, 112), lambda x, w: torch.bmm(x.expand(2, 96, 80), w)),
    "what others are made of": ((96, 80), (80, 112), lambda x, w: (x.relu() @ (2 * w)).relu() + 1),
}


def operands(shapes, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]


def targets(graph):
    return [n.target for n in graph.graph.nodes]


@needs_onednn
@pytest.mark.parametrize(("x", "w", "fn"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("compiled", [False, True], ids=["traced", "compiled"])
def test_it_is_the_same_product_however_the_two_lie_in_memory(x, w, fn, compiled, monkeypatch):
    x, w = operands((x, w))
    exact = fn(x.double(), w.double())
    if compiled:
        from torch._inductor import lowering, mkldnn_ir
        assert aten.mm.default in lowering.lowerings
        made = []
        monkeypatch.setattr(mkldnn_ir, "_create_output_node", lambda node, _of=mkldnn_ir._create_output_node: made.append(node) or _of(node))
        call = CompiledCall(fn, {}, products="onednn", fx_graph_cache=False)
        assert call.onednn
        found = call(x, w)
        assert len(made) == (x.shape[0] if x.ndim == 3 else w.shape[0] if w.ndim == 3 else 1), "the compiler was not asked for oneDNN"
    else:
        graph = make_fx(fn)(x, w)
        assert by_onednn(graph, [x, w]) == 1 and product in targets(graph) and not {aten.mm.default, aten.bmm.default} & {*targets(graph)}
        found = graph(x, w)
    assert found.shape == exact.shape
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize(("m", "k", "n", "dtype", "goes"), [
    (100, 50, 100, torch.float32, 1), (100, 50, 99, torch.float32, 0), (8, 250, 250, torch.float32, 1), (7, 300, 300, torch.float32, 0), (300, 7, 300, torch.float32, 0), (300, 300, 7, torch.float32, 0),
    (100, 50, 100, torch.float64, 0), (100, 50, 100, torch.bfloat16, 0)])
def test_large_products_of_float32_go_and_no_others(m, k, n, dtype, goes):
    x, w = operands(((m, k), (k, n)), dtype)
    graph = make_fx(lambda x, w: x @ w)(x, w)
    assert by_onednn(graph, [x, w]) == goes == targets(graph).count(product)
    torch.testing.assert_close(graph(x, w), x @ w, rtol=1e-5, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize("options", [{}, {"cpp_wrapper": False}, {"backend": "eager"}], ids=["C++", "Python", "traced"])
def test_a_gradient_is_autograds(options):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(12, 96), torch.nn.ReLU(), torch.nn.Linear(96, 128), torch.nn.ReLU(), torch.nn.Linear(128, 2))
    x = torch.randn(64, 12)

    def loss(x):
        return net(x).pow(2).mean()
    call = CompiledCall(loss, {"net": net}, net, products="onednn", **options)
    grads, found = call(x)
    torch.testing.assert_close(found, loss(x).detach(), rtol=1e-5, atol=0)
    for g, e in zip(grads, torch.autograd.grad(loss(x), [*net.parameters()])):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)
    assert torch.equal(call(x)[0][2], grads[2]), "the same graph with the same numbers gives the same bits"


@needs_onednn
@pytest.mark.parametrize("kind", test_compile.LEARNERS)
def test_every_learner_learns_with_them_what_eager_learns(kind, monkeypatch):
    went = []
    monkeypatch.setattr("fastrl_pipes.pipes.compiled.by_onednn", lambda graph, example: went.append(by_onednn(graph, example, smallest=1, side=1)) or went[-1])
    found, expected = test_compile.both(kind, torch.float32, backend="eager", products="onednn")
    assert sum(went) > 4
    test_compile.assert_close(found, expected, **test_compile.tolerance(kind, torch.float32))


@needs_onednn
@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "td3" else pytest.mark.slow) for k in test_compile.LEARNERS])
def test_compiled_with_them_it_learns_what_eager_learns(kind, monkeypatch):
    monkeypatch.setattr("fastrl_pipes.pipes.compiled.by_onednn", partial(by_onednn, smallest=1, side=1))
    found, expected = test_compile.both(kind, torch.float32, products="onednn")
    test_compile.assert_close(found, expected, **test_compile.tolerance(kind, torch.float32))


# --- who is asked ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("vendor", "capability", "mkl", "onednn", "expected"), [
    ("AuthenticAMD", "AVX512", True, True, True), ("GenuineIntel", "AVX512", True, True, False), ("AuthenticAMD", "AVX2", True, True, False), ("AuthenticAMD", "AVX512", False, True, False), ("AuthenticAMD", "AVX512", True, False, False),
    ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", "AVX512", True, True, True), ("", "AVX512", True, True, False)])
def test_auto_is_about_the_processor(vendor, capability, mkl, onednn, expected, monkeypatch):
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    mkl_holds_back.cache_clear()
    try:
        assert mkl_holds_back() is expected
        assert asks_onednn("x", "auto") is expected and not asks_onednn("x", "blas")
        assert CompiledCall(torch.sin, {}).onednn is expected
    finally:
        mkl_holds_back.cache_clear()


@pytest.mark.parametrize(("text", "expected"), [("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\n", "AuthenticAMD"), ("processor\t: 0\nCPU implementer\t: 0x41\n", "words"), (None, "words")])
def test_the_processor_says_who_made_it(text, expected, monkeypatch):
    def read(*_, **__):
        if text is None:
            raise FileNotFoundError
        return text
    monkeypatch.setattr(products.Path, "read_text", read)
    monkeypatch.setattr(products.platform, "processor", lambda: "words")
    assert products._vendor() == expected


def test_another_word_is_refused(monkeypatch):
    with pytest.raises(LookupError, match="CompiledCall: field 'products' is 'onednnn', expected one of .*onednn"):
        CompiledCall(torch.sin, {}, products="onednnn")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="CompiledCall: field 'products' is 'onednn', and this PyTorch was built without it, expected 'auto' or 'blas'"):
        CompiledCall(torch.sin, {}, products="onednn")
