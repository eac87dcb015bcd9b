"""The two warps that bring: q and the wide pair by TMA, and the rows of the narrow pair."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from csrc_free.hopper.channels import arrive, wait_empty
from csrc_free.hopper.layouts import columns_of, loaded_rows, rows_of
from csrc_free.hopper.reach import query_reach

ROWS = gl.constexpr(64)
# Narrow rows that one warp loads at once: it has 24 registers a thread.
ROWS_AT_ONCE = gl.constexpr(4)


@gluon.jit
def place(item, grid):
    """Return (batch, kv_head, head_tile, i) of an item: the last queries come first."""
    _items, seq, per_query, kv_heads, head_tiles = grid
    i = seq - 1 - item // per_query
    rest = item % per_query
    batch = rest // (kv_heads * head_tiles)
    rest = rest % (kv_heads * head_tiles)
    return batch, rest // head_tiles, rest % head_tiles, i


@gluon.jit
def bring(
    q, k_wide, v_wide, q_tile, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    grid, view,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """Bring the queries of every item, and its wide tiles for each chunk, the newest first."""
    items, seq, _per_query, _kv_heads, head_tiles = grid
    turn = 0
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, head_tile, i = place(item, grid)
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
    source, stride_n, first, end, bias, target, start,
    HAS_BIAS: gl.constexpr, DIM: gl.constexpr, BLOCK: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """Write rows [first, end) of a matrix, CHUNK at most, to shared memory; 0 beyond."""
    layout: gl.constexpr = loaded_rows(ROWS_AT_ONCE, BLOCK)
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
        target.index(start + n).store(x.to(target.dtype))


@gluon.jit
def bring_narrow(
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
        batch, kv_head, _head_tile, i = place(item, grid)
        _low, _high, first, end = query_reach(view, batch, i, seq)
        k_head = k_narrow + batch.to(gl.int64) * k_stride_b + kv_head.to(gl.int64) * k_stride_h
        v_head = v_narrow + batch.to(gl.int64) * v_stride_b + kv_head.to(gl.int64) * v_stride_h
        for row in range(first, end, CHUNK):
            slot = turn & 1
            wait_empty(empty, slot, turn >> 1)
            slot_start = slot * (CHUNK // ROWS_AT_ONCE)
            _bring_rows(
                k_head, k_stride_n, row, end, k_bias, k_rows, slot_start,
                HAS_BIAS, HEAD_DIM, BLOCK_D, CHUNK,
            )  # fmt: skip
            _bring_rows(
                v_head, v_stride_n, row, end, v_bias, v_rows, slot_start,
                HAS_BIAS, VALUE_DIM, BLOCK_DV, CHUNK,
            )  # fmt: skip
            arrive(full, slot)
            turn += 1
