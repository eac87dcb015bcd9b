"""Which problems the Hopper kernels serve: the first reason why not, told without a GPU.

What is not served here runs on the portable kernels.
"""

import functools

import torch

from csrc_free.device.descriptors import can_describe
from csrc_free.problem import Problem

ROWS = 64  # of a warpgroup's matrix product
_DTYPES = (torch.bfloat16, torch.float16)
_FORMS = ("trilinear", "strassen")
_DIMS = (33, 128)  # a tile has 64 or 128 columns: less than half of them would be wasted work
_PROCESSORS = 132  # of an H100, where no device is at hand


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
    return None


def why_not_forward(problem: Problem) -> str | None:
    """Return the first reason why the Hopper forward does not serve a problem, or None."""
    reason = why_not(problem)
    if reason is None and problem.group % ROWS:
        reason = f"a tile is {ROWS} heads of one query, and a key-value head has {problem.group}"
    return reason


@functools.cache
def processors_of(device: torch.device) -> int:
    """Return how many multiprocessors a device has."""
    if device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
