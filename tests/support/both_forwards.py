"""The Hopper forward beside the portable one: who is nearer to float64, at scores of every size."""

import torch

from csrc_free.hopper import forward as hopper
from csrc_free.hopper.serve import why_not_forward
from csrc_free.portable import forward as portable
from csrc_free.problem import problem_of
from simplex_ops import reference
from simplex_ops.devices.gpu import kernel_arguments

SLACK = 1.1  # times the portable kernel's error


def _outputs(inputs):
    q, v = inputs[0], inputs[3]
    shape = (*q.shape[:3], v.shape[3])
    return (
        torch.full(shape, torch.nan, dtype=q.dtype, device=q.device),
        torch.full(shape[:3], torch.nan, device=q.device),
    )


def both(inputs, w1, w2, **options):
    """Return (out, lse) of the Hopper forward and of the portable one."""
    arguments = kernel_arguments(w1, w2, inputs[0], options)
    problem = problem_of(*inputs, **arguments)
    assert why_not_forward(problem) is None
    ours, theirs = _outputs(inputs), _outputs(inputs)
    hopper.compute(problem, *ours)
    portable.compute(problem, *theirs)
    return ours, theirs


def exact(inputs, i, w1, w2, **options):
    """Return out [H, Dv] and lse [H] of query i of the first batch row, in float64."""
    q, k1, k2, v1, v2 = (t[:1].double() for t in inputs)
    first, second = slice(max(0, i - w1 + 1), i + 1), slice(max(0, i - w2 + 1), i + 1)
    out, lse = reference.attn(
        q[:, :, i : i + 1], k1[:, :, first], k2[:, :, second], v1[:, :, first], v2[:, :, second],
        None, None, is_causal=False, **options,
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


def first_tile_far_below(q, k1, k2, v1, v2):
    k1[:, :, :500] *= 50


def powers_of_two(size):
    """A softmax of one pair: k2 of powers of two, so that no product with it rounds."""

    def change(q, k1, k2, v1, v2):
        q *= size
        k2.copy_(torch.exp2(k2.float().abs().clamp(min=1e-3).log2().round()).mul(k2.sign()))

    return change


SAFE = {
    "x1": _scaled(1), "x8": _scaled(8), "x30": _scaled(30), "x100": _scaled(100),
    "x1000": _scaled(1000), "constant": _constant, "outlier": _outlier,
    "first tile far below": first_tile_far_below,
}  # fmt: skip


def relative(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def assert_errs_as_the_portable_kernel(inputs, queries, **options):
    """Hold the error of out and lse over some queries to 1.1 times the portable kernel's."""
    ours, theirs = both(inputs, W1, W2, **options)
    found = (exact(inputs, i, W1, W2, **options) for i in queries)
    truths = [torch.stack(t) for t in zip(*found, strict=True)]
    for name, mine, other, truth in zip(("out", "lse"), ours, theirs, truths, strict=True):
        assert mine.isfinite().all(), name
        mine, other = (t[0].transpose(0, 1)[list(queries)] for t in (mine, other))
        # lse is the sum of the maximum and of a logarithm of some times its size.
        steps = 4 if name == "lse" else 1 / 4
        least = steps * torch.finfo(mine.dtype).eps
        assert relative(mine, truth) <= SLACK * relative(other, truth) + least, name
