"""The query side of the backward, offset by offset: dq, and parts of the narrow pair's gradients.

One launch makes dq and the parts of dk, another the parts of dv: that is one matrix product more
than both at once, but both at once spill, and take longer.

A tile's rows are REPLICAS copies of BLOCK_Q (position, head) entries, as in the forward.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from csrc_free import measured
from csrc_free.device.forms import key_gradient, query_gradient, store_rows
from csrc_free.device.pair import load_narrow_keys, pairs_of
from csrc_free.device.tiles import (
    head_offs,
    heads_of,
    look,
    offset_range,
    place,
    query_rows,
    sizes_of,
    windows_of,
)
from csrc_free.portable.gradients import PairGradients, inputs_of, launch_backward, sum_parts
from csrc_free.portable.rows import (
    attend_backward,
    load_dout,
    load_queries,
    load_stats,
    queries_of,
    virtual_rows,
)
from csrc_free.portable.shared_memory import backward_bytes
from csrc_free.portable.wide_parts import with_wide_parts
from csrc_free.problem import NOT_SPECIALIZED, Problem
from csrc_free.rounding import ceil_div, next_power_of_2
from csrc_free.steps.delta import Statistics
from csrc_free.steps.parts import Parts, parts_of_queries
from csrc_free.steps.parts_sum import slot_base
from csrc_free.traits import Device, Traits, first_that_fits


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_Q rows, REPLICAS offsets at a time, that meet BLOCK_N wide keys at a time."""

    block_q: int
    replicas: int
    block_n: int
    tile_stages: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # the wide pair is read through tensor descriptors

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        return backward_bytes(
            self.block_q * self.replicas, self.block_n, self.tile_stages, traits, device
        )


SPACE = {
    "block_q": (16, 32, 64, 128), "replicas": (1, 2, 4), "block_n": (16, 32, 64, 128),
    "tile_stages": (1, 2, 3, 4), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4),
}  # fmt: skip


def choose(traits: Traits, device: Device) -> Config:
    """Choose the tiles of dq alone."""
    return first_that_fits(_configs(traits, device), traits, device)


def choose_with_parts(traits: Traits, device: Device) -> Config | None:
    """Choose the tiles of dq and the narrow pair's parts, offset by offset; None: take `keys`."""
    if device.is_interpreted:  # which meets every kernel, each at one range of group sizes
        return Config(16, 2, 16, 1, 4, 1, traits.is_describable) if traits.group == 1 else None
    found = measured.configs(
        "query_with_parts", Config, traits, device, descriptors=traits.is_describable
    )
    return next((c for c in found if c.shared_bytes(traits, device) <= device.shared_limit), None)


def _configs(traits: Traits, device: Device) -> Iterator[Config]:
    described = traits.is_describable
    if device.is_interpreted:
        yield Config(16, 2, 16, 1, 4, 1, described)
        return
    yield from measured.configs("query", Config, traits, device, descriptors=described)
    side, warps = traits.plain_tile
    yield Config(side, 1, side, 1, warps, 1)
    yield Config(16, 1, 16, 1, 8, 1)


@triton.jit
def _add_in_turn(
    parts, slot, replica, slot_mask, gradient, columns,
    REPLICAS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Add rows of a gradient to the slots of a part, one replica after the other.

    A slot meets the next row of the tile with every offset, hence another thread: the barrier makes
    what that one wrote visible.
    """
    ptrs = parts + slot[:, None] * HEAD_DIM + columns[None, :]
    for turn in tl.static_range(REPLICAS):
        mask = (slot_mask & (replica == turn))[:, None] & (columns < HEAD_DIM)[None, :]
        tl.debug_barrier()
        tl.store(ptrs, tl.load(ptrs, mask=mask, other=0.0) + gradient, mask=mask)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward_query_kernel(
    q, k_wide, v_wide, k_narrow, v_narrow, dout, delta, lse2, has_huge, dq, dk_parts, dv_parts,
    kv_bounds, q_start,
    kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
    q_start_default, slots, part_rows, part_shift,
    stride_q_b, stride_q_h, stride_q_n,
    stride_kw_b, stride_kw_h, stride_kw_n, stride_vw_b, stride_vw_h, stride_vw_n,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_do_b, stride_do_h, stride_do_n, stride_dq_b, stride_dq_h, stride_dq_n,
    scale, log2_scale, k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
    FORM: tl.constexpr, SIGN: tl.constexpr, GROUP: tl.constexpr, INDEX: tl.constexpr,
    IS_SMALL_GRID: tl.constexpr, HAS_BOUNDS: tl.constexpr, HAS_Q_START: tl.constexpr,
    HAS_WIDE_BIAS: tl.constexpr, HAS_NARROW_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, REPLICAS: tl.constexpr, BLOCK_N: tl.constexpr,
    HEADS: tl.constexpr, NEEDS_DQ: tl.constexpr, FILLS_DK: tl.constexpr, FILLS_DV: tl.constexpr,
    PARTS_FOLLOW_QUERIES: tl.constexpr,
    TILE_STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_Q rows of one key-value head: their dq, and a part where it fills one.

    Filling parts needs HEADS a power of two; parts must come zeroed.
    """
    M: tl.constexpr = BLOCK_Q * REPLICAS
    form: tl.constexpr = (FORM, SIGN, HAS_WIDE_BIAS, HAS_NARROW_BIAS)
    dims: tl.constexpr = (HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV)
    dot: tl.constexpr = (DOT_DTYPE, PRECISION)
    tiles = tl.cdiv(seq * HEADS, BLOCK_Q)
    tile, bh, batch, kv_head = place(tiles, kv_heads, IS_SMALL_GRID, True)
    sizes = sizes_of(seq, wide_rows, narrow_rows)
    _seq, _keys, _wide_rows, _narrow_rows, _wide_first, narrow_first = sizes
    start = tl.load(q_start + batch) if HAS_Q_START else q_start_default
    windows = windows_of(start, wide_left, wide_right, narrow_left, narrow_right, sizes)
    _wide_begin, _wide_end, narrow_begin, _narrow_end = windows
    replica = tl.arange(0, M) // BLOCK_Q
    flat = tile * BLOCK_Q + tl.arange(0, M) % BLOCK_Q
    rows = query_rows(flat, seq, GROUP, HEADS, INDEX)
    i, head, mask = rows
    sight, narrow_sight = look(rows, batch, kv_bounds, windows, sizes, HAS_BOUNDS)
    narrow_lo, narrow_hi, sees = narrow_sight
    offset_first, offset_last = offset_range(i, narrow_lo, narrow_hi, sees)

    scale = tl.cast(scale, tl.float32)
    log2_scale = tl.cast(log2_scale, tl.float32)
    wide, narrow = pairs_of(
        (k_wide, stride_kw_b, stride_kw_h, stride_kw_n, k_wide_bias),
        (v_wide, stride_vw_b, stride_vw_h, stride_vw_n, v_wide_bias),
        (k_narrow, stride_kn_b, stride_kn_h, stride_kn_n, k_narrow_bias),
        (v_narrow, stride_vn_b, stride_vn_h, stride_vn_n, v_narrow_bias),
        batch, kv_head, sizes, DESCRIPTORS,
    )  # fmt: skip
    is_huge = tl.load(has_huge + bh) != 0
    q_heads = heads_of((q, stride_q_b, stride_q_h, stride_q_n), batch, kv_head, GROUP)
    dout_heads = heads_of((dout, stride_do_b, stride_do_h, stride_do_n), batch, kv_head, GROUP)
    queries = queries_of(q_heads, dout_heads, rows)
    stats = load_stats(lse2, delta, (bh * seq + i) * GROUP + head, mask)
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    keys = tl.arange(0, BLOCK_N).to(INDEX)

    acc = tl.zeros([M, BLOCK_D], tl.float32)
    key = i - offset_first - replica
    sees_key = sees & (key >= narrow_lo) & (key < narrow_hi)
    # One offset ahead, as in the forward: loop-carried operands are multiplied from shared memory.
    vq, vdo, shift, row_dp = virtual_rows(
        queries, stats, narrow, wide, key - narrow_first, sees_key, sees_key, log2_scale,
        form, dims, dot,
    )  # fmt: skip
    for offset in range(offset_first, offset_last + 1, REPLICAS):
        dvq, t, sigma = attend_backward(
            (vq, vdo, shift, row_dp), sight, wide, keys, is_huge, scale, log2_scale, form, dims,
            dot, NEEDS_DQ | FILLS_DK, FILLS_DV, TILE_STAGES, DESCRIPTORS,
        )  # fmt: skip
        if NEEDS_DQ:
            k, k_prev = load_narrow_keys(narrow, key - narrow_first, sees_key, form, dims)
            acc += query_gradient(dvq, sigma, k, k_prev, columns, FORM, SIGN, HEAD_DIM)
        if FILLS_DK | FILLS_DV:
            P: tl.constexpr = BLOCK_Q // HEADS
            summed = tl.arange(0, P * REPLICAS)
            base = slot_base(tile, part_rows, HEADS, part_shift)
            if PARTS_FOLLOW_QUERIES:
                base += narrow_begin - narrow_first
            narrow_row = tile * P + summed % P - offset - summed // P - narrow_first
            slot_mask = (narrow_row >= 0) & (narrow_row < narrow_rows) & (narrow_row >= base)
            slot = (tile * (tl.num_programs(0) // tiles) + bh) * slots + narrow_row - base
        if FILLS_DK:
            query, query_prev = load_queries(queries, form, dims)
            dk = key_gradient(dvq, sigma, query, query_prev, columns, FORM, SIGN, HEAD_DIM)
            dk = tl.sum(tl.reshape(dk, [P * REPLICAS, HEADS, BLOCK_D]), 1)
            _add_in_turn(dk_parts, slot, summed // P, slot_mask, dk, columns, REPLICAS, HEAD_DIM)
        if FILLS_DV:
            dv = t * load_dout(queries, dims)
            dv = tl.sum(tl.reshape(dv, [P * REPLICAS, HEADS, BLOCK_DV]), 1)
            _add_in_turn(
                dv_parts, slot, summed // P, slot_mask, dv, value_columns, REPLICAS, VALUE_DIM
            )

        key -= REPLICAS
        sees_key = sees & (key >= narrow_lo) & (key < narrow_hi)
        vq, vdo, shift, row_dp = virtual_rows(
            queries, stats, narrow, wide, key - narrow_first, sees_key, sees_key, log2_scale,
            form, dims, dot,
        )  # fmt: skip

    if NEEDS_DQ:
        if REPLICAS > 1:
            acc = tl.sum(tl.reshape(acc, [REPLICAS, BLOCK_Q, BLOCK_D]), 0)
            flat = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
            rows = query_rows(flat, seq, GROUP, HEADS, INDEX)
        _i, _head, mask = rows
        dq_offs = head_offs(stride_dq_b, stride_dq_h, stride_dq_n, batch, kv_head, rows, GROUP)
        store_rows(dq, dq_offs, acc, mask, HEAD_DIM)


def write_query(problem: Problem, statistics: Statistics, config: Config, dq: Tensor) -> None:
    """Write dq alone."""
    problem = with_wide_parts(problem)
    _launch(problem, statistics, config, dq, None, NEEDS_DQ=True, FILLS_DK=False, FILLS_DV=False)


def write_query_and_narrow(
    problem: Problem, statistics: Statistics, config: Config, dq: Tensor, narrow: PairGradients
) -> bool:
    """Write dq and the narrow pair's gradients, unless their parts would be too large."""
    parts = parts_of_queries(problem, next_power_of_2(problem.group), config.block_q)
    if parts is None:
        return False
    problem = with_wide_parts(problem)
    _launch(problem, statistics, config, dq, parts, NEEDS_DQ=True, FILLS_DK=True, FILLS_DV=False)
    _launch(problem, statistics, config, dq, parts, NEEDS_DQ=False, FILLS_DK=False, FILLS_DV=True)
    sum_parts(parts, narrow, problem)
    return True


def _launch(
    problem: Problem, statistics: Statistics, config: Config, dq: Tensor, parts: Parts | None,
    **wanted: bool,
) -> None:  # fmt: skip
    heads = problem.group if parts is None else parts.per_position
    launch_backward(
        backward_query_kernel, ceil_div(problem.q.shape[2] * heads, config.block_q),
        problem, statistics,
        inputs_of(problem, statistics, config.block_n if config.descriptors else None),
        (dq, *((None, None) if parts is None else (parts.dk, parts.dv))),
        (0, 0, 0) if parts is None else parts.numbers, dq.stride()[:3],
        HEADS=heads, PARTS_FOLLOW_QUERIES=parts is not None and parts.do_follow_queries,
        config=config, **wanted,
    )  # fmt: skip
