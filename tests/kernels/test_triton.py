"""The Triton kernels through Triton's interpreter, on CPU tensors: run with TRITON_INTERPRET=1.

Everything goes by way of the GPU implementation, `simplex_ops.devices.gpu`, as on a GPU. bfloat16
products are wrong in the interpreter: a GPU runs them, by tests/op/test_budgets.py and its
neighbours.
"""

import dataclasses
import math
import os
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from huge_logits import assert_finite
from hypothesis import given, settings

from csrc_free.portable.wide_parts import with_wide_parts
from csrc_free.problem import problem_of
from simplex_ops import reference
from simplex_ops.devices import gpu
from simplex_ops.testing import Case, Problem, assert_matches_reference, cases, run_attn

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
    ),
    pytest.mark.usefixtures("poisoned_memory"),
]

DTYPES = (torch.float32, torch.float16)
ASKED = "SIMPLEX_FUZZ_EXAMPLES" in os.environ


@pytest.fixture(scope="module", autouse=True)
def kernels_serve_cpu_tensors():
    """Let the GPU implementation take CPU tensors, which the interpreter computes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "unserved", lambda *_: None)
        yield


class _Attn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, windows, options, *inputs):
        out, lse = gpu.attn(*inputs, *windows, **options)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.windows, ctx.options = windows, options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, *grads):
        mask = ctx.needs_input_grad[2:]
        found = gpu.attn_backward(
            *grads, *ctx.saved_tensors, *ctx.windows, **ctx.options, grad_mask=mask
        )
        return None, None, *(g if m else None for g, m in zip(found, mask, strict=True))


def _attn(*arguments: Any, **options: Any) -> Any:
    inputs, windows = arguments[:5], arguments[5:] or (None, None)
    return _Attn.apply(windows, options, *inputs)


CASES = {
    "wide first": Case(1, 1, 2, 20, head_dim=16, w1=12, w2=3, through="both"),
    "wide second": Case(2, 1, 2, 18, head_dim=16, w1=3, w2=12, through="both"),
    "both ways": Case(1, 1, 3, 18, head_dim=10, w1=6, w2=4, is_causal=False, through="both"),
    "unbounded": Case(1, 1, 1, 17, head_dim=24, value_dim=40, through="both"),
    "cache": Case(2, 1, 6, 2, keys1=37, keys2=12, head_dim=20, w1=16, w2=5, through="both"),
    "packed": Case(2, 1, 2, 17, w1=7, w2=3, bounds="documents", through="both"),
    "placed": Case(3, 1, 2, 5, keys1=24, keys2=24, w1=9, w2=3, starts="random", through="both"),
    "wild": Case(2, 1, 1, 9, keys1=20, keys2=17, bounds="wild", starts="random", w1=7),
    "biased": Case(1, 1, 2, 12, w1=8, w2=3, k2_bias=1.0, v2_bias=-0.5, through="both"),
    "biased wide": Case(1, 1, 2, 12, w1=3, w2=8, k2_bias=1.0, v2_bias=-0.5, through="both"),
    "one pair": Case(1, 1, 1, 4, head_dim=3, w1=1, w2=1, through="both"),
    "large head": Case(1, 1, 1, 5, head_dim=200, value_dim=136, w1=4, w2=2, through="both"),
    "large group": Case(1, 1, 64, 3, keys1=9, keys2=9, w1=6, w2=2, through="both"),
    "no keys": Case(1, 1, 2, 4, keys1=0, keys2=0),
    "no queries": Case(1, 1, 2, 0, keys1=4, keys2=4),
}


# Who sees which key is no matter of the form; test_any_case draws both.
OF_EVERY_FORM = (
    "wide first", "wide second", "both ways", "cache", "biased", "biased wide", "one pair",
    "large head", "large group",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "trilinear") for name in CASES),
        *product(OF_EVERY_FORM, ("determinant", "strassen")),
    ],
)
def test_the_kernels_are_within_their_budget(name, form):
    assert_matches_reference(Case(**{**CASES[name].__dict__, "form": form}), _attn)


@pytest.mark.parametrize("name", ["wide first", "wide second", "cache", "biased wide"])
def test_the_kernels_are_within_their_budget_in_half_precision(name):
    assert_matches_reference(Case(**{**CASES[name].__dict__, "dtype": torch.float16}), _attn)


@pytest.mark.parametrize("layout", ["transposed", "fused", "strided", "expanded"])
def test_any_strides_are_within_the_budget(layout):
    case = Case(2, 2, 2, 11, keys1=14, head_dim=12, w1=6, w2=3, layout=layout)
    assert_matches_reference(case, _attn)


@given(case=cases(dtypes=DTYPES, max_seq=20, max_heads=32, max_head_dim=40, max_batch=2,
                  max_work=10_000 if ASKED else 4_000))  # fmt: skip
@(settings() if ASKED else settings(max_examples=10))
def test_any_case_is_within_the_budget(case):
    assert_matches_reference(case, _attn)


@pytest.mark.parametrize("which", range(5))
def test_a_nan_stays_in_its_batch_row_and_kv_head(which):
    problem = Problem.of(Case(2, 2, 1, 9, w1=5, w2=3, through="both"))
    clean = run_attn(_attn, problem)
    inputs = [t.clone() for t in problem.inputs]
    inputs[which][1, 1, 4, 3] = math.nan
    dirty = run_attn(
        _attn,
        Problem(tuple(inputs), problem.windows, problem.options, problem.dout, problem.dlse),
    )
    for name, value in dirty.items():
        for row, head in ((0, 0), (0, 1), (1, 0)):
            assert torch.equal(value[row, head], clean[name][row, head]), name
    assert dirty["out"][1, 1].isnan().any()


@pytest.mark.parametrize("size", [50.0, 1e4, 1e30])
def test_a_query_never_feels_what_it_cannot_see(size):
    q, *keys = Case(1, 1, 2, 20, w1=6, w2=3).inputs()
    loud = [t.clone() for t in keys]
    for t in loud:
        t[:, :, 13:] *= size
    for a, b in zip(_attn(q, *keys, 6, 3), _attn(q, *loud, 6, 3), strict=True):
        torch.testing.assert_close(a[:, :, :13], b[:, :, :13])


@pytest.mark.parametrize("form", ["trilinear", "determinant", "strassen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_finite_inputs_stay_finite(form, dtype):
    """q∘k2 is far over 65504, out is not."""
    case = Case(1, 1, 2, 12, head_dim=12, w1=8, w2=3, form=form, dtype=dtype, through="both")
    q, k1, k2, v1, v2 = case.inputs()
    out, lse = _attn(q * 300, k1 * 0.1, k2 * 1000, v1, v2, 8, 3, form=form)
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.fixture
def fused_arithmetic(monkeypatch):
    """Round a product and the sum it is part of once, as GPUs do; the interpreter rounds both."""
    from triton.runtime.interpreter import InterpreterBuilder

    def fmul(self, lhs, rhs):
        product = self.binary_op(lhs, rhs, np.multiply)
        product.exact = lhs.data.astype(np.float64) * rhs.data
        return product

    def fused(op):
        def run(self, lhs, rhs):
            result = self.binary_op(lhs, rhs, op)
            if hasattr(lhs, "exact"):
                result.data = op(lhs.exact, rhs.data).astype(result.data.dtype)
            return result

        return run

    monkeypatch.setattr(InterpreterBuilder, "create_fmul", fmul)
    monkeypatch.setattr(InterpreterBuilder, "create_fadd", fused(np.add))
    monkeypatch.setattr(InterpreterBuilder, "create_fsub", fused(np.subtract))


@pytest.mark.usefixtures("fused_arithmetic")
@pytest.mark.parametrize(("w1", "w2"), [(4, 3), (3, 4)])
def test_equal_logits_weigh_the_same_however_low(w1, w2):
    q, k1, k2, v1, v2 = Case(1, 1, 2, 12, head_dim=4).inputs()
    low = torch.full_like(q, 1e4), torch.full_like(k1, -1e4), torch.ones_like(k2)  # s = -2e8
    average, _ = _attn(q, k1, k2, v1, v2, w1, w2, scale=0.0)
    torch.testing.assert_close(_attn(*low, v1, v2, w1, w2)[0], average)


@pytest.mark.usefixtures("fused_arithmetic")
@pytest.mark.parametrize(("group", "size"), [(1, 1e8), (1, 1e20), (1, 1e30), (2, 1e20), (16, 1e30)])
def test_huge_logits_give_finite_answers(group, size):
    q, *keys = Case(2, 1, group, 12, w1=6, w2=3).inputs()
    assert_finite(_attn, q * size, *keys)


@pytest.mark.usefixtures("fused_arithmetic")
@pytest.mark.parametrize("name", ["wide first", "biased wide", "large group"])
def test_fused_arithmetic_stays_within_the_budget(name):
    assert_matches_reference(CASES[name], _attn)


def test_the_same_call_gives_the_same_bits():
    problem = Problem.of(Case(1, 2, 1, 14, w1=8, w2=4, through="both"))
    first, second = run_attn(_attn, problem), run_attn(_attn, problem)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_windows_beyond_int32_are_no_windows():
    inputs = Case(1, 1, 1, 9).inputs()
    for a, b in zip(_attn(*inputs), _attn(*inputs, 2**40, 2**31), strict=True):
        assert torch.equal(a, b)


INT32 = torch.iinfo(torch.int32)
STARTS = (INT32.max, INT32.min, 2**30 + 5, 21)


@pytest.mark.parametrize(
    ("windows", "keys", "is_causal", "group"),
    [
        ((None, None), 7, True, 1),
        ((None, None), 7, False, 2),
        ((None, 3), 24, True, 1),
        ((None, 3), 24, True, 4),
        ((2, 3), 24, True, 1),
        ((2, 3), 24, False, 2),
        ((2**31, 2**31 + 3), 7, False, 2),
        ((2**31, 2**31 + 3), 7, True, 4),
    ],
)
def test_q_start_at_the_ends_of_int32(windows, keys, is_causal, group):
    case = Case(len(STARTS), 1, group, 3, keys1=keys, keys2=keys, head_dim=4, is_causal=is_causal)
    inputs = [t.requires_grad_() for t in case.inputs()]
    options = {"is_causal": is_causal, "q_start": torch.tensor(STARTS, dtype=torch.int32)}
    found = []
    for attn, rows in ((_attn, inputs), (reference.attn, [t.double() for t in inputs])):
        out, lse = attn(*rows, *windows, **options)
        found.append((out, lse, *torch.autograd.grad(out.square().sum(), inputs)))
    for got, exact in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), exact.double(), rtol=1e-4, atol=1e-5)


def test_parts_of_float32_add_up_to_the_last_bit():
    """Up to the largest number, which would round to infinity in bfloat16."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, 21, 20), torch.randn(2, 21, 2, 33).transpose(1, 2) * 1e20
    k[0, 0, 0, 0] = torch.finfo(torch.float32).max
    problem = problem_of(
        torch.randn(2, 4, 9, 20), k, k, v, v, (8, 0), (2, 0), 1.0, "trilinear", 0.0, 0.0, None, None
    )  # fmt: skip
    parts = with_wide_parts(dataclasses.replace(problem, precision="bf16x6")).wide_parts
    assert parts is not None
    for whole, part in zip((problem.k_wide, problem.v_wide), parts, strict=True):
        assert torch.equal(part.double().unflatten(2, (3, -1)).sum(2), whole.double())
