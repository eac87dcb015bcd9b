"""Partial gradients of the narrow pair: how many parts there are, and which rows each one holds."""

import dataclasses
import math

import torch
from torch import Tensor

from csrc_free import tracing
from csrc_free.launch import launch
from csrc_free.problem import Problem
from csrc_free.rounding import ceil_div
from csrc_free.steps import parts_sum
from csrc_free.steps.parts_sum import sum_parts_kernel

LIMIT_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Parts:
    """The buffers that a kernel fills, and where slot 0 of each part stands.

    Part number `part` holds the narrow rows from part * rows // per_position + shift on, counted
    from where the first query's narrow window begins if the parts follow the queries; or all rows.
    """

    # Of one dimension: PyTorch asks of each whether it is 1, and a trace would serve one answer.
    dk: Tensor  # float32, zeroed, of [count, B, Hkv, copies, slots, D]
    dv: Tensor  # float32, zeroed, of [count, B, Hkv, copies, slots, Dv]
    count: int
    slots: int
    rows: int
    per_position: int
    shift: int
    do_move: bool
    do_follow_queries: bool
    copies: int = 1  # of every slot: one for each warpgroup that adds without regard to the others

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Return slots, rows and shift, as the kernels take them."""
        return self.slots, self.rows, self.shift

    def sum_into(
        self, dk: Tensor, dv: Tensor, problem: Problem, factors: Tensor | None = None
    ) -> None:
        """Write the sums over parts [B, Hkv, M_narrow, ...], in a fixed order.

        factors [B, Hkv, 2] are what the sums of dk and dv are multiplied by.
        """
        batch, kv_heads, rows, _ = dk.shape
        constants, numbers = problem.constants(), problem.numbers()
        _kv_heads, seq, _wide_rows, _narrow_rows, _left, _right, narrow_left, _, start = numbers
        names = ("HAS_Q_START", "HEAD_DIM", "VALUE_DIM", "BLOCK_D", "BLOCK_DV")
        launch(
            sum_parts_kernel, batch * kv_heads * rows,
            self.dk, self.dv, dk, dv, factors, problem.q_start, kv_heads, rows, self.count,
            *self.numbers, narrow_left, seq, problem.keys, start,
            *dk.stride()[:3], *dv.stride()[:3],
            COPIES=self.copies, PER_POSITION=self.per_position if self.do_move else 1,
            PARTS_MOVE=self.do_move, PARTS_FOLLOW_QUERIES=self.do_follow_queries,
            **{name: constants[name] for name in names},
            config=parts_sum.Config(),
        )  # fmt: skip


def parts_of_queries(problem: Problem, heads: int, rows: int, *, copies: int = 1) -> Parts | None:
    """Allocate parts of `rows` consecutive (position, head) entries, `heads` to a position.

    Returns None where they would be larger than LIMIT_BYTES.
    """
    left, right = problem.narrow_reach
    count = ceil_div(problem.q.shape[2] * heads, rows)
    span = (rows - 1) // heads + 2 + left + right
    return _allocate(problem, count, span, rows, heads, 0, copies, do_follow_queries=True)


def parts_of_wide_keys(problem: Problem, rows: int) -> Parts | None:
    """Allocate parts of `rows` wide keys, each for the narrow rows that share a query with them.

    Returns None where they would be larger than LIMIT_BYTES.
    """
    (left, right), (wide_left, wide_right) = problem.narrow_reach, problem.wide_reach
    count = ceil_div(problem.k_wide.shape[2], rows)
    span = rows + wide_left + wide_right + left + right
    shift = problem.wide_first - wide_right - left - problem.narrow_first
    return _allocate(problem, count, span, rows, 1, shift, 1, do_follow_queries=False)


def _allocate(
    problem: Problem, count: int, span: int, rows: int, per_position: int, shift: int,
    copies: int, *, do_follow_queries: bool,
) -> Parts | None:  # fmt: skip
    batch, kv_heads, narrow_rows, head_dim = problem.k_narrow.shape
    value_dim = problem.v_narrow.shape[3]
    do_move = tracing.holds(span < narrow_rows)
    slots = span if do_move else narrow_rows
    size = math.prod((count, batch, kv_heads, copies, slots))
    if tracing.holds(4 * size * (head_dim + value_dim) > LIMIT_BYTES) and tracing.holds(count > 1):
        return None
    dk, dv = (
        torch.zeros(size * dim, dtype=torch.float32, device=problem.q.device)
        for dim in (head_dim, value_dim)
    )
    if not do_move:
        rows, shift = 0, 0
    do_follow_queries = do_move and do_follow_queries
    return Parts(
        dk, dv, count, slots, rows, per_position, shift, do_move, do_follow_queries, copies
    )  # fmt: skip
