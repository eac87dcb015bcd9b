"""The warp that brings the key side its tiles, by TMA."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from csrc_free.hopper.channels import wait_empty
from csrc_free.hopper.key_items import (
    item_of,
    known,
    narrow_key,
    places,
    rows_of_turn,
    span_of,
    turns_of,
)
from csrc_free.hopper.key_plan import KEYS, ROWS

_KEYS = gl.constexpr(KEYS)
_ROWS = gl.constexpr(ROWS)


@gluon.jit
def bring_keys(
    q, dout, delta, lse2, k_wide, v_wide, spans, q_start,
    q_tiles, dout_tiles, delta_tiles, lse2_tiles, k_tile, v_tile,
    rows_full, rows_empty, keys_full, keys_empty, sizes, items, heads, splits, tiles,
    tiles_of_a_part,
    HEADS: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    STAGES: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    IS_CAUSAL: gl.constexpr, IS_SQUARE: gl.constexpr, APART: gl.constexpr,
    WIDE: gl.constexpr,
):  # fmt: skip
    """Bring the wide keys of each item, and for each turn the rows.

    A tile of rows is announced to those who need it, and who does not is said to be done with it.
    """
    (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        q_start_default,
    ) = known(sizes, IS_CAUSAL, IS_SQUARE)  # fmt: skip
    positions: gl.constexpr = _ROWS // HEADS
    NARROW: gl.constexpr = _KEYS // WIDE
    step = 0
    tiles_done = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        bh, batch, kv_head, part, split, start = item_of(
            item, heads, splits, kv_heads, q_start, q_start_default, HAS_Q_START
        )
        for tile in range(
            part * tiles_of_a_part, gl.minimum((part + 1) * tiles_of_a_part, tiles)
        ):  # fmt: skip
            _key_first, query_first, query_end, narrow_first, narrow_end, _lo, _hi = span_of(
                tile, batch, tiles, start, spans, seq, wide_rows, narrow_rows,
                wide_left, wide_right, narrow_left, narrow_right, HAS_BOUNDS, WIDE,
            )  # fmt: skip
            base, turns = turns_of(narrow_first, narrow_end, APART, NARROW)
            place, own_turns = places(base, turns, split, splits, NARROW)
            wait_empty(keys_empty, 0, tiles_done)
            mbarrier.expect(keys_full.index(0), k_wide.block_type.nbytes + v_wide.block_type.nbytes)
            coords = [batch, kv_head, tile * WIDE, 0]
            tma.async_copy_global_to_shared(
                k_wide, coords, keys_full.index(0),
                k_tile._reinterpret(q.dtype, [1, 1, WIDE, BLOCK_D], k_wide.layout),
            )  # fmt: skip
            tma.async_copy_global_to_shared(
                v_wide, coords, keys_full.index(0),
                v_tile._reinterpret(q.dtype, [1, 1, WIDE, BLOCK_DV], v_wide.layout),
            )  # fmt: skip
            for _turn in range(own_turns):
                i, count, begin_0, end_0, begin_1, end_1 = rows_of_turn(
                    narrow_key(place, base, APART, NARROW), narrow_first, narrow_end,
                    query_first, query_end, start, narrow_left, narrow_right, APART, positions,
                    NARROW,
                )  # fmt: skip
                place += 1
                place = gl.where(place == turns, 0, place)
                for t in range(count):
                    s = step % STAGES
                    wait_empty(rows_empty, s, step // STAGES)
                    needs_0 = (t >= begin_0) & (t < end_0)
                    needs_1 = (t >= begin_1) & (t < end_1)
                    if needs_0 == 0:
                        mbarrier.arrive(rows_empty.index(s), count=1)
                    if needs_1 == 0:
                        mbarrier.arrive(rows_empty.index(s), count=1)
                    if needs_0 | needs_1:
                        needed_by = gl.where(needs_0 & needs_1, 2, needs_1.to(gl.int32))
                        full = rows_full.index(STAGES * needed_by + s)
                        mbarrier.expect(
                            full,
                            q.block_type.nbytes + dout.block_type.nbytes
                            + delta.block_type.nbytes + lse2.block_type.nbytes,
                        )  # fmt: skip
                        rows = [batch, kv_head, i, 0, 0]
                        tma.async_copy_global_to_shared(
                            q, rows, full,
                            q_tiles.index(s)._reinterpret(
                                q.dtype, [1, 1, positions, HEADS, BLOCK_D], q.layout
                            ),
                        )  # fmt: skip
                        tma.async_copy_global_to_shared(
                            lse2, [bh, i * HEADS], full, lse2_tiles.index(s)
                        )
                        tma.async_copy_global_to_shared(
                            dout, rows, full,
                            dout_tiles.index(s)._reinterpret(
                                q.dtype, [1, 1, positions, HEADS, BLOCK_DV], dout.layout
                            ),
                        )  # fmt: skip
                        tma.async_copy_global_to_shared(
                            delta, [bh, i * HEADS], full, delta_tiles.index(s)
                        )
                    i += positions
                    step += 1
            tiles_done += 1
