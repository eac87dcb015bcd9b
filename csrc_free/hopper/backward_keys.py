"""All four key-value gradients on Hopper, in four matrix products.

For a narrow key m and a tile of wide keys j, with X = sum of dS · q and Y = sum of P · dout over
the queries that see m:

    dk_wide += scale · k_m ∘ X      dk_m = scale · sum over j of k_j ∘ X[j]
    dv_wide += v_m ∘ Y              dv_m = sum over j of v_j ∘ Y[j]

so the inner loop is that of plain flash attention, with virtual keys k_j ∘ k_m. That is the
trilinear form. For strassen the virtual keys are k_j + k_m, a logit has k_j · k_m besides, and with
σ[j] = sum of dS

    dk_wide += scale · (X + σ k_m)  dk_m = scale · sum over j of (X[j] + σ[j] k_j)
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from csrc_free.device.forms import CODES, STRASSEN
from csrc_free.hopper.assembly import opaque_zero, pack_bfloat16, parts_of_rows
from csrc_free.hopper.channels import arrive, barriers, wait_empty, wait_full
from csrc_free.hopper.describe import describe
from csrc_free.hopper.key_plan import KEYS, ROWS, Plan
from csrc_free.launch import launch
from csrc_free.problem import Problem, block
from csrc_free.steps.delta import Statistics
from csrc_free.steps.parts import Parts
from csrc_free.traits import Device, Traits

_KEYS = gl.constexpr(KEYS)
_ROWS = gl.constexpr(ROWS)
_RESERVE = 1000  # bytes: barriers, and what the warps are told
_NONE = gl.constexpr(-(2**30))  # before every query

# Sizes that change from call to call: one compiled kernel serves them all.
NOT_SPECIALIZED = (
    "kv_heads", "seq", "wide_rows", "narrow_rows",
    "wide_left", "wide_right", "narrow_left", "narrow_right", "q_start_default",
    "items", "heads", "splits", "tiles", "tiles_of_a_part", "slots", "part_rows", "part_shift",
)  # fmt: skip


@gluon.constexpr_function
def _log2(power):
    return power.bit_length() - 1


@gluon.jit
def _known(sizes, IS_CAUSAL: gl.constexpr, IS_SQUARE: gl.constexpr):
    """Return the sizes, with what the usual problem knows of them: numbers cost no registers.

    A causal window reaches no key after the query; in a square problem there are as many rows in
    each pair as queries, and the first query stands at the first key.
    """
    (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        start,
    ) = sizes  # fmt: skip
    if IS_CAUSAL:
        wide_right = 0
        narrow_right = 0
    if IS_SQUARE:
        wide_rows = seq
        narrow_rows = seq
        start = 0
    return (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        start,
    )  # fmt: skip


@gluon.jit
def _item(
    item, heads, splits, kv_heads, q_start, q_start_default, HAS_Q_START: gl.constexpr
):  # fmt: skip
    """Return an item's key-value head of all, batch row, head, part, split and first position.

    Items of the last keys, which a causal window shows to few queries, come last.
    """
    bh = item % heads
    batch = bh // kv_heads
    start = q_start_default
    if HAS_Q_START:
        start = gl.load(q_start + batch)
    rest = item // heads
    return bh, batch, bh % kv_heads, rest // splits, rest % splits, start


@gluon.jit
def _span(
    tile, batch, tiles, start, spans, seq, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, HAS_BOUNDS: gl.constexpr,
):  # fmt: skip
    """Return what a tile of wide keys meets, and the bounds that all its queries share.

    That is its first key, [first, end) of the queries that see it and of the narrow keys that
    these see, and [lo, hi) of the keys that no bounds hide from any of them.
    """
    keys = gl.maximum(wide_rows, narrow_rows)
    key_first = keys - wide_rows + tile * _KEYS
    if HAS_BOUNDS:
        at = spans + (batch * tiles + tile) * 6
        query_first = gl.load(at)
        query_end = gl.load(at + 1)
        narrow_first = gl.load(at + 2)
        narrow_end = gl.load(at + 3)
        lo = gl.load(at + 4)
        hi = gl.load(at + 5)
    else:
        key_end = gl.minimum(key_first + _KEYS, keys)
        query_first = gl.maximum(key_first - wide_right - start, 0)
        query_end = gl.minimum(key_end + wide_left - start, seq)
        narrow_first = gl.maximum(start + query_first - narrow_left, keys - narrow_rows)
        narrow_end = gl.minimum(start + query_end + narrow_right, keys)
        if query_first >= query_end:
            narrow_end = narrow_first
        narrow_end = gl.maximum(narrow_end, narrow_first)
        lo = 0
        hi = keys
    return key_first, query_first, query_end, narrow_first, narrow_end, lo, hi


@gluon.jit
def _turns(narrow_first, narrow_end, POSITIONS: gl.constexpr):
    """Return the first of the narrow keys' pairs, and their number.

    A turn is of two narrow keys, POSITIONS apart, so that they share all but two tiles of rows.
    """
    log: gl.constexpr = _log2(2 * POSITIONS)
    base = (narrow_first >> log) << log
    return base, ((narrow_end - base + 2 * POSITIONS - 1) >> log) * POSITIONS


@gluon.jit
def _places(base, turns, split, splits):
    """Return the pair that a split begins with, and how many it has.

    At turn t a program is at the pair congruent to t: programs whose tiles overlap then read the
    same queries, from the cache.
    """
    first = turns * split // splits
    around = gl.maximum(turns, 1)
    place = (first + around - (base // 2) % around) % around
    return place, turns * (split + 1) // splits - first


@gluon.jit
def _narrow_key(place, base, POSITIONS: gl.constexpr):
    """Return the first narrow key of a pair."""
    log: gl.constexpr = _log2(POSITIONS)
    return base + ((place >> log) << (log + 1)) + (place & (POSITIONS - 1))


@gluon.jit
def _rows_of(m, query_first, query_end, start, narrow_left, narrow_right, POSITIONS: gl.constexpr):
    """Return the first query that sees m or m + POSITIONS, and how many tiles of rows do."""
    first = gl.maximum(m - narrow_right - start, query_first)
    end = gl.minimum(m + POSITIONS + narrow_left + 1 - start, query_end)
    return first, gl.maximum(end - first + POSITIONS - 1, 0) >> _log2(POSITIONS)


@gluon.jit
def _fetch(
    q, dout, delta, lse2, k_wide, v_wide, spans, q_start,
    q_tiles, dout_tiles, delta_tiles, lse2_tiles, k_tile, v_tile,
    rows_full, rows_empty, keys_full, keys_empty, sizes, items, heads, splits, tiles,
    tiles_of_a_part,
    HEADS: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    STAGES: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    IS_CAUSAL: gl.constexpr, IS_SQUARE: gl.constexpr,
):  # fmt: skip
    """The warp that brings tiles: the wide keys of each item, and for each turn the rows."""
    (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        q_start_default,
    ) = _known(sizes, IS_CAUSAL, IS_SQUARE)  # fmt: skip
    positions: gl.constexpr = _ROWS // HEADS
    step = 0
    tiles_done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        bh, batch, kv_head, part, split, start = _item(
            item, heads, splits, kv_heads, q_start, q_start_default, HAS_Q_START
        )
        for tile in range(
            part * tiles_of_a_part, gl.minimum((part + 1) * tiles_of_a_part, tiles)
        ):  # fmt: skip
            _key_first, query_first, query_end, narrow_first, narrow_end, _lo, _hi = _span(
                tile, batch, tiles, start, spans, seq, wide_rows, narrow_rows,
                wide_left, wide_right, narrow_left, narrow_right, HAS_BOUNDS,
            )  # fmt: skip
            base, turns = _turns(narrow_first, narrow_end, positions)
            place, own_turns = _places(base, turns, split, splits)
            wait_empty(keys_empty, 0, tiles_done)
            mbarrier.expect(keys_full.index(0), k_wide.block_type.nbytes + v_wide.block_type.nbytes)
            to = [batch, kv_head, tile * _KEYS, 0]
            tma.async_copy_global_to_shared(
                k_wide, to, keys_full.index(0),
                k_tile._reinterpret(gl.bfloat16, [1, 1, _KEYS, BLOCK_D], k_wide.layout),
            )  # fmt: skip
            tma.async_copy_global_to_shared(
                v_wide, to, keys_full.index(0),
                v_tile._reinterpret(gl.bfloat16, [1, 1, _KEYS, BLOCK_DV], v_wide.layout),
            )  # fmt: skip
            for _turn in range(own_turns):
                i, count = _rows_of(
                    _narrow_key(place, base, positions), query_first, query_end, start,
                    narrow_left, narrow_right, positions,
                )  # fmt: skip
                place += 1
                place = gl.where(place == turns, 0, place)
                for _ in range(count):
                    s = step % STAGES
                    full = rows_full.index(s)
                    wait_empty(rows_empty, s, step // STAGES)
                    mbarrier.expect(
                        full,
                        q.block_type.nbytes + dout.block_type.nbytes
                        + delta.block_type.nbytes + lse2.block_type.nbytes,
                    )  # fmt: skip
                    rows = [batch, kv_head, i, 0, 0]
                    tma.async_copy_global_to_shared(
                        q, rows, full,
                        q_tiles.index(s)._reinterpret(
                            gl.bfloat16, [1, 1, positions, HEADS, BLOCK_D], q.layout
                        ),
                    )  # fmt: skip
                    tma.async_copy_global_to_shared(
                        lse2, [bh, i * HEADS], full, lse2_tiles.index(s)
                    )
                    tma.async_copy_global_to_shared(
                        dout, rows, full,
                        dout_tiles.index(s)._reinterpret(
                            gl.bfloat16, [1, 1, positions, HEADS, BLOCK_DV], dout.layout
                        ),
                    )  # fmt: skip
                    tma.async_copy_global_to_shared(
                        delta, [bh, i * HEADS], full, delta_tiles.index(s)
                    )
                    i += positions
                    step += 1
            tiles_done += 1


@gluon.jit
def _probabilities(
    s, of_keys, lse2_tile, i, seen, m, window, batch, seq, kv_bounds, log2_scale,
    FORM: gl.constexpr, HEADS: gl.constexpr, HAS_BOUNDS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return P of a tile [keys, rows] whose first query is i.

    `of_keys` is what stands in a key's logits besides, in log2 units. Tiles from `first` to `last`
    need no mask. Rows past the last query are zero in q and dout, and add nothing, whatever their P
    is, so long as it is finite.
    """
    first, last = seen
    shift = lse2_tile.load(LAYOUT)
    if FORM == STRASSEN:
        shift -= of_keys[:, None]
    p = gl.exp2(s * log2_scale - shift)
    if (i < first) | (i > last):
        key_first, keys, start, wide_left, wide_right, narrow_left, narrow_right = window
        lowest = start - wide_left - key_first
        highest = start + wide_right - key_first
        see_first = m - narrow_right - start
        see_last = m + narrow_left - start
        key = gl.arange(0, _KEYS, layout=gl.SliceLayout(1, LAYOUT))
        if HEADS == _ROWS:
            row = i
        else:
            key = key[:, None]
            row = i + (gl.arange(0, _ROWS, layout=gl.SliceLayout(0, LAYOUT)) // HEADS)[None, :]
        offset = key - row
        visible = (offset >= lowest) & (offset <= highest) & (key < keys - key_first)
        # Said of keys, not of rows: as scalars these cost uniform registers and spills.
        visible = visible & (offset <= key - see_first) & (offset >= key - see_last)
        if HAS_BOUNDS:
            at = kv_bounds + (batch.to(gl.int64) * seq + gl.minimum(row, seq - 1)) * 2
            lo = gl.maximum(gl.load(at), 0)
            hi = gl.maximum(gl.load(at + 1), 0)
            visible = visible & (key >= lo - key_first) & (key < hi - key_first)
            visible = visible & (m >= lo) & (m < hi)
        if FORM == STRASSEN:
            visible = visible & (row < seq)
        if HEADS == _ROWS:
            visible = visible[:, None]
        p = gl.where(visible, gl.minimum(p, 1.0), 0.0)
    return p


@gluon.jit
def _weigh(
    s, y, sigma, of_keys, vv, dout_tile, delta_tile, lse2_tile, i, seen, m, window, batch, seq,
    kv_bounds, log2_scale, FORM: gl.constexpr, HEADS: gl.constexpr, HAS_BOUNDS: gl.constexpr,
    LAYOUT: gl.constexpr, A_OF_Y: gl.constexpr,
):  # fmt: skip
    """Return dS of a tile [keys, rows] in bfloat16, y with its product under way, and sigma.

    sigma [keys, 4] are the sums of dS over rows, in parts.
    """
    dp = warpgroup_mma(
        vv, dout_tile.permute((1, 0)), gl.zeros([_KEYS, _ROWS], gl.float32, LAYOUT),
        use_acc=False, is_async=True,
    )  # fmt: skip
    p = _probabilities(
        s, of_keys, lse2_tile, i, seen, m, window, batch, seq, kv_bounds, log2_scale,
        FORM, HEADS, HAS_BOUNDS, LAYOUT,
    )  # fmt: skip
    y = warpgroup_mma(gl.convert_layout(pack_bfloat16(p), A_OF_Y), dout_tile, y, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = p * (dp - delta_tile.load(LAYOUT))
    if FORM == STRASSEN:
        sigma += parts_of_rows(ds)
    return pack_bfloat16(ds), y, sigma


@gluon.jit
def _pass_by(step, end, rows_full, rows_empty, STAGES: gl.constexpr):
    """Let go of the tiles of a turn that only the other warpgroup needs."""
    for at in range(step, end):
        wait_full(rows_full, at % STAGES, at // STAGES)
        arrive(rows_empty, at % STAGES)


@gluon.jit
def _load_rows(
    k, v, k_head, v_head, row, rows, stride_k, stride_v, columns, value_columns,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr, INDEX: gl.constexpr,
):  # fmt: skip
    """Load a row of a head's narrow keys and values; one that is not there is never used."""
    row = gl.minimum(gl.maximum(row, 0), rows - 1).to(INDEX)
    return (
        gl.load(k + (k_head + row * stride_k) + columns, mask=columns < HEAD_DIM, other=0.0),
        gl.load(
            v + (v_head + row * stride_v) + value_columns, mask=value_columns < VALUE_DIM, other=0.0
        ),
    )


@gluon.jit
def _wait_for_turn(barrier, r: gl.constexpr, turn):
    """Wait until the other warpgroup has added: 0 adds before 1, in every turn."""
    if r == 0:
        wait_empty(barrier, 1, turn)
    else:
        wait_full(barrier, 0, turn)


@gluon.jit
def _sum_over_keys(x, buffer, LAYOUT: gl.constexpr):
    """Sum [64, D] over the keys: two in a thread, then 32 a column through shared memory.

    No shuffles: `gl.sum` took 4% more of the whole at 64 heads to one, 12% at 8 (H100, 2026-11-25).
    """
    columns: gl.constexpr = x.shape[1]
    halves = gl.sum(gl.reshape(x, [4, 2, 8, columns]), 1)
    buffer.store(gl.reshape(halves, [32, columns]))
    return gl.sum(buffer.load(LAYOUT), 0)


@gluon.jit
def _biased(tile, bias, HAS_BIAS: gl.constexpr):
    if HAS_BIAS:
        tile = tile.to(gl.float32) + bias
    return tile


@gluon.jit
def _of_key(x, sigma, other, FORM: gl.constexpr):
    """Return what a pair of keys adds to the gradient of one of them, of which `other` is not."""
    return x + sigma[:, None] * other if FORM == STRASSEN else x * other


@gluon.jit
def _sum_up(
    r: gl.constexpr,
    k_narrow, v_narrow, has_huge, dk_wide, dv_wide, dk_parts, dv_parts, kv_bounds, spans, q_start,
    q_tiles, dout_tiles, delta_tiles, lse2_tiles, k_tile, v_tile, vk, vv, k_row, v_row,
    dk_sums, dv_sums, rows_full, rows_empty, keys_full, keys_empty, dk_turn, dv_turn,
    sizes, items, heads, splits, tiles, tiles_of_a_part, slots, part_rows, part_shift, strides,
    scale, log2_scale,
    k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
    FORM: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, STAGES: gl.constexpr,
    HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr, HAS_BIAS: gl.constexpr,
    DO_ACCUMULATE: gl.constexpr, IS_CAUSAL: gl.constexpr, IS_SQUARE: gl.constexpr,
    INDEX: gl.constexpr,
):  # fmt: skip
    """Warpgroup r of two: of every turn's narrow keys it takes number r."""
    (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        q_start_default,
    ) = _known(sizes, IS_CAUSAL, IS_SQUARE)  # fmt: skip
    (
        stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
        stride_dk_b, stride_dk_h, stride_dk_n, stride_dv_b, stride_dv_h, stride_dv_n,
    ) = strides  # fmt: skip
    of_logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _ROWS, 16])
    of_x: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    of_y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    a_of_x: gl.constexpr = gl.DotOperandLayout(0, of_x, 2)
    a_of_y: gl.constexpr = gl.DotOperandLayout(0, of_y, 2)
    by_rows: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    one_row: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0])
    by_columns: gl.constexpr = gl.BlockedLayout([32, 1], [1, 32], [1, 4], [1, 0])
    in_partials: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    positions: gl.constexpr = _ROWS // HEADS
    log: gl.constexpr = _log2(positions)

    columns = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, one_row))
    value_columns = gl.arange(0, BLOCK_DV, layout=gl.SliceLayout(0, one_row))
    part_columns = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, by_columns))
    part_value_columns = gl.arange(0, BLOCK_DV, layout=gl.SliceLayout(0, by_columns))
    dk_partials = vk._reinterpret(gl.float32, [_KEYS // 2, BLOCK_D], in_partials)
    dv_partials = vv._reinterpret(gl.float32, [_KEYS // 2, BLOCK_DV], in_partials)
    no_logits = gl.zeros([_KEYS, _ROWS], gl.float32, of_logits)
    keys = gl.maximum(wide_rows, narrow_rows)
    narrow_row_0 = keys - narrow_rows

    if r == 0:
        dk_sums.store(gl.zeros([_KEYS, BLOCK_D], gl.float32, by_rows))
    else:
        dv_sums.store(gl.zeros([_KEYS, BLOCK_DV], gl.float32, by_rows))
    step = 0
    tiles_done = 0
    turns_done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        bh, batch, kv_head, part, split, start = _item(
            item, heads, splits, kv_heads, q_start, q_start_default, HAS_Q_START
        )
        is_huge = gl.load(has_huge + bh) != 0
        k_head = batch.to(INDEX) * stride_kn_b + kv_head.to(INDEX) * stride_kn_h
        v_head = batch.to(INDEX) * stride_vn_b + kv_head.to(INDEX) * stride_vn_h
        split_offset = split.to(gl.int64) * heads * wide_rows
        slot = (part * heads + bh) * slots - narrow_row_0 - (part * part_rows + part_shift)
        for tile in range(
            part * tiles_of_a_part, gl.minimum((part + 1) * tiles_of_a_part, tiles)
        ):  # fmt: skip
            key_first, query_first, query_end, narrow_first, narrow_end, lo, hi = _span(
                tile, batch, tiles, start, spans, seq, wide_rows, narrow_rows,
                wide_left, wide_right, narrow_left, narrow_right, HAS_BOUNDS,
            )  # fmt: skip
            base, turns = _turns(narrow_first, narrow_end, positions)
            place, own_turns = _places(base, turns, split, splits)
            m = _narrow_key(place, base, positions) + positions * r
            k_next, v_next = _load_rows(
                k_narrow, v_narrow, k_head, v_head, m - narrow_row_0, narrow_rows,
                stride_kn_n, stride_vn_n, columns, value_columns, HEAD_DIM, VALUE_DIM, INDEX,
            )  # fmt: skip
            wait_full(keys_full, 0, tiles_done)
            for _turn in range(own_turns):
                if not HAS_BOUNDS:
                    # Made anew from the tile: kept, these numbers are spilled, and come back from
                    # the L2 cache, since next to no L1 is left beside the shared memory.
                    key_first, query_first, query_end, narrow_first, narrow_end, lo, hi = _span(
                        tile + opaque_zero(), batch, tiles, start, spans, seq, wide_rows,
                        narrow_rows, wide_left, wide_right, narrow_left, narrow_right, HAS_BOUNDS,
                    )  # fmt: skip
                    base, turns = _turns(narrow_first, narrow_end, positions)
                m = _narrow_key(place, base, positions)
                first, count = _rows_of(
                    m, query_first, query_end, start, narrow_left, narrow_right, positions
                )
                m += positions * r
                see_first = m - narrow_right - start
                see_last = m + narrow_left - start
                # The tiles of rows that see this warpgroup's key, among those of the turn.
                next_step = step + count
                if r == 0:
                    own_step = step
                    own_end = gl.minimum(see_last + 1, query_end)
                    own_step_end = step + ((gl.maximum(own_end - first, 0) + positions - 1) >> log)
                else:
                    own_first = gl.maximum(see_first, query_first)
                    own_step = step + gl.minimum((own_first - first) >> log, count)
                    own_step_end = next_step
                is_narrow = (m >= narrow_first) & (m < narrow_end)
                own_step_end = gl.where(is_narrow, own_step_end, own_step)
                shift = first - step * positions  # of a tile's first query from its step's

                place += 1
                place = gl.where(place == turns, 0, place)
                k_row.store(k_next[None, :])
                v_row.store(v_next[None, :])
                k_next, v_next = _load_rows(
                    k_narrow, v_narrow, k_head, v_head,
                    _narrow_key(place, base, positions) + positions * r - narrow_row_0, narrow_rows,
                    stride_kn_n, stride_vn_n, columns, value_columns, HEAD_DIM, VALUE_DIM, INDEX,
                )  # fmt: skip
                if DO_ACCUMULATE:  # what earlier tiles of this part left there
                    dk_before = gl.load(
                        dk_parts + (slot + m) * HEAD_DIM + part_columns,
                        mask=is_narrow & (part_columns < HEAD_DIM), other=0.0,
                    )  # fmt: skip
                    dv_before = gl.load(
                        dv_parts + (slot + m) * VALUE_DIM + part_value_columns,
                        mask=is_narrow & (part_value_columns < VALUE_DIM), other=0.0,
                    )  # fmt: skip
                if r == 1:
                    _pass_by(step, own_step, rows_full, rows_empty, STAGES)
                if own_step_end > own_step:
                    one = _biased(k_tile.load(by_rows), k_wide_bias, HAS_BIAS)
                    other = _biased(k_row.load(by_rows), k_narrow_bias, HAS_BIAS)
                    made = one + other if FORM == STRASSEN else one * other
                    vk.store(made.to(gl.bfloat16))
                    vv.store(
                        (
                            _biased(v_tile.load(by_rows), v_wide_bias, HAS_BIAS)
                            * _biased(v_row.load(by_rows), v_narrow_bias, HAS_BIAS)
                        ).to(gl.bfloat16)
                    )
                    fence_async_shared()
                    # Tiles of rows from `begin` to `last` see all of these keys, and m.
                    begin = gl.maximum(key_first + _KEYS - 1 - wide_right - start, see_first)
                    last = gl.minimum(key_first + wide_left - start, see_last) - positions + 1
                    is_whole = (key_first + _KEYS <= hi) & (is_huge == 0)
                    if HAS_BOUNDS:  # what `lo` and `hi` say is said of these queries alone
                        last = gl.minimum(last, query_end - positions)
                        is_whole = is_whole & (key_first >= lo) & (m >= lo) & (m < hi)
                    of_keys = gl.zeros([_KEYS], gl.float32, gl.SliceLayout(1, of_logits))
                    sigma = of_keys
                    if FORM == STRASSEN:
                        last = gl.minimum(last, seq - positions)
                        one = _biased(k_tile.load(of_x).to(gl.float32), k_wide_bias, HAS_BIAS)
                        other = _biased(k_row.load(of_x).to(gl.float32), k_narrow_bias, HAS_BIAS)
                        of_keys = gl.convert_layout(
                            gl.sum(one * other, 1) * log2_scale, of_keys.type.layout,
                            assert_trivial=True,
                        )  # fmt: skip
                        sigma = parts_of_rows(no_logits)
                    seen = begin, gl.where(is_whole, last, _NONE)
                    window = (
                        key_first,
                        keys,
                        start,
                        wide_left,
                        wide_right,
                        narrow_left,
                        narrow_right,
                    )
                    x = gl.zeros([_KEYS, BLOCK_D], gl.float32, of_x)
                    y = gl.zeros([_KEYS, BLOCK_DV], gl.float32, of_y)
                    now = own_step % STAGES
                    wait_full(rows_full, now, own_step // STAGES)
                    s = warpgroup_mma(
                        vk, q_tiles.index(now).permute((1, 0)), no_logits,
                        use_acc=False, is_async=True,
                    )  # fmt: skip
                    s = warpgroup_mma_wait(0, deps=(s,))
                    # The last tile stands after the loop: nothing in flight may cross a loop's
                    # edge, or ptxas waits for every product.
                    for at in range(own_step + 1, own_step_end):
                        ds, y, sigma = _weigh(
                            s, y, sigma, of_keys, vv, dout_tiles.index(now), delta_tiles.index(now),
                            lse2_tiles.index(now), (at - 1) * positions + shift, seen, m, window,
                            batch, seq, kv_bounds, log2_scale,
                            FORM, HEADS, HAS_BOUNDS, of_logits, a_of_y,
                        )  # fmt: skip
                        later = at % STAGES
                        wait_full(rows_full, later, at // STAGES)
                        x = warpgroup_mma(
                            gl.convert_layout(ds, a_of_x), q_tiles.index(now), x, is_async=True
                        )
                        s = warpgroup_mma(
                            vk, q_tiles.index(later).permute((1, 0)), no_logits,
                            use_acc=False, is_async=True,
                        )  # fmt: skip
                        x, y = warpgroup_mma_wait(1, deps=(x, y))
                        mbarrier.arrive(rows_empty.index(now), count=1)
                        s = warpgroup_mma_wait(0, deps=(s,))
                        now = later
                    ds, y, sigma = _weigh(
                        s, y, sigma, of_keys, vv, dout_tiles.index(now), delta_tiles.index(now),
                        lse2_tiles.index(now), (own_step_end - 1) * positions + shift, seen, m,
                        window, batch, seq, kv_bounds, log2_scale,
                        FORM, HEADS, HAS_BOUNDS, of_logits, a_of_y,
                    )  # fmt: skip
                    x = warpgroup_mma(
                        gl.convert_layout(ds, a_of_x), q_tiles.index(now), x, is_async=True
                    )
                    x, y = warpgroup_mma_wait(0, deps=(x, y))
                    arrive(rows_empty, now)
                    _pass_by(own_step_end, next_step, rows_full, rows_empty, STAGES)
                    dv_row = _sum_over_keys(
                        y * _biased(v_tile.load(of_y).to(gl.float32), v_wide_bias, HAS_BIAS),
                        dv_partials, by_columns,
                    )  # fmt: skip
                    if FORM == STRASSEN:
                        sigma = gl.convert_layout(
                            gl.sum(sigma, 1), gl.SliceLayout(1, of_x), assert_trivial=True
                        )
                    dk_row = scale * _sum_over_keys(
                        _of_key(
                            x, sigma,
                            _biased(k_tile.load(of_x).to(gl.float32), k_wide_bias, HAS_BIAS), FORM,
                        ),
                        dk_partials, by_columns,
                    )  # fmt: skip
                    if DO_ACCUMULATE:
                        dv_row += dv_before
                        dk_row += dk_before
                    gl.store(
                        dv_parts + (slot + m) * VALUE_DIM + part_value_columns, dv_row,
                        mask=part_value_columns < VALUE_DIM,
                    )  # fmt: skip
                    gl.store(
                        dk_parts + (slot + m) * HEAD_DIM + part_columns, dk_row,
                        mask=part_columns < HEAD_DIM,
                    )  # fmt: skip
                    # The sums of the wide pair: warpgroup 0 before 1, in every turn.
                    _wait_for_turn(dv_turn, r, turns_done)
                    dv_sums.store(
                        dv_sums.load(of_y)
                        + y * _biased(v_row.load(of_y).to(gl.float32), v_narrow_bias, HAS_BIAS)
                    )
                    arrive(dv_turn, r)
                    _wait_for_turn(dk_turn, r, turns_done)
                    dk_sums.store(
                        dk_sums.load(of_x)
                        + _of_key(
                            x, sigma,
                            _biased(k_row.load(of_x).to(gl.float32), k_narrow_bias, HAS_BIAS), FORM,
                        )
                    )  # fmt: skip
                    arrive(dk_turn, r)
                else:
                    _pass_by(own_step_end, next_step, rows_full, rows_empty, STAGES)
                    _wait_for_turn(dv_turn, r, turns_done)
                    arrive(dv_turn, r)
                    _wait_for_turn(dk_turn, r, turns_done)
                    arrive(dk_turn, r)
                turns_done += 1
                step = next_step
            _wait_for_turn(dv_turn, r, turns_done)
            if r == 0:
                _hand_over(
                    dv_sums, dv_wide + split_offset * VALUE_DIM, batch, kv_head, tile, wide_rows,
                    stride_dv_b, stride_dv_h, stride_dv_n, 1.0, VALUE_DIM, BLOCK_DV, by_rows,
                )  # fmt: skip
            arrive(dv_turn, r)
            _wait_for_turn(dk_turn, r, turns_done)
            if r == 1:
                _hand_over(
                    dk_sums, dk_wide + split_offset * HEAD_DIM, batch, kv_head, tile, wide_rows,
                    stride_dk_b, stride_dk_h, stride_dk_n, scale, HEAD_DIM, BLOCK_D, by_rows,
                )  # fmt: skip
            arrive(dk_turn, r)
            turns_done += 1
            arrive(keys_empty, 0)
            tiles_done += 1


@gluon.jit
def _hand_over(
    sums, grad, batch, kv_head, tile, rows, stride_b, stride_h, stride_n, scale,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Write a tile's sums to its gradient, and begin anew."""
    row = tile * _KEYS + gl.arange(0, _KEYS, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, LAYOUT))
    grad += batch.to(gl.int64) * stride_b + kv_head.to(gl.int64) * stride_h
    gl.store(
        grad + (row.to(gl.int64) * stride_n)[:, None] + column[None, :],
        (sums.load(LAYOUT) * scale).to(grad.dtype.element_ty),
        mask=(row < rows)[:, None] & (column < HEAD_DIM)[None, :],
    )  # fmt: skip
    sums.store(gl.zeros([_KEYS, BLOCK_D], gl.float32, LAYOUT))


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def hopper_backward_keys_kernel(
    q, dout, delta, lse2, k_wide, v_wide,
    k_narrow, v_narrow, has_huge, dk_wide, dv_wide, dk_parts, dv_parts, kv_bounds, spans, q_start,
    kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
    q_start_default, items, heads, splits, tiles, tiles_of_a_part, slots, part_rows, part_shift,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_dk_b, stride_dk_h, stride_dk_n, stride_dv_b, stride_dv_h, stride_dv_n,
    scale, log2_scale, k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
    FORM: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, STAGES: gl.constexpr,
    HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr, HAS_BIAS: gl.constexpr,
    DO_ACCUMULATE: gl.constexpr, IS_CAUSAL: gl.constexpr, IS_SQUARE: gl.constexpr,
    INDEX: gl.constexpr,
):  # fmt: skip
    """A persistent program takes items: some tiles of 64 wide keys, or one and some of its turns.

    For each tile it loops over turns of two narrow keys, one for either of two warpgroups, and
    inside over tiles of 64 rows, (64 / HEADS positions) x HEADS heads, which a third brings. The
    wide pair's sums stay in shared memory for the whole tile.

    q and dout are descriptors of [B, Hkv, N, G, D], delta and lse2 of [B * Hkv, N * G], the wide
    pair of [B, Hkv, rows, D]. Parts are zeroed float32 [parts, B, Hkv, slots, D].
    """
    rows_of_k: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    float32_rows: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, _ROWS, BLOCK_D], rows_of_k)
    dout_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, _ROWS, BLOCK_DV], rows_of_k)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, _ROWS], delta.layout)
    lse2_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, _ROWS], lse2.layout)
    k_tile = gl.allocate_shared_memory(gl.bfloat16, [_KEYS, BLOCK_D], rows_of_k)
    v_tile = gl.allocate_shared_memory(gl.bfloat16, [_KEYS, BLOCK_DV], rows_of_k)
    vk = gl.allocate_shared_memory(gl.bfloat16, [2, _KEYS, BLOCK_D], rows_of_k)
    vv = gl.allocate_shared_memory(gl.bfloat16, [2, _KEYS, BLOCK_DV], rows_of_k)
    dk_sums = gl.allocate_shared_memory(gl.float32, [_KEYS, BLOCK_D], float32_rows)
    dv_sums = gl.allocate_shared_memory(gl.float32, [_KEYS, BLOCK_DV], float32_rows)
    k_rows = gl.allocate_shared_memory(gl.bfloat16, [2, 1, BLOCK_D], plain)
    v_rows = gl.allocate_shared_memory(gl.bfloat16, [2, 1, BLOCK_DV], plain)
    rows_full = barriers(STAGES, 1)
    rows_empty = barriers(STAGES, 2)
    keys_full = barriers(1, 1)
    keys_empty = barriers(1, 2)
    dk_turn = barriers(2, 1)
    dv_turn = barriers(2, 1)
    fence_async_shared()

    sizes = (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        q_start_default,
    )  # fmt: skip
    strides = (
        stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
        stride_dk_b, stride_dk_h, stride_dk_n, stride_dv_b, stride_dv_h, stride_dv_n,
    )  # fmt: skip
    gl.warp_specialize([
        (_sum_up, (
            0,
            k_narrow, v_narrow, has_huge, dk_wide, dv_wide, dk_parts, dv_parts, kv_bounds, spans,
            q_start, q_tiles, dout_tiles, delta_tiles, lse2_tiles, k_tile, v_tile,
            vk.index(0), vv.index(0), k_rows.index(0), v_rows.index(0), dk_sums, dv_sums,
            rows_full, rows_empty, keys_full, keys_empty, dk_turn, dv_turn,
            sizes, items, heads, splits, tiles, tiles_of_a_part, slots, part_rows, part_shift,
            strides,
    scale, log2_scale,
            k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
            FORM, HEADS, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, STAGES,
            HAS_BOUNDS, HAS_Q_START, HAS_BIAS, DO_ACCUMULATE, IS_CAUSAL, IS_SQUARE, INDEX,
        )),
        (_sum_up, (
            1,
            k_narrow, v_narrow, has_huge, dk_wide, dv_wide, dk_parts, dv_parts, kv_bounds, spans,
            q_start, q_tiles, dout_tiles, delta_tiles, lse2_tiles, k_tile, v_tile,
            vk.index(1), vv.index(1), k_rows.index(1), v_rows.index(1), dk_sums, dv_sums,
            rows_full, rows_empty, keys_full, keys_empty, dk_turn, dv_turn,
            sizes, items, heads, splits, tiles, tiles_of_a_part, slots, part_rows, part_shift,
            strides,
    scale, log2_scale,
            k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
            FORM, HEADS, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, STAGES,
            HAS_BOUNDS, HAS_Q_START, HAS_BIAS, DO_ACCUMULATE, IS_CAUSAL, IS_SQUARE, INDEX,
        )),
        (_fetch, (
            q, dout, delta, lse2, k_wide, v_wide, spans, q_start,
            q_tiles, dout_tiles, delta_tiles, lse2_tiles, k_tile, v_tile,
            rows_full, rows_empty, keys_full, keys_empty, sizes, items, heads, splits, tiles,
    tiles_of_a_part,
            HEADS, BLOCK_D, BLOCK_DV, STAGES, HAS_BOUNDS, HAS_Q_START, IS_CAUSAL, IS_SQUARE,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Two warpgroups and a warp that brings rows, STAGES tiles of them ahead."""

    stages: int = 2
    num_warps: int = 4
    maxnreg: int = 168  # on average: 240 for the two warpgroups, 24 for the warp

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        columns = traits.block_d + traits.block_dv
        tiles = (self.stages + 1 + 2) * 2 * KEYS * columns  # rows, keys, virtual keys of each
        sums = 4 * KEYS * columns
        rows = 2 * 4 * ROWS * self.stages + 4 * columns  # statistics, narrow rows
        return tiles + sums + rows + _RESERVE


def backward_keys(
    problem: Problem, statistics: Statistics, plan: Plan, parts: Parts,
    dk_wide: Tensor, dv_wide: Tensor, spans: Tensor | None,
) -> None:  # fmt: skip
    """Write the wide pair's gradients, and fill the narrow pair's parts."""
    batch, kv_heads, wide_rows, head_dim = problem.k_wide.shape
    value_dim = problem.v_wide.shape[3]
    heads = batch * kv_heads
    sums = [dk_wide, dv_wide]
    if plan.splits > 1:
        sums = [
            torch.empty(plan.splits, *t.shape, dtype=torch.float32, device=t.device) for t in sums
        ]
    items = parts.count * plan.splits * heads
    slots_of_rows = triton.next_power_of_2(problem.group)
    launch(
        hopper_backward_keys_kernel, min(problem.device.multiprocessors, items),
        *(_rows(t, problem.group) for t in (problem.q, statistics.dout)),
        _statistic(statistics.delta, slots_of_rows, 0.0),
        _statistic(statistics.lse2, slots_of_rows, math.inf),
        *(describe(t, [1, 1, KEYS, block(t.shape[3])]) for t in (problem.k_wide, problem.v_wide)),
        problem.k_narrow, problem.v_narrow, statistics.has_huge, *sums, parts.dk, parts.dv,
        problem.kv_bounds, spans, problem.q_start,
        *problem.sizes(), items, heads, plan.splits, triton.cdiv(wide_rows, KEYS), plan.tiles,
        *parts.numbers,
        *problem.k_narrow.stride()[:3], *problem.v_narrow.stride()[:3],
        *(stride for t in sums for stride in t.stride()[-4:-1]),
        problem.scale, problem.log2_scale, *problem.biases(),
        FORM=CODES[problem.form], HEADS=slots_of_rows, DO_ACCUMULATE=plan.tiles > 1,
        HEAD_DIM=head_dim, VALUE_DIM=value_dim,
        BLOCK_D=block(head_dim), BLOCK_DV=block(value_dim),
        HAS_BOUNDS=problem.kv_bounds is not None, HAS_Q_START=problem.q_start is not None,
        HAS_BIAS=any(problem.biases()),
        IS_CAUSAL=problem.wide_reach[1] == problem.narrow_reach[1] == 0,
        IS_SQUARE=problem.q_start is None and problem.q.shape[2] == wide_rows
        and wide_rows == problem.k_narrow.shape[2],
        INDEX=problem.constants()["INDEX"],
        config=Config(),
    )  # fmt: skip
    if plan.splits > 1:
        for grad, total in zip((dk_wide, dv_wide), sums, strict=True):
            grad.copy_(total.sum(0))


def _rows(tensor: Tensor, group: int) -> TensorDescriptor:
    """Describe q or dout [B, H, N, D] as [B, Hkv, N, G, D], in tiles of ROWS rows.

    A tile has a power of two of heads to a position: those beyond G are zero.
    """
    heads = triton.next_power_of_2(group)
    rows = tensor.unflatten(1, (-1, group)).transpose(2, 3)
    return describe(rows, [1, 1, ROWS // heads, heads, block(tensor.shape[3])])


def _statistic(tensor: Tensor, heads: int, beyond: float) -> TensorDescriptor:
    """Describe a statistic [B, Hkv, N, G] as [B * Hkv, N * heads]: those past G are `beyond`."""
    group = tensor.shape[3]
    if heads != group:
        tensor = torch.nn.functional.pad(tensor, (0, heads - group), value=beyond)
    return describe(tensor.flatten(2).flatten(0, 1), [1, ROWS])
