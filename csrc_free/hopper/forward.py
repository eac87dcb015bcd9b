"""The forward for groups of a multiple of 64 heads: a tile is 64 heads of one query.

All rows of such a tile see the same keys of both pairs, so a narrow key is one row for all of them
and only the oldest wide tiles are masked. One warp brings q and the wide pair by TMA, one the
narrow rows; two warpgroups take every second narrow key each, with sums of their own, and the
second hands its sums over to the first.

TILES wide tiles of BLOCK_N keys are the whole ring: tile t of a group always lies in slot t and
stays there for all narrow keys of a chunk, so T of one narrow key accumulates over them in
registers, and then out += T ∘ v.

The maximum lags, as in the portable forward: a row's exponentials begin at 2^-30, and where a part
of their sum passes 2^10 the tile's product is made again under a raised maximum, before anything
that grew too large was multiplied.
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

from csrc_free.device.forms import CODES, STRASSEN, TRILINEAR
from csrc_free.hopper.assembly import (
    declare_flags,
    is_any_above,
    opaque_zero,
    pack_bfloat16,
    parts_of_rows,
)
from csrc_free.hopper.channels import arrive, barriers, wait_empty, wait_full
from csrc_free.hopper.describe import describe, matrix
from csrc_free.hopper.layouts import (
    accumulator,
    columns_of,
    operand,
    permuted_rows,
    plain,
    rows_of,
)
from csrc_free.hopper.maximum import UNSET, raised, total_of_both
from csrc_free.hopper.reach import query_reach
from csrc_free.hopper.serve import processors_of
from csrc_free.launch import launch
from csrc_free.problem import Problem
from csrc_free.traits import Device, Traits

LN_2 = gl.constexpr(0.6931471805599453)
LIMIT = gl.constexpr(10)  # an exponent of two
ROWS = gl.constexpr(64)
# Narrow rows that one warp loads at once: it has 24 registers a thread.
ROWS_AT_ONCE = gl.constexpr(4)


@gluon.jit
def _place(item, grid):
    """Return (batch, kv_head, head_tile, i) of an item: the last queries come first."""
    _items, seq, per_query, kv_heads, head_tiles = grid
    i = seq - 1 - item // per_query
    rest = item % per_query
    batch = rest // (kv_heads * head_tiles)
    rest = rest % (kv_heads * head_tiles)
    return batch, rest // head_tiles, rest % head_tiles, i


@gluon.jit
def _bring(
    q, k_wide, v_wide, q_tile, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    grid, view,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """Bring the queries of every item, and its wide tiles for each chunk, the newest first."""
    items, seq, _per_query, _kv_heads, head_tiles = grid
    turn = 0
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, head_tile, i = _place(item, grid)
        low, high, first, end = query_reach(view, batch, i, seq)
        groups = gl.cdiv(high - low, TILES * BLOCK_N)
        turns = groups * gl.cdiv(end - first, CHUNK)
        for n in range(turns):
            newest = high - (n % groups) * (TILES * BLOCK_N)
            for t in gl.static_range(TILES):
                if t == TILES - 1:  # noqa: SIM102 (one is of compile time, one of run time)
                    if n == 0:
                        wait_empty(q_empty, 0, count)
                        mbarrier.expect(q_full.index(0), q.block_type.nbytes)
                        head = (kv_head * head_tiles + head_tile) * ROWS
                        tma.async_copy_global_to_shared(
                            q, [batch, head, i, 0], q_full.index(0), q_tile
                        )
                row = newest - (t + 1) * BLOCK_N
                # Nothing to see: past the last row, where the engine writes zeros unread.
                row = gl.where(row + BLOCK_N > low, row, 1 << 30)
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
        if turns > 0:
            count += 1


@gluon.jit
def _bring_rows(
    source, stride_n, first, end, bias, to, place,
    HAS_BIAS: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """Write rows [first, end) of a matrix, CHUNK at most, to shared memory; 0 beyond."""
    layout: gl.constexpr = gl.BlockedLayout([ROWS_AT_ONCE, BLOCK // 32], [1, 32], [1, 1], [1, 0])
    rows = gl.arange(0, ROWS_AT_ONCE, layout=rows_of(layout))
    columns = gl.arange(0, BLOCK, layout=columns_of(layout))
    for n in range(CHUNK // ROWS_AT_ONCE):
        row = first + n * ROWS_AT_ONCE + rows
        mask = (row < end)[:, None] & (columns < DIM)[None, :]
        x = gl.load(
            source + row.to(gl.int64)[:, None] * stride_n + columns[None, :], mask=mask, other=0.0
        )
        if HAS_BIAS:
            x = x.to(gl.float32) + bias
        to.index(place + n).store(x.to(to.dtype))


@gluon.jit
def _bring_narrow(
    k_narrow, v_narrow, k_rows, v_rows, full, empty,
    grid, view, strides,
    k_bias, v_bias, HAS_BIAS: gl.constexpr,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """Bring the narrow rows of every item, a chunk at a time, with their biases."""
    items, seq, _per_query, _kv_heads, _head_tiles = grid
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n = strides
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, _head_tile, i = _place(item, grid)
        _low, _high, first, end = query_reach(view, batch, i, seq)
        k_head = k_narrow + batch.to(gl.int64) * k_stride_b + kv_head.to(gl.int64) * k_stride_h
        v_head = v_narrow + batch.to(gl.int64) * v_stride_b + kv_head.to(gl.int64) * v_stride_h
        for row in range(first, end, CHUNK):
            slot = turn & 1
            wait_empty(empty, slot, turn >> 1)
            place = slot * (CHUNK // ROWS_AT_ONCE)
            _bring_rows(
                k_head, k_stride_n, row, end, k_bias, k_rows, place,
                HAS_BIAS, HEAD_DIM, BLOCK_D, CHUNK,
            )  # fmt: skip
            _bring_rows(
                v_head, v_stride_n, row, end, v_bias, v_rows, place,
                HAS_BIAS, VALUE_DIM, BLOCK_DV, CHUNK,
            )  # fmt: skip
            arrive(full, slot)
            turn += 1


@gluon.jit
def _virtual_queries(
    q_tile, k_rows, row, k_wide_bias,
    FORM: gl.constexpr, HAS_WIDE_BIAS: gl.constexpr,
    LAYOUT: gl.constexpr, ROWS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return the virtual queries [64, BLOCK_D] of one narrow key, and what they add to a row.

    That is 0 where nothing is added, else one number a row, in the logits' own unit.
    """
    q = q_tile.load(LAYOUT)
    k = k_rows.index(row).load(LAYOUT)
    constant = 0.0
    if FORM == TRILINEAR and k.dtype == q.dtype and not HAS_WIDE_BIAS:
        vq = q * k
    else:
        wide_q = q.to(gl.float32)
        wide_k = k.to(gl.float32)
        if FORM == STRASSEN:
            vq = wide_q + wide_k
            constant = gl.convert_layout(gl.sum(wide_q * wide_k, 1), ROWS_LAYOUT)
        else:
            vq = wide_q * wide_k
        if HAS_WIDE_BIAS:
            constant += gl.convert_layout(gl.sum(vq, 1), ROWS_LAYOUT) * k_wide_bias
        vq = vq.to(q.dtype)
    return vq, constant


@gluon.jit
def _hidden(s, left, log2_scale, N: gl.constexpr, LAYOUT: gl.constexpr):
    """Hide all but the last `left` keys of logits [64, N]: those before are not seen."""
    if left < N:
        key = gl.arange(0, N, layout=columns_of(LAYOUT))
        nothing = gl.where(log2_scale < 0, float("inf"), float("-inf"))
        s = gl.where((key >= N - left)[None, :], s, nothing)
    return s


@gluon.jit
def _weights(s, constant, top, factor, HAS_CONSTANT: gl.constexpr, LAYOUT: gl.constexpr):
    """Return P = exp2(factor · (s + constant) - top) as an operand, and its row sums in parts."""
    shift = top
    if HAS_CONSTANT:
        shift -= constant * factor
    p = gl.exp2(s * factor[:, None] - shift[:, None])
    return gl.convert_layout(pack_bfloat16(p), LAYOUT), parts_of_rows(p)


@gluon.jit
def _raised(s, constant, top, factor, log2_scale, HAS_CONSTANT: gl.constexpr):
    if HAS_CONSTANT:
        s += constant[:, None]
    return raised(s, top, factor, log2_scale)


@gluon.jit
def _attend(
    SIDE: gl.constexpr, q_tile, k_tiles, v_tiles, k_rows, v_rows,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, narrow_full, narrow_empty,
    hand_full, hand_empty, hand_out, hand_sums, out, lse,
    grid, view, strides, log2_scale, k_wide_bias, v_wide_bias,
    FORM: gl.constexpr, HAS_WIDE_BIAS: gl.constexpr,
    VALUE_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """Take the narrow keys SIDE, SIDE + 2, ... of every chunk of every item."""
    items, seq, _per_query, kv_heads, head_tiles = grid
    S: gl.constexpr = accumulator(BLOCK_N)
    T: gl.constexpr = accumulator(BLOCK_DV)
    QUERIES: gl.constexpr = operand(BLOCK_N)
    WEIGHTS: gl.constexpr = operand(BLOCK_DV)
    HAS_CONSTANT: gl.constexpr = FORM == STRASSEN or HAS_WIDE_BIAS
    turn = 0
    chunk_turn = 0
    worked = 0
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, head_tile, i = _place(item, grid)
        low, high, first, end = query_reach(view, batch, i, seq)
        groups = gl.cdiv(high - low, TILES * BLOCK_N)
        blank = gl.zeros([ROWS, BLOCK_N], gl.float32, S)
        nothing = gl.zeros([ROWS, BLOCK_DV], gl.float32, T)
        acc = gl.zeros([ROWS, BLOCK_DV], gl.float32, T)
        sums = parts_of_rows(blank)
        top = gl.full([ROWS], UNSET, gl.float32, rows_of(S))
        factor = gl.full([ROWS], 0.0, gl.float32, rows_of(S)) + log2_scale
        if first < end:
            wait_full(q_full, 0, worked)
            worked += 1
        for chunk in range(first, end, CHUNK):
            slot = chunk_turn & 1
            is_last_chunk = chunk + CHUNK >= end
            offsets = (gl.minimum(end - chunk, CHUNK) + 1 - SIDE) // 2
            narrow = slot * CHUNK + SIDE
            wait_full(narrow_full, slot, chunk_turn >> 1)
            if offsets > 0:
                vq, constant = _virtual_queries(
                    q_tile, k_rows, narrow, k_wide_bias, FORM, HAS_WIDE_BIAS, QUERIES, rows_of(S)
                )
                passes = groups * offsets
                if is_last_chunk & (passes == 1):
                    arrive(q_empty, 0)
                wait_full(k_full, 0, turn)
                s = warpgroup_mma(
                    vq, k_tiles.index(0).permute((1, 0)), blank, use_acc=False, is_async=True
                )
                s = warpgroup_mma_wait(0, deps=(s,))
                if offsets == 1:
                    arrive(k_empty, 0)
                left = high - low
                s = _hidden(s, left, log2_scale, BLOCK_N, S)
                top, factor, decay = _raised(s, constant, top, factor, log2_scale, HAS_CONSTANT)
                p, parts = _weights(s, constant, top, factor, HAS_CONSTANT, WEIGHTS)
                acc *= gl.convert_layout(decay, rows_of(T))[:, None]
                sums *= gl.convert_layout(decay, rows_of(sums.type.layout))[:, None]
                sums += parts
                mass = parts  # of the narrow key at hand, which v_wide_bias multiplies
                offset = 0
                for more in range(passes - 1, -1, -1):
                    is_first = offset == 0
                    is_last = offset == offsets - 1
                    is_new_group = is_last & (more > 0)
                    next_left = gl.where(is_new_group, left - TILES * BLOCK_N, left)
                    next_turn = gl.where(is_new_group, turn + 1, turn)
                    next_offset = gl.where(is_last, 0, offset + 1)
                    z = opaque_zero()
                    t = nothing
                    for n in gl.static_range(TILES):
                        if n < TILES - 1:
                            if is_first:
                                wait_full(k_full, z + n + 1, turn)
                                wait_full(v_full, z + n, turn)
                            k_tile = k_tiles.index(z + n + 1).permute((1, 0))
                            s = warpgroup_mma(vq, k_tile, blank, use_acc=False, is_async=True)
                            t = warpgroup_mma(
                                p, v_tiles.index(z + n), t, use_acc=n > 0, is_async=True
                            )
                            s = warpgroup_mma_wait(1, deps=(s,))
                            s = _hidden(s, left - (n + 1) * BLOCK_N, log2_scale, BLOCK_N, S)
                            p, parts = _weights(s, constant, top, factor, HAS_CONSTANT, WEIGHTS)
                            # Before the wait for t: ptxas else sinks the exponentials behind it.
                            is_high = is_any_above(parts, LIMIT, SIDE)
                            t = warpgroup_mma_wait(0, deps=(t,))
                            if is_last:
                                arrive(v_empty, z + n)
                            if is_high != 0:
                                k_tile = k_tiles.index(z + n + 1).permute((1, 0))
                                s = warpgroup_mma(vq, k_tile, blank, use_acc=False, is_async=True)
                                s = warpgroup_mma_wait(0, deps=(s,))
                                s = _hidden(s, left - (n + 1) * BLOCK_N, log2_scale, BLOCK_N, S)
                                top, factor, decay = _raised(
                                    s, constant, top, factor, log2_scale, HAS_CONSTANT
                                )
                                p, parts = _weights(s, constant, top, factor, HAS_CONSTANT, WEIGHTS)
                                decay_t = gl.convert_layout(decay, rows_of(T))[:, None]
                                t *= decay_t
                                acc *= decay_t
                                decay_s = gl.convert_layout(decay, rows_of(sums.type.layout))[
                                    :, None
                                ]
                                sums *= decay_s
                                if HAS_WIDE_BIAS:
                                    mass *= decay_s
                            if is_last:
                                arrive(k_empty, z + n + 1)
                            sums += parts
                            if HAS_WIDE_BIAS:
                                mass += parts
                        else:
                            vq, constant = _virtual_queries(
                                q_tile, k_rows, narrow + 2 * next_offset, k_wide_bias,
                                FORM, HAS_WIDE_BIAS, QUERIES, rows_of(S),
                            )  # fmt: skip
                            if is_last_chunk & (more == 1):
                                arrive(q_empty, 0)
                            if is_new_group:
                                wait_full(k_full, z, next_turn)
                            if is_first:
                                wait_full(v_full, z + n, turn)
                            k_tile = k_tiles.index(z).permute((1, 0))
                            s = warpgroup_mma(vq, k_tile, blank, use_acc=False, is_async=True)
                            t = warpgroup_mma(
                                p, v_tiles.index(z + n), t, use_acc=n > 0, is_async=True
                            )
                            s = warpgroup_mma_wait(1, deps=(s,))
                            s = _hidden(s, next_left, log2_scale, BLOCK_N, S)
                            p, parts = _weights(s, constant, top, factor, HAS_CONSTANT, WEIGHTS)
                            # After the last pass s is of no key.
                            parts = gl.where(more > 0, parts, 0.0)
                            is_high = is_any_above(parts, LIMIT, SIDE)
                            t = warpgroup_mma_wait(0, deps=(t,))
                            if is_last:
                                arrive(v_empty, z + n)
                            v = v_rows.index(narrow + 2 * offset).load(T)
                            if HAS_WIDE_BIAS:
                                total = gl.convert_layout(gl.sum(mass, 1), rows_of(T))
                                t += (v_wide_bias * total)[:, None]
                            acc += t * v
                            if is_high != 0:
                                k_tile = k_tiles.index(z).permute((1, 0))
                                s = warpgroup_mma(vq, k_tile, blank, use_acc=False, is_async=True)
                                s = warpgroup_mma_wait(0, deps=(s,))
                                s = _hidden(s, next_left, log2_scale, BLOCK_N, S)
                                top, factor, decay = _raised(
                                    s, constant, top, factor, log2_scale, HAS_CONSTANT
                                )
                                p, parts = _weights(s, constant, top, factor, HAS_CONSTANT, WEIGHTS)
                                acc *= gl.convert_layout(decay, rows_of(T))[:, None]
                                sums *= gl.convert_layout(decay, rows_of(sums.type.layout))[:, None]
                            if (more > 0) & (next_offset == offsets - 1):
                                arrive(k_empty, z)
                            sums += parts
                            if HAS_WIDE_BIAS:
                                mass = parts
                    left = next_left
                    turn = next_turn
                    offset = next_offset
                turn += 1
            else:
                if is_last_chunk:
                    arrive(q_empty, 0)
                for _group in range(groups):
                    for n in gl.static_range(TILES):
                        wait_full(k_full, n, turn)
                        arrive(k_empty, n)
                        wait_full(v_full, n, turn)
                        arrive(v_empty, n)
                    turn += 1
            arrive(narrow_empty, slot)
            chunk_turn += 1

        top_o = gl.convert_layout(top, rows_of(T))
        factor_o = gl.convert_layout(factor, rows_of(T))
        sums_o = gl.convert_layout(gl.sum(sums, 1), rows_of(T))
        if SIDE == 1:
            wait_empty(hand_empty, 0, count)
            hand_out.store(acc)
            hand_sums.index(0).store(top_o)
            hand_sums.index(1).store(factor_o)
            hand_sums.index(2).store(sums_o)
            arrive(hand_full, 0)
        else:
            wait_full(hand_full, 0, count)
            other_top = hand_sums.index(0).load(rows_of(T))
            other_factor = hand_sums.index(1).load(rows_of(T))
            other_sums = hand_sums.index(2).load(rows_of(T))
            weight, other_weight, logarithm = total_of_both(
                top_o, factor_o, sums_o, other_top, other_factor, other_sums, log2_scale
            )
            acc = acc * weight[:, None] + hand_out.load(T) * other_weight[:, None]
            arrive(hand_empty, 0)
            o_stride_b, o_stride_h, o_stride_n = strides
            rows = gl.arange(0, ROWS, layout=rows_of(T))
            columns = gl.arange(0, BLOCK_DV, layout=columns_of(T))
            head = (kv_head * head_tiles + head_tile) * ROWS + rows
            place = batch.to(gl.int64) * o_stride_b + i.to(gl.int64) * o_stride_n
            to = out + place + head.to(gl.int64)[:, None] * o_stride_h + columns[None, :]
            if VALUE_DIM == BLOCK_DV:
                gl.store(to, acc.to(out.dtype.element_ty))
            else:
                mask = (head >= 0)[:, None] & (columns < VALUE_DIM)[None, :]
                gl.store(to, acc.to(out.dtype.element_ty), mask=mask)
            heads = kv_heads * head_tiles * ROWS
            gl.store(lse + (batch.to(gl.int64) * heads + head) * seq + i, logarithm * LN_2)
        count += 1  # noqa: SIM113 (a kernel has no enumerate)


@gluon.jit(do_not_specialize=(
    "has_bounds", "has_q_start", "items", "seq", "per_query", "kv_heads", "head_tiles",
    "keys", "wide_rows", "narrow_rows",
    "wide_left", "wide_right", "narrow_left", "narrow_right", "start",
))  # fmt: skip
def forward_kernel(
    q, k_wide, v_wide, k_narrow, v_narrow, out, lse, kv_bounds, has_bounds, q_start, has_q_start,
    items, seq, per_query, kv_heads, head_tiles, keys, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, start,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_o_b, stride_o_h, stride_o_n,
    log2_scale, k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
    FORM: gl.constexpr, HAS_WIDE_BIAS: gl.constexpr, HAS_NARROW_BIAS: gl.constexpr,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, CHUNK: gl.constexpr,
    Q_LAYOUT: gl.constexpr, K_LAYOUT: gl.constexpr, V_LAYOUT: gl.constexpr,
):  # fmt: skip
    """One program owns every num_programs-th item: 64 heads of one query, of out and of lse.

    q, k_wide and v_wide are descriptors; the layouts are of their tiles as matrices.
    """
    declare_flags()
    dtype: gl.constexpr = k_wide.dtype
    narrow_dtype: gl.constexpr = gl.float32 if HAS_NARROW_BIAS else dtype
    q_tile = gl.allocate_shared_memory(dtype, [1, ROWS, 1, BLOCK_D], q.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [TILES, 1, 1, BLOCK_N, BLOCK_D], k_wide.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [TILES, 1, 1, BLOCK_N, BLOCK_DV], v_wide.layout)
    q_matrix = q_tile._reinterpret(dtype, [ROWS, BLOCK_D], Q_LAYOUT)
    k_matrices = k_tiles._reinterpret(dtype, [TILES, BLOCK_N, BLOCK_D], K_LAYOUT)
    v_matrices = v_tiles._reinterpret(dtype, [TILES, BLOCK_N, BLOCK_DV], V_LAYOUT)
    k_space = gl.allocate_shared_memory(narrow_dtype, [2 * CHUNK, BLOCK_D], plain(2))
    v_space = gl.allocate_shared_memory(gl.float32, [2 * CHUNK, BLOCK_DV], plain(2))
    k_bytes: gl.constexpr = narrow_dtype.primitive_bitwidth // 8
    few: gl.constexpr = 2 * CHUNK // ROWS_AT_ONCE
    k_rows = k_space._reinterpret(
        narrow_dtype, [2 * CHUNK, 1, BLOCK_D], permuted_rows(1, BLOCK_D, k_bytes)
    )
    v_rows = v_space._reinterpret(
        gl.float32, [2 * CHUNK, 1, BLOCK_DV], permuted_rows(1, BLOCK_DV, 4)
    )
    k_written = k_space._reinterpret(
        narrow_dtype, [few, ROWS_AT_ONCE, BLOCK_D], permuted_rows(ROWS_AT_ONCE, BLOCK_D, k_bytes)
    )
    v_written = v_space._reinterpret(
        gl.float32, [few, ROWS_AT_ONCE, BLOCK_DV], permuted_rows(ROWS_AT_ONCE, BLOCK_DV, 4)
    )
    hand_out = gl.allocate_shared_memory(
        gl.float32, [ROWS, BLOCK_DV], gl.SwizzledSharedLayout(2, 1, 16, [1, 0])
    )
    hand_sums = gl.allocate_shared_memory(gl.float32, [3, ROWS], plain(1))
    k_full = barriers(TILES, 1)
    k_empty = barriers(TILES, 2)
    v_full = barriers(TILES, 1)
    v_empty = barriers(TILES, 2)
    narrow_full = barriers(2, 1)
    narrow_empty = barriers(2, 2)
    q_full = barriers(1, 1)
    q_empty = barriers(1, 2)
    hand_full = barriers(1, 1)
    hand_empty = barriers(1, 1)
    fence_async_shared()
    grid = (items, seq, per_query, kv_heads, head_tiles)
    view = (
        kv_bounds, q_start, has_bounds, has_q_start, keys, wide_rows, narrow_rows,
        wide_left, wide_right, narrow_left, narrow_right, start,
    )  # fmt: skip
    narrow_strides = (stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n)
    out_strides = (stride_o_b, stride_o_h, stride_o_n)
    gl.warp_specialize([
        (_attend, (
            0, q_matrix, k_matrices, v_matrices, k_rows, v_rows,
            q_full, q_empty, k_full, k_empty, v_full, v_empty, narrow_full, narrow_empty,
            hand_full, hand_empty, hand_out, hand_sums, out, lse,
            grid, view, out_strides, log2_scale, k_wide_bias, v_wide_bias,
            FORM, HAS_WIDE_BIAS, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, TILES, CHUNK,
        )),
        (_attend, (
            1, q_matrix, k_matrices, v_matrices, k_rows, v_rows,
            q_full, q_empty, k_full, k_empty, v_full, v_empty, narrow_full, narrow_empty,
            hand_full, hand_empty, hand_out, hand_sums, out, lse,
            grid, view, out_strides, log2_scale, k_wide_bias, v_wide_bias,
            FORM, HAS_WIDE_BIAS, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, TILES, CHUNK,
        )),
        (_bring, (
            q, k_wide, v_wide, q_tile, k_tiles, v_tiles,
            q_full, q_empty, k_full, k_empty, v_full, v_empty, grid, view,
            BLOCK_N, TILES, CHUNK,
        )),
        (_bring_narrow, (
            k_narrow, v_narrow, k_written, v_written, narrow_full, narrow_empty,
            grid, view,
            narrow_strides, k_narrow_bias, v_narrow_bias, HAS_NARROW_BIAS,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, CHUNK,
        )),
    ], [4, 1, 1], [240, 24, 24])  # fmt: skip


@dataclass(frozen=True)
class Config:
    """TILES tiles of BLOCK_N wide keys stay in shared memory for CHUNK narrow rows at a time."""

    tiles: int
    block_n: int = 64
    chunk: int = 32
    num_warps: int = 4
    num_stages: int = 1
    maxnreg: int = 168  # on average: 240 for the two warpgroups, 24 for the warps that bring

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        q, v = traits.block_d, traits.block_dv
        rows = 2 * 64 * q + 2 * 4 * self.chunk * v  # narrow keys in float32 come in half as many
        tiles = 2 * self.tiles * self.block_n * (q + v)
        return 2 * 64 * q + tiles + rows + 4 * 64 * v + 2048


def choose(width: int, *, has_bias: bool) -> Config:
    """Choose how many tiles stay, for a wide window of so many keys.

    What is computed is a multiple of the tiles. A pass over them costs 0.6 of a tile more.
    """
    tiles = -(-width // 64)
    kept = min((4, 3, 2, 1), key=lambda n: -(-tiles // n) * (n + 0.6))
    return Config(kept, chunk=16 if has_bias else 32)


def _given_or(tensor: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    """Return a tensor of int32 and 1; or, where there is none, one that is not read, and 0."""
    return (stand_in.view(torch.int32), 0) if tensor is None else (tensor, 1)


def run(problem: Problem, out: Tensor, lse: Tensor) -> None:
    """Write out [B, H, N, Dv] and lse [B, H, N]."""
    batch, heads, seq, head_dim = problem.q.shape
    value_dim = out.shape[3]
    block_d, block_dv = (64 if dim <= 64 else 128 for dim in (head_dim, value_dim))
    wide_rows, narrow_rows = problem.k_wide.shape[2], problem.k_narrow.shape[2]
    biases = problem.biases()
    has_narrow_bias = biases[2:] != (0.0, 0.0)
    width = min(sum(problem.wide_reach) + 1, wide_rows)
    config = choose(width, has_bias=has_narrow_bias)
    kv_heads = problem.k_wide.shape[1]
    per_query = batch * heads // 64
    items = per_query * seq
    blocks = [1, 64, 1, block_d], [1, 1, config.block_n, block_d], [1, 1, config.block_n, block_dv]
    tiles = (problem.q, problem.k_wide, problem.v_wide)
    described = [describe(t, block) for t, block in zip(tiles, blocks, strict=True)]
    sides = (64, block_d), (config.block_n, block_d), (config.block_n, block_dv)
    q_layout, k_layout, v_layout = (matrix(problem.q.dtype, [*side]) for side in sides)
    launch(
        forward_kernel, min(processors_of(problem.q.device), items),
        *described, problem.k_narrow, problem.v_narrow, out, lse,
        *_given_or(problem.kv_bounds, lse), *_given_or(problem.q_start, lse),
        items, seq, per_query, kv_heads, problem.group // 64,
        problem.keys, wide_rows, narrow_rows,
        *problem.wide_reach, *problem.narrow_reach, problem.keys - seq,
        *problem.k_narrow.stride()[:3], *problem.v_narrow.stride()[:3], *out.stride()[:3],
        problem.log2_scale, *biases,
        FORM=CODES[problem.form], HAS_WIDE_BIAS=biases[:2] != (0.0, 0.0),
        HAS_NARROW_BIAS=has_narrow_bias, HEAD_DIM=head_dim, VALUE_DIM=value_dim,
        BLOCK_D=block_d, BLOCK_DV=block_dv,
        Q_LAYOUT=q_layout, K_LAYOUT=k_layout, V_LAYOUT=v_layout, config=config,
    )  # fmt: skip
