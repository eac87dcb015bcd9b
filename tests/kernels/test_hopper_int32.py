"""Starts and reaches as the Hopper kernels take them: every int32 start means what it means."""

import pytest

pytest.importorskip("triton")

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from csrc_free.hopper.within_int32 import UNBOUNDED, farthest_start, why_not_int32, within_int32
from csrc_free.problem import problem_of
from simplex_ops.contract.windows import UNBOUNDED as WITHOUT_BOUND

REACHES = st.one_of(st.integers(0, 70), st.sampled_from([2**29 - 1, 2**29, WITHOUT_BOUND]))
STARTS = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    st.sampled_from([-(2**31), -(2**30), -(2**29) - 1, 2**29, 2**30 - 1, 2**30, 2**31 - 1]),
)


def problem(queries, keys, reach, start):
    q, k = torch.empty(1, 1, queries, 4), torch.empty(1, 1, keys, 4)
    starts = torch.tensor([start], dtype=torch.int32)
    return problem_of(
        q, k, k, k, k, reach, reach, 1.0, "trilinear", 0.0, 0.0, None, starts
    )  # fmt: skip


def seen(start, queries, keys, left, right):
    """Return [low, high) of the keys that each query sees, empty ones as one."""
    ranges = [(max(start + i - left, 0), min(start + i + right + 1, keys)) for i in range(queries)]
    return [(low, high) if low < high else None for low, high in ranges]


@given(st.integers(1, 40), st.integers(1, 60), REACHES, REACHES, STARTS)
@example(40, 60, WITHOUT_BOUND, WITHOUT_BOUND, 2**31 - 1)
@example(40, 60, 2**29, WITHOUT_BOUND, -(2**31))
def test_a_moved_start_sees_the_same_keys_and_no_sum_leaves_int32(
    queries, keys, left, right, start
):
    given_ = problem(queries, keys, (left, right), start)
    assert why_not_int32(given_) is None
    moved = within_int32(given_)
    assert moved.q_start is not None
    at, (cut_left, cut_right) = int(moved.q_start), moved.wide_reach
    assert max(cut_left, cut_right) <= UNBOUNDED
    assert seen(at, queries, keys, cut_left, cut_right) == seen(start, queries, keys, left, right)
    sums = [at - cut_left, at + queries + cut_right + 1, keys + cut_left - at, -cut_right - at]
    assert all(-(2**31) <= s < 2**31 for s in sums)


def test_what_32_bits_cannot_hold_is_said():
    assert "windows of up to 536870912 keys" in str(why_not_int32(problem(2, 2, (2**29 + 1, 0), 0)))
    long = torch.empty(1).expand(1, 1, 2**26 + 1, 1)
    reaches = ((3, 0), (3, 0))
    given_ = problem_of(
        *(long,) * 5, *reaches, 1.0, "trilinear", 0.0, 0.0, None, None
    )  # fmt: skip
    assert "up to 67108864 queries and keys, got 67108865" in str(why_not_int32(given_))


def test_the_longest_served_problem_leaves_room_for_starts():
    assert farthest_start(2**26, 2**26) > 2**29 + 3 * 2**26
