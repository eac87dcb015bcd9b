"""Problems so small that the host takes longer to launch them than the device to run them.

The portable kernels cost the host less: they take fewer descriptors, and compiled code has them
written out, where a Gluon kernel keeps the operator's call.
"""

from typing import TYPE_CHECKING

import torch

from csrc_free import tracing

if TYPE_CHECKING:  # it imports triton, and whoever sets LEAST may have none
    from csrc_free.problem import Problem

# B1 N256 H16 Hkv4 D64, 512 x 32, is 0.86e10. Forward and backward take the device 1.0 ms on the
# portable kernels and 0.3 on Hopper's; the host 1.8 where the former are written out, 3.2 where
# they are called, and 5.2 where the latter are. At N512 the device takes 1.9 ms and 0.6 (H200,
# torch 2.11.0+cu130, Triton 3.6.0, 2026-11-30; the host beside other programs).
LEAST = 10**10
# For other forms and float16 the portable kernels take the device longer: strassen 1.7 ms there,
# float16 2.3, determinants 2.8 (the same). Time grows with the length, and work with its square.
_TIMES_OF_OTHERS = 4


def why_too_little(problem: "Problem") -> str | None:
    """Return why a problem is too small for the Hopper kernels, or None.

    One rule serves both directions: of the backward both device and host take some three times as
    long as of the forward.
    """
    is_plain = problem.form == "trilinear" and problem.q.dtype == torch.bfloat16
    is_little = work_of(problem) * (1 if is_plain else _TIMES_OF_OTHERS) < LEAST
    # No guard where the example is large: the operator that is then called decides when it runs.
    if tracing.likely(is_little) and tracing.holds(is_little):
        return "a problem so small takes the host longer than the device"
    return None


def work_of(problem: "Problem") -> int:
    """Return the FLOPs of a forward in which every query sees both of its windows whole."""
    batch, heads, seq, head_dim = problem.q.shape
    wide, narrow = (
        torch.sym_min(sum(reach) + 1, rows)
        for reach, rows in (
            (problem.wide_reach, problem.k_wide.shape[2]),
            (problem.narrow_reach, problem.k_narrow.shape[2]),
        )
    )
    return 2 * (head_dim + problem.v_wide.shape[3]) * batch * heads * seq * wide * narrow
