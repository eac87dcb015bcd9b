"""A warpgroup of the forward for 64 heads of one query: every second narrow key of each item."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from csrc_free.device.forms import DETERMINANT, STRASSEN, TRILINEAR
from csrc_free.hopper.assembly import (
    is_any_above,
    opaque_zero,
    pack_bfloat16,
    pack_float16,
    parts_of_rows,
)
from csrc_free.hopper.bring import ROWS, place
from csrc_free.hopper.channels import arrive, wait_empty, wait_full
from csrc_free.hopper.layouts import accumulator, columns_of, operand, rows_of
from csrc_free.hopper.maximum import CENTRE, HALF_CENTRE, UNSET, raised, total_of_both
from csrc_free.hopper.reach import query_reach
from csrc_free.hopper.threes import cross, rounded_cross

LN_2 = gl.constexpr(0.6931471805599453)
# A part of a row's sum stays below 2^LIMIT, so that times any value up to 2^100 it is finite.
LIMIT = gl.constexpr(24)
HALF_LIMIT = gl.constexpr(15)


@gluon.jit
def scale_of(q, FORM: gl.constexpr):
    """Return a power of two a row [M, 1] that keeps virtual queries within float16's range.

    The largest of a row of q becomes less than 1/2, so that times any float16 it fits.
    """
    q = q.to(gl.float32)
    exponent = gl.max(gl.abs(q), 1).to(gl.int32, bitcast=True) >> 23
    exponent = gl.minimum(gl.maximum(exponent, 127 - 16), 127 + 15)
    if FORM == STRASSEN:
        exponent = exponent * 0 + 126  # a sum of two float16 numbers
    return ((252 - exponent) << 23).to(gl.float32, bitcast=True)[:, None]


@gluon.jit
def _virtual_queries(
    q_tile, k_rows, row, scale, k_wide_bias,
    FORM: gl.constexpr, HAS_WIDE_BIAS: gl.constexpr,
    LAYOUT: gl.constexpr, ROWS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return the virtual queries [64, BLOCK_D] of one narrow key, and what they add to a row.

    That is 0 where nothing is added, else one number a row, in the unit of the products with vq.
    `scale` multiplies both in float16.
    """
    q = q_tile.load(LAYOUT)
    k = k_rows.index(row).load(LAYOUT)
    HAS_SCALE: gl.constexpr = q.dtype == gl.float16
    constant = 0.0
    if FORM == TRILINEAR and k.dtype == q.dtype and not HAS_WIDE_BIAS:
        if HAS_SCALE:
            q *= scale.to(gl.float16)
        vq = q * k
    elif (
        FORM == DETERMINANT and q.dtype == gl.bfloat16 and k.dtype == q.dtype and not HAS_WIDE_BIAS
    ):
        k, _like = gl.broadcast(k, q)
        vq = rounded_cross(k, q)
    else:
        wide_q = q.to(gl.float32)
        if HAS_SCALE:
            wide_q *= scale
        wide_k = k.to(gl.float32)
        if FORM == STRASSEN:
            constant = gl.convert_layout(gl.sum(wide_q * wide_k, 1), ROWS_LAYOUT)
            vq = wide_q + (wide_k * scale if HAS_SCALE else wide_k)
        elif FORM == DETERMINANT:
            wide_k, wide_q = gl.broadcast(wide_k, wide_q)
            vq = cross(wide_k, wide_q)
        else:
            vq = wide_q * wide_k
        if HAS_WIDE_BIAS:
            constant += gl.convert_layout(gl.sum(vq, 1), ROWS_LAYOUT) * k_wide_bias
        vq = vq.to(q.dtype)
    return vq, constant


@gluon.jit
def _hidden(s, left, factor, IS_MASKED: gl.constexpr, LAYOUT: gl.constexpr):
    """Hide all but the last `left` keys of logits [64, N]: those before are not seen."""
    if IS_MASKED:
        N: gl.constexpr = s.shape[1]
        if left < N:
            key = gl.arange(0, N, layout=columns_of(LAYOUT))
            nothing = gl.where(factor < 0, float("inf"), float("-inf"))
            s = gl.where((key >= N - left)[None, :], s, nothing[:, None])
    return s


@gluon.jit
def _weights(
    s, constant, top, factor,
    HAS_CONSTANT: gl.constexpr, IS_HALF: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return P = exp2(factor · (s + constant) - top) as an operand, and its row sums in parts."""
    shift = top
    if HAS_CONSTANT:
        shift -= constant * factor
    p = gl.exp2(s * factor[:, None] - shift[:, None])
    packed = pack_float16(p) if IS_HALF else pack_bfloat16(p)
    return gl.convert_layout(packed, LAYOUT), parts_of_rows(p)


@gluon.jit
def _weights_raised(
    vq, k_tile, left, constant, top, factor, full_factor,
    IS_MASKED: gl.constexpr, HAS_CONSTANT: gl.constexpr,
    LAYOUT: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Multiply by a tile of keys, and weigh under maxima that hold for it; nothing is in flight.

    Returns P, its row sums in parts, the new top and factor, and the decay of what was summed.
    """
    N: gl.constexpr = k_tile.shape[1]
    IS_HALF: gl.constexpr = vq.dtype == gl.float16
    centre: gl.constexpr = HALF_CENTRE if IS_HALF else CENTRE
    blank = gl.zeros([ROWS, N], gl.float32, LAYOUT)
    s = warpgroup_mma(vq, k_tile, blank, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    s = _hidden(s, left, full_factor, IS_MASKED, LAYOUT)
    if HAS_CONSTANT:
        found = raised(s + constant[:, None], top, factor, full_factor, centre)
    else:
        found = raised(s, top, factor, full_factor, centre)
    new_top, new_factor, decay = found
    p, parts = _weights(s, constant, new_top, new_factor, HAS_CONSTANT, IS_HALF, WEIGHTS)
    return p, parts, new_top, new_factor, decay


@gluon.jit
def is_high(grown, parts, IS_HALF: gl.constexpr, SIDE: gl.constexpr):
    """Tell a warpgroup whether a tile's exponentials grew too large, be it together."""
    if IS_HALF:  # P itself must fit; the sums have room
        return is_any_above(parts, HALF_LIMIT, SIDE)
    return is_any_above(grown, LIMIT, SIDE)


@gluon.jit
def _attend_chunk(
    SIDE: gl.constexpr, acc, sums, top, factor, turn, left, groups, offsets, narrow, is_last_chunk,
    q_tile, k_tiles, v_tiles, k_rows, v_rows, q_empty, k_full, k_empty, v_full, v_empty,
    scale, full_factor, k_wide_bias, v_wide_bias,
    IS_MASKED: gl.constexpr, FORM: gl.constexpr, HAS_WIDE_BIAS: gl.constexpr,
    BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Attend to `left` wide keys from `offsets` narrow keys, rows narrow, narrow + 2, ...

    In a turn P is multiplied by a tile of values while the next logits are made, those of the next
    narrow key's first tile behind the last tile of this one. Nothing is in flight between passes.
    """
    S: gl.constexpr = accumulator(BLOCK_N)
    T: gl.constexpr = accumulator(BLOCK_DV)
    QUERIES: gl.constexpr = operand(BLOCK_N)
    WEIGHTS: gl.constexpr = operand(BLOCK_DV)
    HAS_CONSTANT: gl.constexpr = FORM == STRASSEN or HAS_WIDE_BIAS
    IS_HALF: gl.constexpr = q_tile.dtype == gl.float16
    blank = gl.zeros([ROWS, BLOCK_N], gl.float32, S)
    nothing = gl.zeros([ROWS, BLOCK_DV], gl.float32, T)
    vq, constant = _virtual_queries(
        q_tile, k_rows, narrow, scale, k_wide_bias, FORM, HAS_WIDE_BIAS, QUERIES, rows_of(S)
    )
    passes = groups * offsets
    if is_last_chunk & (passes == 1):
        arrive(q_empty, 0)
    wait_full(k_full, 0, turn)
    p, parts, top, factor, decay = _weights_raised(
        vq, k_tiles.index(0).permute((1, 0)), left, constant, top, factor, full_factor,
        IS_MASKED, HAS_CONSTANT, S, WEIGHTS,
    )  # fmt: skip
    if offsets == 1:
        arrive(k_empty, 0)
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
                t = warpgroup_mma(p, v_tiles.index(z + n), t, use_acc=n > 0, is_async=True)
                s = warpgroup_mma_wait(1, deps=(s,))
                s = _hidden(s, left - (n + 1) * BLOCK_N, full_factor, IS_MASKED, S)
                p, parts = _weights(s, constant, top, factor, HAS_CONSTANT, IS_HALF, WEIGHTS)
                # Before the wait for t: ptxas else sinks the exponentials behind it.
                grown = sums + parts
                is_bad = is_high(grown, parts, IS_HALF, SIDE)
                t = warpgroup_mma_wait(0, deps=(t,))
                if is_last:
                    arrive(v_empty, z + n)
                if is_bad != 0:
                    k_tile = k_tiles.index(z + n + 1).permute((1, 0))
                    p, parts, top, factor, decay = _weights_raised(
                        vq, k_tile, left - (n + 1) * BLOCK_N, constant, top, factor, full_factor,
                        IS_MASKED, HAS_CONSTANT, S, WEIGHTS,
                    )  # fmt: skip
                    decay_t = gl.convert_layout(decay, rows_of(T))[:, None]
                    t *= decay_t
                    acc *= decay_t
                    decay_s = gl.convert_layout(decay, rows_of(sums.type.layout))[:, None]
                    grown = sums * decay_s + parts
                    if HAS_WIDE_BIAS:
                        mass *= decay_s
                if is_last:
                    arrive(k_empty, z + n + 1)
                sums = grown
                if HAS_WIDE_BIAS:
                    mass += parts
            else:
                vq, constant = _virtual_queries(
                    q_tile, k_rows, narrow + 2 * next_offset, scale, k_wide_bias,
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
                t = warpgroup_mma(p, v_tiles.index(z + n), t, use_acc=n > 0, is_async=True)
                s = warpgroup_mma_wait(1, deps=(s,))
                s = _hidden(s, next_left, full_factor, IS_MASKED, S)
                p, parts = _weights(s, constant, top, factor, HAS_CONSTANT, IS_HALF, WEIGHTS)
                # After the last pass s is of no key.
                parts = gl.where(more > 0, parts, 0.0)
                grown = sums + parts
                is_bad = is_high(grown, parts, IS_HALF, SIDE)
                t = warpgroup_mma_wait(0, deps=(t,))
                if is_last:
                    arrive(v_empty, z + n)
                v = v_rows.index(narrow + 2 * offset).load(T)
                if HAS_WIDE_BIAS:
                    total = gl.convert_layout(gl.sum(mass, 1), rows_of(T))
                    t += (v_wide_bias * total)[:, None]
                acc += t * v
                if is_bad != 0:
                    k_tile = k_tiles.index(z).permute((1, 0))
                    p, parts, top, factor, decay = _weights_raised(
                        vq, k_tile, next_left, constant, top, factor, full_factor,
                        IS_MASKED, HAS_CONSTANT, S, WEIGHTS,
                    )  # fmt: skip
                    acc *= gl.convert_layout(decay, rows_of(T))[:, None]
                    decay_s = gl.convert_layout(decay, rows_of(sums.type.layout))[:, None]
                    grown = sums * decay_s + parts
                if (more > 0) & (next_offset == offsets - 1):
                    arrive(k_empty, z)
                sums = grown
                if HAS_WIDE_BIAS:
                    mass = parts
        left = next_left
        turn = next_turn
        offset = next_offset
    turn += 1
    return acc, sums, top, factor, turn


@gluon.jit
def attend(
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
    turn = 0
    chunk_turn = 0
    worked = 0
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, head_tile, i = place(item, grid)
        low, high, first, end = query_reach(view, batch, i, seq)
        groups = gl.cdiv(high - low, TILES * BLOCK_N)
        blank = gl.zeros([ROWS, BLOCK_N], gl.float32, S)
        acc = gl.zeros([ROWS, BLOCK_DV], gl.float32, T)
        sums = parts_of_rows(blank)
        top = gl.full([ROWS], UNSET, gl.float32, rows_of(S))
        full_factor = gl.full([ROWS], 0.0, gl.float32, rows_of(S)) + log2_scale
        scale = 1.0
        if first < end:
            wait_full(q_full, 0, worked)
            worked += 1
        if q_tile.dtype == gl.float16:
            scale = scale_of(q_tile.load(operand(BLOCK_N)), FORM)
            full_factor /= gl.convert_layout(gl.max(scale, 1), rows_of(S))
        factor = full_factor
        for chunk in range(first, end, CHUNK):
            slot = chunk_turn & 1
            is_last_chunk = chunk + CHUNK >= end
            offsets = (gl.minimum(end - chunk, CHUNK) + 1 - SIDE) // 2
            narrow = slot * CHUNK + SIDE
            wait_full(narrow_full, slot, chunk_turn >> 1)
            if offsets > 0:
                left = high - low
                if left % (TILES * BLOCK_N) == 0:
                    acc, sums, top, factor, turn = _attend_chunk(
                        SIDE, acc, sums, top, factor, turn, left, groups, offsets, narrow,
                        is_last_chunk, q_tile, k_tiles, v_tiles, k_rows, v_rows,
                        q_empty, k_full, k_empty, v_full, v_empty,
                        scale, full_factor, k_wide_bias, v_wide_bias,
                        False, FORM, HAS_WIDE_BIAS, BLOCK_DV, BLOCK_N, TILES,
                    )  # fmt: skip
                else:
                    acc, sums, top, factor, turn = _attend_chunk(
                        SIDE, acc, sums, top, factor, turn, left, groups, offsets, narrow,
                        is_last_chunk, q_tile, k_tiles, v_tiles, k_rows, v_rows,
                        q_empty, k_full, k_empty, v_full, v_empty,
                        scale, full_factor, k_wide_bias, v_wide_bias,
                        True, FORM, HAS_WIDE_BIAS, BLOCK_DV, BLOCK_N, TILES,
                    )  # fmt: skip
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
                top_o,
                factor_o,
                sums_o,
                other_top,
                other_factor,
                other_sums,
                gl.convert_layout(full_factor, rows_of(T)),
            )
            acc = acc * weight[:, None] + hand_out.load(T) * other_weight[:, None]
            arrive(hand_empty, 0)
            o_stride_b, o_stride_h, o_stride_n = strides
            rows = gl.arange(0, ROWS, layout=rows_of(T))
            columns = gl.arange(0, BLOCK_DV, layout=columns_of(T))
            head = (kv_head * head_tiles + head_tile) * ROWS + rows
            first_row = batch.to(gl.int64) * o_stride_b + i.to(gl.int64) * o_stride_n
            ptrs = out + first_row + head.to(gl.int64)[:, None] * o_stride_h + columns[None, :]
            if VALUE_DIM == BLOCK_DV:
                gl.store(ptrs, acc.to(out.dtype.element_ty))
            else:
                mask = (head >= 0)[:, None] & (columns < VALUE_DIM)[None, :]
                gl.store(ptrs, acc.to(out.dtype.element_ty), mask=mask)
            heads = kv_heads * head_tiles * ROWS
            gl.store(lse + (batch.to(gl.int64) * heads + head) * seq + i, logarithm * LN_2)
        count += 1  # noqa: SIM113 (a kernel has no enumerate)
