"""Problems whose positions the Hopper kernels can compute in 32 bits, sums with a reach included.

A reach of 2^30 stands for one without a bound. Starts so far from the keys that every finite window
is past them, or every unbounded one holds them all, are moved nearer, where the same is true.
"""

import dataclasses

from csrc_free.problem import Problem

UNBOUNDED = 2**30
_LONGEST = 2**26  # queries, and keys
_WIDEST = 2**29  # a finite reach


def why_not_int32(problem: Problem) -> str | None:
    """Return why 32 bits do not suffice for a problem, or None."""
    longest = max(problem.q.shape[2], problem.keys)
    if longest > _LONGEST:
        return f"they take up to {_LONGEST} queries and keys, got {longest}"
    reaches = (*problem.wide_reach, *problem.narrow_reach)
    if problem.q_start is not None and any(_WIDEST < r < 2**40 for r in reaches):
        return f"with q_start they take windows of up to {_WIDEST} keys, or unbounded ones"
    return None


def within_int32(problem: Problem) -> Problem:
    """Return a problem of the same answer, whose reaches and starts are within 2^30."""
    q_start = problem.q_start
    if q_start is not None:
        far = farthest_start(problem.q.shape[2], problem.keys)
        q_start = q_start.clamp(-far, far)
    wide, narrow = (
        (min(a, UNBOUNDED), min(b, UNBOUNDED))
        for a, b in (problem.wide_reach, problem.narrow_reach)
    )
    return dataclasses.replace(problem, wide_reach=wide, narrow_reach=narrow, q_start=q_start)


def farthest_start(queries: int, keys: int) -> int:
    """Return how far from the keys a start may be: no sum with a reach of 2^30 leaves int32."""
    return 2**30 - 2 * queries - 2 * keys - 64
