"""The query side of the backward, narrow key by narrow key: dq, and the narrow pair's parts.

All rows of a tile meet the same narrow key, so its gradients are sums over the tile's rows.
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
    heads_of,
    look,
    place,
    query_rows,
    rows_in,
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
from csrc_free.rounding import ceil_div
from csrc_free.steps.delta import Statistics
from csrc_free.steps.parts import parts_of_queries
from csrc_free.steps.parts_sum import slot_base
from csrc_free.traits import Device, Traits, first_that_fits


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_Q rows that meet BLOCK_N wide keys at a time."""

    block_q: int
    block_n: int
    tile_stages: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # the wide pair is read through tensor descriptors

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        return backward_bytes(self.block_q, self.block_n, self.tile_stages, traits, device)


SPACE = {
    "block_q": (16, 32, 64, 128), "block_n": (16, 32, 64, 128), "tile_stages": (1, 2, 3, 4),
    "num_warps": (4, 8), "num_stages": (1, 2, 3, 4),
}  # fmt: skip


def choose(traits: Traits, device: Device) -> Config:
    """Choose the tiles of dq and the narrow pair's parts, narrow key by narrow key."""
    return first_that_fits(_configs(traits, device), traits, device)


def tiles_of_a_part(traits: Traits, device: Device) -> int:
    """Choose how many tiles of rows share a part of the narrow pair's gradients."""
    return 1 if measured.is_measured(traits, device) else 2


def _configs(traits: Traits, device: Device) -> Iterator[Config]:
    described = traits.is_describable
    if device.is_interpreted:
        yield Config(16, 16, 1, 4, 1, described)
        return
    yield from measured.configs("keys", Config, traits, device, descriptors=described)
    side, warps = traits.plain_tile
    yield Config(side, side, 1, warps, 1)
    yield Config(16, 16, 1, 8, 1)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward_keys_kernel(
    q, k_wide, v_wide, k_narrow, v_narrow, dout, delta, lse2, has_huge, dq, dk_parts, dv_parts,
    kv_bounds, q_start,
    kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
    q_start_default, slots, part_rows, part_shift, tiles_of_a_part,
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
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, PARTS_FOLLOW_QUERIES: tl.constexpr,
    TILE_STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One program owns `tiles_of_a_part` tiles of BLOCK_Q rows: their dq, and one part.

    It loops over its tiles, over the narrow keys a tile sees, and inside over tiles of the wide
    window. Parts must come zeroed; only this program adds to its part.
    """
    form: tl.constexpr = (FORM, SIGN, HAS_WIDE_BIAS, HAS_NARROW_BIAS)
    dims: tl.constexpr = (HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV)
    dot: tl.constexpr = (DOT_DTYPE, PRECISION)
    parts = tl.cdiv(tl.cdiv(seq * GROUP, BLOCK_Q), tiles_of_a_part)
    part, bh, batch, kv_head = place(parts, kv_heads, IS_SMALL_GRID, True)
    sizes = sizes_of(seq, wide_rows, narrow_rows)
    _seq, key_count, _wide_rows, _narrow_rows, _wide_first, narrow_first = sizes
    start = tl.load(q_start + batch) if HAS_Q_START else q_start_default
    windows = windows_of(start, wide_left, wide_right, narrow_left, narrow_right, sizes)
    _wide_begin, _wide_end, narrow_begin, _narrow_end = windows
    scale = tl.cast(scale, tl.float32)
    log2_scale = tl.cast(log2_scale, tl.float32)
    wide, narrow = pairs_of(
        (k_wide, stride_kw_b, stride_kw_h, stride_kw_n, k_wide_bias),
        (v_wide, stride_vw_b, stride_vw_h, stride_vw_n, v_wide_bias),
        (k_narrow, stride_kn_b, stride_kn_h, stride_kn_n, k_narrow_bias),
        (v_narrow, stride_vn_b, stride_vn_h, stride_vn_n, v_narrow_bias),
        batch, kv_head, sizes, DESCRIPTORS,
    )  # fmt: skip
    q_heads = heads_of((q, stride_q_b, stride_q_h, stride_q_n), batch, kv_head, GROUP)
    dout_heads = heads_of((dout, stride_do_b, stride_do_h, stride_do_n), batch, kv_head, GROUP)
    dq_heads = heads_of((dq, stride_dq_b, stride_dq_h, stride_dq_n), batch, kv_head, GROUP)
    is_huge = tl.load(has_huge + bh) != 0
    base = slot_base(part, part_rows, GROUP, part_shift)
    if PARTS_FOLLOW_QUERIES:
        base += narrow_begin - narrow_first
    part_slot = (part * (tl.num_programs(0) // parts) + bh) * slots - base - narrow_first
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    keys = tl.arange(0, BLOCK_N).to(INDEX)
    # All rows meet the same narrow key: its row and its mask are of one element.
    same = tl.zeros([1], INDEX)

    for tile in range(part * tiles_of_a_part, (part + 1) * tiles_of_a_part):
        flat = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        rows = query_rows(flat, seq, GROUP, GROUP, INDEX)
        i, head, mask = rows
        sight, narrow_sight = look(rows, batch, kv_bounds, windows, sizes, HAS_BOUNDS)
        narrow_lo, narrow_hi, sees = narrow_sight
        key_first = tl.min(tl.where(sees, narrow_lo, key_count), 0)
        key_end = tl.max(tl.where(sees, narrow_hi, 0), 0)
        queries = queries_of(q_heads, dout_heads, rows)
        stats = load_stats(lse2, delta, (bh * seq + i) * GROUP + head, mask)

        acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        sees_key = sees & (key_first >= narrow_lo) & (key_first < narrow_hi)
        vq, vdo, shift, row_dp = virtual_rows(
            queries, stats, narrow, wide, same + key_first - narrow_first,
            same + key_first < key_end, sees_key, log2_scale, form, dims, dot,
        )  # fmt: skip
        for key in range(key_first, key_end):
            dvq, t, sigma = attend_backward(
                (vq, vdo, shift, row_dp), sight, wide, keys, is_huge, scale, log2_scale, form, dims,
                dot, True, True, TILE_STAGES, DESCRIPTORS,
            )  # fmt: skip
            k, k_prev = load_narrow_keys(narrow, same + key - narrow_first, same == 0, form, dims)
            acc += query_gradient(dvq, sigma, k, k_prev, columns, FORM, SIGN, HEAD_DIM)
            query, query_prev = load_queries(queries, form, dims)
            dk = tl.sum(
                key_gradient(dvq, sigma, query, query_prev, columns, FORM, SIGN, HEAD_DIM), 0
            )
            dv = tl.sum(t * load_dout(queries, dims), 0)
            dk_slot = dk_parts + (part_slot + key) * HEAD_DIM + columns
            dv_slot = dv_parts + (part_slot + key) * VALUE_DIM + value_columns
            tl.store(
                dk_slot, tl.load(dk_slot, mask=columns < HEAD_DIM, other=0.0) + dk,
                mask=columns < HEAD_DIM,
            )  # fmt: skip
            tl.store(
                dv_slot, tl.load(dv_slot, mask=value_columns < VALUE_DIM, other=0.0) + dv,
                mask=value_columns < VALUE_DIM,
            )  # fmt: skip

            ahead = key + 1
            sees_key = sees & (ahead >= narrow_lo) & (ahead < narrow_hi)
            vq, vdo, shift, row_dp = virtual_rows(
                queries, stats, narrow, wide, same + ahead - narrow_first, same + ahead < key_end,
                sees_key, log2_scale, form, dims, dot,
            )  # fmt: skip
        dq_rows, dq_offs = rows_in(dq_heads, rows)
        store_rows(dq_rows, dq_offs, acc, mask, HEAD_DIM)
        # The next tile meets the same narrow keys.
        tl.debug_barrier()


def write_query_and_narrow(
    problem: Problem, statistics: Statistics, config: Config, tiles_of_a_part: int,
    dq: Tensor, narrow: PairGradients,
) -> None:  # fmt: skip
    """Write dq and the narrow pair's gradients; parts that would be too large take more tiles."""
    parts = parts_of_queries(problem, problem.group, tiles_of_a_part * config.block_q)
    while parts is None:
        tiles_of_a_part *= 2
        parts = parts_of_queries(problem, problem.group, tiles_of_a_part * config.block_q)
    tiles = ceil_div(problem.q.shape[2] * problem.group, config.block_q)
    problem = with_wide_parts(problem)
    launch_backward(
        backward_keys_kernel, ceil_div(tiles, tiles_of_a_part),
        problem, statistics,
        inputs_of(problem, statistics, config.block_n if config.descriptors else None),
        (dq, parts.dk, parts.dv),
        (*parts.numbers, tiles_of_a_part), dq.stride()[:3],
        PARTS_FOLLOW_QUERIES=parts.do_follow_queries, config=config,
    )  # fmt: skip
    sum_parts(parts, narrow, problem)
