"""Which problems the Hopper kernels serve: the first reason why not, told without a GPU.

What is not served here runs on the portable kernels.
"""

import torch

from csrc_free import tracing
from csrc_free.device.descriptors import can_describe
from csrc_free.hopper.least_work import why_too_little
from csrc_free.hopper.ordered import columns_of
from csrc_free.hopper.tiles_config import choose
from csrc_free.hopper.within_int32 import why_not_int32
from csrc_free.problem import Problem

ROWS = 64  # of a warpgroup's matrix product
_DTYPES = (torch.bfloat16, torch.float16)
_DIMS = (33, 128)  # a tile has 64 or 128 columns: less than half of them would be wasted work
# Each tile of the wide pair meets so many narrow keys, or its way to shared memory is what counts:
# 512 x 1 took 1.15 ms for the portable kernel's 0.92, 512 x 4 2.10 for 2.65 (B 4, N 4096, H 64;
# H100, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-25).
_NARROW_FROM = 4

# What of a tile's work is of use at least: a group fills some of its rows, a query sees some of its
# keys. Trilinear: at 0.59 the portable kernel took 0.79 and 0.90 of the time, at 0.73 1.10; other
# forms: at 0.59 2.6 and 3.6 (groups of 3 and 5; H200, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-29
# and 30).
USEFUL_FROM = {"trilinear": 0.7, "strassen": 0.5, "determinant": 0.5}
# In float16 the portable kernel took 7.6 times as long where 0.87 was of use (525 TFLOP/s for 69, 8
# heads to one): as long, were time as that share, where 0.12 is (the same).
USEFUL_FROM_IN_FLOAT16 = 0.25
# Of 64 columns, tiles of 64 positions took 3.72 ms, portable 3.50; of 16, 5.97 and 6.94 (the same;
# bfloat16, and so not said of float16).
MOST_POSITIONS_OF_64_COLUMNS = 16


def why_not(problem: Problem) -> str | None:
    """Return the first reason why no Hopper kernel serves a problem, or None."""
    device = problem.device
    if (device.backend, device.arch) != ("cuda", 90):
        return f"they are written for sm_90, and this is {device.name}"
    if problem.q.dtype not in _DTYPES:
        dtype = str(problem.q.dtype).removeprefix("torch.")
        return f"they take bfloat16 and float16, and q is {dtype}"
    for name, dim in (("D", problem.q.shape[3]), ("Dv", problem.v_wide.shape[3])):
        if not _DIMS[0] <= dim <= _DIMS[1]:
            return f"they take {name} from {_DIMS[0]} to {_DIMS[1]}, got {dim}"
    if (reason := why_too_little(problem)) is not None:
        return reason
    for name, tensor in (
        ("q", problem.q), ("the wide keys", problem.k_wide), ("the wide values", problem.v_wide)
    ):  # fmt: skip
        if not can_describe(tensor):
            return (
                f"{name} must have an address and strides of a positive multiple of 16 bytes, "
                f"got strides {tuple(tensor.stride())}"
            )
    if problem.scale == 0.0:
        return "the scale is 0"
    return why_not_int32(problem)


def why_not_forward(problem: Problem) -> str | None:
    """Return the first reason why the Hopper forward does not serve a problem, or None."""
    reason = why_not(problem)
    if reason is not None:
        return reason
    if problem.group % ROWS:
        reason = _why_not_tiles(problem)
        if reason is not None:
            return reason
    if problem.narrow_width < _NARROW_FROM:
        return (
            f"a narrow window of fewer than {_NARROW_FROM} keys is no faster, "
            f"got {problem.narrow_width}"
        )
    return None


def _why_not_tiles(problem: Problem) -> str | None:
    """Return why tiles of several positions, of all heads of a group, do not serve, or None."""
    group = problem.group
    if group > ROWS:
        return f"a tile holds a group, or {ROWS} heads of it, and a key-value head has {group}"
    if tracing.tracer() is not None:
        return None  # what follows depends on sizes: the operator that is called then decides
    dims = (columns_of(problem), problem.v_wide.shape[3])
    block_d, block_dv = (64 if dim <= 64 else 128 for dim in dims)
    width = min(sum(problem.wide_reach) + 1, problem.k_wide.shape[2])
    config = choose(group, width, block_d, block_dv)
    seq = problem.q.shape[2]
    if seq < config.p:
        return f"a tile is {config.p} positions of {config.heads} heads, and q has {seq}"
    useful = group * width / (config.heads * config.covered(width))
    is_half = problem.q.dtype == torch.float16
    least = USEFUL_FROM[problem.form]
    if is_half:
        least = min(least, USEFUL_FROM_IN_FLOAT16)
    if useful < least:
        return (
            f"a tile has {config.heads} rows for each of {config.p} positions, of which a group "
            f"fills {group}, and meets {config.covered(width)} keys, of which a query sees {width}"
        )
    if block_d == block_dv == 64 and config.p > MOST_POSITIONS_OF_64_COLUMNS and not is_half:
        return f"tiles of 64 columns and {config.p} positions are no faster"
    return None
