"""The Hopper forward on a device, against float64 and against the portable kernels."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from both_forwards import (
    QUERIES,
    SAFE,
    W1,
    W2,
    assert_errs_as_the_portable_kernel,
    both,
    exact,
    first_tile_far_below,
    powers_of_two,
    relative,
)

from csrc_free import attn as entry
from simplex_ops.devices.gpu import kernel_arguments
from simplex_ops.testing import Case, Problem, assert_matches_reference, cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]
attn = torch.ops.simplex.attn
FORWARD = (False,) * 5


def _case(**given):
    """Return a case for one key-value head of 64 heads, forward alone."""
    return Case(
        **{
            "group": 64, "seq": 40, "head_dim": 128, "w1": 30, "w2": 7, "dtype": torch.bfloat16,
            "grad_mask": FORWARD, **given,
        }
    )  # fmt: skip


def _is_served(problem: Problem) -> bool:
    arguments = kernel_arguments(*problem.windows, problem.inputs[0], problem.options)
    q, k1, k2, v1, v2 = problem.inputs
    return entry.forward_served_by(q, k1, k2, v1, v2, **arguments) == "hopper"


def _assert_served_and_right(case: Case) -> None:
    assert _is_served(Problem.of(case, "cuda"))
    assert_matches_reference(case, attn, device="cuda")


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "fused"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"batch": 2, "kv_heads": 2},
        {"group": 128},
        {"is_causal": False},
        {"bounds": "documents"},
        {"bounds": "wild", "starts": "random", "batch": 3},
        {"keys1": 90, "keys2": 70, "seq": 9},
        {"keys1": 20, "keys2": 70, "seq": 50},
        {"w1": 4, "w2": 33},
        {"w1": 4, "w2": 4},
        {"w1": None, "w2": None},
        {"form": "strassen"},
        {"form": "strassen", "k2_bias": 1.0, "v2_bias": -0.5},
        {"form": "strassen", "k2_bias": 1.0, "v2_bias": -0.5, "w1": 4, "w2": 20},
        {"form": "determinant"},
        {"form": "determinant", "w1": 4, "w2": 33},
        {"form": "determinant", "k2_bias": 1.0, "v2_bias": -0.5},
        {"form": "determinant", "k2_bias": 1.0, "v2_bias": -0.5, "w1": 4, "w2": 20},
        {"form": "determinant", "head_dim": 64},
        {"form": "determinant", "head_dim": 80, "value_dim": 96},
        {"form": "determinant", "head_dim": 96, "batch": 2, "kv_heads": 2},
        {"form": "determinant", "head_dim": 120, "value_dim": 64},
        {"k2_bias": 1.0, "v2_bias": 1.0},
        {"k2_bias": 1.0, "v2_bias": -0.5, "w1": 4, "w2": 33},
        {"head_dim": 64},
        {"head_dim": 64, "value_dim": 128},
        {"head_dim": 96},
        {"head_dim": 80, "value_dim": 96},
        {"scale": -0.3},
        {"amplitude": 0.0},
        {"dtype": torch.float16, "bounds": "ranges"},
        {"dtype": torch.float16, "form": "strassen", "k2_bias": 1.0},
        {"dtype": torch.float16, "form": "determinant"},
        {"dtype": torch.float16, "form": "determinant", "w1": 5, "w2": 33, "k2_bias": -0.5},
        {"dtype": torch.float16, "w1": 5, "w2": 33, "k2_bias": -0.5, "v2_bias": 1.0},
    ],
    ids=str,
)
def test_forward_is_within_budget(given, layout, poisoned_memory):
    _assert_served_and_right(_case(layout=layout, **given))


@pytest.mark.parametrize("keys", [65, 129, 193, 257, 300])
@pytest.mark.parametrize(
    "windows", [(64, 32), (128, 33), (192, 40), (256, 65), (257, 7), (None, 5)]
)
def test_windows_of_several_tiles(windows, keys, poisoned_memory):
    w1, w2 = windows
    _assert_served_and_right(_case(seq=6, keys1=keys, keys2=keys, w1=w1, w2=w2))


@settings(max_examples=25)
@given(case=cases(dtypes=(torch.bfloat16,), max_head_dim=128),
       keys=st.tuples(st.integers(0, 128), st.integers(0, 70)),
       dims=st.sampled_from([(128, 128), (64, 64)]))  # fmt: skip
def test_drawn_problems(case, keys, dims):
    """Drawn as everywhere, moved to where the kernel serves; few constants, so few compilations."""
    biases = (1.0, -0.5) if case.k2_bias or case.v2_bias else (0.0, 0.0)
    case = dataclasses.replace(
        case, group=64, kv_heads=min(case.kv_heads, 2), batch=min(case.batch, 2),
        seq=min(case.seq, 6), keys1=keys[0], keys2=keys[1], head_dim=dims[0], value_dim=dims[1],
        k2_bias=biases[0], v2_bias=biases[1], grad_mask=FORWARD,
        layout="transposed" if case.layout in ("strided", "expanded") else case.layout,
    )  # fmt: skip
    assert_matches_reference(case, attn, device="cuda")


def _inputs(seq, batch=1, dtype=torch.bfloat16):
    return Case(batch, 1, 64, seq, head_dim=128, dtype=dtype, layout="transposed").inputs("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SAFE)
def test_scores_of_any_size_err_as_the_portable_kernel_does(name, dtype):
    inputs = _inputs(700, dtype=dtype)
    SAFE[name](*inputs)
    assert_errs_as_the_portable_kernel(inputs, QUERIES)


@pytest.mark.parametrize("name", SAFE)
def test_scores_of_any_size_in_the_determinant_form(name):
    inputs = _inputs(700)
    SAFE[name](*inputs)
    assert_errs_as_the_portable_kernel(inputs, QUERIES, form="determinant")


def test_products_beyond_the_range_of_float16():
    """Of q with k2: each row's virtual queries are scaled by a power of two."""
    inputs = _inputs(700, dtype=torch.float16)
    q, k1, k2, _, _ = inputs
    q *= 2000.0
    k1 *= 1e-5
    k2 *= 1000.0
    assert (q.float().abs().max() * k2.float().abs().max()) > 20 * 65504
    assert_errs_as_the_portable_kernel(inputs, QUERIES)


def test_values_of_any_size():
    """Values times 2^100 give the same bits times 2^100, also where the maximum is raised late."""
    inputs = _inputs(700)
    first_tile_far_below(*inputs)
    (out, lse), _ = both(inputs, W1, W2)
    inputs[3].mul_(2.0**100)
    (large, same), _ = both(inputs, W1, W2)
    assert torch.equal(large, out * 2.0**100)
    assert torch.equal(same, lse)


@pytest.mark.parametrize("size", [1e8, 1e20, 1e30])
def test_huge_scores_give_finite_answers(size):
    inputs = _inputs(200)
    powers_of_two(size)(*inputs)
    (out, lse), _ = both(inputs, W1, W2)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    for i in (0, 40, 130, 199):
        exact_out, exact_lse = exact(inputs, i, W1, W2)
        assert relative(out[0, :, i], exact_out) < 2**-8
        assert relative(lse[0, :, i], exact_lse) < 1e-4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [1, 2, 3, 4])
def test_what_is_not_finite_stays_where_it_can_be_seen(which, bad):
    """In its batch row and key-value head, and not before the tiles that hold it."""
    inputs = Case(
        2, 2, 64, 700, head_dim=128, dtype=torch.bfloat16, layout="transposed"
    ).inputs("cuda")  # fmt: skip
    clean, _ = both(inputs, W1, W2)
    inputs[which][1, 1, 350, 5] = bad
    (out, lse), _ = both(inputs, W1, W2)
    for got, before in zip((out, lse), clean, strict=True):
        assert torch.equal(got[0], before[0])
        assert torch.equal(got[1, :64], before[1, :64])
        assert torch.equal(got[1, 64:, :350], before[1, 64:, :350])
    assert not out[1, 64:, 350].isfinite().all()


def test_rows_that_see_nothing():
    case = _case(seq=70, keys1=60, bounds="padding", batch=3, starts="random")
    inputs, options = case.inputs("cuda"), case.options("cuda")
    start, end = options["kv_bounds"].unbind(-1)
    start[0, 10:15], end[0, 10:15] = 5, 5
    start[0, 15:20], end[0, 15:20] = 5, torch.iinfo(torch.int32).min
    arguments = {name: options[name] for name in ("kv_bounds", "q_start")}
    (out, lse), _ = both(inputs, 30, 7, **arguments)
    assert lse[0, :, 10:20].isneginf().all()
    assert (out[0, :, 10:20] == 0).all()
    assert (out[lse.isneginf()] == 0).all()


def test_a_second_launch_gives_the_same_bits():
    inputs = _inputs(700, batch=2)
    SAFE["x100"](*inputs)
    first, _ = both(inputs, W1, W2)
    for _ in range(3):
        again, _ = both(inputs, W1, W2)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])
