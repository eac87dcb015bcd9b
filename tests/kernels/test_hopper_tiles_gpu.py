"""The Hopper forward for groups of fewer than 64 heads, on a device."""

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
from csrc_free.hopper import serve
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
GROUPS = (1, 2, 4, 8, 16, 32)


@pytest.fixture(scope="module", autouse=True)
def every_tile_serves():
    """Serve what the portable kernel would be faster at, too: small problems find more faults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "USEFUL_FROM", dict.fromkeys(serve.USEFUL_FROM, 0.0))
        patch.setattr(serve, "MOST_POSITIONS_OF_64_COLUMNS", 64)
        yield


def _case(**given):
    """Return a case for few heads to a key-value head, forward alone."""
    return Case(
        **{
            "group": 8, "seq": 90, "head_dim": 128, "w1": 30, "w2": 7, "dtype": torch.bfloat16,
            "grad_mask": FORWARD, **given,
        }
    )  # fmt: skip


def _assert_served_and_right(case: Case) -> None:
    problem = Problem.of(case, "cuda")
    arguments = kernel_arguments(*problem.windows, problem.inputs[0], problem.options)
    assert entry.forward_served_by(*problem.inputs, **arguments) == "hopper"
    assert_matches_reference(case, attn, device="cuda")


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize(
    "given",
    [
        {"layout": "transposed"},
        {"layout": "fused"},
        {"batch": 2, "kv_heads": 2},
        {"is_causal": False},
        {"bounds": "documents"},
        {"bounds": "wild", "starts": "random", "batch": 3},
        {"keys1": 150, "keys2": 130, "seq": 70},
        {"keys1": 20, "keys2": 90, "seq": 70},
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
def test_forward_is_within_budget(given, group, poisoned_memory):
    _assert_served_and_right(_case(group=group, **given))


@pytest.mark.parametrize("group", [2, 3, 4, 6, 16, 32, 48])
@pytest.mark.parametrize(
    "given",
    [
        {"batch": 2, "kv_heads": 2, "layout": "transposed"},
        {"is_causal": False, "bounds": "wild", "starts": "random"},
        {"seq": 300, "w1": 256, "w2": 32},
    ],
    ids=str,
)
def test_groups_of_any_size(given, group, poisoned_memory):
    _assert_served_and_right(_case(group=group, **given))


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("keys", [65, 129, 257, 300])
@pytest.mark.parametrize(
    "windows", [(64, 32), (65, 4), (128, 33), (192, 40), (256, 65), (300, 20), (None, 5)]
)
def test_windows_of_several_tiles(windows, keys, group, poisoned_memory):
    w1, w2 = windows
    _assert_served_and_right(_case(group=group, seq=70, keys1=keys, keys2=keys, w1=w1, w2=w2))


@settings(max_examples=25)
@given(case=cases(dtypes=(torch.bfloat16,), max_head_dim=128),
       keys=st.tuples(st.integers(0, 128), st.integers(0, 70)),
       group=st.sampled_from([1, 8]))  # fmt: skip
def test_drawn_problems(case, keys, group):
    """Drawn as everywhere, moved to where the kernel serves; few constants, so few compilations."""
    biases = (1.0, -0.5) if case.k2_bias or case.v2_bias else (0.0, 0.0)
    case = dataclasses.replace(
        case, group=group, kv_heads=min(case.kv_heads, 2), batch=min(case.batch, 2),
        seq=min(64 + case.seq, 70), keys1=keys[0], keys2=keys[1], head_dim=128, value_dim=128,
        k2_bias=biases[0], v2_bias=biases[1], grad_mask=FORWARD,
        layout="transposed" if case.layout in ("strided", "expanded") else case.layout,
    )  # fmt: skip
    assert_matches_reference(case, attn, device="cuda")


def _inputs(seq, group, batch=1, kv_heads=None, dtype=torch.bfloat16):
    """Return inputs of 32 heads, or of so many key-value heads."""
    kv_heads = kv_heads or 32 // group
    case = Case(batch, kv_heads, group, seq, head_dim=128, dtype=dtype, layout="transposed")
    return case.inputs("cuda")


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", SAFE)
def test_scores_of_any_size_err_as_the_portable_kernel_does(name, group):
    inputs = _inputs(700, group)
    SAFE[name](*inputs)
    assert_errs_as_the_portable_kernel(inputs, QUERIES)


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("name", SAFE)
def test_scores_of_any_size_in_the_determinant_form(name, group):
    inputs = _inputs(700, group)
    SAFE[name](*inputs)
    assert_errs_as_the_portable_kernel(inputs, QUERIES, form="determinant")


@pytest.mark.parametrize("name", SAFE)
def test_scores_of_any_size_in_float16(name):
    inputs = _inputs(700, 8, dtype=torch.float16)
    SAFE[name](*inputs)
    assert_errs_as_the_portable_kernel(inputs, QUERIES)


@pytest.mark.parametrize("group", [1, 8])
def test_values_of_any_size(group):
    """Values times 2^100 give the same bits times 2^100, also where the maximum is raised late."""
    inputs = _inputs(700, group)
    first_tile_far_below(*inputs)
    (out, lse), _ = both(inputs, W1, W2)
    inputs[3].mul_(2.0**100)
    (large, same), _ = both(inputs, W1, W2)
    assert torch.equal(large, out * 2.0**100)
    assert torch.equal(same, lse)


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("size", [1e8, 1e20, 1e30])
def test_huge_scores_give_finite_answers(size, group):
    inputs = _inputs(200, group)
    powers_of_two(size)(*inputs)
    (out, lse), _ = both(inputs, W1, W2)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    for i in (0, 40, 130, 199):
        exact_out, exact_lse = exact(inputs, i, W1, W2)
        assert relative(out[0, :, i], exact_out) < 2**-8
        assert relative(lse[0, :, i], exact_lse) < 1e-4


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [1, 2, 3, 4])
def test_what_is_not_finite_stays_where_it_can_be_seen(which, bad, group):
    """In its batch row and key-value head, and not before the tiles that hold it."""
    inputs = _inputs(700, group, batch=2, kv_heads=2)
    clean, _ = both(inputs, W1, W2)
    inputs[which][1, 1, 350, 5] = bad
    (out, lse), _ = both(inputs, W1, W2)
    before_its_tiles = 350 - 63
    for got, before in zip((out, lse), clean, strict=True):
        assert torch.equal(got[0], before[0])
        assert torch.equal(got[1, :group], before[1, :group])
        assert torch.equal(got[1, group:, :before_its_tiles], before[1, group:, :before_its_tiles])
    assert not out[1, group:, 350].isfinite().all()


@pytest.mark.parametrize("group", [1, 8])
def test_what_a_query_cannot_see_never_matters(group):
    """Not even near float32's largest numbers, in the tiles that it shares."""
    inputs = _inputs(300, group)
    clean, _ = both(inputs, 64, 8)
    for t in inputs[1:]:
        t[:, :, 201:] = 1e30
    (out, lse), _ = both(inputs, 64, 8)
    # A maximum of another row of the tile may be raised earlier: not the same bits.
    assert relative(out[:, :, :201], clean[0][:, :, :201].double()) < 2**-8
    assert relative(lse[:, :, :201], clean[1][:, :, :201].double()) < 1e-6


@pytest.mark.parametrize("group", [1, 8])
def test_rows_that_see_nothing(group):
    case = _case(group=group, seq=70, keys1=60, bounds="padding", batch=3, starts="random")
    inputs, options = case.inputs("cuda"), case.options("cuda")
    start, end = options["kv_bounds"].unbind(-1)
    start[0, 10:15], end[0, 10:15] = 5, 5
    start[0, 15:20], end[0, 15:20] = 5, torch.iinfo(torch.int32).min
    arguments = {name: options[name] for name in ("kv_bounds", "q_start")}
    (out, lse), _ = both(inputs, 30, 7, **arguments)
    assert lse[0, :, 10:20].isneginf().all()
    assert (out[0, :, 10:20] == 0).all()
    assert (out[lse.isneginf()] == 0).all()
    start[:], end[:] = 5, 5
    (out, lse), _ = both(inputs, 30, 7, **arguments)
    assert lse.isneginf().all()
    assert (out == 0).all()


@pytest.mark.parametrize("group", [1, 4, 8])
def test_a_second_launch_gives_the_same_bits(group):
    inputs = _inputs(700, group, batch=2)
    SAFE["x100"](*inputs)
    first, _ = both(inputs, W1, W2)
    for _ in range(3):
        again, _ = both(inputs, W1, W2)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])
