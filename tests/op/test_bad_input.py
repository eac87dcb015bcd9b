"""Every bad input by its text, in eager, fake and compiled code, before any work is done."""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import simplex_ops


@dataclass(frozen=True)
class Bad:
    """A call that is wrong in one thing, and what it raises."""

    error: type[Exception]
    text: str
    change: dict[str, Any] = field(default_factory=dict)


def _empty(*shape, dtype=torch.float32, device="cpu"):
    return torch.empty(shape, dtype=dtype, device=device)


def _int32(*shape):
    return torch.zeros(shape, dtype=torch.int32)


RANK = "must have 4 dimensions [batch, heads, seq, head_dim], got"
BAD = {
    "integer q": Bad(
        TypeError,
        "q must be float16, bfloat16, float32 or float64, got torch.int32",
        {"q": _int32(2, 6, 8, 16)},
    ),
    "complex v1": Bad(
        TypeError,
        "v1 must be float16, bfloat16, float32 or float64, got torch.complex64",
        {"v1": _empty(2, 2, 8, 16, dtype=torch.complex64)},
    ),
    "another dtype": Bad(
        TypeError,
        "k2 must have the dtype of q, torch.float32, got torch.bfloat16",
        {"k2": _empty(2, 2, 8, 16, dtype=torch.bfloat16)},
    ),
    "another device": Bad(
        RuntimeError,
        "v2 must be on the device of q, cpu, got meta",
        {"v2": _empty(2, 2, 8, 16, device="meta")},
    ),
    "kv_bounds on another device": Bad(
        RuntimeError,
        "kv_bounds must be on the device of q, cpu, got meta",
        {"kv_bounds": _empty(2, 8, 2, dtype=torch.int32, device="meta")},
    ),
    **{
        f"rank of {name}": Bad(
            ValueError, f"{name} {RANK} 3 of shape [2, 8, 16]", {name: _empty(2, 8, 16)}
        )
        for name in ("q", "k1", "k2", "v1", "v2")
    },
    "heads": Bad(
        ValueError,
        "q must have a multiple of k1's key-value heads, got 6 heads in q and 4 in k1",
        {name: _empty(2, 4, 8, 16) for name in ("k1", "k2", "v1", "v2")},
    ),
    "no kv heads": Bad(
        ValueError,
        "k1 must have at least 1 key-value head, got 0",
        {name: _empty(2, 0, 8, 16) for name in ("k1", "k2", "v1", "v2")},
    ),
    "no head_dim": Bad(
        ValueError, "q must have head_dim at least 1, got 0", {"q": _empty(2, 6, 8, 0)}
    ),
    "no value_dim": Bad(
        ValueError,
        "v1 must have head_dim at least 1, got 0",
        {"v1": _empty(2, 2, 8, 0), "v2": _empty(2, 2, 8, 0)},
    ),
    "batch of k1": Bad(
        ValueError,
        "k1 must have q's batch and head_dim [2, 16], got [3, 16]",
        {"k1": _empty(3, 2, 8, 16)},
    ),
    "head_dim of k1": Bad(
        ValueError,
        "k1 must have q's batch and head_dim [2, 16], got [2, 12]",
        {"k1": _empty(2, 2, 8, 12)},
    ),
    "keys of v1": Bad(
        ValueError,
        "v1 must have k1's batch, heads and length [2, 2, 8], got [2, 2, 9]",
        {"v1": _empty(2, 2, 9, 16)},
    ),
    "kv heads of k2": Bad(
        ValueError,
        "k2 must have k1's batch, heads and head_dim [2, 2, 16], got [2, 3, 16]",
        {"k2": _empty(2, 3, 8, 16)},
    ),
    "kv heads of k1": Bad(  # the one that is wrong may be either
        ValueError,
        "v1 must have k1's batch, heads and length [2, 3, 8], got [2, 2, 8]",
        {"k1": _empty(2, 3, 8, 16)},
    ),
    "keys of k1": Bad(
        ValueError,
        "v1 must have k1's batch, heads and length [2, 2, 9], got [2, 2, 8]",
        {"k1": _empty(2, 2, 9, 16)},
    ),
    "keys of v2": Bad(
        ValueError,
        "v2 must have k2's batch, heads and length [2, 2, 8], got [2, 2, 7]",
        {"v2": _empty(2, 2, 7, 16)},
    ),
    "head_dim of q": Bad(
        ValueError,
        "k1 must have q's batch and head_dim [2, 20], got [2, 16]",
        {"q": _empty(2, 6, 8, 20)},
    ),
    "value_dim of v2": Bad(
        ValueError,
        "v2 must have v1's head_dim [16], got [20]",
        {"v2": _empty(2, 2, 8, 20)},
    ),
    "w1 of zero": Bad(
        ValueError, "w1 must be at least 1 (a window counts the query itself), got 0", {"w1": 0}
    ),
    "negative w2": Bad(
        ValueError, "w2 must be at least 1 (a window counts the query itself), got -3", {"w2": -3}
    ),
    "form": Bad(
        ValueError,
        "form must be one of ('trilinear', 'determinant', 'strassen'), got 'bilinear'",
        {"form": "bilinear"},
    ),
    "dtype of kv_bounds": Bad(
        TypeError,
        "kv_bounds must be int32, got torch.int64",
        {"kv_bounds": torch.zeros(2, 8, 2, dtype=torch.int64)},
    ),
    "shape of kv_bounds": Bad(
        ValueError,
        "kv_bounds must have shape [q's batch, q's length, 2] = [2, 8, 2], got [2, 9, 2]",
        {"kv_bounds": _int32(2, 9, 2)},
    ),
    "rank of kv_bounds": Bad(
        ValueError,
        "kv_bounds must have shape [q's batch, q's length, 2] = [2, 8, 2], got [8, 2]",
        {"kv_bounds": _int32(8, 2)},
    ),
    "dtype of q_start": Bad(
        TypeError, "q_start must be int32, got torch.float32", {"q_start": torch.zeros(2)}
    ),
    "shape of q_start": Bad(
        ValueError, "q_start must have shape [q's batch] = [2], got [3]", {"q_start": _int32(3)}
    ),
}
BAD_BACKWARD = {
    "shape of dout": Bad(
        ValueError,
        "dout must have q's batch, heads and length and v1's head_dim [2, 6, 8, 16], "
        "got [2, 6, 8, 12]",
        {"dout": _empty(2, 6, 8, 12)},
    ),
    "shape of dlse": Bad(
        ValueError,
        "dlse must have q's batch, heads and length [2, 6, 8], got [2, 6]",
        {"dlse": _empty(2, 6)},
    ),
    "shape of out": Bad(
        ValueError,
        "out must have q's batch, heads and length and v1's head_dim [2, 6, 8, 16], "
        "got [2, 6, 9, 16]",
        {"out": _empty(2, 6, 9, 16)},
    ),
    "shape of lse": Bad(
        ValueError,
        "lse must have q's batch, heads and length [2, 6, 8], got [2, 6, 8, 1]",
        {"lse": _empty(2, 6, 8, 1)},
    ),
    "device of dout": Bad(
        RuntimeError,
        "dout must be on the device of q, cpu, got meta",
        {"dout": _empty(2, 6, 8, 16, device="meta")},
    ),
    "window": BAD["w1 of zero"],
    "keys of v1": BAD["keys of v1"],
}


def _call(change):
    """Return the arguments of a good call with one thing changed: (positional, keyword)."""
    good: dict[str, Any] = {"q": _empty(2, 6, 8, 16)}
    good |= {name: _empty(2, 2, 8, 16) for name in ("k1", "k2", "v1", "v2")}
    good |= {"w1": 4, "w2": 2} | change
    positional = [good.pop(name) for name in ("q", "k1", "k2", "v1", "v2", "w1", "w2")]
    return positional, good


def _assert_raises_before_any_work(bad, call):
    with (
        profile(activities=[ProfilerActivity.CPU]) as seen,
        pytest.raises(bad.error, match=f"^{re.escape(bad.text)}$"),
    ):
        call()
    work = {e.name for e in seen.events() or () if not e.name.startswith(("simplex::", "Profiler"))}
    assert not work


@pytest.mark.parametrize("name", BAD)
def test_eager_code_raises(name):
    positional, keyword = _call(BAD[name].change)
    _assert_raises_before_any_work(
        BAD[name], lambda: torch.ops.simplex.attn(*positional, **keyword)
    )


@pytest.mark.parametrize("name", BAD)
def test_the_function_raises_the_same(name):
    (q, k1, k2, v1, v2, w1, w2), keyword = _call(BAD[name].change)
    with pytest.raises(BAD[name].error, match=f"^{re.escape(BAD[name].text)}$"):
        simplex_ops.simplicial_attention(q, k1, k2, v1, v2, window=(w1, w2), **keyword)


@pytest.mark.parametrize("name", [n for n in BAD if "device" not in n])
def test_fake_tensors_raise_the_same(name):
    positional, keyword = _call(BAD[name].change)
    positional = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in positional]
    keyword = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in keyword.items()}
    with pytest.raises(BAD[name].error, match=f"^{re.escape(BAD[name].text)}$"):
        torch.ops.simplex.attn(*positional, **keyword)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_raises_the_same(name, dynamic, monkeypatch):
    """Dynamo wraps what a fake kernel raises; the sentence is in it, sizes perhaps as symbols."""
    torch._dynamo.reset()
    started = []
    monkeypatch.setattr(
        "simplex_ops.devices.cpu.blocked_forward", lambda *a, **k: started.append(a)
    )
    positional, keyword = _call(BAD[name].change)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def compiled(*arguments, **options):
        return torch.ops.simplex.attn(*arguments, **options)

    text = BAD[name].text.partition(", got")[0].partition(" [")[0].partition(" = ")[0]
    pattern = re.escape(text) if dynamic else _as_printed(BAD[name].text)
    with pytest.raises(Exception, match=pattern) as caught:
        compiled(*positional, **keyword)
    assert BAD[name].error.__name__ in f"{type(caught.value).__name__}: {caught.value}"
    assert not started


def _as_printed(text):
    """Return a pattern for the text inside the repr of an exception, quotes escaped or not."""
    return re.escape(text).replace("'", r"\\?'")


@pytest.mark.parametrize("name", BAD_BACKWARD)
@pytest.mark.parametrize("kind", ["eager", "meta"])
def test_the_backward_raises(name, kind):
    bad = BAD_BACKWARD[name]
    saved = {"dout": _empty(2, 6, 8, 16), "dlse": _empty(2, 6, 8)}
    saved |= {"out": _empty(2, 6, 8, 16), "lse": _empty(2, 6, 8)}
    change = dict(bad.change)
    saved |= {key: change.pop(key) for key in list(change) if key in saved}
    (*inputs, w1, w2), keyword = _call(change)
    tensors = [saved["dout"], saved["dlse"], *inputs, saved["out"], saved["lse"]]
    if kind == "meta":
        if "device" in name:
            pytest.skip("all are on one device")
        tensors = [t.to("meta") for t in tensors]
    _assert_raises_before_any_work(
        bad, lambda: torch.ops.simplex.attn_backward(*tensors, w1, w2, **keyword)
    )


@pytest.mark.parametrize("window", [5, (1, 2, 3), "ab c"])
def test_a_window_that_is_no_pair_raises(window):
    positional, _ = _call({})
    text = f"window must be None or a pair (w1, w2), each an int or None, got {window!r}"
    with pytest.raises(ValueError, match=re.escape(text)):
        simplex_ops.simplicial_attention(*positional[:5], window=window)


@pytest.mark.parametrize("name", ["q", "k1", "k2", "v1", "v2"])
def test_none_in_place_of_a_tensor_raises(name):
    positional, _ = _call({name: None})
    with pytest.raises(TypeError, match=f"^{name} must be a tensor, got None$"):
        simplex_ops.simplicial_attention(*positional[:5])


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("scale", lambda t, q, k2, v2: {"q": q * t, "scale": 1.0}),
        ("k2_bias", lambda t, q, k2, v2: {"k2": k2 + t}),
        ("v2_bias", lambda t, q, k2, v2: {"v2": v2 + t}),
    ],
)
def test_a_number_that_would_lose_its_gradient_raises_and_its_remedy_keeps_it(name, remedy):
    """The dispatcher makes a number of a tensor, so that a learnable scale would never learn."""
    inputs = {n: torch.randn(1, 2, 5, 4) for n in ("q", "k1", "k2", "v1", "v2")}
    learnt = torch.nn.Parameter(torch.tensor(0.5))
    instead = {"scale": "multiply q by it", "k2_bias": "add it to k2", "v2_bias": "add it to v2"}
    text = f"{name} must be a number, got a tensor that requires a gradient, which none goes to: "
    with pytest.raises(TypeError, match=f"^{text}{instead[name]} instead$"):
        simplex_ops.simplicial_attention(**inputs, **{name: learnt})
    expected = simplex_ops.simplicial_attention(**inputs, **{name: 0.5})
    given = inputs | remedy(learnt, inputs["q"], inputs["k2"], inputs["v2"])
    got = simplex_ops.simplicial_attention(**given)
    torch.testing.assert_close(got, expected)
    (grad,) = torch.autograd.grad(got.square().sum(), learnt)
    assert grad != 0


def _nested(t, layout):
    rows = [row.transpose(0, 1).contiguous() for row in t]
    return torch.nested.nested_tensor(rows, layout=layout).transpose(1, 2)


@pytest.mark.filterwarnings("ignore:.*(prototype|beta state).*")
@pytest.mark.parametrize("name", ["q", "k1", "v2"])
@pytest.mark.parametrize(
    ("made", "text"),
    [
        (torch.Tensor.to_sparse, "got torch.sparse_coo: give {}.to_dense()"),
        (torch.Tensor.to_mkldnn, "got torch._mkldnn: give {}.to_dense()"),
        (lambda t: _nested(t, torch.strided), "got a nested one: pack its rows into one"),
    ],
    ids=["sparse", "mkldnn", "nested"],
)
@pytest.mark.parametrize("wants_grad", [False, True])
def test_a_tensor_that_is_not_strided_raises_before_any_work(name, made, text, wants_grad):
    inputs = {n: torch.randn(2, 2, 5, 4) for n in ("q", "k1", "k2", "v1", "v2")}
    inputs["k2"].requires_grad_(wants_grad)
    inputs[name] = made(inputs[name])
    text = f"{name} must be a dense tensor, {text.format(name)}"
    with pytest.raises(TypeError, match=f"^{re.escape(text)}"):
        torch.ops.simplex.attn(**inputs)


def test_sparse_bounds_raise():
    positional, _ = _call({})
    text = "kv_bounds must be a dense tensor, got torch.sparse_coo"
    with pytest.raises(TypeError, match=text):
        torch.ops.simplex.attn(*positional, kv_bounds=_int32(2, 8, 2).to_sparse())
