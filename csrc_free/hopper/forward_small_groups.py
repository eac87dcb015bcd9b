"""The Hopper forward where a key-value head has few query heads: a tile of 64 rows is P positions.

The rows are P positions x HEADS heads, row = position · HEADS + head. Two warpgroups share them and
take every second offset of the narrow window each. Some tiles of the wide pair stay in shared
memory through all offsets (a group of tiles); T = P·v sums over them in the accumulator, and goes
to the output once an offset. The maximum lags: it is the first tile's, plus some headroom, and
every tile's exponentials are tested; where some are too large, that tile is done again, before
anything of it is used.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from csrc_free.hopper.assembly import (
    declare_flags,
    is_any_above,
    opaque_zero,
    pack_bfloat16,
    parts_of_rows,
)
from csrc_free.hopper.channels import arrive, barriers, wait_empty, wait_full
from csrc_free.hopper.describe import describe
from csrc_free.hopper.layouts import accumulator, columns_of, operand, plain, rows_of
from csrc_free.hopper.serve import processors_of
from csrc_free.hopper.tile_reach import first_position, place, row_range, tile_reach
from csrc_free.launch import OPTIONS
from csrc_free.problem import NOT_SPECIALIZED, Problem
from csrc_free.traits import Device, Traits, first_that_fits

LN_2 = gl.constexpr(0.6931471805599453)
# Other numbers that change from call to call.
_SIZES = ("has_bounds", "has_q_start", "items", "tiles", "group", "kv_heads")
_ROWS = 64  # of a tile: a warpgroup's product
_KEYS = 64  # of a wide tile
_OFFSETS = 32  # whose narrow keys are in shared memory at a time
_TAIL = 16  # keys beyond the last group of tiles

# A row's maximum stands this many powers of two above the logits that set it, and no weight may
# reach 2: 29 powers of headroom. So sums of P·v keep 2^-28 of |v| where logits are even, and stay
# below twice |v| a key where they are not.
HEADROOM = gl.constexpr(28.0)
# The maximum of a row that has seen nothing: whatever comes is above it.
NOTHING = gl.constexpr(-3.4028234663852886e38)
# Beyond 2 to this power a maximum's steps are of the size of the headroom. Rows that high are
# always done again, with exponents cut off at 0: float32 logits of that size differ by 32 at least.
HUGE = gl.constexpr(28)

# Pairs of barriers, full and empty.
Q = gl.constexpr(0)
K_ROWS = gl.constexpr(1)
V_ROWS = gl.constexpr(2)
TAIL = gl.constexpr(3)
SUMS = gl.constexpr(4)

# What the warp of the narrow rows tells the warpgroups of every chunk of offsets.
CHUNKS = gl.constexpr(0)  # of the item
STEPS = gl.constexpr(1)  # offsets of each warpgroup, times groups of wide tiles
HIGH = gl.constexpr(2)  # the wide row after the newest tile
NEW_EDGE = gl.constexpr(3)  # all rows see the tiles from this one on
OLD_EDGE = gl.constexpr(4)  # and before this one
BYTES = gl.constexpr(5)  # the four below, a byte each
# Offsets of each warpgroup; all rows see the narrow keys of offsets from the first of the chunk on,
# and before the last; whether there is a tail.
PASSES, FIRST, LAST, HAS_TAIL = (gl.constexpr(shift) for shift in (0, 8, 16, 24))

# Bits that flip with every item, chunk, tail and group of tiles: what their barriers wait for.
ITEM, CHUNK, END, GROUP_OF_TILES = (gl.constexpr(bit) for bit in range(4))


@dataclasses.dataclass(frozen=True)
class Config:
    """Rows of a tile, and the wide tiles that stay in shared memory through all offsets."""

    heads: int  # rows of a position: the group, or the power of two above it
    tiles: int
    tail: int  # keys of the tile beyond the last group of tiles, or 0
    is_by_chunks: bool  # the narrow rows lie by chunks of 16 bytes: no two rows in one bank

    @property
    def positions(self) -> int:
        return _ROWS // self.heads

    @property
    def narrow_rows(self) -> int:
        """Return the rows that the buffer of narrow rows has room for."""
        rows = _OFFSETS + self.positions
        return triton.next_power_of_2(rows) if self.is_by_chunks else rows

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        del device
        columns = traits.block_d + traits.block_dv
        wide = 2 * columns * (self.tiles * _KEYS + self.tail)
        narrow = 2 * columns * self.narrow_rows
        handed = 4 * _ROWS * (traits.block_dv + 2)
        queries = 2 * _ROWS * traits.block_d
        spans = 4 * 2 * (4 * _ROWS + 16)
        return wide + narrow + handed + queries + spans + 1024


def choose(traits: Traits, device: Device, wide_keys: int) -> Config:
    """Choose the tiles for a wide window of so many keys: the fewest keys that cover it."""
    return first_that_fits(_configs(traits, wide_keys), traits, device)


def _configs(traits: Traits, wide_keys: int) -> Iterator[Config]:
    heads = triton.next_power_of_2(traits.group)
    seen = wide_keys + _ROWS // heads - 1

    def covered(tiles: int, tail: int) -> float:
        groups = max(1, -(-(seen - tail) // (tiles * _KEYS)))
        # A tail waits for its products; a group goes through the output once.
        return groups * (tiles * _KEYS + 16) + 2 * tail

    shapes = ((4, _TAIL), (3, 0), (4, 0))
    for tiles, tail in sorted(shapes, key=lambda shape: covered(*shape)):
        yield Config(heads, tiles, tail, heads <= 2)


@gluon.jit
def _bring_tiles(
    q, k_wide, v_wide, k_end, v_end, q_tile, k_tiles, v_tiles, k_tail, v_tail,
    k_full, k_empty, v_full, v_empty, full, empty, kv_bounds, q_start, has_bounds, has_q_start,
    items, tiles, kv_heads, seq, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, q_start_default,
    P: gl.constexpr, 
    KEYS: gl.constexpr, TILES: gl.constexpr, TAIL_KEYS: gl.constexpr, OFFSETS: gl.constexpr,
):  # fmt: skip
    """Bring the queries of every item and its wide tiles, the newest first, again for a chunk."""
    turn = 0
    tail_turn = 0
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, i = place(item, tiles, kv_heads, P)
        start = first_position(q_start, has_q_start, batch, q_start_default)
        low, high, first, last, _low, _high, _first, _last = tile_reach(
            kv_bounds, has_bounds, batch, i, start, seq, wide_rows, narrow_rows,
            wide_left, wide_right, narrow_left, narrow_right, P,
        )  # fmt: skip
        groups = gl.maximum(gl.cdiv(high - low - TAIL_KEYS, TILES * KEYS), 1)
        chunks = gl.cdiv(last - first + 1, OFFSETS)
        for chunk in range(chunks):
            row = high
            for group in range(groups):
                for t in gl.static_range(TILES):
                    row -= KEYS
                    if t == TILES - 1:
                        if (chunk == 0) & (group == 0):
                            wait_empty(empty, Q, count)
                            mbarrier.expect(full.index(Q), q.block_type.nbytes)
                            tma.async_copy_global_to_shared(
                                q, [batch, kv_head, i, 0, 0], full.index(Q), q_tile
                            )
                    wait_empty(k_empty, t, turn)
                    mbarrier.expect(k_full.index(t), k_wide.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        k_wide, [batch, kv_head, row, 0], k_full.index(t), k_tiles.index(t)
                    )
                    wait_empty(v_empty, t, turn)
                    mbarrier.expect(v_full.index(t), v_wide.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        v_wide, [batch, kv_head, row, 0], v_full.index(t), v_tiles.index(t)
                    )
                turn += 1
            if TAIL_KEYS:
                if low < row:
                    wait_empty(empty, TAIL, tail_turn)
                    mbarrier.expect(
                        full.index(TAIL), k_end.block_type.nbytes + v_end.block_type.nbytes
                    )
                    tma.async_copy_global_to_shared(
                        k_end, [batch, kv_head, row - TAIL_KEYS, 0], full.index(TAIL), k_tail
                    )
                    tma.async_copy_global_to_shared(
                        v_end, [batch, kv_head, row - TAIL_KEYS, 0], full.index(TAIL), v_tail
                    )
                    tail_turn += 1
        count += 1  # noqa: SIM113 (a kernel has no enumerate)


@gluon.jit
def _copy_rows(
    source, units, row, rows, stride,
    START: gl.constexpr, COLUMNS: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, PITCH: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Copy rows of a narrow key or value to shared memory, those outside [0, rows) as zeros.

    Shared memory is an array of units of 16 bytes. A row's follow one another, or, with a PITCH,
    chunk c of row r is unit c · PITCH + r.
    """
    CHUNKS: gl.constexpr = BLOCK // 8
    # By chunks a warp copies parts of 8 rows: its lanes then write different banks.
    AT_ONCE: gl.constexpr = 8 if PITCH else 32 // CHUNKS
    STEP: gl.constexpr = AT_ONCE if PITCH else AT_ONCE * CHUNKS
    SHAPE: gl.constexpr = gl.BlockedLayout([1, 8], [AT_ONCE, 32 // AT_ONCE], [1, 1], [1, 0])
    within = gl.arange(0, AT_ONCE, layout=gl.SliceLayout(1, SHAPE))
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, SHAPE))
    offsets = within[:, None] * stride + columns[None, :]
    for step in range(ROWS // AT_ONCE):
        there = (row + within >= 0) & (row + within < rows)
        if PITCH:
            target = units.index(START + step * STEP)._reinterpret(
                gl.bfloat16, [PITCH, BLOCK], LAYOUT
            )
            target = target.slice(0, AT_ONCE, 0)
        else:
            target = units.index(START + step * STEP)._reinterpret(
                gl.bfloat16, [AT_ONCE, BLOCK], LAYOUT
            )
        async_copy.async_copy_global_to_shared(
            target, source + row.to(gl.int64) * stride + offsets,
            mask=there[:, None] & (columns < COLUMNS)[None, :],
        )  # fmt: skip
        row += AT_ONCE
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def _plan(plans, place, number, LAYOUT: gl.constexpr):
    """Write one number for the warpgroups."""
    plans.index(place).store(gl.full([1], 0, gl.int32, LAYOUT) + number)


@gluon.jit
def _bring_rows(
    k_narrow, v_narrow, units, spans, plans, full, empty, kv_bounds, q_start, has_bounds, has_q_start,
    items, tiles, kv_heads, seq, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, q_start_default,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    P: gl.constexpr, HEADS: gl.constexpr, 
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    KEYS: gl.constexpr, TILES: gl.constexpr, TAIL_KEYS: gl.constexpr, OFFSETS: gl.constexpr,
    PITCH: gl.constexpr, V_UNIT: gl.constexpr, K_ROW: gl.constexpr, V_ROW: gl.constexpr,
):  # fmt: skip
    """Bring the narrow rows of every item, a chunk of offsets at a time, and say what is seen.

    Row r of a chunk is key position p - (its first offset) - OFFSETS + 1 + r, where p is that of
    the item's first query.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    keys = gl.maximum(wide_rows, narrow_rows)
    wide_first = keys - wide_rows
    narrow_first = keys - narrow_rows
    segment = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, i = place(item, tiles, kv_heads, P)
        start = first_position(q_start, has_q_start, batch, q_start_default)
        low, high, first, last, all_low, all_high, all_first, all_last = tile_reach(
            kv_bounds, has_bounds, batch, i, start, seq, wide_rows, narrow_rows,
            wide_left, wide_right, narrow_left, narrow_right, P,
        )  # fmt: skip
        groups = gl.maximum(gl.cdiv(high - low - TAIL_KEYS, TILES * KEYS), 1)
        chunks = gl.cdiv(last - first + 1, OFFSETS)
        passes = gl.cdiv(gl.cdiv(last - first + 1, chunks), 2)
        new_edge = gl.cdiv(gl.maximum(high - all_high, 0), KEYS)
        old_edge = gl.maximum(high - all_low, 0) // KEYS
        has_tail = (low < high - groups * (TILES * KEYS)).to(gl.int32)

        k_source = k_narrow + batch.to(gl.int64) * stride_kn_b + kv_head.to(gl.int64) * stride_kn_h
        v_source = v_narrow + batch.to(gl.int64) * stride_vn_b + kv_head.to(gl.int64) * stride_vn_h
        for chunk in range(chunks):
            offset = first + chunk * (2 * passes)
            wait_empty(empty, K_ROWS, segment)
            plan = 6 * (segment & 1)
            inner_first = gl.minimum(gl.maximum(all_first - offset, 0), 255)
            inner_last = gl.minimum(gl.maximum(all_last - offset + 1, 0), 255)
            _plan(plans, plan + CHUNKS, chunks, LAYOUT)
            _plan(plans, plan + STEPS, groups * passes, LAYOUT)
            _plan(plans, plan + HIGH, high, LAYOUT)
            _plan(plans, plan + NEW_EDGE, new_edge, LAYOUT)
            _plan(plans, plan + OLD_EDGE, old_edge, LAYOUT)
            _plan(
                plans, plan + BYTES,
                (passes << PASSES) | (inner_first << FIRST) | (inner_last << LAST)
                | (has_tail << HAS_TAIL), LAYOUT,
            )  # fmt: skip
            rows = gl.arange(0, 64, layout=LAYOUT) // HEADS
            query = gl.minimum(i + rows, seq - 1)
            position = start + query
            lo, hi = row_range(
                kv_bounds, has_bounds, batch, query, position, wide_left, wide_right, wide_first,
                seq, keys,
            )  # fmt: skip
            narrow_lo, narrow_hi = row_range(
                kv_bounds, has_bounds, batch, query, position, narrow_left, narrow_right,
                narrow_first, seq, keys,
            )  # fmt: skip
            span = 4 * (segment & 1)
            spans.index(span).store(lo - wide_first)
            spans.index(span + 1).store(gl.maximum(hi, lo) - wide_first)
            spans.index(span + 2).store(position - narrow_hi + 1 - offset)
            spans.index(span + 3).store(position - narrow_lo - offset)
            row = start + i - offset - (OFFSETS - 1) - narrow_first
            _copy_rows(
                k_source, units, row, narrow_rows, stride_kn_n,
                0, HEAD_DIM, BLOCK_D, OFFSETS + P, PITCH, K_ROW,
            )  # fmt: skip
            arrive(full, K_ROWS)
            wait_empty(empty, V_ROWS, segment)
            _copy_rows(
                v_source, units, row, narrow_rows, stride_vn_n,
                V_UNIT, VALUE_DIM, BLOCK_DV, OFFSETS + P, PITCH, V_ROW,
            )  # fmt: skip
            arrive(full, V_ROWS)
            segment += 1


@gluon.jit
def _unpack(x):
    """Return bfloat16 as float32: one instruction each, where a conversion takes 1.7."""
    return gl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x],
        dtype=gl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _spread_rows(
    units, unit, P: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr, PITCH: gl.constexpr,
    LAYOUT: gl.constexpr, BY_HEADS: gl.constexpr, ROW_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Load P narrow rows from a unit of shared memory on, each for its HEADS rows of the tile."""
    if PITCH:
        rows = units.index(unit)._reinterpret(gl.bfloat16, [PITCH, BLOCK], ROW_LAYOUT)
        rows = rows.slice(0, P, 0)
    else:
        rows = units.index(unit)._reinterpret(gl.bfloat16, [P, BLOCK], ROW_LAYOUT)
    if HEADS == 1:
        return rows.load(LAYOUT)
    x = gl.expand_dims(rows.load(gl.SliceLayout(1, BY_HEADS)), 1)
    x, _like = gl.broadcast(x, gl.zeros([P, HEADS, BLOCK], gl.bfloat16, BY_HEADS))
    return gl.convert_layout(gl.reshape(x, [P * HEADS, BLOCK]), LAYOUT, assert_trivial=True)


@gluon.jit
def _hide(s, hidden, spans, span, offset, row, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """Return products of the wide rows from `row` on, `hidden` where a row of the tile sees none."""
    lo = spans.index(span).load(rows_of(LAYOUT))
    hi = spans.index(span + 1).load(rows_of(LAYOUT))
    first = spans.index(span + 2).load(rows_of(LAYOUT))
    last = spans.index(span + 3).load(rows_of(LAYOUT))
    hi = gl.where((offset >= first) & (offset <= last), hi, lo)
    key = gl.arange(0, KEYS, layout=columns_of(LAYOUT))
    # One comparison for both ends: a key before lo is a large unsigned number.
    place_in_span = (key[None, :] - (lo - row)[:, None]).to(gl.uint32, bitcast=True)
    visible = place_in_span < (hi - lo).to(gl.uint32, bitcast=True)[:, None]
    return gl.where(visible, s, hidden)


@gluon.jit
def _or(x, y):
    return x | y


@gluon.jit
def _is_any_high(p, SIDE: gl.constexpr):
    """Tell the threads of warpgroup SIDE whether a weight of any of them is 2 or more, or NaN.

    The top bit of a bfloat16's exponent says so. It is read off the packed weights, so that these
    are packed before the test: ptxas else keeps 32 unpacked ones across it (22 are spilled).
    """
    bits = gl.inline_asm_elementwise(
        "mov.b32 $0, $2; mov.b32 $1, 0;", "=r,=r,r", [p], dtype=gl.int32, is_pure=True, pack=2
    )
    N: gl.constexpr = p.shape[1]
    bits = gl.reduce(gl.reshape(bits, [64, N // 8, 4, 2]), 3, _or)
    bits = gl.reduce(bits, 1, _or)
    # Of two weights in one number the bit of either, as that of a float32: 2 or more.
    bits = (bits | (bits << 16)) & 0x40000000
    return is_any_above(bits.to(gl.float32, bitcast=True), 0, SIDE)


@gluon.jit
def _weights(s, top, log2_scale, LAYOUT: gl.constexpr):
    """Return P as an operand, and its row sums in parts."""
    p = gl.exp2(s * log2_scale - top[:, None])
    return gl.convert_layout(pack_bfloat16(p), LAYOUT), parts_of_rows(p)


@gluon.jit
def _weights_anew(s, top, log2_scale, LAYOUT: gl.constexpr):
    """Return P and its parts under a maximum raised to these logits, that maximum, and its decay.

    The logits of a row of no visible key are all -inf; its maximum stays.
    """
    new_top = gl.maximum(top, gl.max(s, 1) * log2_scale + HEADROOM)
    # A huge maximum may be rounded to below its logit.
    p = gl.exp2(gl.minimum(s * log2_scale - new_top[:, None], 0.0))
    decay = gl.exp2(top - new_top)
    return gl.convert_layout(pack_bfloat16(p), LAYOUT), parts_of_rows(p), new_top, decay


@gluon.jit
def _is_any_huge(top, SIDE: gl.constexpr):
    """Tell whether some row's maximum is beyond HUGE."""
    size = gl.where(top == NOTHING, 0.0, gl.abs(top))
    return is_any_above(size, HUGE, SIDE)


@gluon.jit
def _attend_anew(
    vq, k_tile, top, log2_scale, hidden, spans, span, offset, row,
    SIDE: gl.constexpr, KEYS: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Return P of one tile, its parts, the maximum raised to it, its decay, whether it is huge."""
    S: gl.constexpr = accumulator(KEYS)
    s = warpgroup_mma(
        vq, k_tile.permute((1, 0)), gl.zeros([64, KEYS], gl.float32, S),
        use_acc=False, is_async=True,
    )  # fmt: skip
    s = warpgroup_mma_wait(0, deps=(s,))
    s = _hide(s, hidden, spans, span, offset, row, KEYS, S)
    p, parts, top, decay = _weights_anew(s, top, log2_scale, WEIGHTS)
    return p, parts, top, decay, _is_any_huge(top, SIDE)


@gluon.jit
def _attend_tail(
    vq, k_tail, v_tail, t, acc, total, p, top, is_huge, log2_scale, hidden, spans, span, offset,
    row,
    SIDE: gl.constexpr, KEYS: gl.constexpr, S: gl.constexpr, T: gl.constexpr,
    WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Attend to the keys beyond the last group of tiles, while P of its last tile waits."""
    ENDS: gl.constexpr = accumulator(KEYS)
    PARTS: gl.constexpr = total.type.layout
    s = warpgroup_mma(
        vq, k_tail.permute((1, 0)), gl.zeros([64, KEYS], gl.float32, ENDS),
        use_acc=False, is_async=True,
    )  # fmt: skip
    s = warpgroup_mma_wait(0, deps=(s,))
    s = _hide(s, hidden, spans, span, offset, row, KEYS, ENDS)
    own_top = gl.convert_layout(top, rows_of(ENDS))
    p_end, parts = _weights(s, own_top, log2_scale, WEIGHTS)
    is_bad = _is_any_high(p_end, SIDE) | is_huge
    if is_bad != 0:
        p_end, parts, own_top, decay = _weights_anew(s, own_top, log2_scale, WEIGHTS)
        top = gl.convert_layout(own_top, rows_of(S))
        t_decay = gl.convert_layout(decay, rows_of(T))[:, None]
        t = t * t_decay
        acc = acc * t_decay
        total = total * gl.convert_layout(decay, rows_of(PARTS))[:, None]
        p_decay = gl.convert_layout(decay, rows_of(WEIGHTS))[:, None]
        p = pack_bfloat16(p.to(gl.float32) * p_decay)
        is_huge = _is_any_huge(top, SIDE)
    total = total + gl.convert_layout(parts, PARTS)
    t = warpgroup_mma(p_end, v_tail, t, use_acc=True, is_async=True)
    return warpgroup_mma_wait(0, deps=(t,)), acc, total, p, top, is_huge


@gluon.jit
def _planned(plans, place):
    """Return one number that the warp of the narrow rows wrote, as a scalar."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.sum(plans.index(place).load(LAYOUT), 0)


@gluon.jit
def _byte(word, SHIFT: gl.constexpr):
    return (word >> SHIFT) & 255


@gluon.jit
def _is_partly_seen(offset, word):
    """Tell whether some row does not see its narrow key of an offset of the chunk."""
    return (offset < _byte(word, FIRST)) | (offset >= _byte(word, LAST))


@gluon.jit
def _partial_tiles(plans, plan, row, TILES: gl.constexpr, KEYS: gl.constexpr):
    """Return bits: which of a group's tiles, the first of which ends at `row`, some row sees partly.

    Bit TILES is of the first tile of the next group.
    """
    number = (_planned(plans, plan + HIGH) - row) // KEYS
    new_edge = _planned(plans, plan + NEW_EDGE)
    old_edge = _planned(plans, plan + OLD_EDGE)
    bits = 0
    for n in gl.static_range(TILES + 1):
        is_partial = (number + n < new_edge) | (number + n >= old_edge)
        bits |= is_partial.to(gl.int32) << n
    return bits


@gluon.jit
def _virtual_queries(
    q_tile, units, unit, bias,
    HAS_BIAS: gl.constexpr, P: gl.constexpr, HEADS: gl.constexpr, BLOCK: gl.constexpr,
    PITCH: gl.constexpr, LAYOUT: gl.constexpr, BY_HEADS: gl.constexpr, ROW_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return q̃ [64, BLOCK] of one offset as an operand."""
    query = q_tile.load(LAYOUT)
    k = _spread_rows(units, unit, P, HEADS, BLOCK, PITCH, LAYOUT, BY_HEADS, ROW_LAYOUT)
    if HAS_BIAS:
        return pack_bfloat16(_unpack(query) * (_unpack(k) + bias))
    return query * k


@gluon.jit
def _attend(
    SIDE: gl.constexpr,
    q_tile, units, spans, plans, k_tiles, v_tiles, k_tail, v_tail,
    k_full, k_empty, v_full, v_empty, full, empty, handed_out, handed_sums, out, lse,
    items, tiles, kv_heads, group, seq, stride_o_b, stride_o_h, stride_o_n,
    log2_scale, hidden, k_bias, v_bias,
    HAS_BIAS: gl.constexpr, P: gl.constexpr, HEADS: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, VALUE_DIM: gl.constexpr,
    KEYS: gl.constexpr, TILES: gl.constexpr, TAIL_KEYS: gl.constexpr, OFFSETS: gl.constexpr,
    PITCH: gl.constexpr, V_UNIT: gl.constexpr,
    K_ROW: gl.constexpr, V_ROW: gl.constexpr,
    K_BY_HEADS: gl.constexpr, V_BY_HEADS: gl.constexpr,
):  # fmt: skip
    """Take every second offset, from SIDE on; side 1 hands its sums over, side 0 merges, stores.

    S of the next tile, or of the next offset's first one, is issued before T of this one.
    """
    S: gl.constexpr = accumulator(KEYS)
    T: gl.constexpr = accumulator(BLOCK_DV)
    VQ: gl.constexpr = operand(KEYS)
    WEIGHTS: gl.constexpr = operand(BLOCK_DV)
    T_ROWS: gl.constexpr = rows_of(T)
    K_STEP: gl.constexpr = 1 if PITCH else BLOCK_D // 8
    V_STEP: gl.constexpr = 1 if PITCH else BLOCK_DV // 8
    K_START: gl.constexpr = (OFFSETS - 1 - SIDE) * K_STEP
    V_START: gl.constexpr = (OFFSETS - 1 - SIDE) * V_STEP + V_UNIT
    flips = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        no_logits = gl.zeros([64, KEYS], gl.float32, S)
        no_sums = gl.zeros([64, BLOCK_DV], gl.float32, T)
        top = gl.full([64], NOTHING, gl.float32, rows_of(S))
        acc = no_sums
        total = parts_of_rows(no_logits)
        PARTS: gl.constexpr = rows_of(total.type.layout)
        wait_full(full, Q, flips >> ITEM)
        wait_full(full, K_ROWS, flips >> CHUNK)
        chunks = _planned(plans, 6 * ((flips >> CHUNK) & 1) + CHUNKS)
        while chunks > 0:
            wait_full(full, K_ROWS, flips >> CHUNK)
            side = (flips >> CHUNK) & 1
            word = _planned(plans, 6 * side + BYTES)
            left = _planned(plans, 6 * side + STEPS)
            row = _planned(plans, 6 * side + HIGH)
            partial = _partial_tiles(plans, 6 * side, row, TILES, KEYS)
            vq = _virtual_queries(
                q_tile, units, K_START, k_bias,
                HAS_BIAS, P, HEADS, BLOCK_D, PITCH, VQ, K_BY_HEADS, K_ROW,
            )  # fmt: skip
            if left == 1:
                arrive(empty, K_ROWS)
                if chunks == 1:
                    arrive(empty, Q)
            wait_full(k_full, 0, flips >> GROUP_OF_TILES)
            p, parts, top, decay, is_huge = _attend_anew(
                vq, k_tiles.index(0), top, log2_scale, hidden, spans, 4 * side, SIDE, row - KEYS,
                SIDE, KEYS, WEIGHTS,
            )  # fmt: skip
            acc = acc * gl.convert_layout(decay, T_ROWS)[:, None]
            total = total * gl.convert_layout(decay, PARTS)[:, None] + parts
            if _byte(word, PASSES) == 1:
                arrive(k_empty, 0)
            this = 0  # of the warpgroup's offsets in this chunk
            while left > 0:
                slot = opaque_zero()
                t = no_sums
                is_first = this == 0
                is_last = this == _byte(word, PASSES) - 1
                is_hidden = _is_partly_seen(SIDE + 2 * this, word)
                for n in gl.static_range(TILES - 1):
                    if is_first:
                        wait_full(k_full, slot + n + 1, flips >> GROUP_OF_TILES)
                        wait_full(v_full, slot + n, flips >> GROUP_OF_TILES)
                    s = warpgroup_mma(
                        vq, k_tiles.index(slot + n + 1).permute((1, 0)), no_logits,
                        use_acc=False, is_async=True,
                    )  # fmt: skip
                    t = warpgroup_mma(p, v_tiles.index(slot + n), t, use_acc=n > 0, is_async=True)
                    s = warpgroup_mma_wait(1, deps=(s,))
                    is_partial = is_hidden | ((partial & (2 << n)) != 0)
                    # Elsewhere than at a group's ends a partly seen tile is done again.
                    if n == TILES - 2:
                        if is_partial:
                            s = _hide(
                                s, hidden, spans, 4 * ((flips >> CHUNK) & 1), SIDE + 2 * this,
                                row - TILES * KEYS, KEYS, S,
                            )  # fmt: skip
                    p, parts = _weights(s, top, log2_scale, WEIGHTS)
                    is_bad = _is_any_high(p, SIDE) | is_huge
                    if n < TILES - 2:
                        is_bad |= is_partial.to(gl.int32)
                    t = warpgroup_mma_wait(0, deps=(t,))
                    if is_last:
                        arrive(v_empty, slot + n)
                    if is_bad != 0:
                        p, parts, top, decay, is_huge = _attend_anew(
                            vq, k_tiles.index(slot + n + 1), top, log2_scale, hidden, spans,
                            4 * ((flips >> CHUNK) & 1), SIDE + 2 * this, row - (n + 2) * KEYS,
                            SIDE, KEYS, WEIGHTS,
                        )  # fmt: skip
                        t_decay = gl.convert_layout(decay, T_ROWS)[:, None]
                        t = t * t_decay
                        acc = acc * t_decay
                        total = total * gl.convert_layout(decay, PARTS)[:, None]
                    if is_last:
                        arrive(k_empty, slot + n + 1)
                    total = total + parts
                if TAIL_KEYS:
                    if (left <= _byte(word, PASSES)) & (_byte(word, HAS_TAIL) != 0):
                        if is_first:
                            wait_full(full, TAIL, flips >> END)
                        t, acc, total, p, top, is_huge = _attend_tail(
                            vq, k_tail, v_tail, t, acc, total, p, top, is_huge,
                            log2_scale, hidden, spans, 4 * ((flips >> CHUNK) & 1),
                            SIDE + 2 * this, row - TILES * KEYS - TAIL_KEYS,
                            SIDE, TAIL_KEYS, S, T, WEIGHTS,
                        )  # fmt: skip
                        if is_last:
                            arrive(empty, TAIL)
                # The last step has no next: it computes of stale tiles, for nobody.
                is_more = left > 1
                next_offset = gl.where(is_last, 0, this + 1)
                vq = _virtual_queries(
                    q_tile, units, K_START + slot - 2 * K_STEP * next_offset, k_bias,
                    HAS_BIAS, P, HEADS, BLOCK_D, PITCH, VQ, K_BY_HEADS, K_ROW,
                )  # fmt: skip
                if left == 2:
                    arrive(empty, K_ROWS)
                    if chunks == 1:
                        arrive(empty, Q)
                if is_last & is_more:
                    wait_full(k_full, slot, (flips >> GROUP_OF_TILES) + 1)
                if is_first:
                    wait_full(v_full, slot + TILES - 1, flips >> GROUP_OF_TILES)
                s = warpgroup_mma(
                    vq, k_tiles.index(slot).permute((1, 0)), no_logits,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                t = warpgroup_mma(
                    p, v_tiles.index(slot + TILES - 1), t, use_acc=True, is_async=True
                )
                s = warpgroup_mma_wait(1, deps=(s,))
                is_edge = (partial & gl.where(is_last, 1 << TILES, 1)) != 0
                if _is_partly_seen(SIDE + 2 * next_offset, word) | is_edge:
                    s = _hide(
                        s, hidden, spans, 4 * ((flips >> CHUNK) & 1), SIDE + 2 * next_offset,
                        row - gl.where(is_last, (TILES + 1) * KEYS, KEYS), KEYS, S,
                    )  # fmt: skip
                p, parts = _weights(s, top, log2_scale, WEIGHTS)
                is_bad = _is_any_high(p, SIDE) | is_huge
                if is_first:
                    wait_full(full, V_ROWS, flips >> CHUNK)
                t = warpgroup_mma_wait(0, deps=(t,))
                if is_last:
                    arrive(v_empty, slot + TILES - 1)
                # Loaded before the wait, it would take the registers of p.
                v = _unpack(
                    _spread_rows(
                        units, V_START + slot - 2 * V_STEP * this,
                        P, HEADS, BLOCK_DV, PITCH, T, V_BY_HEADS, V_ROW,
                    )
                )  # fmt: skip
                if HAS_BIAS:
                    v += v_bias
                acc = acc + t * v
                if is_more & (is_bad != 0):
                    p, parts, top, decay, is_huge = _attend_anew(
                        vq, k_tiles.index(slot), top, log2_scale, hidden, spans,
                        4 * ((flips >> CHUNK) & 1), SIDE + 2 * next_offset,
                        row - gl.where(is_last, (TILES + 1) * KEYS, KEYS), SIDE, KEYS, WEIGHTS,
                    )  # fmt: skip
                    acc = acc * gl.convert_layout(decay, T_ROWS)[:, None]
                    total = total * gl.convert_layout(decay, PARTS)[:, None]
                if (next_offset == _byte(word, PASSES) - 1) & is_more:
                    arrive(k_empty, slot)
                total = total + gl.where(is_more, parts, 0.0)
                if is_last:
                    row -= TILES * KEYS
                    flips ^= 1 << GROUP_OF_TILES
                    partial = _partial_tiles(plans, 6 * ((flips >> CHUNK) & 1), row, TILES, KEYS)
                this = next_offset
                left -= 1
            arrive(empty, V_ROWS)
            flips ^= 1 << CHUNK
            flips ^= _byte(word, HAS_TAIL) << END
            chunks -= 1

        own_top = gl.convert_layout(top, T_ROWS)
        own_total = gl.convert_layout(gl.sum(total, 1), T_ROWS)
        if SIDE == 1:
            wait_empty(empty, SUMS, flips >> ITEM)
            handed_out.store(acc)
            handed_sums.index(0).store(own_top)
            handed_sums.index(1).store(own_total)
            arrive(full, SUMS)
        else:
            wait_full(full, SUMS, flips >> ITEM)
            other_top = handed_sums.index(0).load(T_ROWS)
            other_total = handed_sums.index(1).load(T_ROWS)
            other = handed_out.load(T)
            arrive(empty, SUMS)
            highest = gl.maximum(own_top, other_top)
            own_weight = gl.exp2(own_top - highest)
            other_weight = gl.exp2(other_top - highest)
            whole = own_total * own_weight + other_total * other_weight
            # Not `whole > 0`: a NaN must stay one.
            divisor = gl.where(whole == 0.0, 1.0, whole)
            result = acc * (own_weight / divisor)[:, None]
            result += other * (other_weight / divisor)[:, None]
            batch, kv_head, i = place(item, tiles, kv_heads, P)
            rows = gl.arange(0, 64, layout=T_ROWS)
            columns = gl.arange(0, BLOCK_DV, layout=columns_of(T))
            query = i + rows // HEADS
            head = kv_head * group + rows % HEADS
            real = query < seq
            real = real & (rows % HEADS < group)
            start = batch.to(gl.int64) * stride_o_b
            start += head.to(gl.int64) * stride_o_h + query.to(gl.int64) * stride_o_n
            gl.store(
                out + start[:, None] + columns[None, :], pack_bfloat16(result),
                mask=real[:, None] & (columns < VALUE_DIM)[None, :],
            )  # fmt: skip
            heads = kv_heads * group
            level = (highest + gl.log2(divisor)) * LN_2
            gl.store(
                lse + (batch.to(gl.int64) * heads + head) * seq + query,
                gl.where(whole == 0.0, float("-inf"), level), mask=real,
            )  # fmt: skip
        flips ^= 1 << ITEM


@gluon.jit(do_not_specialize=(*NOT_SPECIALIZED, *_SIZES))
def forward_kernel(
    q, k_wide, v_wide, k_end, v_end, k_narrow, v_narrow, out, lse, kv_bounds, q_start,
    has_bounds, has_q_start, items, tiles, group, kv_heads, seq, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, q_start_default,
    chunk_kn_b, chunk_kn_h, chunk_kn_n, chunk_vn_b, chunk_vn_h, chunk_vn_n,
    stride_o_b, stride_o_h, stride_o_n,
    log2_scale, hidden, k_bias, v_bias,
    HAS_BIAS: gl.constexpr, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    HEADS: gl.constexpr, P: gl.constexpr, TILES: gl.constexpr, TAIL_KEYS: gl.constexpr,
    KEYS: gl.constexpr, OFFSETS: gl.constexpr, PITCH: gl.constexpr,
    K_BY_HEADS: gl.constexpr, V_BY_HEADS: gl.constexpr, Q_LAYOUT: gl.constexpr,
    K_LAYOUT: gl.constexpr, V_LAYOUT: gl.constexpr, K_END: gl.constexpr, V_END: gl.constexpr,
    K_ROW: gl.constexpr, V_ROW: gl.constexpr,
):  # fmt: skip
    """One program owns every num_programs-th tile of P positions of one kv head, and its outputs.

    q, k_wide, v_wide, and the k_end and v_end of fewer rows, are descriptors. A chunk is a stride
    in units of 16 bytes.
    """
    declare_flags()
    q_tile = gl.allocate_shared_memory(gl.bfloat16, [1, 1, P, HEADS, BLOCK_D], q.layout)
    K_ROOM: gl.constexpr = (PITCH or OFFSETS + P) * (BLOCK_D // 8)
    V_ROOM: gl.constexpr = (PITCH or OFFSETS + P) * (BLOCK_DV // 8)
    units = gl.allocate_shared_memory(gl.bfloat16, [K_ROOM + V_ROOM, 1, 8], plain(2))
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [TILES, 1, 1, KEYS, BLOCK_D], k_wide.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [TILES, 1, 1, KEYS, BLOCK_DV], v_wide.layout)
    ENDS: gl.constexpr = TAIL_KEYS or 16
    k_tail = gl.allocate_shared_memory(gl.bfloat16, [1, 1, ENDS, BLOCK_D], k_end.layout)
    v_tail = gl.allocate_shared_memory(gl.bfloat16, [1, 1, ENDS, BLOCK_DV], v_end.layout)
    handed_out = gl.allocate_shared_memory(
        gl.float32, [64, BLOCK_DV], gl.SwizzledSharedLayout(2, 1, 16, [1, 0])
    )
    handed_sums = gl.allocate_shared_memory(gl.float32, [2, 64], plain(1))
    spans = gl.allocate_shared_memory(gl.int32, [8, 64], plain(1))
    plans = gl.allocate_shared_memory(gl.int32, [12, 1], plain(1))
    k_full = barriers(TILES, 1)
    k_empty = barriers(TILES, 2)
    v_full = barriers(TILES, 1)
    v_empty = barriers(TILES, 2)
    full = barriers(5, 1)
    empty = gl.allocate_shared_memory(gl.int64, [5, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(5):
        # Two warpgroups read all but the sums of one of them.
        mbarrier.init(empty.index(slot), count=1 if slot == SUMS else 2)
    fence_async_shared()

    q_rows = q_tile._reinterpret(gl.bfloat16, [64, BLOCK_D], Q_LAYOUT)
    k_rows = k_tiles._reinterpret(gl.bfloat16, [TILES, KEYS, BLOCK_D], K_LAYOUT)
    v_rows = v_tiles._reinterpret(gl.bfloat16, [TILES, KEYS, BLOCK_DV], V_LAYOUT)
    k_end_rows = k_tail._reinterpret(gl.bfloat16, [ENDS, BLOCK_D], K_END)
    v_end_rows = v_tail._reinterpret(gl.bfloat16, [ENDS, BLOCK_DV], V_END)
    gl.warp_specialize([
        (_attend, (
            0, q_rows, units, spans, plans, k_rows, v_rows, k_end_rows, v_end_rows,
            k_full, k_empty, v_full, v_empty, full, empty, handed_out, handed_sums, out, lse,
            items, tiles, kv_heads, group, seq, stride_o_b, stride_o_h, stride_o_n,
            log2_scale, hidden, k_bias, v_bias, HAS_BIAS, P, HEADS, BLOCK_D, BLOCK_DV, VALUE_DIM,
            KEYS, TILES, TAIL_KEYS, OFFSETS, PITCH, K_ROOM, K_ROW, V_ROW, K_BY_HEADS, V_BY_HEADS,
        )),
        (_attend, (
            1, q_rows, units, spans, plans, k_rows, v_rows, k_end_rows, v_end_rows,
            k_full, k_empty, v_full, v_empty, full, empty, handed_out, handed_sums, out, lse,
            items, tiles, kv_heads, group, seq, stride_o_b, stride_o_h, stride_o_n,
            log2_scale, hidden, k_bias, v_bias, HAS_BIAS, P, HEADS, BLOCK_D, BLOCK_DV, VALUE_DIM,
            KEYS, TILES, TAIL_KEYS, OFFSETS, PITCH, K_ROOM, K_ROW, V_ROW, K_BY_HEADS, V_BY_HEADS,
        )),
        (_bring_tiles, (
            q, k_wide, v_wide, k_end, v_end, q_tile, k_tiles, v_tiles, k_tail, v_tail,
            k_full, k_empty, v_full, v_empty, full, empty, kv_bounds, q_start, has_bounds, has_q_start,
            items, tiles, kv_heads, seq, wide_rows, narrow_rows,
            wide_left, wide_right, narrow_left, narrow_right, q_start_default,
            P, KEYS, TILES, TAIL_KEYS, OFFSETS,
        )),
        (_bring_rows, (
            k_narrow, v_narrow, units, spans, plans, full, empty, kv_bounds, q_start, has_bounds, has_q_start,
            items, tiles, kv_heads, seq, wide_rows, narrow_rows,
            wide_left, wide_right, narrow_left, narrow_right, q_start_default,
            chunk_kn_b * 8, chunk_kn_h * 8, chunk_kn_n * 8,
            chunk_vn_b * 8, chunk_vn_h * 8, chunk_vn_n * 8,
            P, HEADS, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
            KEYS, TILES, TAIL_KEYS, OFFSETS, PITCH, K_ROOM, K_ROW, V_ROW,
        )),
    ], [4, 1, 1], [240, 24, 24])  # fmt: skip


@functools.cache
def _by_heads(heads: int, columns: int) -> gl.DistributedLinearLayout:
    """Return the layout [P, heads, columns] that is a product's rows, once reshaped."""

    def row(bit: int) -> list[int]:
        return [2**bit // heads, 2**bit % heads, 0]

    wide = [[0, 0, 2**bit] for bit in range(3, columns.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], row(3), *wide], [[0, 0, 2], [0, 0, 4], row(0), row(1), row(2)],
        [row(4), row(5)], [], [_ROWS // heads, heads, columns],
    )  # fmt: skip


def _row_layout(columns: int, pitch: int) -> object:
    """Return the layout of narrow rows in shared memory."""
    if not pitch:
        return plain(2)
    within = [[0, 1], [0, 2], [0, 4]]
    rows = [[2**bit, 0] for bit in range(pitch.bit_length() - 1)]
    return gl.SharedLinearLayout(
        within + rows + [[0, 2**bit] for bit in range(3, columns.bit_length() - 1)]
    )


@functools.cache
def constants(config: Config, block_d: int, block_dv: int) -> dict[str, object]:
    """Return the kernel's constants that follow from its tiles."""

    def matrix(rows: int, columns: int) -> gl.NVMMASharedLayout:
        return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)

    pitch = config.narrow_rows if config.is_by_chunks else 0
    end = config.tail or _TAIL
    return {
        "BLOCK_D": block_d, "BLOCK_DV": block_dv,
        "HEADS": config.heads, "P": config.positions,
        "TILES": config.tiles, "TAIL_KEYS": config.tail, "KEYS": _KEYS, "OFFSETS": _OFFSETS,
        "PITCH": pitch,
        "K_BY_HEADS": _by_heads(config.heads, block_d),
        "V_BY_HEADS": _by_heads(config.heads, block_dv),
        "Q_LAYOUT": matrix(_ROWS, block_d),
        "K_LAYOUT": matrix(_KEYS, block_d), "V_LAYOUT": matrix(_KEYS, block_dv),
        "K_END": matrix(end, block_d), "V_END": matrix(end, block_dv),
        "K_ROW": _row_layout(block_d, pitch), "V_ROW": _row_layout(block_dv, pitch),
    }  # fmt: skip


def descriptors(
    problem: Problem, config: Config, block_d: int, block_dv: int
) -> list[TensorDescriptor]:
    """Describe q and the wide pair, and the wide pair again for its tail."""
    q, end = problem.q, config.tail or _TAIL
    kv_heads = problem.k_wide.shape[1]
    by_position = q.unflatten(1, (kv_heads, problem.group)).movedim(3, 2)
    return [
        describe(by_position, [1, 1, config.positions, config.heads, block_d]),
        describe(problem.k_wide, [1, 1, _KEYS, block_d]),
        describe(problem.v_wide, [1, 1, _KEYS, block_dv]),
        describe(problem.k_wide, [1, 1, end, block_d]),
        describe(problem.v_wide, [1, 1, end, block_dv]),
    ]


def forward(problem: Problem, out: Tensor, lse: Tensor, config: Config | None = None) -> None:
    """Write out [B, H, N, Dv] and lse [B, H, N]."""
    traits = problem.traits()
    keys = min(sum(problem.wide_reach) + 1, problem.k_wide.shape[2])
    config = config or choose(traits, problem.device, keys)
    block_d, block_dv = (max(_ROWS, block) for block in (traits.block_d, traits.block_dv))
    batch, _heads, seq, head_dim = problem.q.shape
    tiles = triton.cdiv(seq, config.positions)
    items = tiles * batch * problem.k_wide.shape[1]
    _, _, k_bias, v_bias = problem.biases()
    narrow = (problem.k_narrow, problem.v_narrow)
    forward_kernel[(min(processors_of(problem.q.device), items),)](
        *descriptors(problem, config, block_d, block_dv), *narrow, out, lse,
        *(lse.view(torch.int32) if t is None else t for t in (problem.kv_bounds, problem.q_start)),
        int(problem.kv_bounds is not None), int(problem.q_start is not None),
        items, tiles, problem.group, *problem.sizes(),
        *(stride // 8 for t in narrow for stride in t.stride()[:3]), *out.stride()[:3],
        problem.log2_scale, math.copysign(math.inf, -problem.scale), k_bias, v_bias,
        HAS_BIAS=k_bias != 0.0 or v_bias != 0.0, HEAD_DIM=head_dim,
        VALUE_DIM=problem.v_wide.shape[3], **constants(config, block_d, block_dv),
        num_warps=4, maxnreg=168, **OPTIONS,
    )  # fmt: skip
