"""The Hopper forward on a device, against float64 and against the portable kernels."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from csrc_free import attn as entry
from csrc_free.hopper import forward as hopper
from csrc_free.hopper.serve import why_not_forward
from csrc_free.portable import forward as portable
from csrc_free.problem import problem_of
from simplex_ops import reference
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
SLACK = 1.1  # times the portable kernel's error


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
@given(case=cases(dtypes=(torch.bfloat16,), forms=("trilinear", "strassen"), max_head_dim=128),
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


def _outputs(inputs):
    q, v = inputs[0], inputs[3]
    shape = (*q.shape[:3], v.shape[3])
    return (
        torch.full(shape, torch.nan, dtype=q.dtype, device=q.device),
        torch.full(shape[:3], torch.nan, device=q.device),
    )


def _both(inputs, w1, w2, **options):
    """Return (out, lse) of the Hopper forward and of the portable one."""
    arguments = kernel_arguments(w1, w2, inputs[0], options)
    problem = problem_of(*inputs, **arguments)
    assert why_not_forward(problem) is None
    ours, theirs = _outputs(inputs), _outputs(inputs)
    hopper.compute(problem, *ours)
    portable.compute(problem, *theirs)
    return ours, theirs


def _inputs(seq, batch=1, dtype=torch.bfloat16):
    return Case(batch, 1, 64, seq, head_dim=128, dtype=dtype, layout="transposed").inputs("cuda")


def _exact(inputs, i, w1, w2):
    """Return out [64, Dv] and lse [64] of query i of the first batch row, in float64."""
    q, k1, k2, v1, v2 = (t[:1].double() for t in inputs)
    first, second = slice(max(0, i - w1 + 1), i + 1), slice(max(0, i - w2 + 1), i + 1)
    out, lse = reference.attn(
        q[:, :, i : i + 1], k1[:, :, first], k2[:, :, second], v1[:, :, first], v2[:, :, second],
        None, None, is_causal=False,
    )  # fmt: skip
    return out[0, :, 0], lse[0, :, 0]


# Where scores are large a rounding of q∘k2 makes another pair the first, in a few rows of each
# hundred: over 14,000 rows two kernels' errors differ by chance by some percent.
QUERIES = (0, 1, 31, 33, 63, 64, *range(66, 700, 3))
W1, W2 = 512, 32


def _scaled(size):
    def change(q, k1, k2, v1, v2):
        q *= size

    return change


def _constant(q, k1, k2, v1, v2):
    k1[:] = k1[:, :, :1]
    k2[:] = 1


def _outlier(q, k1, k2, v1, v2):
    k1[:, :, 230] *= 60


def _first_tile_far_below(q, k1, k2, v1, v2):
    k1[:, :, :500] *= 50


def _powers_of_two(size):
    """A softmax of one pair: k2 of powers of two, so that no product with it rounds."""

    def change(q, k1, k2, v1, v2):
        q *= size
        k2.copy_(torch.exp2(k2.float().abs().clamp(min=1e-3).log2().round()).mul(k2.sign()))

    return change


SAFE = {
    "x1": _scaled(1), "x8": _scaled(8), "x30": _scaled(30), "x100": _scaled(100),
    "x1000": _scaled(1000), "constant": _constant, "outlier": _outlier,
    "first tile far below": _first_tile_far_below,
}  # fmt: skip


def _relative(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def _assert_errs_as_the_portable_kernel(inputs, queries):
    """Hold the error of out and lse over some queries to 1.1 times the portable kernel's."""
    ours, theirs = _both(inputs, W1, W2)
    exact = [
        torch.stack(t) for t in zip(*(_exact(inputs, i, W1, W2) for i in queries), strict=True)
    ]
    for name, mine, other, truth in zip(("out", "lse"), ours, theirs, exact, strict=True):
        assert mine.isfinite().all(), name
        mine, other = (t[0].transpose(0, 1)[list(queries)] for t in (mine, other))
        # lse is the sum of the maximum and of a logarithm of some times its size.
        steps = 4 if name == "lse" else 1 / 4
        least = steps * torch.finfo(mine.dtype).eps
        assert _relative(mine, truth) <= SLACK * _relative(other, truth) + least, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SAFE)
def test_scores_of_any_size_err_as_the_portable_kernel_does(name, dtype):
    inputs = _inputs(700, dtype=dtype)
    SAFE[name](*inputs)
    _assert_errs_as_the_portable_kernel(inputs, QUERIES)


def test_products_beyond_the_range_of_float16():
    """Of q with k2: each row's virtual queries are scaled by a power of two."""
    inputs = _inputs(700, dtype=torch.float16)
    q, k1, k2, _, _ = inputs
    q *= 2000.0
    k1 *= 1e-5
    k2 *= 1000.0
    assert (q.float().abs().max() * k2.float().abs().max()) > 20 * 65504
    _assert_errs_as_the_portable_kernel(inputs, QUERIES)


def test_values_of_any_size():
    """Values times 2^100 give the same bits times 2^100, also where the maximum is raised late."""
    inputs = _inputs(700)
    _first_tile_far_below(*inputs)
    (out, lse), _ = _both(inputs, W1, W2)
    inputs[3].mul_(2.0**100)
    (large, same), _ = _both(inputs, W1, W2)
    assert torch.equal(large, out * 2.0**100)
    assert torch.equal(same, lse)


@pytest.mark.parametrize("size", [1e8, 1e20, 1e30])
def test_huge_scores_give_finite_answers(size):
    inputs = _inputs(200)
    _powers_of_two(size)(*inputs)
    (out, lse), _ = _both(inputs, W1, W2)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    for i in (0, 40, 130, 199):
        exact_out, exact_lse = _exact(inputs, i, W1, W2)
        assert _relative(out[0, :, i], exact_out) < 2**-8
        assert _relative(lse[0, :, i], exact_lse) < 1e-4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [1, 2, 3, 4])
def test_what_is_not_finite_stays_where_it_can_be_seen(which, bad):
    """In its batch row and key-value head, and not before the tiles that hold it."""
    inputs = Case(
        2, 2, 64, 700, head_dim=128, dtype=torch.bfloat16, layout="transposed"
    ).inputs("cuda")  # fmt: skip
    clean, _ = _both(inputs, W1, W2)
    inputs[which][1, 1, 350, 5] = bad
    (out, lse), _ = _both(inputs, W1, W2)
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
    (out, lse), _ = _both(inputs, 30, 7, **arguments)
    assert lse[0, :, 10:20].isneginf().all()
    assert (out[0, :, 10:20] == 0).all()
    assert (out[lse.isneginf()] == 0).all()


def test_a_second_launch_gives_the_same_bits():
    inputs = _inputs(700, batch=2)
    SAFE["x100"](*inputs)
    first, _ = _both(inputs, W1, W2)
    for _ in range(3):
        again, _ = _both(inputs, W1, W2)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])
