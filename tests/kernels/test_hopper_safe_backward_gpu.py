"""The Hopper kernels' gradients on a device: scores and values of any size, NaN and infinities."""

import pytest
import torch

pytest.importorskip("triton")

from both_forwards import relative

from csrc_free import attn as entry
from csrc_free.hopper import serve
from simplex_ops.devices.gpu import kernel_arguments
from simplex_ops.testing import Case, Problem, run_attn
from tools.precision import both, exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]
SLACK = 1.1  # times the portable kernels' error
# Heads to a key-value head, and how many of these.
SIZES = {64: 1, 12: 2, 8: 2, 4: 2, 1: 2}
SEQ = {64: 96, 12: 136, 8: 136, 4: 136, 1: 136}
# float16 of 64 heads is served by `keys`, which rounds k1∘k2.
OF_DTYPES = [(group, torch.bfloat16) for group in SIZES] + [
    (group, torch.float16) for group in SIZES if group < 32
]


@pytest.fixture(autouse=True)
def every_tile_serves(monkeypatch):
    """Serve what the portable forward would be faster at, too."""
    monkeypatch.setattr(serve, "USEFUL_FROM", dict.fromkeys(serve.USEFUL_FROM, 0.0))


def _problem(group, **given):
    case = Case(
        **{
            "batch": 2, "kv_heads": SIZES[group], "group": group, "seq": SEQ[group],
            "head_dim": 128, "w1": 80, "w2": 20, "dtype": torch.bfloat16, "layout": "transposed",
            "through": "both", **given,
        }
    )  # fmt: skip
    problem = Problem.of(case, "cuda")
    q, k1, k2, v1, v2 = problem.inputs
    arguments = kernel_arguments(*problem.windows, q, problem.options)
    assert problem.dout is not None
    served_by = entry.backward_served_by(problem.dout, q, k1, k2, v1, v2, **arguments)
    assert served_by.startswith("hopper")
    assert "portable" not in served_by
    return problem


def _constant(q, k1, k2, v1, v2):
    k1[:] = k1[:, :, :1]
    k2[:] = 1


def _outlier(q, k1, k2, v1, v2):
    k1[:, :, 60] *= 60


def _first_tile_far_below(q, k1, k2, v1, v2):
    k1[:, :, :70] *= 50


def _by_size(size):
    def change(q, k1, k2, v1, v2):
        q *= size

    return change


SAFE = {
    "x1": _by_size(1), "x8": _by_size(8), "x30": _by_size(30), "constant": _constant,
    "outlier": _outlier, "first tile far below": _first_tile_far_below,
}  # fmt: skip


# In float16 the portable kernels cut q∘k2 off where these round it: among outliers of like size it
# is luck whose first is the right one.
@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "group", "dtype"), [
        (name, group, dtype) for name in SAFE for group, dtype in OF_DTYPES
        if name != "outlier" or dtype == torch.bfloat16
    ],
)  # fmt: skip
def test_gradients_err_as_the_portable_kernels_do(name, bias, group, dtype):
    problem = _problem(group, dtype=dtype, k2_bias=bias, v2_bias=bias)
    SAFE[name](*problem.inputs)
    ours, portable = both(problem)
    luck = torch.finfo(dtype).eps / 4  # a step here and there
    for tensor, error in ours.of.items():
        assert error <= SLACK * portable.of[tensor] + luck, tensor


@pytest.mark.parametrize(
    ("size", "group", "dtype"), [
        (size, group, dtype)
        for size in (100, 1000, 1e6) for group, dtype in OF_DTYPES
        if size < 1e6 or dtype == torch.bfloat16
    ],
)  # fmt: skip
def test_gradients_of_large_scores_are_finite(size, group, dtype):
    """Which pair is the first is then a matter of rounding; see `python -m tools.precision`."""
    problem = _problem(group, dtype=dtype)
    problem.inputs[0].mul_(size)
    for name, value in run_attn(torch.ops.simplex.attn, problem).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("group", SIZES)
def test_values_of_any_size_give_the_same_bits(group):
    """v1 times 2^80 and dout by as much less: dv1 changes by that factor, and nothing else.

    Sums of exponentials grow before they are brought down, and v1∘v2 is multiplied by them:
    DESIGN.md, Known limits.
    """
    problem = _problem(group, through="out")
    _first_tile_far_below(*problem.inputs)
    before = run_attn(torch.ops.simplex.attn, problem)
    assert problem.dout is not None
    problem.inputs[3].mul_(2.0**80)
    problem.dout.mul_(2.0**-80)
    after = run_attn(torch.ops.simplex.attn, problem)
    factors = {"out": 2.0**80, "dv1": 2.0**-80}
    for name, value in before.items():
        assert torch.equal(after[name], value * factors.get(name, 1.0)), name


@pytest.mark.parametrize(("group", "dtype"), OF_DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", range(6))
def test_what_is_not_finite_stays_in_its_head(which, bad, group, dtype):
    """In its batch row and key-value head; `which` is one of the inputs, or dout."""
    problem = _problem(group, dtype=dtype)
    before = run_attn(torch.ops.simplex.attn, problem)
    assert problem.dout is not None
    tensor = (*problem.inputs, problem.dout)[which]
    heads = SIZES[group] * (group if which in (0, 5) else 1)
    tensor[1, heads - 1, 70, 5] = bad
    after = run_attn(torch.ops.simplex.attn, problem)
    for name, value in before.items():
        others = value.shape[1] - value.shape[1] // SIZES[group]
        assert torch.equal(after[name][0], value[0]), name
        assert torch.equal(after[name][1, :others], value[1, :others]), name


@pytest.mark.parametrize(("group", "dtype"), OF_DTYPES)
def test_queries_that_see_nothing_have_no_gradient(group, dtype):
    problem = _problem(group, dtype=dtype, bounds="padding")
    start, end = problem.options["kv_bounds"].unbind(-1)
    start[:], end[:] = 0, SEQ[group]
    start[0, 20:40], end[0, 20:40] = 5, 5
    start[1, 40:60], end[1, 40:60] = 7, torch.iinfo(torch.int32).min
    got, truth = run_attn(torch.ops.simplex.attn, problem), exact(problem)
    assert (got["dq"][0, :, 20:40] == 0).all()
    assert (got["dq"][1, :, 40:60] == 0).all()
    for name in ("dq", "dk1", "dk2", "dv1", "dv2"):
        assert relative(got[name], truth[name]) < 0.02, name
    start[:], end[:] = 5, 5
    got = run_attn(torch.ops.simplex.attn, problem)
    for name in ("out", "dq", "dk1", "dk2", "dv1", "dv2"):
        assert (got[name] == 0).all(), name
