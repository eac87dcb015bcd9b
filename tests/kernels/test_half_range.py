"""Powers of two that keep float16 in its range: how they are chosen, and what gradients they give.

What chooses them runs in Triton's interpreter too, with TRITON_INTERPRET=1.
"""

import dataclasses
import os

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import triton
import triton.language as tl

from csrc_free import attn as entries
from csrc_free.device.products import rounded_operand
from csrc_free.hopper import backward, half_range, key_plan
from csrc_free.problem import problem_of
from csrc_free.steps.delta import Statistics
from simplex_ops.testing import Case, Problem, assert_matches_reference, run_attn

attn = torch.ops.simplex.attn
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
HALF = torch.float16
LARGEST = torch.finfo(HALF).max
# Of q, k1, k2, v1, v2 and dout.
SIZES = {
    "as drawn": (1.0,) * 6,
    "small": (2.0**-10, 2.0**-20, 2.0**-10, 2.0**-10, 2.0**-20, 2.0**-10),
    "large": (300.0, 2.0**14, 300.0, 2.0**14, 300.0, 2.0**14),
    "nothing": (0.0, 1.0, 0.0, 2.0**14, 0.0, 0.0),
}


def _problem(sizes, bias=0.0):
    """Return a problem of normal numbers of given sizes."""
    torch.manual_seed(0)
    of_q, *of_keys, of_dout = sizes
    q = torch.randn(1, 6, 19, 40) * of_q
    keys = [
        torch.randn(1, 2, 23, dim) * size
        for dim, size in zip((40, 40, 24, 24), of_keys, strict=True)
    ]
    dout = torch.randn(1, 6, 19, 24) * of_dout
    inputs = [t.clamp(-LARGEST, LARGEST).to(HALF) for t in (q, *keys)]
    q, k1, k2, v1, v2 = inputs
    problem = problem_of(
        q, k1, k2, v1, v2, (15, 0), (3, 0), 0.25, "trilinear", bias, bias, None, None
    )
    delta = torch.randn(1, 2, 19, 3) * of_dout
    statistics = Statistics(
        dout.clamp(-LARGEST, LARGEST).to(HALF), delta, torch.randn_like(delta),
        torch.zeros(1, 2, dtype=torch.int32),
    )  # fmt: skip
    return problem, statistics


def _most(x):
    """Return the largest number of each batch row and key-value head."""
    return x.double().abs().unflatten(1, (2, -1)).amax((2, 3, 4))


# Powers of the products with the wide pair or with q and dout; of dS one for each row, or one.
SIDES = {"keys": (True, False), "wide": (False, False), "narrow and query": (False, True)}


@interpreted
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", SIZES)
def test_operands_stay_in_range_and_powers_are_divided_out(name, side):
    bias = 1.0 if name == "as drawn" else 0.0
    is_of_keys, is_by_row = SIDES[side]
    problem, statistics = _problem(SIZES[name], bias)
    ranges = half_range.ranges_of(problem, statistics)
    size = _gradients_of_logits(problem, statistics, bias)
    assert (size <= ranges.bound.double() * (1 + 1e-5) + 1e-30).all()
    found = half_range.scaled(
        problem, statistics, ranges, is_of_keys=is_of_keys, is_by_row=is_by_row
    )
    assert found.problem.biases() == problem.biases()
    factors, exact = found.factors.double(), {}
    others = (problem.k_wide, problem.v_wide) if is_of_keys else (problem.q, statistics.dout)
    for given, other, place in zip(
        ("k_narrow", "v_narrow"), others, (half_range.K_BIAS, half_range.V_BIAS), strict=True
    ):
        got, true = (getattr(p, given).double() for p in (found.problem, problem))
        power = (_most(got) / _most(true).clamp(min=1e-30)).log2().round().exp2()
        by_row = power[..., None, None]
        assert torch.equal(got.to(HALF), (true * by_row).to(HALF)) or not true.any()
        assert (_most(got + bias * by_row) * _most(other)).max() < 2**15
        assert torch.equal(factors[..., place.value], bias * power)
        exact[given] = power if true.any() else torch.full_like(power, torch.nan)
    of_logits = factors[..., half_range.OF_LOGITS.value] * exact["k_narrow"]
    _assert_one(of_logits / problem.log2_scale)
    is_some = statistics.delta.abs() > 1e-30
    of_ds = torch.where(is_some, found.delta / statistics.delta, torch.nan).double()
    assert (size * of_ds <= 1.0)[is_some].all()
    assert torch.equal(found.lse2, statistics.lse2 - half_range.P_EXPONENT.value)
    if is_by_row:
        of_dp, of_t = found.row_factors.double()
        of_k, of_v = (exact[given][..., None, None] for given in ("k_narrow", "v_narrow"))
        _assert_one(of_dp / of_ds * of_v)
        _assert_one(of_t * of_ds * of_k * 2.0**15 / problem.scale)
        _assert_one(factors[..., half_range.OF_DK_NARROW.value] / exact["k_narrow"])


def _assert_one(tensor):
    """Hold all numbers but NaN to 1."""
    assert torch.allclose(tensor.nan_to_num(1.0), torch.ones_like(tensor), rtol=1e-6)


def _gradients_of_logits(problem, statistics, bias):
    """Return the largest |dP - delta| of each row."""
    dout = statistics.dout.double().unflatten(1, (2, 3))
    dp = torch.einsum(
        "bhgnd,bhmd,bhkd->bhngmk", dout, problem.v_wide.double(), problem.v_narrow.double() + bias
    ).flatten(4)  # fmt: skip
    return (dp - statistics.delta[..., None]).abs().amax(-1)


@interpreted
def test_what_is_not_finite_does_not_change_the_powers():
    problem, statistics = _problem((1.0,) * 6)
    ranges = half_range.ranges_of(problem, statistics)
    problem.k_wide[0, 0, 3, 5] = torch.inf
    problem.v_narrow[0, 0, 4] = torch.nan
    for one, other in zip(ranges, half_range.ranges_of(problem, statistics), strict=True):
        torch.testing.assert_close(one, other, rtol=0.2, atol=1)


@triton.jit
def _rounded_kernel(x, y):
    offs = tl.arange(0, 64)
    tl.store(y + offs, rounded_operand(tl.load(x + offs), tl.float32, "tf32"))


@interpreted
def test_virtual_rows_are_rounded_to_the_nearest_of_tf32():
    """As a Hopper kernel rounds them to float16, whatever their size."""
    torch.manual_seed(0)
    x = torch.randn(64) * 2.0 ** torch.randint(-30, 32, (64,))
    x[:4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan])
    x[3:4].view(torch.int32).fill_(2**31 - 1)
    got = torch.full_like(x, 0.0)
    _rounded_kernel[(1,)](x, got)
    mantissa, exponent = torch.frexp(x[4:].double())
    assert torch.equal(got[4:].double(), torch.ldexp((mantissa * 2**11).round(), exponent - 11))
    torch.testing.assert_close(got[:4], x[:4], rtol=0, atol=0, equal_nan=True)


@pytest.fixture(params=[3, 65])
def keys_from(request, monkeypatch):
    """Let `keys` serve groups of so many heads and more."""
    monkeypatch.setattr(backward, "_KEYS_FROM", request.param)
    return request.param


@pytest.fixture
def served(monkeypatch, keys_from):
    """Note who serves the backward, however few rows there are."""
    noted = []
    inner = backward.choose

    def choose(*args):
        choice = inner(*args)
        noted.append(choice.served_by)
        return choice

    monkeypatch.setattr(key_plan, "FEWEST_ROWS", 0)
    monkeypatch.setattr(backward, "choose", choose)
    return noted


CASES = {
    "64 heads": Case(group=64, seq=90, head_dim=128, w1=50, w2=20),
    "8 heads": Case(kv_heads=2, group=8, seq=200, head_dim=64, w1=100, w2=12, through="both"),
    "5 heads": Case(batch=2, group=5, seq=120, head_dim=96, value_dim=80, w1=None, w2=9),
    "exchanged": Case(group=16, seq=90, head_dim=128, w1=10, w2=70, through="both"),
    "biases": Case(group=8, seq=90, head_dim=64, w1=40, w2=9, k2_bias=1.0, v2_bias=1.0),
    "documents": Case(group=8, seq=150, head_dim=64, w1=60, w2=9, bounds="documents"),
    "not causal": Case(group=32, seq=80, head_dim=40, value_dim=128, w1=20, w2=5, is_causal=False),
    "large logits": Case(group=8, seq=90, head_dim=64, w1=40, w2=9, amplitude=30.0),
    "1 head": Case(kv_heads=3, group=1, seq=150, head_dim=128, w1=70, w2=40, through="both"),
    "2 heads, biases": Case(group=2, seq=120, head_dim=64, w1=50, w2=9, k2_bias=1.0, v2_bias=-1.0),
    "lse alone": Case(group=8, seq=90, head_dim=64, w1=40, w2=9, through="lse"),
}
FACTORS = {
    "as drawn": (1.0,) * 6,
    "small": (0.03, 0.03, 0.03, 0.2, 0.2, 0.03),
    "keys large": (1e-3, 3e3, 1.0, 1.0, 1.0, 1.0),
    "narrow keys large": (1e-3, 1.0, 3e3, 1.0, 1.0, 1.0),
    "values large": (1.0, 1.0, 1.0, 30.0, 30.0, 1e-2),
    "gradients large": (1.0, 1.0, 1.0, 0.2, 0.2, 1e3),
}


def _multiplied(case, factors):
    """Return a case's problem, its tensors multiplied and its scale divided by as much."""
    problem = Problem.of(dataclasses.replace(case, dtype=HALF), "cuda")
    *of_inputs, of_dout = factors
    inputs = tuple((t * f).to(HALF) for t, f in zip(problem.inputs, of_inputs, strict=True))
    scale = case.head_dim**-0.5 / (of_inputs[0] * of_inputs[1] * of_inputs[2])
    return dataclasses.replace(
        problem,
        inputs=inputs,
        options=problem.options | {"scale": scale},
        dout=None if problem.dout is None else (problem.dout * of_dout).to(HALF),
        dlse=None if problem.dlse is None else problem.dlse * of_dout,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_in_float16_are_within_the_budget(
    name, factors, keys_from, served, poisoned_memory
):
    if CASES[name].k2_bias and factors != "as drawn":
        pytest.skip("a bias is not multiplied")
    assert_matches_reference(_multiplied(CASES[name], FACTORS[factors]), attn, device="cuda")
    assert served
    by = "keys, query" if CASES[name].group >= keys_from else "wide, narrow"
    if name == "not causal":  # whose D and Dv take tiles of two sizes
        by = "keys), portable"
    assert all(f"hopper ({by}" in each for each in served), served


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["64 heads", "8 heads", "1 head"])
def test_rows_of_small_gradients_keep_their_own(name, served):
    """One power of two for all rows of a tensor would lose those beside a row of large ones."""
    case = dataclasses.replace(CASES[name], through="out")
    problem = _multiplied(case, FACTORS["as drawn"])
    assert problem.dout is not None
    small = 2.0**-12
    dout = problem.dout.clone()
    dout[:, :, 1::2] *= small
    found = run_attn(attn, dataclasses.replace(problem, dout=dout))["dq"]
    alone = torch.zeros_like(dout)
    alone[:, :, 1::2] = dout[:, :, 1::2] / small
    other = run_attn(attn, dataclasses.replace(problem, dout=alone))["dq"]
    size = other[:, :, 1::2].abs().max().item()
    torch.testing.assert_close(
        found[:, :, 1::2].float() / small, other[:, :, 1::2].float(), rtol=0, atol=1e-2 * size
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["64 heads", "8 heads", "exchanged", "1 head"])
def test_gradients_in_float16_repeat_bit_for_bit(name, served):
    problem = _multiplied(CASES[name], FACTORS["as drawn"])
    first = run_attn(attn, problem)
    for _ in range(3):
        for one, other in zip(run_attn(attn, problem).values(), first.values(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
def test_the_largest_numbers_have_finite_gradients(served):
    """Products of two of them are past 65504 in float16, and gradients here are not."""
    case = CASES["8 heads"]
    problem = _multiplied(case, (1.0,) * 6)
    inputs = tuple(t.sign() * LARGEST if at in (1, 2) else t for at, t in enumerate(problem.inputs))
    scale = 1 / (8 * LARGEST**2)
    problem = dataclasses.replace(
        problem, inputs=inputs, options=problem.options | {"scale": scale}
    )
    found = run_attn(attn, problem)
    with entries.portable_alone():
        other = run_attn(attn, problem)
    for name, grad in found.items():
        assert grad.isfinite().all(), name
        size = other[name].float().abs().max()
        assert (grad.float() - other[name].float()).abs().max() <= 2e-2 * size, name
