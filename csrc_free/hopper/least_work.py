"""Problems so small that a kernel's time on the device is hidden behind its launch.

The portable kernels cost the host less: they take fewer descriptors, and compiled code has them
written out, where a Gluon kernel keeps the operator's call.
"""

from typing import TYPE_CHECKING

import torch

from csrc_free import tracing

if TYPE_CHECKING:  # it imports triton, and whoever sets LEAST may have none
    from csrc_free.problem import Problem

LEAST = 2 * 10**10


def why_too_little(problem: "Problem") -> str | None:
    """Return why a problem is too small for the Hopper kernels, or None.

    The backward's work is 2.5 times the forward's, and so is the host's: one rule serves both.
    """
    is_little = work_of(problem) < LEAST
    # No guard where the example is large: the operator that is then called decides when it runs.
    if tracing.likely(is_little) and tracing.holds(is_little):
        return f"less than {LEAST:.0e} FLOPs take the device less time than the host"
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
