"""The lowerings, compiled for an H100 that is not there: what is launched, and in which order."""

import functools
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from gpuless import Compiled, compiled_for_gpu

import simplex_ops  # noqa: F401  (registers the operators)
from csrc_free import attn
from csrc_free.traits import DEVICES
from simplex_ops.devices import gpu
from simplex_ops.marking.windows_in_graphs import past
from tools.compiled.launches import recorded

BF16 = torch.bfloat16
# heads, kv_heads, head_dim, windows: each way in which Hopper computes.
GROUPS = {"alone": (2, 2, 128, 32, 8), "group": (16, 2, 64, 128, 16), "large": (64, 1, 64, 32, 8)}


@pytest.fixture(autouse=True)
def portable_kernels_alone():
    """Take the Hopper kernels out of use: they are of Gluon, which Inductor cannot write out."""
    with attn.portable_alone():
        yield


def make_inputs(heads, kv_heads, head_dim, seq=256, batch=2, dtype=BF16, device="cuda"):
    """Return q, k1, k2, v1, v2 and dout."""
    return tuple(
        torch.empty(batch, h, seq, head_dim, dtype=dtype, device=device)
        for h in (heads, *[kv_heads] * 4, heads)
    )


def both(w1, w2, **options):
    """Return a function that runs both operators, with something before and after each."""

    def run(q, k1, k2, v1, v2, dout):
        q = q * 2
        out, lse = torch.ops.simplex.attn(q, k1, k2, v1, v2, w1, w2, **options)
        grads = torch.ops.simplex.attn_backward(
            dout, None, q, k1, k2, v1, v2, out, lse, w1, w2, **options
        )
        return out.sigmoid(), lse + 1, *(grad * 2 for grad in grads)

    return run


def launched_in_eager_code(sizes, w1, w2, dtype=BF16, **options):
    """Return the names of the kernels that eager code launches on the same device."""
    with (
        recorded(DEVICES["sm_90"]) as launches,
        mock.patch.object(gpu, "unserved", return_value=""),
    ):
        *inputs, dout = make_inputs(*sizes, dtype=dtype, device="meta")
        out, lse = gpu.attn(*inputs, w1, w2, **options)
        gpu.attn_backward(dout, None, *inputs, out, lse, w1, w2, **options)
    return [launch.kernel.__name__ for launch in launches]


def launched_by(compiled):
    """Return the names of our kernels that the compiled code launches, in order."""
    (wrapper,) = compiled.wrappers
    found = re.findall(r"^ +(\w+_kernel)_\d+\.run\(", wrapper, re.MULTILINE)
    return [name for name in found if not name.startswith("triton_")]


def calls_of_ours(compiled):
    """Return the operators that the compiled code calls, in order."""
    text = "\n".join(compiled.wrappers)
    return re.findall(r"^ .*torch\.ops\.simplex\.(\w+)\.default\(", text, re.MULTILINE)


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_to_the_kernels_of_eager_code(dynamic):
    heads, kv_heads, head_dim, w1, w2 = GROUPS["group"]
    sizes = (heads, kv_heads, head_dim)
    compiled = compiled_for_gpu(
        both(w1, w2), lambda: make_inputs(*sizes), dynamic=dynamic, to_binary=True
    )
    assert launched_by(compiled) == launched_in_eager_code(sizes, w1, w2)
    assert not calls_of_ours(compiled)
    ours = [k for k in compiled.kernels if k.fn.__name__ in set(launched_by(compiled))]
    assert {kernel.fn.__name__ for kernel in ours} == set(launched_by(compiled))
    for kernel in ours:
        (result,) = kernel.compile_results
        assert result.kernel.asm["cubin"]
        assert result.kernel.metadata.enable_fp_fusion  # the kernels count on it


CASES = {
    **{name: (GROUPS[name][:3], GROUPS[name][3:], {}) for name in ("alone", "large")},
    "determinant": ((4, 2, 48), (20, 5), {"form": "determinant", "k2_bias": 1.0}),
    "strassen": ((4, 2, 64), (20, 5), {"form": "strassen", "is_causal": False}),
    "exchanged": ((4, 2, 64), (5, 20), {}),
    "odd rows": ((4, 2, 33), (20, None), {}),
    "one position": ((4, 2, 64, 1), (20, 5), {}),
}


# Sizes decide among groups and at one position, and they are symbols where dynamic.
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*((name, False) for name in CASES), *((n, True) for n in ("alone", "large", "one position"))],
)
def test_it_launches_what_eager_code_launches(name, dynamic):
    sizes, windows, options = CASES[name]
    compiled = compiled_for_gpu(
        both(*windows, **options), lambda: make_inputs(*sizes), dynamic=dynamic
    )
    assert launched_by(compiled) == launched_in_eager_code(sizes, *windows, **options)
    assert not calls_of_ours(compiled)


MODES = {
    "default": {},
    "max-autotune": {"max_autotune": True, "coordinate_descent_tuning": True},
    "nothing fused": {"epilogue_fusion": False, "max_fusion_size": 1},
    "another memory plan": {"memory_planning": True, "reorder_for_peak_memory": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_lse_is_read_after_it_is_written(mode):
    """What reads a kernel's output comes after its launch, and reads its buffer, no constant."""
    compiled = compiled_for_gpu(both(32, 8), lambda: make_inputs(4, 2, 64), **MODES[mode])
    (wrapper,) = compiled.wrappers
    lines = wrapper[wrapper.index("def call(") :].splitlines()
    at = next(i for i, line in enumerate(lines) if "forward_kernel_0.run(" in line)
    out, lse = re.findall(r"\bbuf\d+\b", lines[at].split("-1, -1")[0])[-2:]
    for buffer in (out, lse):
        uses = [i for i, line in enumerate(lines) if re.search(rf"\.run\(.*\b{buffer}\b", line)]
        assert uses[0] == at, "something else comes first"
        assert len(uses) >= 3, "the backward and what follows read it"
    assert 'float("nan")' not in wrapper


def test_lengths_and_windows_stay_arguments():
    def run(q, k1, k2, v1, v2, _dout, sizes):
        return torch.ops.simplex.attn(q, k1, k2, v1, v2, *sizes.shape)

    def make():
        inputs = (*make_inputs(4, 2, 64), torch.empty(32, 8, device="cuda"))
        for tensor in inputs[:5]:
            torch._dynamo.mark_dynamic(tensor, 2)
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(inputs[-1], dim)
        return inputs

    compiled = compiled_for_gpu(run, make)
    (wrapper,) = compiled.wrappers
    (launch,) = re.findall(r"forward_kernel_0\.run\((.*)\)", wrapper)
    symbols = set(re.findall(r"\bs\d+\b", launch))
    assert len(symbols) == 4, launch  # queries, keys, and two windows
    assert "32," not in launch.replace(" ", "").split("-1,-1")[1].split("0.")[0]


def test_a_schedule_of_windows_is_compiled_once_for_each_of_their_roles():
    held = SimpleNamespace()

    def run(*inputs):
        return both(held.past_w1 - 1, held.past_w2 - 1)(*inputs)

    def make(w1, w2):
        held.past_w1, held.past_w2 = past(w1), past(w2)
        return make_inputs(4, 2, 64)

    def wrappers(*schedule):
        with torch.compiler.config.patch(dynamic_sources=r".*\.past_w[12]$"):
            makes = [functools.partial(make, *windows) for windows in schedule]
            return compiled_for_gpu(run, *makes).wrappers

    wider = ((32, 8), (64, 8), (None, 8), (64, 1), (8, 8), (None, 40))
    assert len(wrappers(*wider)) == 1
    assert len(wrappers(*wider, (4, 8), (8, None), (1, 2), (32, 8))) == 2


@pytest.mark.parametrize(
    ("sizes", "dtype", "device"),
    [
        ((4, 2, 64), torch.float64, "cuda"),
        ((4, 2, 512), BF16, "cuda"),
    ],
    ids=["float64", "head_dim"],
)
def test_what_cannot_be_written_out_stays_a_call_of_the_operator(sizes, dtype, device):
    compiled = compiled_for_gpu(
        both(20, 5), lambda: make_inputs(*sizes, dtype=dtype, device=device)
    )
    assert not launched_by(compiled)
    assert calls_of_ours(compiled) == ["attn", "attn_backward"]


def test_float32_is_lowered_where_its_setting_is_guarded(monkeypatch):
    from lowering import compat

    sizes = (4, 2, 64)
    expected = launched_in_eager_code(sizes, 20, 5, dtype=torch.float32)
    for guarded in (True, False):
        if not guarded:
            monkeypatch.setattr(compat, "guard_precision", lambda: False)
        compiled = compiled_for_gpu(both(20, 5), lambda: make_inputs(*sizes, dtype=torch.float32))
        assert launched_by(compiled) == (expected if guarded else [])
        assert calls_of_ours(compiled) == ([] if guarded else ["attn", "attn_backward"])


def test_a_kernel_that_inductor_cannot_write_out_stays_a_call_of_the_operator(monkeypatch):
    from lowering import compat

    monkeypatch.setattr(compat, "is_rewritable", lambda kernel: False)
    compiled = compiled_for_gpu(both(20, 5), lambda: make_inputs(4, 2, 64))
    assert not launched_by(compiled)
    assert calls_of_ours(compiled) == ["attn", "attn_backward"]


def test_without_fused_multiply_adds_by_default_it_stays_a_call_of_the_operator(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # Inductor has no way to ask for them
    compiled = compiled_for_gpu(both(20, 5), lambda: make_inputs(4, 2, 64))
    assert not launched_by(compiled)
    assert calls_of_ours(compiled) == ["attn", "attn_backward"]


def test_an_untested_torch_that_cannot_lower_it_calls_the_operator_and_says_so(monkeypatch):
    from lowering import compat

    def gone(*_given):
        raise AttributeError("no such name")

    monkeypatch.setattr(compat, "record_launch", gone)
    with pytest.raises(Exception, match="no such name"):
        compiled_for_gpu(both(20, 5), lambda: make_inputs(4, 2, 64))
    monkeypatch.setattr(compat, "is_tested", lambda: False)
    with pytest.warns(UserWarning, match=r"simplex.attn.default is called .* no such name"):
        compiled = compiled_for_gpu(both(20, 5), lambda: make_inputs(4, 2, 64))
    assert calls_of_ours(compiled) == ["attn", "attn_backward"]


def test_layers_of_one_shape_are_traced_once(monkeypatch):
    from lowering.inductor import launcher

    traced = []
    trace = launcher._trace
    monkeypatch.setattr(launcher, "_trace", lambda *given: traced.append(given) or trace(*given))

    def layers(q, k1, k2, v1, v2, _dout):
        for _ in range(4):
            q, _lse = torch.ops.simplex.attn(q.sin(), k1, k2, v1, v2, 32, 8)
        return q

    compiled = compiled_for_gpu(layers, lambda: make_inputs(4, 2, 64))
    assert launched_by(compiled) == ["forward_kernel"] * 4
    assert len(traced) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_gluon_kernels_serve_stays_a_call(monkeypatch, dynamic):
    monkeypatch.setattr(attn, "_broken", [])
    heads, kv_heads, head_dim, w1, w2 = GROUPS["large"]
    sizes = (heads, kv_heads, head_dim)
    compiled = compiled_for_gpu(both(w1, w2), lambda: make_inputs(*sizes), dynamic=dynamic)
    assert not launched_by(compiled)
    assert calls_of_ours(compiled) == ["attn", "attn_backward"]


SMALL = 64, 1, 64, 300


@pytest.fixture
def hopper_as_users_have_it(small_problems_as_users_have_them, monkeypatch):
    monkeypatch.setattr(attn, "_broken", [])


@pytest.mark.parametrize("dynamic", [False, True])
def test_small_problems_are_written_out_on_hopper_too(hopper_as_users_have_it, dynamic):
    compiled = compiled_for_gpu(both(100, 8), lambda: make_inputs(*SMALL), dynamic=dynamic)
    assert launched_by(compiled) == launched_in_eager_code(SMALL, 100, 8)
    assert "forward_kernel" in launched_by(compiled)
    assert not calls_of_ours(compiled)


def test_a_graph_of_any_length_is_compiled_once_for_small_problems_and_once_for_all(
    hopper_as_users_have_it,
):
    def make(seq):
        inputs = make_inputs(*SMALL[:3], seq=seq)
        for tensor in inputs:
            torch._dynamo.mark_dynamic(tensor, 2)
        return inputs

    lengths = (300, 200, 4000, 5000, 3000, 301)
    compiled = compiled_for_gpu(both(100, 8), *(lambda n=n: make(n) for n in lengths))
    calls = [calls_of_ours(Compiled([wrapper])) for wrapper in compiled.wrappers]
    assert calls == [[], ["attn", "attn_backward"]]
