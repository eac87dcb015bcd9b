"""The determinant's columns in an order in which a lane has whole threes, and back.

A logit is a sum over columns, in whatever order. The Hopper kernels take q and both keys with
their columns moved to where `threes` multiplies them, and leave the gradients in that order.
Exchanged roles turn every three around, which is an order as well: its second and third components
change places.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from csrc_free.launch import launch
from csrc_free.problem import Problem
from csrc_free.rounding import ceil_div
from csrc_free.traits import Device, Traits

_FORM = "determinant"


@dataclass(frozen=True)
class Config:
    """Rows of a program, which only moves them."""

    block_rows: int = 32
    num_warps: int = 4
    num_stages: int = 1

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound: rows go from the threads that load them to those that store."""
        return 4 * self.block_rows * 128


@triton.jit
def place_of(column, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, IS_TURNED: tl.constexpr):
    """Return where a column stands in an ordered row.

    Of blocks of eight columns, three in a row hold the components of eight threes. In the one or
    two that are left over a component of a three is one of two columns, and the last two columns
    are trilinear ones; but of two, the last four are a three and a trilinear column.
    """
    BLOCKS: tl.constexpr = COLUMNS // 8
    WHOLE: tl.constexpr = BLOCKS // 3  # times eight threes
    three = column // 3
    axis = column % 3
    if IS_TURNED:
        axis = (3 - axis) % 3
    rest = three - 8 * WHOLE
    left_over = 24 * WHOLE + rest // 2 * 8 + axis * 2 + rest % 2
    if BLOCKS - 3 * WHOLE == 2:
        left_over = tl.where(rest < 4, left_over, COLUMNS - 10 + axis + axis // 2 * 6)
    place = tl.where(rest < 0, three // 8 * 24 + axis * 8 + three % 8, left_over)
    trilinear = column - HEAD_DIM // 3 * 3 + COLUMNS - 2 // (BLOCKS - 3 * WHOLE)
    return tl.where(column < HEAD_DIM // 3 * 3, place, trilinear)


@triton.jit(do_not_specialize=["tiles", "heads", "seq"])
def order_columns_kernel(
    source, target, tiles, heads, seq,
    stride_s_b, stride_s_h, stride_s_n, stride_t_b, stride_t_h, stride_t_n,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
    IS_TURNED: tl.constexpr, IS_BACK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """One program moves BLOCK_ROWS rows of [B, H, N, ..]: into the order, or back out of it."""
    bh = tl.program_id(0) // tiles
    batch = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    i = tl.program_id(0) % tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (i < seq)[:, None] & (column < HEAD_DIM)[None, :]
    place = place_of(column, HEAD_DIM, COLUMNS, IS_TURNED)
    source_columns = column
    target_columns = place
    if IS_BACK:
        source_columns = place
        target_columns = column
    source += batch * stride_s_b + head * stride_s_h
    target += batch * stride_t_b + head * stride_t_h
    source_offs = i.to(tl.int64) * stride_s_n
    target_offs = i.to(tl.int64) * stride_t_n
    x = tl.load(source + source_offs[:, None] + source_columns[None, :], mask=mask)
    tl.store(target + target_offs[:, None] + target_columns[None, :], x, mask=mask)


def columns_of(problem: Problem) -> int:
    """Return how many columns q and the keys have, once ordered."""
    head_dim = problem.q.shape[3]
    if problem.form != _FORM:
        return head_dim
    # Of two trilinear columns beside many threes, 64 have no place for the second.
    return 64 if head_dim <= 64 and head_dim % 3 < 2 else 128


def ordered(problem: Problem) -> Problem:
    """Return a determinant's problem with ordered columns: zeros where a row has none.

    Any other form's comes back as it is.
    """
    if problem.form != _FORM:
        return problem
    head_dim, columns = problem.q.shape[3], columns_of(problem)

    def order(tensor: Tensor) -> Tensor:
        shape = (*tensor.shape[:3], columns)
        space = tensor.new_empty(shape) if head_dim == columns else tensor.new_zeros(shape)
        _move(tensor, space, head_dim, columns, is_turned=problem.is_exchanged, is_back=False)
        return space

    q, wide, narrow = map(order, (problem.q, problem.k_wide, problem.k_narrow))
    return dataclasses.replace(problem, q=q, k_wide=wide, k_narrow=narrow)


@contextlib.contextmanager
def gradients_of(problem: Problem, *targets: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Give kernels of an ordered problem places for gradients, whose columns then move back."""
    if problem.form != _FORM:
        yield targets
        return
    columns = columns_of(problem)
    places = tuple(t.new_empty((*t.shape[:3], columns)) for t in targets)
    yield places
    for place, target in zip(places, targets, strict=True):
        head_dim, is_turned = target.shape[3], problem.is_exchanged
        _move(place, target, head_dim, columns, is_turned=is_turned, is_back=True)


def bytes_of(problem: Problem) -> int:
    """Return the bytes of what is ordered: q and the keys, and the gradients of the keys."""
    if problem.form != _FORM:
        return 0
    k_wide, k_narrow = problem.k_wide, problem.k_narrow
    rows = sum(t.numel() // t.shape[3] for t in (problem.q, k_wide, k_narrow, k_wide, k_narrow))
    return rows * columns_of(problem) * problem.q.element_size()


def _move(
    source: Tensor, target: Tensor, head_dim: int, columns: int, *, is_turned: bool, is_back: bool
) -> None:
    batch, heads, seq, _ = source.shape
    config = Config()
    tiles = ceil_div(seq, config.block_rows)
    launch(
        order_columns_kernel, batch * heads * tiles,
        source, target, tiles, heads, seq, *source.stride()[:3], *target.stride()[:3],
        HEAD_DIM=head_dim, COLUMNS=columns, IS_TURNED=is_turned, IS_BACK=is_back, config=config,
    )  # fmt: skip
