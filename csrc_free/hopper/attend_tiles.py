"""The two warpgroups of the forward for tiles of several positions, in one program.

Each takes every second offset of the narrow window: rows 0 to 63 are the tile's at one offset, rows
64 to 127 the same at the offset after it. As two programs they did the same work, but their code
did not stay in the instruction cache.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from csrc_free.hopper.assembly import parts_of_rows, warpgroup
from csrc_free.hopper.attend import LN_2, scale_of
from csrc_free.hopper.attend_chunk import attend_chunk
from csrc_free.hopper.bring_tiles import CHUNKS, GROUPS, NUMBERS, ROWS
from csrc_free.hopper.channels import arrive, wait_full
from csrc_free.hopper.layouts import accumulator, columns_of, operand, rows_of
from csrc_free.hopper.maximum import UNSET, total_of_both
from csrc_free.hopper.tile_reach import place
from csrc_free.hopper.tile_state import CHUNK_OF_OFFSETS, FLIPS, ITEM, QUERIES_OF_ITEM, planned
from csrc_free.hopper.virtual_queries import twice


@gluon.jit
def _half_of(x, HALF: gl.constexpr):
    """Return the first or the second half of the columns of a product."""
    x = gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, x.type.layout))
    which = gl.arange(0, 2, layout=layout)
    return gl.sum(gl.where((which == HALF)[None, :, None], x, 0.0), 1)


@gluon.jit
def attend_tiles(
    q_tile, k_tiles, v_tiles, k_tail, v_tail, units, plans, spans,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty,
    rows_full, rows_empty, values_full, values_empty,
    hand_out, hand_sums, out, lse, grid, strides, log2_scale, biases,
    FORM: gl.constexpr, HAS_WIDE_BIAS: gl.constexpr, HAS_NARROW_BIAS: gl.constexpr,
    P: gl.constexpr, VALUE_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, TAIL: gl.constexpr, CHUNK: gl.constexpr,
    NARROW_ROWS: gl.constexpr, V_UNIT: gl.constexpr, K_ROW: gl.constexpr, V_ROW: gl.constexpr,
    K_BY_HEADS: gl.constexpr, V_BY_HEADS: gl.constexpr, Q_BY_SIDES: gl.constexpr,
):  # fmt: skip
    """Take every offset of every chunk of every item, in turns of two.

    Of an odd number the last one's next is hidden from all rows.
    """
    HEADS: gl.constexpr = ROWS // P
    HALF: gl.constexpr = BLOCK_DV // 2
    which = warpgroup()
    items, _tiles, kv_heads, group, seq = grid
    S: gl.constexpr = accumulator(BLOCK_N, 8)
    T: gl.constexpr = accumulator(BLOCK_DV, 8)
    state = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        blank = gl.zeros([2 * ROWS, BLOCK_N], gl.float32, S)
        acc = gl.zeros([2 * ROWS, BLOCK_DV], gl.float32, T)
        sums = parts_of_rows(blank)
        top = gl.full([2 * ROWS], UNSET, gl.float32, rows_of(S))
        factor = gl.full([2 * ROWS], 0.0, gl.float32, rows_of(S)) + log2_scale
        scale = 1.0
        wait_full(rows_full, 0, state >> CHUNK_OF_OFFSETS)
        plan = NUMBERS * ((state >> CHUNK_OF_OFFSETS) & 1)
        chunks = planned(plans, plan + CHUNKS)
        if planned(plans, plan + GROUPS) > 0:
            wait_full(q_full, 0, state >> QUERIES_OF_ITEM)
            state ^= 1 << QUERIES_OF_ITEM
        if q_tile.dtype == gl.float16:
            scale = scale_of(twice(q_tile.index(0), BLOCK_D, operand(BLOCK_N, 8), Q_BY_SIDES), FORM)
            factor /= gl.convert_layout(gl.max(scale, 1), rows_of(S))
        while chunks > 0:
            wait_full(rows_full, 0, state >> CHUNK_OF_OFFSETS)
            plan = NUMBERS * ((state >> CHUNK_OF_OFFSETS) & 1)
            if planned(plans, plan + GROUPS) > 0:
                acc, sums, top, state = attend_chunk(
                    which, acc, sums, top, state, chunks,
                    q_tile, k_tiles, v_tiles, k_tail, v_tail, units, plans, spans,
                    q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty,
                    rows_empty, values_full, scale, factor, biases,
                    FORM, HAS_WIDE_BIAS, HAS_NARROW_BIAS, P, BLOCK_D, BLOCK_DV, BLOCK_N, TILES,
                    TAIL, CHUNK, NARROW_ROWS, V_UNIT, K_ROW, V_ROW, K_BY_HEADS, V_BY_HEADS,
                    Q_BY_SIDES,
                )  # fmt: skip
            else:
                arrive(rows_empty, 0)
                wait_full(values_full, 0, state >> CHUNK_OF_OFFSETS)
            arrive(values_empty, 0)
            state ^= 1 << CHUNK_OF_OFFSETS
            chunks -= 1

        F: gl.constexpr = gl.BlockedLayout([1, 4], [128 // HALF, HALF // 4], [8, 1], [1, 0])
        hand_sums.index(0).store(gl.convert_layout(top, rows_of(T)))
        hand_sums.index(1).store(gl.convert_layout(gl.sum(sums, 1), rows_of(T)))
        hand_sums.index(2).store(gl.convert_layout(factor, rows_of(T)))
        first_top = hand_sums.index(0).slice(0, ROWS, 0).load(rows_of(F))
        second_top = hand_sums.index(0).slice(ROWS, ROWS, 0).load(rows_of(F))
        first_sums = hand_sums.index(1).slice(0, ROWS, 0).load(rows_of(F))
        second_sums = hand_sums.index(1).slice(ROWS, ROWS, 0).load(rows_of(F))
        same_factor = hand_sums.index(2).slice(0, ROWS, 0).load(rows_of(F))
        first_weight, second_weight, logarithm = total_of_both(
            first_top, same_factor, first_sums, second_top, same_factor, second_sums, same_factor
        )
        batch, kv_head, i = place(item, grid, P)
        o_stride_b, o_stride_h, o_stride_n = strides
        rows = gl.arange(0, ROWS, layout=rows_of(F))
        query = i + rows // HEADS
        head = kv_head * group + rows % HEADS
        mask = (query < seq) & (rows % HEADS < group)
        heads = kv_heads * group
        ptrs = lse + (batch.to(gl.int64) * heads + head) * seq + query
        gl.store(ptrs, logarithm * LN_2, mask=mask)
        ptrs = out + batch.to(gl.int64) * o_stride_b
        ptrs += (head.to(gl.int64) * o_stride_h + query.to(gl.int64) * o_stride_n)[:, None]
        for half in gl.static_range(2):
            hand_out.store(_half_of(acc, half))
            columns = half * HALF + gl.arange(0, HALF, layout=columns_of(F))
            both = hand_out.slice(0, ROWS, 0).load(F) * first_weight[:, None]
            both += hand_out.slice(ROWS, ROWS, 0).load(F) * second_weight[:, None]
            of_columns = mask[:, None] & (columns < VALUE_DIM)[None, :]
            gl.store(ptrs + columns[None, :], both.to(out.dtype.element_ty), mask=of_columns)
        state = (state & FLIPS) ^ (1 << ITEM)
