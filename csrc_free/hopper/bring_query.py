"""The two warps that bring what dq is made of: rows and wide tiles by TMA, and the narrow rows."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from csrc_free.hopper.channels import wait_empty
from csrc_free.hopper.query_items import place


@gluon.jit
def bring_tiles(
    q, dout, k_wide, v_wide, q_tile, do_tile, q_full, q_empty, k_ring, v_ring, full, empty,
    kv_bounds, q_start, sizes, items, tiles,
    GROUP: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    P: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Bring each item's rows of q and dout, and its wide tiles, the newest first.

    Groups are as even as they can be, and their tiles end in the last slot. Slots before them take
    their turn with no bytes.
    """
    n = 0
    turn = 0
    wide_first = gl.maximum(sizes[2], sizes[3]) - sizes[2]
    for w in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, i0, _, top, count, tails, _, _, _, _ = place(
            w, tiles, sizes, q_start, kv_bounds,
            HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, TAIL, 1,
        )  # fmt: skip
        if count > 0:
            wait_empty(q_empty, 0, n)
            mbarrier.expect(q_full.index(0), q.block_type.nbytes + dout.block_type.nbytes)
            coords = [batch, i0, kv_head * GROUP, 0]
            tma.async_copy_global_to_shared(q, coords, q_full.index(0), q_tile)
            tma.async_copy_global_to_shared(dout, coords, q_full.index(0), do_tile)
            n += 1
        before = 0
        for left in range((count + SLOTS - 1) // SLOTS, 0, -1):
            size = (count - before + left - 1) // left
            unused = SLOTS - size
            for slot in range(SLOTS):
                t = before + slot - unused
                row = top - wide_first - (t + 1 - tails) * BLOCK_N
                if t < tails:
                    row = top - wide_first - (count - 1) * BLOCK_N - TAIL
                wait_empty(empty, slot, turn)
                if slot < unused:
                    mbarrier.arrive(full.index(slot), count=1)
                else:
                    mbarrier.expect(
                        full.index(slot), k_wide.block_type.nbytes + v_wide.block_type.nbytes
                    )
                    coords = [batch, kv_head, row, 0]
                    tma.async_copy_global_to_shared(
                        k_wide, coords, full.index(slot), k_ring.index(slot)
                    )
                    tma.async_copy_global_to_shared(
                        v_wide, coords, full.index(slot), v_ring.index(slot)
                    )
            before += size
            turn += 1


@gluon.jit
def _copy_rows(
    buffer, pointer, stride_8, key, narrow_first, narrow_rows, bounds, i0, seq, DIMS: gl.constexpr,
    HAS_BOUNDS: gl.constexpr, P: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Begin to copy the narrow rows of keys key .. key + P to shared memory, one for each query.

    Rows that there are not, or that the bounds of their query hide, come as zeros. `bounds` are
    those of query 0.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [1, 1], [1, 0])
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    AT_ONCE: gl.constexpr = 2 if P > 1 else 1
    for x0 in gl.static_range(0, P, AT_ONCE):
        x = x0 + gl.arange(0, AT_ONCE, layout=gl.SliceLayout(1, layout))
        rows = key - narrow_first + x
        mask = (rows >= 0) & (rows < narrow_rows)
        if HAS_BOUNDS:
            low = gl.load(bounds + (i0 + x) * 2, mask=i0 + x < seq, other=0)
            high = gl.load(bounds + (i0 + x) * 2 + 1, mask=i0 + x < seq, other=0)
            mask = mask & (key + x >= low) & (key + x < high)
        mask = mask[:, None] & (columns < DIMS)[None, :]
        ptrs = pointer + (rows.to(gl.int64) * stride_8 * 8)[:, None] + columns[None, :]
        async_copy.async_copy_global_to_shared(buffer.slice(x0, AT_ONCE), ptrs, mask=mask)


@gluon.jit
def bring_rows(
    k_rows, v_rows, rows_full, rows_empty, k_narrow, v_narrow,
    kv_bounds, q_start, sizes, narrow_strides, items, tiles,
    HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    P: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Bring the narrow rows of every turn, those of both its offsets, in two buffers by turns."""
    seq = sizes[1]
    narrow_rows = sizes[3]
    narrow_first = gl.maximum(sizes[2], sizes[3]) - sizes[3]
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n = narrow_strides
    turn = 0
    for w in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, i0, p0, _, count, _, offset_first, offsets, _, _ = place(
            w, tiles, sizes, q_start, kv_bounds,
            HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, TAIL, 1,
        )  # fmt: skip
        b = batch.to(gl.int64)
        h = kv_head.to(gl.int64)
        k_head = k_narrow + (b * stride_kn_b + h * stride_kn_h) * 8
        v_head = v_narrow + (b * stride_vn_b + h * stride_vn_h) * 8
        bounds = kv_bounds
        if HAS_BOUNDS:
            bounds += b * seq * 2
        for _ in range(0, count, SLOTS):
            for offset in range((offsets + 1) // 2 * 2):
                buffer = turn & 3
                key = p0 - offset_first - offset
                # An offset after the last one is nobody's: its rows are zeros.
                rows = gl.where(offset < offsets, narrow_rows, 0)
                if turn & 1 == 0:
                    wait_empty(rows_empty, buffer >> 1, turn >> 2)
                _copy_rows(
                    k_rows.index(buffer), k_head, stride_kn_n, key, narrow_first, rows,
                    bounds, i0, seq, HEAD_DIM, HAS_BOUNDS, P, BLOCK_D,
                )  # fmt: skip
                _copy_rows(
                    v_rows.index(buffer), v_head, stride_vn_n, key, narrow_first, rows,
                    bounds, i0, seq, VALUE_DIM, HAS_BOUNDS, P, BLOCK_DV,
                )  # fmt: skip
                if turn & 1 == 1:
                    async_copy.mbarrier_arrive(rows_full.index(buffer >> 1))
                    mbarrier.arrive(rows_full.index(buffer >> 1), count=1)
                turn += 1
