"""The wide pair's gradients on Hopper, weighed as the forward weighed, in four matrix products.

With virtual queries q̃ = q ∘ k_m and virtual dout dõ = dout ∘ v_m, m = position - offset (for
determinants k_m × q in the threes, for strassen q + k_m, which has q · k_m besides in its logits):

    dk_wide += scale · dS q̃      dv_wide += P dõ

so both sums stay in registers while all rows and offsets pass, and nothing is left to do for an
offset. The narrow pair's gradients are another kernel's: here no sum of X is at hand.
"""

from dataclasses import dataclass

import torch
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

from csrc_free.device.forms import CODES, DETERMINANT, STRASSEN
from csrc_free.hopper.assembly import opaque_zero, pack_as
from csrc_free.hopper.channels import arrive, barriers, wait_empty, wait_full
from csrc_free.hopper.describe import describe
from csrc_free.hopper.half_range import (
    K_BIAS,
    OF_DK_WIDE,
    OF_DP,
    OF_DV_WIDE,
    OF_LOGITS,
    V_BIAS,
    Scaled,
    largest_p,
)
from csrc_free.hopper.key_plan import ROWS
from csrc_free.hopper.layouts import accumulator, columns_of, operand, plain, rows_of
from csrc_free.hopper.spans import FIELDS
from csrc_free.hopper.splits import add_splits, sums_of_splits
from csrc_free.hopper.threes import rounded_cross
from csrc_free.launch import launch
from csrc_free.problem import Problem, block
from csrc_free.rounding import ceil_div, next_power_of_2
from csrc_free.steps.delta import Statistics
from csrc_free.traits import Device, Traits

KEYS = 128  # of a program: 64 for each of two warpgroups
HEADS_OF_TILE = 4  # of a tile of rows: of more each has tiles of its own, of the same positions
_KEYS = gl.constexpr(KEYS)
_HALF = gl.constexpr(KEYS // 2)
_ROWS = gl.constexpr(ROWS)
_FIELDS = gl.constexpr(FIELDS)
_RESERVE = 1000  # bytes: barriers, and what the warps are told
PANEL = 64
_PANEL = gl.constexpr(PANEL)
_BLOCK_BITS = gl.constexpr(5)  # numbers of up to 16 tiles of a position's heads
_LAST_BLOCK = gl.constexpr(31)

NOT_SPECIALIZED = (
    "kv_heads", "group", "seq", "wide_rows", "narrow_rows",
    "wide_left", "wide_right", "narrow_left", "narrow_right", "q_start_default", "items", "heads",
    "splits",
)  # fmt: skip


@gluon.jit
def _split(item, heads, splits):
    """Return an item's tile of keys, split and key-value head of the batch."""
    return item // heads // splits, item // heads % splits, item % heads


@gluon.jit
def _item(
    item, heads, splits, sizes, spans, q_start, HAS_BOUNDS: gl.constexpr,
    HAS_Q_START: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """Return where an item stands, and what its keys meet: queries, offsets, and common bounds.

    Of the queries that see a tile of keys, an item has its split. Items of the last keys, which a
    causal window shows to few queries, come last.
    """
    (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        start,
    ) = sizes  # fmt: skip
    positions: gl.constexpr = _ROWS // HEADS
    tile, split, bh = _split(item, heads, splits)
    batch = bh // kv_heads
    if HAS_Q_START:
        start = gl.load(q_start + batch)
    keys = gl.maximum(wide_rows, narrow_rows)
    narrow_first = keys - narrow_rows
    key_first = keys - wide_rows + tile * _KEYS
    if HAS_BOUNDS:
        span_ptr = spans + (batch * ((wide_rows + _KEYS - 1) // _KEYS) + tile) * _FIELDS
        query_first = gl.load(span_ptr)
        query_end = gl.load(span_ptr + 1)
        lo = gl.load(span_ptr + 4)
        hi = gl.load(span_ptr + 5)
    else:
        key_end = gl.minimum(key_first + _KEYS, keys)
        query_first = gl.maximum(key_first - wide_right - start, 0)
        query_end = gl.minimum(key_end + wide_left - start, seq)
        lo = 0
        hi = keys
    tiles = (gl.maximum(query_end - query_first, 0) + positions - 1) // positions
    query_end = gl.minimum(query_end, query_first + tiles * (split + 1) // splits * positions)
    query_first += tiles * split // splits * positions
    tiles = tiles * (split + 1) // splits - tiles * split // splits
    first = gl.maximum(0 - narrow_right, start + query_first - keys + 1)
    last = gl.minimum(narrow_left, start + query_end - 1 - narrow_first)
    offsets = gl.maximum(last - first + 1, 0)
    if offsets == 0:
        tiles = 0
    return (
        batch, bh, tile, start, key_first, query_first, query_end, tiles, first, offsets,
        lo, hi,
    )  # fmt: skip


@gluon.jit
def _fetch(
    q, dout, k_wide, v_wide, k_narrow, v_narrow, spans, q_start,
    q_tile, dout_tile, k_tiles, v_tiles, ring,
    k_full, k_empty, q_full, q_empty, slot_full, slot_empty,
    sizes, group, items, heads, splits,
    HEADS: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
):  # fmt: skip
    """The warp that brings tiles: wide keys, rows, and for each offset the rows' narrow keys."""
    blocks = (group + HEADS - 1) // HEADS
    kv_heads, _, wide_rows, narrow_rows, _, _, _, _, _ = sizes
    positions: gl.constexpr = _ROWS // HEADS
    shape: gl.constexpr = [1, 1, _HALF, BLOCK_D]
    rows: gl.constexpr = [1, 1, HEADS, positions, BLOCK_D]
    # A matrix in shared memory is panels of 64 columns, one after the other; each head has all.
    panels: gl.constexpr = [BLOCK_D // _PANEL * HEADS, 1, 1, positions, _PANEL]
    narrow_first = gl.maximum(wide_rows, narrow_rows) - narrow_rows
    step = 0
    items_done = 0
    tiles_done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, bh, tile, start, _, query_first, _, tiles, first, offsets, _, _ = (
            _item(item, heads, splits, sizes, spans, q_start, HAS_BOUNDS, HAS_Q_START, HEADS)
        )  # fmt: skip
        kv_head = bh % kv_heads
        wait_empty(k_empty, 0, items_done)
        mbarrier.expect(k_full.index(0), 4 * k_wide.block_type.nbytes)
        for half in gl.static_range(2):
            coords = [batch, kv_head, tile * _KEYS + half * _HALF, 0]
            tma.async_copy_global_to_shared(
                k_wide, coords, k_full.index(0),
                k_tiles.index(half)._reinterpret(q.dtype, shape, k_wide.layout),
            )  # fmt: skip
            tma.async_copy_global_to_shared(
                v_wide, coords, k_full.index(0),
                v_tiles.index(half)._reinterpret(q.dtype, shape, v_wide.layout),
            )  # fmt: skip
        for a in range(tiles * blocks):
            i = query_first + a // blocks * positions
            head = a % blocks * HEADS
            wait_empty(q_empty, 0, tiles_done)
            mbarrier.expect(q_full.index(0), 2 * q.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q, [batch, kv_head, head, i, 0], q_full.index(0),
                q_tile._reinterpret(q.dtype, rows, q.layout),
            )  # fmt: skip
            tma.async_copy_global_to_shared(
                dout, [batch, kv_head, head, i, 0], q_full.index(0),
                dout_tile._reinterpret(q.dtype, rows, dout.layout),
            )  # fmt: skip
            tiles_done += 1
            for d in range(offsets):
                s = step % STAGES
                wait_empty(slot_empty, s, step // STAGES)
                mbarrier.expect(slot_full.index(s), 4 * _ROWS * BLOCK_D)  # bytes
                k_slot = ring.index(2 * s)._reinterpret(q.dtype, panels, k_narrow.layout)
                v_slot = ring.index(2 * s + 1)._reinterpret(q.dtype, panels, v_narrow.layout)
                for panel in gl.static_range(BLOCK_D // _PANEL):
                    coords = [batch, kv_head, start + i - first - d - narrow_first, panel * _PANEL]
                    for copy in gl.static_range(HEADS):
                        index = panel * HEADS + copy
                        tma.async_copy_global_to_shared(
                            k_narrow, coords, slot_full.index(s), k_slot.index(index)
                        )
                        tma.async_copy_global_to_shared(
                            v_narrow, coords, slot_full.index(s), v_slot.index(index)
                        )
                step += 1
        items_done += 1  # noqa: SIM113


@gluon.jit
def _build(
    step, place, offsets, tiles_done, mine, bias, ring, constants, log2_scale,
    q_full, q_empty, slot_full, built,
    r: gl.constexpr, FORM: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Make this warpgroup's half of the virtual rows of a step, in the narrow rows' place.

    `place` is the step's among the offsets of its tile of rows; returns the next step's, and the
    tiles that are done.
    """
    s = step % STAGES
    wait_full(slot_full, s, step // STAGES)
    if place == 0:
        wait_full(q_full, 0, tiles_done)
    rows = ring.index(2 * s + r)
    columns: gl.constexpr = rows.shape[1]
    IS_CROSS: gl.constexpr = FORM == DETERMINANT and r == 0
    by_rows: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    layout: gl.constexpr = accumulator(columns) if IS_CROSS else by_rows
    x = _biased(rows.load(layout), bias, HAS_BIAS)
    y = mine.load(layout)
    if IS_CROSS:
        made = rounded_cross(x, y)
    elif FORM == STRASSEN and r == 0:
        x, y = x.to(gl.float32), y.to(gl.float32)
        of_rows = constants.index(s)._reinterpret(gl.float32, [_ROWS], plain(1))
        of_rows.store(gl.sum(x * y, 1) * log2_scale)
        made = x + y
    else:
        made = x * y
    rows.store(made.to(rows.dtype))
    fence_async_shared()
    arrive(built, s)
    place += 1
    if place == offsets:
        arrive(q_empty, 0)
        place = 0
        tiles_done += 1
    return place, tiles_done


@gluon.jit
def _biased(tile, bias, HAS_BIAS: gl.constexpr):
    if HAS_BIAS:
        tile = tile.to(gl.float32) + bias
    return tile


@gluon.jit
def _probabilities(
    s, lse2_tile, constants, i, offset, full, reach, batch, start, key_first, seq,
    kv_bounds, log2_scale, FORM: gl.constexpr, HEADS: gl.constexpr, HAS_BOUNDS: gl.constexpr,
    LARGEST: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return P of a tile [keys, rows] whose first query is i, each at its narrow key of an offset.

    Rows past the last query have an infinite lse.
    """
    full_first, full_last, full_narrow_first, full_narrow_last = full
    shift = lse2_tile.load(LAYOUT)
    if FORM == STRASSEN:
        shift -= constants.load(LAYOUT)
    p = gl.exp2(s * log2_scale - shift)
    is_whole = (i >= full_first) & (i <= full_last)
    is_whole = is_whole & (i - offset >= full_narrow_first) & (i - offset <= full_narrow_last)
    if is_whole == 0:
        lowest, highest, last, narrow_first, narrow_last = reach
        key = gl.arange(0, _HALF, layout=rows_of(LAYOUT))[:, None]
        row = i + (gl.arange(0, _ROWS, layout=columns_of(LAYOUT)) % (_ROWS // HEADS))[None, :]
        visible = (key - row >= lowest) & (key - row <= highest) & (key <= last)
        visible = visible & (row - offset >= narrow_first) & (row - offset <= narrow_last)
        if HAS_BOUNDS:
            of_row = kv_bounds + (batch.to(gl.int64) * seq + gl.minimum(row, seq - 1)) * 2
            lo = gl.maximum(gl.load(of_row), 0)
            hi = gl.maximum(gl.load(of_row + 1), 0)
            m = start + row - offset
            visible = visible & (key >= lo - key_first) & (key < hi - key_first)
            visible = visible & (m >= lo) & (m < hi)
        p = gl.where(visible, gl.minimum(p, LARGEST), 0.0)
    return p


@gluon.jit
def _sum_up(
    r: gl.constexpr,
    delta, lse2, has_huge, dk_wide, dv_wide, kv_bounds, spans, q_start,
    mine, statistic, constants, k_tile, v_tile, ring,
    k_full, k_empty, q_full, q_empty, slot_full, slot_empty, built,
    sizes, group, items, heads, splits, strides, scale, log2_scale, bias, factors,
    FORM: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, HAS_BOUNDS: gl.constexpr,
    HAS_Q_START: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Warpgroup r of two: half the keys of an item, and half of every step's virtual rows."""
    kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, _, _, _ = sizes
    stride_dk_b, stride_dk_h, stride_dk_n, stride_dv_b, stride_dv_h, stride_dv_n = strides
    dtype: gl.constexpr = ring.dtype
    IS_HALF: gl.constexpr = dtype == gl.float16
    of_logits: gl.constexpr = accumulator(_ROWS)
    of_sums: gl.constexpr = accumulator(BLOCK_D)
    of_row: gl.constexpr = columns_of(gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0]))
    positions: gl.constexpr = _ROWS // HEADS
    no_logits = gl.zeros([_HALF, _ROWS], gl.float32, of_logits)
    both = gl.arange(0, 2 * _ROWS, layout=of_row)
    statistics = statistic._reinterpret(gl.float32, [2, 1, _ROWS], plain(2))
    both_statistics = statistic._reinterpret(gl.float32, [1, 2 * _ROWS], plain(2))
    keys = gl.maximum(wide_rows, narrow_rows)
    blocks = (group + HEADS - 1) // HEADS
    step = 0
    items_done = 0
    tiles_done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        (
            batch, bh, _tile, start, key_first, query_first, query_end, tiles, first, offsets,
            lo, hi,
        ) = _item(
            item, heads, splits, sizes, spans, q_start, HAS_BOUNDS, HAS_Q_START, HEADS
        )  # fmt: skip
        is_huge = gl.load(has_huge + bh) != 0
        of_dp = 1.0
        if IS_HALF:  # as `half_range.scaled_rows_kernel` left them
            log2_scale = gl.load(factors + bh * 8 + OF_LOGITS)
            of_dp = gl.load(factors + bh * 8 + OF_DP)
            if HAS_BIAS:
                bias = gl.load(factors + bh * 8 + (K_BIAS if r == 0 else V_BIAS))
        key_first += r * _HALF
        # Offsets of a key in this half from a query, and of a query from its narrow key.
        lowest = start - wide_left - key_first
        highest = start + wide_right - key_first
        narrow_first = keys - narrow_rows - start
        reach = lowest, highest, keys - 1 - key_first, narrow_first, keys - 1 - start
        # What a tile of rows must be like to be seen whole: no mask.
        full_first = _HALF - 1 - highest
        full_last = 0 - lowest - positions + 1
        full_narrow_first = narrow_first
        if HAS_BOUNDS:  # what `lo` and `hi` say is said of these queries alone
            full_last = gl.minimum(full_last, query_end - positions)
            full_narrow_first = gl.maximum(narrow_first, lo - start)
        is_whole = (key_first >= lo) & (key_first + _HALF <= hi) & (is_huge == 0)
        full_last = gl.where(is_whole, full_last, full_first - 1)
        full = full_first, full_last, full_narrow_first, hi - start - positions
        # The tiles of rows that see this half.
        own_first = gl.maximum(key_first - wide_right - start, query_first)
        own_end = gl.minimum(gl.minimum(key_first + _HALF, keys) + wide_left - start, query_end)
        tile_first = gl.minimum(gl.maximum(own_first - query_first, 0) // positions, tiles)
        tile_end = gl.minimum(
            (gl.maximum(own_end - query_first, 0) + positions - 1) // positions, tiles
        )
        tile_end = gl.maximum(tile_end, tile_first)
        steps = blocks * offsets  # of the rows of a tile's positions
        step_end = step + tiles * steps
        own_step = step + tile_first * steps
        own_step_end = step + tile_end * steps
        x = gl.zeros([_HALF, BLOCK_D], gl.float32, of_sums)
        y = gl.zeros([_HALF, BLOCK_D], gl.float32, of_sums)
        wait_full(k_full, 0, items_done)
        # Virtual rows are made two steps ahead: `to_build` is that step's place in its tile.
        to_build = 0
        for ahead in range(step, gl.minimum(step + 2, step_end)):
            to_build, tiles_done = _build(
                ahead, to_build, offsets, tiles_done, mine, bias, ring, constants,
                log2_scale, q_full, q_empty, slot_full, built, r, FORM, STAGES, HAS_BIAS,
            )  # fmt: skip
        for step in range(own_step - tile_first * steps, own_step):
            if step + 2 < step_end:
                to_build, tiles_done = _build(
                    step + 2, to_build, offsets, tiles_done, mine, bias, ring, constants,
                    log2_scale, q_full, q_empty, slot_full, built, r, FORM, STAGES, HAS_BIAS,
                )  # fmt: skip
            wait_full(built, step % STAGES, step // STAGES)
            arrive(slot_empty, step % STAGES)
        if own_step_end > own_step:
            now = own_step % STAGES
            wait_full(built, now, own_step // STAGES)
            s = warpgroup_mma(
                k_tile, ring.index(2 * now).permute((1, 0)), no_logits,
                use_acc=False, is_async=True,
            )  # fmt: skip
            s = warpgroup_mma_wait(0, deps=(s,))
            # The first query of a tile of rows, and which heads of its positions, in one register.
            place = (query_first + tile_first * positions) << _BLOCK_BITS
            d = 0
            for step in range(own_step, own_step_end):
                if d == 0:
                    row = (place >> _BLOCK_BITS) + both % positions
                    head = (place & _LAST_BLOCK) * HEADS + both % _ROWS // positions
                    mask = (row < seq) & (head < group)
                    of_head = ((item + opaque_zero()) % heads).to(gl.int64) * seq
                    offs = (of_head + row) * group + head
                    of_lse2 = gl.load(lse2 + offs, mask=mask & (both < _ROWS), other=float("inf"))
                    of_delta = gl.load(delta + offs, mask=mask & (both >= _ROWS), other=0.0)
                    both_statistics.store(gl.where(both < _ROWS, of_lse2, of_delta)[None, :])
                dp = warpgroup_mma(
                    v_tile, ring.index(2 * now + 1).permute((1, 0)), no_logits,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                p = _probabilities(
                    s, statistics.index(0), constants.index(now), place >> _BLOCK_BITS, first + d,
                    full, reach, batch, start, key_first, seq, kv_bounds, log2_scale,
                    FORM, HEADS, HAS_BOUNDS, largest_p(dtype), of_logits,
                )  # fmt: skip
                y = warpgroup_mma(
                    gl.convert_layout(pack_as(p, dtype), operand(BLOCK_D)), ring.index(2 * now + 1),
                    y, is_async=True,
                )  # fmt: skip
                dp = warpgroup_mma_wait(1, deps=(dp,))
                if IS_HALF:
                    dp *= of_dp
                ds = pack_as(p * (dp - statistics.index(1).load(of_logits)), dtype)
                x = warpgroup_mma(
                    gl.convert_layout(ds, operand(BLOCK_D)), ring.index(2 * now), x, is_async=True
                )
                if step + 2 < step_end:
                    to_build, tiles_done = _build(
                        step + 2, to_build, offsets, tiles_done, mine, bias, ring, constants,
                        log2_scale, q_full, q_empty, slot_full, built, r, FORM, STAGES, HAS_BIAS,
                    )  # fmt: skip
                d += 1
                if d == offsets:
                    d = 0
                    place += 1
                    blocks = (group + opaque_zero() + HEADS - 1) // HEADS
                    if (place & _LAST_BLOCK) == blocks:
                        place += (positions << _BLOCK_BITS) - blocks
                has_more = step + 1 < own_step_end
                later = gl.where(has_more, (step + 1) % STAGES, now)
                if has_more:
                    wait_full(built, later, (step + 1) // STAGES)
                # After the last step a product that nobody reads: nothing else may end the loop.
                s = warpgroup_mma(
                    k_tile, ring.index(2 * later).permute((1, 0)), no_logits,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                x, y = warpgroup_mma_wait(1, deps=(x, y))
                if has_more:
                    arrive(slot_empty, now)
                s = warpgroup_mma_wait(0, deps=(s,))
                if has_more == 0:
                    arrive(slot_empty, now)
                now = later
        for step in range(own_step_end, step_end):
            if step + 2 < step_end:
                to_build, tiles_done = _build(
                    step + 2, to_build, offsets, tiles_done, mine, bias, ring, constants,
                    log2_scale, q_full, q_empty, slot_full, built, r, FORM, STAGES, HAS_BIAS,
                )  # fmt: skip
            wait_full(built, step % STAGES, step // STAGES)
            arrive(slot_empty, step % STAGES)
        step = step_end
        arrive(k_empty, 0)
        items_done += 1  # noqa: SIM113

        # Where the item stands is made anew, so that no registers keep it.
        tile, split, bh = _split(item + opaque_zero(), heads, splits)
        row = tile * _KEYS + r * _HALF + gl.arange(0, _HALF, layout=rows_of(of_sums))
        column = gl.arange(0, BLOCK_D, layout=columns_of(of_sums))
        batch = bh // kv_heads
        kv_head = (bh % kv_heads).to(gl.int64)
        of_dk = scale
        if IS_HALF:
            of_dk = gl.load(factors + bh * 8 + OF_DK_WIDE)
            y *= gl.load(factors + bh * 8 + OF_DV_WIDE)
        before = split.to(gl.int64) * heads * wide_rows
        offs = before * HEAD_DIM + batch.to(gl.int64) * stride_dk_b + kv_head * stride_dk_h
        gl.store(
            dk_wide + offs + (row.to(gl.int64) * stride_dk_n)[:, None] + column[None, :],
            (x * of_dk).to(dk_wide.dtype.element_ty),
            mask=(row < wide_rows)[:, None] & (column < HEAD_DIM)[None, :],
        )  # fmt: skip
        offs = before * VALUE_DIM + batch.to(gl.int64) * stride_dv_b + kv_head * stride_dv_h
        gl.store(
            dv_wide + offs + (row.to(gl.int64) * stride_dv_n)[:, None] + column[None, :],
            y.to(dv_wide.dtype.element_ty),
            mask=(row < wide_rows)[:, None] & (column < VALUE_DIM)[None, :],
        )  # fmt: skip


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def hopper_backward_wide_kernel(
    q, dout, k_wide, v_wide, k_narrow, v_narrow,
    delta, lse2, has_huge, dk_wide, dv_wide, kv_bounds, spans, q_start, factors,
    kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
    q_start_default, group, items, heads, splits,
    stride_dk_b, stride_dk_h, stride_dk_n, stride_dv_b, stride_dv_h, stride_dv_n,
    scale, log2_scale, k_narrow_bias, v_narrow_bias,
    FORM: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, HAS_BOUNDS: gl.constexpr,
    HAS_Q_START: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """A persistent program takes items, 128 wide keys each, 64 for either of two warpgroups.

    It goes through tiles of 64 rows, HEADS heads x (64 / HEADS) positions, those of all heads of
    some positions before others, and inside through the offsets of the narrow window. A third warp
    brings the narrow keys of a tile's positions; the first warpgroup multiplies k by q, the second
    v by dout, and both use both.

    q and dout are descriptors of [B, Hkv, G, N, D], the pairs of [B, Hkv, rows, D]; delta and lse2
    are [B, Hkv, N, G]. With several splits the gradients are float32 [splits, B, Hkv, rows, D],
    sums over the queries of one.
    """
    dtype: gl.constexpr = q.dtype
    matrix: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    mine = gl.allocate_shared_memory(dtype, [2, _ROWS, BLOCK_D], matrix)
    k_tiles = gl.allocate_shared_memory(dtype, [2, _HALF, BLOCK_D], matrix)
    v_tiles = gl.allocate_shared_memory(dtype, [2, _HALF, BLOCK_D], matrix)
    ring = gl.allocate_shared_memory(dtype, [2 * STAGES, _ROWS, BLOCK_D], matrix)
    statistic = gl.allocate_shared_memory(gl.float32, [2, 2, _ROWS], plain(2))
    # What stands besides in the logits of a step's virtual rows.
    constants = gl.allocate_shared_memory(
        gl.float32, [STAGES if FORM == STRASSEN else 1, 1, _ROWS], plain(2)
    )
    k_full = barriers(1, 1)
    k_empty = barriers(1, 2)
    q_full = barriers(1, 1)
    q_empty = barriers(1, 2)
    slot_full = barriers(STAGES, 1)
    slot_empty = barriers(STAGES, 2)
    built = barriers(STAGES, 2)
    fence_async_shared()
    sizes = (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        q_start_default,
    )  # fmt: skip
    strides = stride_dk_b, stride_dk_h, stride_dk_n, stride_dv_b, stride_dv_h, stride_dv_n
    gl.warp_specialize([
        (_sum_up, (
            0, delta, lse2, has_huge, dk_wide, dv_wide, kv_bounds, spans, q_start,
            mine.index(0), statistic.index(0), constants, k_tiles.index(0), v_tiles.index(0), ring,
            k_full, k_empty, q_full, q_empty, slot_full, slot_empty, built,
            sizes, group, items, heads, splits, strides, scale, log2_scale, k_narrow_bias,
            factors, FORM, HEADS, HEAD_DIM, VALUE_DIM, BLOCK_D, STAGES,
            HAS_BOUNDS, HAS_Q_START, HAS_BIAS,
        )),
        (_sum_up, (
            1, delta, lse2, has_huge, dk_wide, dv_wide, kv_bounds, spans, q_start,
            mine.index(1), statistic.index(1), constants, k_tiles.index(1), v_tiles.index(1), ring,
            k_full, k_empty, q_full, q_empty, slot_full, slot_empty, built,
            sizes, group, items, heads, splits, strides, scale, log2_scale, v_narrow_bias,
            factors, FORM, HEADS, HEAD_DIM, VALUE_DIM, BLOCK_D, STAGES,
            HAS_BOUNDS, HAS_Q_START, HAS_BIAS,
        )),
        (_fetch, (
            q, dout, k_wide, v_wide, k_narrow, v_narrow, spans, q_start,
            mine.index(0), mine.index(1), k_tiles, v_tiles, ring,
            k_full, k_empty, q_full, q_empty, slot_full, slot_empty, sizes, group, items,
            heads, splits, HEADS, BLOCK_D, STAGES, HAS_BOUNDS, HAS_Q_START,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Two warpgroups and a warp that brings narrow rows, STAGES tiles of them ahead."""

    stages: int = 4
    num_warps: int = 4
    maxnreg: int = 168  # on average: 240 for the two warpgroups, 24 for the warp

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        tiles = (self.stages + 2 + 1) * 2 * 2 * ROWS * traits.columns  # narrow rows, keys, rows
        return tiles + (2 * 2 + self.stages) * 4 * ROWS + _RESERVE


def backward_wide(
    problem: Problem, statistics: Statistics, dk_wide: Tensor, dv_wide: Tensor,
    spans: Tensor | None, splits: int, scaled: Scaled | None = None,
) -> None:  # fmt: skip
    """Write the wide pair's gradients; `splits` programs share the queries of a tile of keys."""
    delta, lse2, factors = statistics.delta, statistics.lse2, None
    if scaled is not None:
        problem, delta, lse2, factors, _ = scaled
    batch, kv_heads, wide_rows, head_dim = problem.k_wide.shape
    value_dim = problem.v_wide.shape[3]
    columns = block(head_dim)
    heads = min(next_power_of_2(problem.group), HEADS_OF_TILE)
    items = batch * kv_heads * ceil_div(wide_rows, KEYS) * splits
    narrow = [1, 1, ROWS // heads, PANEL]
    sums = sums_of_splits((dk_wide, dv_wide), splits)
    launch(
        hopper_backward_wide_kernel, min(problem.device.multiprocessors, items),
        *(_rows(t, problem.group, heads, columns) for t in (problem.q, statistics.dout)),
        *(describe(t, [1, 1, KEYS // 2, columns]) for t in (problem.k_wide, problem.v_wide)),
        *(describe(t, narrow) for t in (problem.k_narrow, problem.v_narrow)),
        delta, lse2, statistics.has_huge, *sums,
        problem.kv_bounds, spans, problem.q_start, factors,
        *problem.sizes(), problem.group, items, batch * kv_heads, splits,
        *(stride for t in sums for stride in t.stride()[-4:-1]),
        problem.scale, problem.log2_scale, *problem.biases()[2:],
        FORM=CODES[problem.form], HEADS=heads, HEAD_DIM=head_dim, VALUE_DIM=value_dim,
        BLOCK_D=columns, HAS_BOUNDS=problem.kv_bounds is not None,
        HAS_Q_START=problem.q_start is not None, HAS_BIAS=any(problem.biases()[2:]),
        config=Config(),
    )  # fmt: skip
    add_splits((dk_wide, dv_wide), sums, splits)


def _rows(tensor: Tensor, group: int, heads: int, columns: int) -> TensorDescriptor:
    """Describe q or dout [B, H, N, D] as [B, Hkv, G, N, D], in tiles of ROWS rows, head by head."""
    rows: torch.Tensor = tensor.unflatten(1, (-1, group))
    return describe(rows, [1, 1, heads, ROWS // heads, columns])
