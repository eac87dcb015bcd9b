"""The inner loop of the forward: all wide keys of a tile at a chunk of its offsets."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from csrc_free.device.forms import STRASSEN
from csrc_free.hopper.assembly import opaque_zero
from csrc_free.hopper.attend_tail import attend_tail
from csrc_free.hopper.bring_tiles import GROUPS, HAS_TAIL, HIGH, NUMBERS, ROWS, SPANS, WORD
from csrc_free.hopper.channels import arrive, arrive_at_both, wait_full
from csrc_free.hopper.layouts import accumulator, operand, rows_of
from csrc_free.hopper.tile_state import (
    CHUNK_OF_OFFSETS,
    END,
    FLIPS,
    GROUP_OF_TILES,
    IS_AT_TAIL,
    IS_HIDDEN,
    IS_HUGE,
    IS_LAST,
    IS_LAST_GROUP,
    IS_ON,
    OF_GROUP,
    OF_OFFSET,
    PARTIAL,
    THIS,
    bits_of_group,
    bits_of_offset,
    byte_of,
    is_set,
    planned,
    this_offset,
)
from csrc_free.hopper.tile_weights import attend_anew, hidden, is_high, packed, weights_of
from csrc_free.hopper.virtual_queries import spread_rows, to_float32, twice, virtual_queries


@gluon.jit
def attend_chunk(
    which, acc, sums, top, state, chunks,
    q_tile, k_tiles, v_tiles, k_tail, v_tail, units, plans, spans,
    q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty,
    rows_empty, values_full, scale, factor, biases,
    FORM: gl.constexpr, HAS_WIDE_BIAS: gl.constexpr, HAS_NARROW_BIAS: gl.constexpr,
    P: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, TAIL: gl.constexpr, CHUNK: gl.constexpr,
    NARROW_ROWS: gl.constexpr, V_UNIT: gl.constexpr, K_ROW: gl.constexpr, V_ROW: gl.constexpr,
    K_BY_HEADS: gl.constexpr, V_BY_HEADS: gl.constexpr, Q_BY_SIDES: gl.constexpr,
):  # fmt: skip
    """Attend to all wide keys of an item at the offsets of a chunk: `which`, and every second.

    `chunks` of the item are left, this one among them. In a turn, that is a group of tiles at an
    offset, P is multiplied by a tile of values while the next logits are made, those of the next
    offset's first tile behind the last tile of this one. Nothing is in flight between turns.
    """
    S: gl.constexpr = accumulator(BLOCK_N, 8)
    T: gl.constexpr = accumulator(BLOCK_DV, 8)
    QUERIES: gl.constexpr = operand(BLOCK_N, 8)
    WEIGHTS: gl.constexpr = operand(BLOCK_DV, 8)
    PARTS: gl.constexpr = sums.type.layout
    DTYPE: gl.constexpr = q_tile.dtype
    HAS_CONSTANT: gl.constexpr = FORM == STRASSEN or HAS_WIDE_BIAS
    IS_HALF: gl.constexpr = gl.float16 == DTYPE
    K_START: gl.constexpr = CHUNK - 1
    V_START: gl.constexpr = K_START + V_UNIT
    k_wide_bias, v_wide_bias, k_bias, v_bias = biases
    blank = gl.zeros([2 * ROWS, BLOCK_N], gl.float32, S)
    nothing = gl.zeros([2 * ROWS, BLOCK_DV], gl.float32, T)
    side = (state >> CHUNK_OF_OFFSETS) & 1
    word = planned(plans, NUMBERS * side + WORD)
    left = planned(plans, NUMBERS * side + GROUPS)
    row = planned(plans, NUMBERS * side + HIGH)  # the one after the group's newest tile
    state |= bits_of_group(plans, NUMBERS * side, word, row, left, TILES, BLOCK_N)
    state |= bits_of_offset(word, 0) | (1 << IS_ON)
    k = spread_rows(
        units, K_START - which, P, DTYPE, BLOCK_D, NARROW_ROWS, QUERIES, K_BY_HEADS, K_ROW
    )
    vq, constant = virtual_queries(
        twice(q_tile.index(0), BLOCK_D, QUERIES, Q_BY_SIDES), k, scale, k_bias, k_wide_bias,
        FORM, HAS_WIDE_BIAS, HAS_NARROW_BIAS, rows_of(S),
    )  # fmt: skip
    if is_set(state, IS_LAST) & is_set(state, IS_LAST_GROUP):
        arrive(rows_empty, 0)
        if chunks == 1:
            arrive(q_empty, 0)
    wait_full(k_full, 0, state >> GROUP_OF_TILES)
    constant, weight, parts, top, decay, is_huge = attend_anew(
        vq, k_tiles.index(0).permute((1, 0)), row - BLOCK_N, 0, spans, SPANS * side,
        constant, top, factor, which, HAS_CONSTANT, S,
    )  # fmt: skip
    p = packed(weight, DTYPE, WEIGHTS)
    state |= is_huge << IS_HUGE
    if is_set(state, IS_LAST):
        arrive(k_empty, 0)
    acc *= gl.convert_layout(decay, rows_of(T))[:, None]
    sums *= gl.convert_layout(decay, rows_of(PARTS))[:, None]
    sums += parts
    mass = parts  # of the offset at hand, which v_wide_bias multiplies
    while is_set(state, IS_ON):
        z = opaque_zero()
        is_first = (state & (31 << THIS)) == 0
        is_last = is_set(state, IS_LAST)
        t = nothing
        for n in gl.static_range(TILES - 1):
            if is_first:
                wait_full(k_full, z + n + 1, state >> GROUP_OF_TILES)
                wait_full(v_full, z + n, state >> GROUP_OF_TILES)
            k_tile = k_tiles.index(z + n + 1).permute((1, 0))
            s = warpgroup_mma(vq, k_tile, blank, use_acc=False, is_async=True)
            t = warpgroup_mma(p, v_tiles.index(z + n), t, use_acc=n > 0, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            # Elsewhere than at a group's ends a partly seen tile is weighed anew.
            partly = state & ((1 << IS_HIDDEN) | (1 << PARTIAL + n + 1))
            if n == TILES - 2:  # noqa: SIM102 (one is of compile time, one of run time)
                if partly != 0:
                    s, constant = hidden(
                        s, constant, row - (n + 2) * BLOCK_N, 2 * this_offset(state),
                        spans, SPANS * ((state >> CHUNK_OF_OFFSETS) & 1), factor, HAS_CONSTANT, S,
                    )  # fmt: skip
            weight, parts = weights_of(s, constant, top, factor, HAS_CONSTANT)
            # Before the wait for t: ptxas else sinks the exponentials behind it.
            grown = sums + parts
            is_bad = is_high(grown, parts, IS_HALF, which)
            is_bad |= state & (1 << IS_HUGE)
            if n < TILES - 2:
                is_bad |= partly
            t = warpgroup_mma_wait(0, deps=(t,))
            if is_bad != 0:
                k_tile = k_tiles.index(z + n + 1).permute((1, 0))
                constant, weight, parts, top, decay, is_huge = attend_anew(
                    vq, k_tile, row - (n + 2) * BLOCK_N, 2 * this_offset(state),
                    spans, SPANS * ((state >> CHUNK_OF_OFFSETS) & 1),
                    constant, top, factor, which, HAS_CONSTANT, S,
                )  # fmt: skip
                state |= is_huge << IS_HUGE
                decay_t = gl.convert_layout(decay, rows_of(T))[:, None]
                t *= decay_t
                acc *= decay_t
                decay_s = gl.convert_layout(decay, rows_of(PARTS))[:, None]
                grown = sums * decay_s + parts
                if HAS_WIDE_BIAS:
                    mass *= decay_s
            if is_last:
                arrive_at_both(v_empty, z + n, k_empty, z + n + 1)
            p = packed(weight, DTYPE, WEIGHTS)
            sums = grown
            if HAS_WIDE_BIAS:
                mass += parts

        if TAIL > 0:  # noqa: SIM102 (one is of compile time, one of run time)
            if is_set(state, IS_AT_TAIL):
                if is_first:
                    wait_full(tail_full, 0, state >> END)
                t, acc, sums, mass, p, top, state = attend_tail(
                    which, t, acc, sums, mass, p, top, factor, state, vq, constant,
                    k_tail, v_tail, row - TILES * BLOCK_N - TAIL, 2 * this_offset(state),
                    spans, SPANS * ((state >> CHUNK_OF_OFFSETS) & 1),
                    HAS_CONSTANT, HAS_WIDE_BIAS, TAIL, S, T,
                )  # fmt: skip
                if is_last:
                    arrive(tail_empty, 0)

        # The last turn has no next: its logits are of stale tiles, for nobody.
        is_more = ~(is_last & is_set(state, IS_LAST_GROUP))
        next_this = gl.where(is_last, 0, this_offset(state) + 1)
        # Read anew, so that neither its bytes nor addresses stay in registers.
        next_word = planned(plans, NUMBERS * ((state >> CHUNK_OF_OFFSETS) & 1) + WORD)
        nil = next_word >> 31  # 0, but the assembler does not know
        bits = bits_of_offset(next_word, next_this)
        k = spread_rows(
            units, K_START - which + z - 2 * next_this,
            P, DTYPE, BLOCK_D, NARROW_ROWS, QUERIES, K_BY_HEADS, K_ROW,
        )  # fmt: skip
        vq, constant = virtual_queries(
            twice(q_tile.index(nil), BLOCK_D, QUERIES, Q_BY_SIDES), k, scale, k_bias,
            k_wide_bias, FORM, HAS_WIDE_BIAS, HAS_NARROW_BIAS, rows_of(S),
        )  # fmt: skip
        if is_set(bits, IS_LAST) & (left == gl.where(is_last, 2, 1)):
            arrive(rows_empty, 0)
            if chunks == 1:
                arrive(q_empty, 0)
        if is_last & is_more:
            wait_full(k_full, z, (state >> GROUP_OF_TILES) + 1)
        if is_first:
            wait_full(v_full, z + TILES - 1, state >> GROUP_OF_TILES)
        k_tile = k_tiles.index(z).permute((1, 0))
        s = warpgroup_mma(vq, k_tile, blank, use_acc=False, is_async=True)
        t = warpgroup_mma(
            p, v_tiles.index(z + TILES - 1), t, use_acc=TILES > 1 or TAIL > 0, is_async=True
        )
        s = warpgroup_mma_wait(1, deps=(s,))
        edge = gl.where(is_last, 1 << PARTIAL + TILES, 1 << PARTIAL)
        if (state & edge) | (bits & (1 << IS_HIDDEN)) != 0:
            s, constant = hidden(
                s, constant, row - gl.where(is_last, (TILES + 1) * BLOCK_N, BLOCK_N),
                2 * next_this, spans, SPANS * ((state >> CHUNK_OF_OFFSETS) & 1),
                factor, HAS_CONSTANT, S,
            )  # fmt: skip
        weight, parts = weights_of(s, constant, top, factor, HAS_CONSTANT)
        parts = gl.where(is_more, parts, 0.0)
        grown = sums + parts
        is_bad = is_high(grown, parts, IS_HALF, which) | (state & (1 << IS_HUGE))
        if is_first:
            wait_full(values_full, 0, state >> CHUNK_OF_OFFSETS)
        t = warpgroup_mma_wait(0, deps=(t,))
        if is_last:
            arrive(v_empty, z + TILES - 1)
        # Loaded before the wait, it would take the registers of p.
        v = to_float32(
            spread_rows(
                units, V_START - which + z - 2 * this_offset(state),
                P, DTYPE, BLOCK_DV, NARROW_ROWS, T, V_BY_HEADS, V_ROW,
            )
        )  # fmt: skip
        if HAS_NARROW_BIAS:
            v += v_bias
        if HAS_WIDE_BIAS:
            total = gl.convert_layout(gl.sum(mass, 1), rows_of(T))
            t += (v_wide_bias * total)[:, None]
        acc += t * v
        if (is_bad != 0) & is_more:
            k_tile = k_tiles.index(z).permute((1, 0))
            constant, weight, parts, top, decay, is_huge = attend_anew(
                vq, k_tile, row - gl.where(is_last, (TILES + 1) * BLOCK_N, BLOCK_N),
                2 * next_this, spans, SPANS * ((state >> CHUNK_OF_OFFSETS) & 1),
                constant, top, factor, which, HAS_CONSTANT, S,
            )  # fmt: skip
            state |= is_huge << IS_HUGE
            acc *= gl.convert_layout(decay, rows_of(T))[:, None]
            decay_s = gl.convert_layout(decay, rows_of(PARTS))[:, None]
            grown = sums * decay_s + parts
        p = packed(weight, DTYPE, WEIGHTS)
        sums = grown
        if HAS_WIDE_BIAS:
            mass = parts
        if is_set(bits, IS_LAST) & is_more:
            arrive(k_empty, z)
        if is_last:
            row -= TILES * BLOCK_N
            left -= 1
            plan = NUMBERS * ((state >> CHUNK_OF_OFFSETS) & 1)
            group = bits_of_group(plans, plan, next_word, row, left, TILES, BLOCK_N)
            state = (state & ~OF_GROUP) ^ (1 << GROUP_OF_TILES) | group
            state &= gl.where(left > 0, -1, ~(1 << IS_ON))
        state = (state & ~OF_OFFSET) | bits
    state ^= byte_of(word, HAS_TAIL) << END
    return acc, sums, top, state & (FLIPS | (1 << IS_HUGE))
