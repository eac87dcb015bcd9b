"""All four key-value gradients of the trilinear form in four matrix products, for large groups.

For a narrow key m and a tile of wide keys j, with X = sum of dS · q and Y = sum of P · dout over
the queries that see m:

    dk_wide += scale · k_m ∘ X      dk_m = scale · sum over j of k_j ∘ X[j]
    dv_wide += v_m ∘ Y              dv_m = sum over j of v_j ∘ Y[j]

so the inner loop is that of plain flash attention, with virtual keys k_j ∘ k_m.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl

from csrc_free import measured
from csrc_free.device.descriptors import load_described
from csrc_free.device.forms import load_rows
from csrc_free.device.tiles import key_ranges, place, positions, query_rows
from csrc_free.portable.shared_memory import backward_bytes
from csrc_free.problem import NOT_SPECIALIZED
from csrc_free.traits import Device, Traits


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_N wide keys that meet BLOCK_Q rows at a time."""

    block_q: int
    block_n: int
    tile_stages: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # the rows are read through tensor descriptors

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        return backward_bytes(self.block_n, self.block_q, self.tile_stages, traits, device)


SPACE = {
    "block_q": (16, 32, 64, 128), "block_n": (16, 32, 64, 128), "tile_stages": (1, 2, 3, 4),
    "num_warps": (4, 8), "num_stages": (1, 2, 3, 4),
}  # fmt: skip


def choose(traits: Traits, device: Device) -> Config | None:
    """Choose the tiles of all four key-value gradients at once; None: take the other kernels.

    Rows are read by descriptor where a tile is of one position.
    """
    for config in _configs(traits, device):
        if config.shared_bytes(traits, device) <= device.shared_limit:
            is_of_one_position = traits.group % config.block_q == 0
            can = traits.is_describable and traits.are_rows_describable
            return dataclasses.replace(config, descriptors=can and is_of_one_position)
    return None


def _configs(traits: Traits, device: Device) -> Iterator[Config]:
    if device.is_interpreted:  # which meets every kernel, each at one range of group sizes
        if traits.group >= 4 and traits.form == "trilinear":
            yield Config(16, 16, 1, 4, 1)
        return
    yield from measured.configs("pairs", Config, traits, device)


@triton.jit
def _virtual_keys(
    k_tile, v_tile, k_narrow, v_narrow, narrow_row, stride_kw_n, stride_vw_n, stride_kn_n,
    stride_vn_n, keys, there, is_row,
    k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Return k_j ∘ k_m [BLOCK_N, BLOCK_D] and v_j ∘ v_m [BLOCK_N, BLOCK_DV]."""
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    k = load_rows(k_tile, keys, stride_kw_n, columns, there, HEAD_DIM, BLOCK_D)
    v = load_rows(v_tile, keys, stride_vw_n, value_columns, there, VALUE_DIM, BLOCK_DV)
    row = narrow_row.to(tl.int64)
    # Not `is_row & ...`: Triton 3.9's interpreter takes no mask made of a scalar and a block.
    k_row = tl.load(
        k_narrow + row * stride_kn_n + columns,
        mask=tl.where(is_row, columns < HEAD_DIM, False), other=0.0,
    )  # fmt: skip
    v_row = tl.load(
        v_narrow + row * stride_vn_n + value_columns,
        mask=tl.where(is_row, value_columns < VALUE_DIM, False), other=0.0,
    )  # fmt: skip
    k_row = k_row.to(tl.float32) + k_narrow_bias
    v_row = v_row.to(tl.float32) + v_narrow_bias
    vk = (k.to(tl.float32) + k_wide_bias) * k_row[None, :]
    vv = (v.to(tl.float32) + v_wide_bias) * v_row[None, :]
    return vk.to(DOT_DTYPE), vv.to(DOT_DTYPE)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward_pairs_kernel(
    q, k_wide, v_wide, k_narrow, v_narrow, dout, delta, lse2, has_huge,
    dk_wide, dv_wide, dk_parts, dv_parts,
    kv_bounds, q_start,
    kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
    q_start_default, slots, part_rows, part_shift,
    stride_q_b, stride_q_h, stride_q_n,
    stride_kw_b, stride_kw_h, stride_kw_n, stride_vw_b, stride_vw_h, stride_vw_n,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_do_b, stride_do_h, stride_do_n,
    scale, log2_scale, k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
    FORM: tl.constexpr, SIGN: tl.constexpr, GROUP: tl.constexpr, INDEX: tl.constexpr,
    IS_SMALL_GRID: tl.constexpr, HAS_BOUNDS: tl.constexpr, HAS_Q_START: tl.constexpr,
    HAS_WIDE_BIAS: tl.constexpr, HAS_NARROW_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, TILE_STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_N wide keys of one key-value head, and one part of the narrow pair's.

    It loops over the narrow keys, and inside over the rows (position, head) that see both.
    dk_wide and dv_wide are zeroed float32 [B, Hkv, rows, D]: between narrow keys the owner keeps
    its sums there. Parts are zeroed too, and each slot is written once. With DESCRIPTORS, q and
    dout are descriptors of [B, N, H, D], delta and lse2 of [B, Hkv, N, G]; a tile of rows is then
    of one position.
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
    keys = tl.arange(0, BLOCK_N).to(INDEX)

    there = tile * BLOCK_N + keys < wide_rows
    key_first = wide_first + tile * BLOCK_N
    key_last = tl.minimum(key_first + BLOCK_N, m_keys) - 1
    tile_row = (tile * BLOCK_N).to(tl.int64)
    k_wide += batch * stride_kw_b + kv_head * stride_kw_h + tile_row * stride_kw_n
    v_wide += batch * stride_vw_b + kv_head * stride_vw_h + tile_row * stride_vw_n
    k_narrow += batch * stride_kn_b + kv_head * stride_kn_h
    v_narrow += batch * stride_vn_b + kv_head * stride_vn_h
    if not DESCRIPTORS:
        q += batch * stride_q_b + kv_head * GROUP * stride_q_h
        dout += batch * stride_do_b + kv_head * GROUP * stride_do_h
    statistics = bh * seq * GROUP
    is_huge = tl.load(has_huge + bh) != 0
    sum_rows = (bh * wide_rows + tile_row + keys)[:, None]
    dk_sums = dk_wide + sum_rows * HEAD_DIM + columns[None, :]
    dv_sums = dv_wide + sum_rows * VALUE_DIM + value_columns[None, :]
    mask_dk = there[:, None] & (columns < HEAD_DIM)[None, :]
    mask_dv = there[:, None] & (value_columns < VALUE_DIM)[None, :]
    part_slot = (tile * (tl.num_programs(0) // tiles) + bh) * slots - narrow_first
    part_slot -= tile * part_rows + part_shift

    start = positions(q_start, batch, 0, q_start_default, HAS_Q_START)
    query_first = tl.maximum(key_first - wide_right - start, 0)
    query_end = tl.minimum(key_last + wide_left - start + 1, seq)
    narrow_begin = tl.maximum(start + query_first - narrow_left, narrow_first)
    narrow_end = tl.minimum(start + query_end + narrow_right, m_keys)
    count = narrow_end - narrow_begin
    if query_first >= query_end:
        count = 0
    # At turn t a program is at the narrow key congruent to t: tiles that share narrow keys, and so
    # queries, meet them at the same time, and read them from the cache.
    shift = count - narrow_begin % tl.maximum(count, 1)
    m = narrow_begin + shift % tl.maximum(count, 1)
    vk, vv = _virtual_keys(
        k_wide, v_wide, k_narrow, v_narrow, m - narrow_first,
        stride_kw_n, stride_vw_n, stride_kn_n, stride_vn_n, keys, there,
        count > 0, k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
        HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, DOT_DTYPE,
    )  # fmt: skip
    for turn in range(count):
        flat_first = tl.maximum(query_first, m - narrow_right - start) * GROUP
        flat_end = tl.minimum(query_end, m + narrow_left - start + 1) * GROUP
        x = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        y = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        for flat in tl.range(flat_first, flat_end, BLOCK_Q, num_stages=TILE_STAGES):
            row = flat + tl.arange(0, BLOCK_Q)
            i, head, real = query_rows(row, seq, GROUP, GROUP, INDEX)
            real = real & (row < flat_end)
            if DESCRIPTORS:
                position, first_head = flat // GROUP, flat % GROUP
                of_all = kv_head * GROUP + first_head
                query = load_described(q, batch, position, of_all, 0, BLOCK_Q, BLOCK_D)
                do = load_described(dout, batch, position, of_all, 0, BLOCK_Q, BLOCK_DV)
                row_lse2 = load_described(lse2, batch, kv_head, position, first_head, 1, BLOCK_Q)
                row_delta = load_described(delta, batch, kv_head, position, first_head, 1, BLOCK_Q)
                row_lse2 = tl.reshape(row_lse2, [BLOCK_Q])
                row_delta = tl.reshape(row_delta, [BLOCK_Q])
            else:
                query = load_rows(
                    q, i * stride_q_n + head * stride_q_h, 1, columns, real,
                    HEAD_DIM, BLOCK_D,
                )  # fmt: skip
                do = load_rows(
                    dout, i * stride_do_n + head * stride_do_h, 1, value_columns, real,
                    VALUE_DIM, BLOCK_DV,
                )  # fmt: skip
                row_lse2 = tl.load(lse2 + statistics + row, mask=real, other=float("inf"))
                row_delta = tl.load(delta + statistics + row, mask=real, other=0.0)
            query = query.to(DOT_DTYPE)
            do = do.to(DOT_DTYPE)
            s = tl.dot(vk, tl.trans(query), input_precision=PRECISION)  # [BLOCK_N, BLOCK_Q]
            dp = tl.dot(vv, tl.trans(do), input_precision=PRECISION)
            p = tl.exp2(s * log2_scale - row_lse2[None, :])
            # Scalars where they decide: a reduction over rows would cost a barrier an iteration.
            is_partial = (
                (key_last > start + flat // GROUP + wide_right)
                | (
                    key_first
                    < start + (tl.minimum(flat + BLOCK_Q, flat_end) - 1) // GROUP - wide_left
                )
                | (key_last - key_first + 1 < BLOCK_N)
                | is_huge
            )
            if HAS_BOUNDS | is_partial:
                lo, hi, narrow_lo, narrow_hi = key_ranges(
                    kv_bounds, batch, i, real, start + i, wide_left, wide_right,
                    narrow_left, narrow_right, wide_first, narrow_first, seq, m_keys, HAS_BOUNDS,
                )  # fmt: skip
                hi = tl.where((m >= narrow_lo) & (m < narrow_hi), hi, 0)
                key = (key_first + keys)[:, None]
                visible = (key >= lo[None, :]) & (key < hi[None, :])
                p = tl.where(visible, tl.minimum(p, 1.0), 0.0)
            y = tl.dot(p.to(DOT_DTYPE), do, y, input_precision=PRECISION)
            ds = p * (dp - row_delta[None, :])
            x = tl.dot(ds.to(DOT_DTYPE), query, x, input_precision=PRECISION)

        k = load_rows(k_wide, keys, stride_kw_n, columns, there, HEAD_DIM, BLOCK_D)
        v = load_rows(v_wide, keys, stride_vw_n, value_columns, there, VALUE_DIM, BLOCK_DV)
        narrow_row = (m - narrow_first).to(tl.int64)
        k_row = tl.load(
            k_narrow + narrow_row * stride_kn_n + columns, mask=columns < HEAD_DIM, other=0.0
        )
        v_row = tl.load(
            v_narrow + narrow_row * stride_vn_n + value_columns,
            mask=value_columns < VALUE_DIM, other=0.0,
        )  # fmt: skip
        dk = tl.sum(x * (k.to(tl.float32) + k_wide_bias), 0) * scale
        dv = tl.sum(y * (v.to(tl.float32) + v_wide_bias), 0)
        tl.store(dk_parts + (part_slot + m) * HEAD_DIM + columns, dk, mask=columns < HEAD_DIM)
        tl.store(
            dv_parts + (part_slot + m) * VALUE_DIM + value_columns, dv,
            mask=value_columns < VALUE_DIM,
        )  # fmt: skip
        x *= ((k_row.to(tl.float32) + k_narrow_bias) * scale)[None, :]
        y *= (v_row.to(tl.float32) + v_narrow_bias)[None, :]
        tl.store(dk_sums, tl.load(dk_sums, mask=mask_dk, other=0.0) + x, mask=mask_dk)
        tl.store(dv_sums, tl.load(dv_sums, mask=mask_dv, other=0.0) + y, mask=mask_dv)
        m = narrow_begin + (turn + 1 + shift) % count
        vk, vv = _virtual_keys(
            k_wide, v_wide, k_narrow, v_narrow, m - narrow_first,
            stride_kw_n, stride_vw_n, stride_kn_n, stride_vn_n, keys, there,
            True, k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, DOT_DTYPE,
        )  # fmt: skip
