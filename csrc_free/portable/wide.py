"""Gradients of the wide pair, by virtual queries: every program owns a tile of wide keys."""

from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl

from csrc_free import measured
from csrc_free.device.forms import store_rows, virtual_query
from csrc_free.device.pair import load_narrow_keys, load_narrow_values, load_pair, pairs_of
from csrc_free.device.products import operand, product, rounded_operand, transposed
from csrc_free.device.tiles import (
    heads_of,
    look,
    offset_range,
    place,
    query_rows,
    sizes_of,
    windows_of,
)
from csrc_free.portable.gradients import PairGradients, complete, inputs_of, launch_backward
from csrc_free.portable.rows import (
    load_dout,
    load_queries,
    load_stats,
    queries_of,
    row_constant,
    row_dp_of,
)
from csrc_free.portable.shared_memory import backward_bytes
from csrc_free.problem import NOT_SPECIALIZED, Problem
from csrc_free.rounding import ceil_div
from csrc_free.steps.delta import Statistics
from csrc_free.traits import Device, Traits, first_that_fits


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_N wide keys that meet BLOCK_Q rows of each offset in turn."""

    block_q: int
    block_n: int
    offset_stages: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        return backward_bytes(self.block_n, self.block_q, self.num_stages, traits, device)


SPACE = {
    "block_q": (16, 32, 64, 128), "block_n": (16, 32, 64, 128), "offset_stages": (1, 2, 3, 4),
    "num_warps": (4, 8), "num_stages": (1, 2, 3, 4),
}  # fmt: skip


def choose(traits: Traits, device: Device) -> Config:
    """Choose the tiles of the wide pair's gradients."""
    return first_that_fits(_configs(traits, device), traits, device)


def _configs(traits: Traits, device: Device) -> Iterator[Config]:
    if device.is_interpreted:
        yield Config(16, 16, 1, 4, 1)
        return
    yield from measured.configs("wide", Config, traits, device)
    side, warps = traits.plain_tile
    yield Config(side, side, 1, warps, 1)
    yield Config(16, 16, 1, 8, 1)


@triton.jit
def _plus_product(total, a, b, key_mask, PRECISION: tl.constexpr):
    """Return total + a · b.

    In float32 these are sums of sums: one chain over all rows and offsets, of tens of thousands of
    terms, would lose what float32 is asked for. The mask keeps the additions apart.
    """
    if PRECISION == "ieee" or PRECISION == "bf16x6":
        total += tl.where(key_mask[:, None], product(a, b, None, PRECISION), 0.0)
    else:
        total = product(a, b, total, PRECISION)
    return total


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward_wide_kernel(
    q, k_wide, v_wide, k_narrow, v_narrow, dout, delta, lse2, has_huge, dk_wide, dv_wide,
    kv_bounds, q_start,
    kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
    q_start_default,
    stride_q_b, stride_q_h, stride_q_n,
    stride_kw_b, stride_kw_h, stride_kw_n, stride_vw_b, stride_vw_h, stride_vw_n,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_do_b, stride_do_h, stride_do_n,
    stride_dk_b, stride_dk_h, stride_dk_n, stride_dv_b, stride_dv_h, stride_dv_n,
    scale, log2_scale, k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
    FORM: tl.constexpr, SIGN: tl.constexpr, GROUP: tl.constexpr, INDEX: tl.constexpr,
    IS_SMALL_GRID: tl.constexpr, HAS_BOUNDS: tl.constexpr, HAS_Q_START: tl.constexpr,
    HAS_WIDE_BIAS: tl.constexpr, HAS_NARROW_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, OFFSET_STAGES: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_N wide keys of one key-value head: dk and dv stay in registers.

    It loops over the rows (position, head) that see the tile, and inside over the offsets of the
    narrow window. delta and lse2 are [B, Hkv, N, G].
    """
    form: tl.constexpr = (FORM, SIGN, HAS_WIDE_BIAS, HAS_NARROW_BIAS)
    dims: tl.constexpr = (HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV)
    # Before the product with P or after it: what spills less as a rule, up to 140 bytes (sm_120).
    MAKES_DS_FIRST: tl.constexpr = PRECISION == "tf32" or PRECISION == "bf16x6"
    tiles = tl.cdiv(wide_rows, BLOCK_N)
    tile, bh, batch, kv_head = place(tiles, kv_heads, IS_SMALL_GRID, False)
    sizes = sizes_of(seq, wide_rows, narrow_rows)
    _seq, key_count, _wide_rows, _narrow_rows, wide_first, narrow_first = sizes
    start = tl.load(q_start + batch) if HAS_Q_START else q_start_default
    windows = windows_of(start, wide_left, wide_right, narrow_left, narrow_right, sizes)
    wide_begin, wide_end, _narrow_begin, _narrow_end = windows
    scale = tl.cast(scale, tl.float32)
    log2_scale = tl.cast(log2_scale, tl.float32)
    wide, narrow = pairs_of(
        (k_wide, stride_kw_b, stride_kw_h, stride_kw_n, k_wide_bias),
        (v_wide, stride_vw_b, stride_vw_h, stride_vw_n, v_wide_bias),
        (k_narrow, stride_kn_b, stride_kn_h, stride_kn_n, k_narrow_bias),
        (v_narrow, stride_vn_b, stride_vn_h, stride_vn_n, v_narrow_bias),
        batch, kv_head, sizes, False,
    )  # fmt: skip
    q_heads = heads_of((q, stride_q_b, stride_q_h, stride_q_n), batch, kv_head, GROUP)
    dout_heads = heads_of((dout, stride_do_b, stride_do_h, stride_do_n), batch, kv_head, GROUP)
    is_huge = tl.load(has_huge + bh) != 0
    columns = tl.arange(0, BLOCK_D)

    wide_row = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    key_mask = wide_row < wide_rows
    key = wide_first + wide_row
    key_first = wide_first + tile * BLOCK_N
    key_last = tl.minimum(key_first + BLOCK_N, key_count) - 1
    # Unbiased: a wide pair's biases are row constants.
    k, v = load_pair(wide, wide_row, key_mask, dims)
    k = operand(k, DOT_DTYPE, PRECISION)
    v = operand(v, DOT_DTYPE, PRECISION)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    flat_first = tl.maximum(key_first - wide_end + 1, 0) * GROUP
    flat_end = tl.minimum(key_last - wide_begin + 1, seq) * GROUP
    for flat in range(flat_first, flat_end, BLOCK_Q):
        row = flat + tl.arange(0, BLOCK_Q)
        rows = query_rows(row, seq, GROUP, GROUP, INDEX)
        i, _head, mask = rows
        sight, narrow_sight = look(rows, batch, kv_bounds, windows, sizes, HAS_BOUNDS)
        lo, hi, _first, _last, full_lo, full_hi = sight
        narrow_lo, narrow_hi, _sees = narrow_sight
        sees = (lo <= key_last) & (hi > key_first) & (narrow_lo < narrow_hi)
        is_partial = (key_first < full_lo) | (key_first + BLOCK_N > full_hi) | is_huge
        offset_first, offset_last = offset_range(i, narrow_lo, narrow_hi, sees)

        queries = queries_of(q_heads, dout_heads, rows)
        query, query_prev = load_queries(queries, form, dims)
        do = load_dout(queries, dims)
        row_lse2, row_delta = load_stats(lse2, delta, bh * seq * GROUP + row, mask)
        for offset in tl.range(offset_first, offset_last + 1, num_stages=OFFSET_STAGES):
            narrow_key = i - offset
            sees_key = sees & (narrow_key >= narrow_lo) & (narrow_key < narrow_hi)
            narrow_row = narrow_key - narrow_first
            kn, kn_prev = load_narrow_keys(narrow, narrow_row, sees_key, form, dims)
            vn = load_narrow_values(narrow, narrow_row, sees_key, form, dims)
            vq = virtual_query(query, query_prev, kn, kn_prev, columns, FORM, SIGN, HEAD_DIM)
            vdo = do * vn
            shift = tl.where(sees_key, row_lse2, float("inf"))
            shift -= row_constant(query, kn, vq, wide, log2_scale, form)
            row_dp = row_dp_of(vdo, row_delta, wide, form)
            vq = rounded_operand(vq, DOT_DTYPE, PRECISION)
            vdo = rounded_operand(vdo, DOT_DTYPE, PRECISION)
            s = product(k, transposed(vq, PRECISION), None, PRECISION)  # [BLOCK_N, BLOCK_Q]
            dp = product(v, transposed(vdo, PRECISION), None, PRECISION)
            p = tl.exp2(s * log2_scale - shift[None, :])
            if is_partial:
                visible = (key[:, None] >= lo[None, :]) & (key[:, None] < hi[None, :])
                p = tl.where(visible, tl.minimum(p, 1.0), 0.0)
            if MAKES_DS_FIRST:
                ds = operand(p * (dp + row_dp[None, :]), DOT_DTYPE, PRECISION)
            dv = _plus_product(dv, operand(p, DOT_DTYPE, PRECISION), vdo, key_mask, PRECISION)
            if not MAKES_DS_FIRST:
                ds = operand(p * (dp + row_dp[None, :]), DOT_DTYPE, PRECISION)
            dk = _plus_product(dk, ds, vq, key_mask, PRECISION)

    dk_offs = batch * stride_dk_b + kv_head * stride_dk_h + wide_row * stride_dk_n
    store_rows(dk_wide, dk_offs, dk * scale, key_mask, HEAD_DIM)
    dv_offs = batch * stride_dv_b + kv_head * stride_dv_h + wide_row * stride_dv_n
    store_rows(dv_wide, dv_offs, dv, key_mask, VALUE_DIM)


def write_wide(
    problem: Problem, statistics: Statistics, config: Config, wide: PairGradients
) -> None:
    """Write the wide pair's gradients."""
    dk, dv = complete(wide, problem.k_wide, problem.v_wide)
    launch_backward(
        backward_wide_kernel, ceil_div(problem.k_wide.shape[2], config.block_n),
        problem, statistics, inputs_of(problem, statistics), (dk, dv),
        strides=(*dk.stride()[:3], *dv.stride()[:3]), config=config,
    )  # fmt: skip
