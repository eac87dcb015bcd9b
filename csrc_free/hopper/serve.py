"""Which problems the Hopper kernels serve: the first reason why not, told without a GPU.

What is not served here runs on the portable kernels.
"""

import torch

from csrc_free.device.descriptors import can_describe
from csrc_free.hopper.within_int32 import why_not_int32
from csrc_free.problem import Problem

ROWS = 64  # of a warpgroup's matrix product
_DTYPES = (torch.bfloat16, torch.float16)
_FORMS = ("trilinear", "strassen")
_DIMS = (33, 128)  # a tile has 64 or 128 columns: less than half of them would be wasted work
# Each tile of the wide pair meets so many narrow keys, or its way to shared memory is what counts:
# 512 x 1 took 1.15 ms for the portable kernel's 0.92, 512 x 4 2.10 for 2.65 (B 4, N 4096, H 64;
# H100, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-25).
_NARROW_FROM = 4


def why_not(problem: Problem) -> str | None:
    """Return the first reason why no Hopper kernel serves a problem, or None."""
    device = problem.device
    if (device.backend, device.arch) != ("cuda", 90):
        return f"they are written for sm_90, and this is {device.name}"
    if problem.q.dtype not in _DTYPES:
        dtype = str(problem.q.dtype).removeprefix("torch.")
        return f"they take bfloat16 and float16, and q is {dtype}"
    if problem.form not in _FORMS:
        return f"they take the forms {' and '.join(_FORMS)}, and this is {problem.form}"
    for name, dim in (("D", problem.q.shape[3]), ("Dv", problem.v_wide.shape[3])):
        if not _DIMS[0] <= dim <= _DIMS[1]:
            return f"they take {name} from {_DIMS[0]} to {_DIMS[1]}, got {dim}"
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
        return f"a tile is {ROWS} heads of one query, and a key-value head has {problem.group}"
    if problem.narrow_width < _NARROW_FROM:
        return (
            f"a narrow window of fewer than {_NARROW_FROM} keys is no faster, "
            f"got {problem.narrow_width}"
        )
    return None
