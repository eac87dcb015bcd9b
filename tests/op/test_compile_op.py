"""torch.compile over the operator itself: one graph, forward and backward, for any length."""

import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_inductor_cache

from simplex_ops import reference
from simplex_ops.rules import cache_key
from simplex_ops.testing import assert_within_budget

NAMES = ("q", "k1", "k2", "v1", "v2")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def problem(seq, keys=None, device="cpu", dtype=torch.float32, heads=4, kv_heads=2):
    """Return q, k1, k2, v1, v2 with gradients, as transposed views of [batch, seq, heads, dim]."""
    generator = torch.Generator().manual_seed(seq)
    shapes = [(seq, heads, 16)] + [(keys or seq, kv_heads, d) for d in (16, 16, 8, 8)]
    return [
        torch.randn(2, *shape, generator=generator)
        .to(device, dtype)
        .transpose(1, 2)
        .requires_grad_()
        for shape in shapes
    ]


def graded(run, inputs, *args, **options):
    """Return out, lse and the five gradients of a loss on both."""
    out, lse = run(*inputs, *args, **options)
    wide = out.to(lse.dtype)
    loss = (wide * wide.cos()).sum() + lse.sin().sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs)


def assert_same(got, expected, **tolerance):
    for name, a, b in zip(("out", "lse", *NAMES), got, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}", **tolerance)
        assert a.stride() == b.stride() or a.numel() == 0, name


def around(*inputs, attn=torch.ops.simplex.attn, **options):
    """Call the operator between other operations, for the compiler to fuse around it."""
    q, *rest = inputs
    out, lse = attn(q * 1.5, *rest, **options)
    return out.sigmoid(), lse + 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_serves_several_lengths(backend, device):
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(around, backend=counter, fullgraph=True, dynamic=True)
    for seq in (24, 7, 33):
        inputs = problem(seq, device=device)
        assert_same(graded(run, inputs, 9, 4), graded(around, inputs, 9, 4))
    assert counter.frame_count == 1


@pytest.mark.parametrize("is_causal", [True, False])
def test_one_graph_serves_several_windows(is_causal):
    counter = CompileCounterWithBackend("aot_eager")

    def windowed(inputs, extra):
        w1, w2 = extra.shape
        return around(*inputs, w1, w2, is_causal=is_causal)

    run = torch.compile(windowed, backend=counter, fullgraph=True, dynamic=True)
    for w1, w2 in ((9, 5), (3, 7), (50, 6)):  # no two sizes alike: those become one symbol
        inputs, extra = problem(12), torch.empty(w1, w2)
        got = graded(lambda *i, extra=extra: run(i, extra), inputs)
        assert_same(got, graded(around, inputs, w1, w2, is_causal=is_causal))
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", ["trilinear", "determinant", "strassen"])
def test_every_argument_reaches_the_compiled_operator(form):
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(around, backend=counter, fullgraph=True, dynamic=True)
    compiled_once = None  # Dynamo starts over within the first call, to make floats constants
    for seq, keys in ((5, 20), (8, 31)):
        inputs = problem(seq, keys)
        bounds = torch.tensor([2, keys - 1], dtype=torch.int32).expand(2, seq, 2).contiguous()
        options = {
            "scale": 0.3,
            "form": form,
            "k2_bias": 0.5,
            "v2_bias": -0.5,
            "kv_bounds": bounds,
            "q_start": torch.tensor([3, keys - seq], dtype=torch.int32),
        }
        plain = graded(around, inputs, 6, None)
        expected = graded(around, inputs, 6, None, **options)
        assert not torch.allclose(plain[0], expected[0])
        assert_same(graded(run, inputs, 6, None, **options), expected)
        compiled_once = compiled_once or counter.frame_count
        assert counter.frame_count == compiled_once


@pytest.mark.parametrize("wanted", [("q",), ("k2", "v1"), ("v2",)])
def test_only_wanted_gradients_are_asked_of_the_compiled_backward(wanted):
    run = torch.compile(around, backend="aot_eager", fullgraph=True)
    results = []
    for function in (run, around):
        inputs = problem(12)
        for name, tensor in zip(NAMES, inputs, strict=True):
            tensor.requires_grad_(name in wanted)
        out, lse = function(*inputs, 5, 3)
        (out.square().sum() + lse.sum()).backward()
        results.append({n: t.grad for n, t in zip(NAMES, inputs, strict=True)})
    got, expected = results
    assert {n for n, grad in got.items() if grad is not None} == set(wanted)
    for name in wanted:
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiling_costs_no_accuracy(dtype, device):
    """Inductor fuses around the operator and rounds elsewhere: it may err as eager code does."""
    run = torch.compile(around, fullgraph=True, dynamic=True)
    for seq in (48, 30):
        inputs = problem(seq, device=device, dtype=dtype, kv_heads=1)
        doubles = [t.detach().double().requires_grad_() for t in inputs]
        exact = graded(around, doubles, 16, 8, attn=reference.attn)
        rounded = graded(around, inputs, 16, 8)
        for name, *judged in zip(
            ("out", "lse", *NAMES), graded(run, inputs, 16, 8), exact, rounded, strict=True
        ):
            assert_within_budget(name, *judged)


@pytest.mark.gpu
def test_a_gpu_replays_the_operator_in_cuda_graphs():
    run = torch.compile(around, fullgraph=True, mode="reduce-overhead")
    inputs = problem(128, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        got = [t.clone() for t in graded(run, inputs, 64, 8)]
        # Inductor keeps in float32 what eager code rounds to bfloat16 on the way.
        assert_same(got, graded(around, inputs, 64, 8), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"w1": 0}, ValueError, r"w1 must be at least 1"),
        ({"form": "bilinear"}, ValueError, r"form must be one of"),
        (
            {"k2": torch.zeros(2, 2, 12, 15)},
            ValueError,
            r"k2 must have k1's batch, heads and head_dim",
        ),
        ({"v1": torch.zeros(2, 2, 12, 8).double()}, TypeError, r"v1 must have the dtype of q"),
        ({"q_start": torch.zeros(3, dtype=torch.int32)}, ValueError, r"q_start must have shape"),
    ],
    ids=["window", "form", "shape", "dtype", "q_start"],
)
def test_bad_input_is_refused_in_compiled_code_by_the_eager_text(change, error, text):
    arguments = {**dict(zip(NAMES, problem(12), strict=True)), "w1": 5, "w2": 3, **change}

    def attn(**given):
        return torch.ops.simplex.attn(**given)

    with pytest.raises(error, match=text):
        attn(**arguments)
    with pytest.raises(Exception, match=text):
        torch.compile(attn, backend="aot_eager", fullgraph=True)(**arguments)


def test_the_caches_follow_the_sources(monkeypatch):
    """Fill Inductor's caches, then ask them as the same version does, and as others do."""
    inputs, found = problem(9), []

    def alone(*inputs, **options):  # nothing to fuse, no C++ to wait for
        return torch.ops.simplex.attn(*inputs, **options)

    def train() -> None:
        torch._dynamo.reset()
        counters.clear()
        with torch.compiler.config.patch(cache_key_tag=""):
            graded(torch.compile(alone, fullgraph=True), inputs, w1=5, w2=3)
        caches = counters["aot_autograd"]
        found.append((caches["autograd_cache_hit"], caches["autograd_cache_miss"]))

    with fresh_inductor_cache():
        for sources in ("these", "these", "others"):
            monkeypatch.setattr(cache_key, "sources", lambda s=sources: s)
            train()
        for sources in ("others", "yet others"):
            monkeypatch.setattr(cache_key, "sources", lambda s=sources: s)
            thread = threading.Thread(target=train)
            thread.start()
            thread.join()
    assert found == [(0, 1), (1, 0), (0, 1), (1, 0), (0, 1)]
