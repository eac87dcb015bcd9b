"""Gradients of the wide pair, by virtual queries: every program owns a tile of wide keys."""

from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl

from csrc_free import measured
from csrc_free.device.forms import STRASSEN, load_for_form, load_rows, virtual_query
from csrc_free.device.tiles import key_ranges, offset_range, place, positions, query_rows, spread
from csrc_free.portable.shared_memory import backward_bytes
from csrc_free.problem import NOT_SPECIALIZED
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
    scale = tl.cast(scale, tl.float32)
    log2_scale = tl.cast(log2_scale, tl.float32)
    k_wide_bias = tl.cast(k_wide_bias, tl.float32)
    v_wide_bias = tl.cast(v_wide_bias, tl.float32)
    k_narrow_bias = tl.cast(k_narrow_bias, tl.float32)
    v_narrow_bias = tl.cast(v_narrow_bias, tl.float32)
    tiles = tl.cdiv(wide_rows, BLOCK_N)
    tile, bh, batch, kv_head = place(tiles, kv_heads, IS_SMALL_GRID, False)
    m_keys = tl.maximum(wide_rows, narrow_rows)
    wide_first = m_keys - wide_rows
    narrow_first = m_keys - narrow_rows
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)

    wide_row = (tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
    there = wide_row < wide_rows
    key = wide_first + wide_row
    key_first = wide_first + tile * BLOCK_N
    key_last = tl.minimum(key_first + BLOCK_N, m_keys) - 1
    k_wide += batch * stride_kw_b + kv_head * stride_kw_h
    v_wide += batch * stride_vw_b + kv_head * stride_vw_h
    k = load_rows(k_wide, wide_row, stride_kw_n, columns, there, HEAD_DIM, BLOCK_D)
    v = load_rows(v_wide, wide_row, stride_vw_n, value_columns, there, VALUE_DIM, BLOCK_DV)
    k = k.to(DOT_DTYPE)
    v = v.to(DOT_DTYPE)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    k_narrow += batch * stride_kn_b + kv_head * stride_kn_h
    v_narrow += batch * stride_vn_b + kv_head * stride_vn_h
    q += batch * stride_q_b + kv_head * GROUP * stride_q_h
    dout += batch * stride_do_b + kv_head * GROUP * stride_do_h
    statistics = bh * seq * GROUP
    is_huge = tl.load(has_huge + bh) != 0
    start = positions(q_start, batch, 0, q_start_default, HAS_Q_START)
    flat_first = tl.maximum(key_first - wide_right - start, 0) * GROUP
    flat_end = tl.minimum(key_last + wide_left - start + 1, seq) * GROUP
    for flat in range(flat_first, flat_end, BLOCK_Q):
        i, head, real = query_rows(flat + tl.arange(0, BLOCK_Q), seq, GROUP, GROUP, INDEX)
        position = start + i
        lo, hi, narrow_lo, narrow_hi = key_ranges(
            kv_bounds, batch, i, real, position, wide_left, wide_right, narrow_left, narrow_right,
            wide_first, narrow_first, seq, m_keys, HAS_BOUNDS,
        )  # fmt: skip
        sees = (lo <= key_last) & (hi > key_first) & (narrow_lo < narrow_hi)
        _first, _last, full_lo, full_hi = spread(lo, hi, m_keys)
        is_partial = (key_first < full_lo) | (key_first + BLOCK_N > full_hi) | is_huge
        offset_first, offset_last = offset_range(sees, position, narrow_lo, narrow_hi)

        query, query_prev = load_for_form(
            q, i * stride_q_n + head * stride_q_h, 1, columns, real, 0.0,
            FORM, False, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        do = load_rows(
            dout, i * stride_do_n + head * stride_do_h, 1, value_columns, real,
            VALUE_DIM, BLOCK_DV,
        )  # fmt: skip
        row_lse2 = tl.load(
            lse2 + statistics + flat + tl.arange(0, BLOCK_Q), mask=real, other=float("inf")
        )
        row_delta = tl.load(delta + statistics + flat + tl.arange(0, BLOCK_Q), mask=real, other=0.0)
        for offset in tl.range(offset_first, offset_last + 1, num_stages=OFFSET_STAGES):
            narrow_key = position - offset
            seen = sees & (narrow_key >= narrow_lo) & (narrow_key < narrow_hi)
            kn, kn_prev = load_for_form(
                k_narrow, narrow_key - narrow_first, stride_kn_n, columns, seen, k_narrow_bias,
                FORM, HAS_NARROW_BIAS, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            vn = load_rows(
                v_narrow, narrow_key - narrow_first, stride_vn_n, value_columns, seen,
                VALUE_DIM, BLOCK_DV,
            )  # fmt: skip
            if HAS_NARROW_BIAS:
                vn = vn.to(tl.float32) + v_narrow_bias
            vq = virtual_query(query, query_prev, kn, kn_prev, columns, FORM, SIGN, HEAD_DIM)
            vdo = do * vn
            shift = tl.where(seen, row_lse2, float("inf"))
            row_dp = -row_delta
            if FORM == STRASSEN:
                shift -= tl.sum(query.to(tl.float32) * kn.to(tl.float32), 1) * log2_scale
            if HAS_WIDE_BIAS:
                shift -= tl.sum(vq.to(tl.float32), 1) * (k_wide_bias * log2_scale)
                row_dp += tl.sum(vdo.to(tl.float32), 1) * v_wide_bias
            vq = vq.to(DOT_DTYPE)
            vdo = vdo.to(DOT_DTYPE)
            s = tl.dot(k, tl.trans(vq), input_precision=PRECISION)  # [BLOCK_N, BLOCK_Q]
            dp = tl.dot(v, tl.trans(vdo), input_precision=PRECISION)
            p = tl.exp2(s * log2_scale - shift[None, :])
            if is_partial:
                visible = (key[:, None] >= lo[None, :]) & (key[:, None] < hi[None, :])
                p = tl.where(visible, tl.minimum(p, 1.0), 0.0)
            if PRECISION == "ieee":
                # Sums of sums: one chain over all rows and offsets, of tens of thousands of terms,
                # would lose what float32 is asked for. The mask keeps the additions apart.
                dv += tl.where(there[:, None], tl.dot(p, vdo, input_precision=PRECISION), 0.0)
                ds = p * (dp + row_dp[None, :])
                dk += tl.where(there[:, None], tl.dot(ds, vq, input_precision=PRECISION), 0.0)
            else:
                dv = tl.dot(p.to(DOT_DTYPE), vdo, dv, input_precision=PRECISION)
                ds = p * (dp + row_dp[None, :])
                dk = tl.dot(ds.to(DOT_DTYPE), vq, dk, input_precision=PRECISION)

    mask = there[:, None]
    to = batch * stride_dk_b + kv_head * stride_dk_h + wide_row * stride_dk_n
    tl.store(
        dk_wide + to[:, None] + columns[None, :], dk * scale,
        mask=mask & (columns < HEAD_DIM)[None, :],
    )  # fmt: skip
    to = batch * stride_dv_b + kv_head * stride_dv_h + wide_row * stride_dv_n
    tl.store(
        dv_wide + to[:, None] + value_columns[None, :], dv,
        mask=mask & (value_columns < VALUE_DIM)[None, :],
    )  # fmt: skip
