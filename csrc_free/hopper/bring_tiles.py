"""The two warps that bring for tiles of several positions: q and the wide pair, narrow rows.

The second also computes what the warpgroups need to know of each chunk of offsets, a plan of
numbers and the reach of every row: their registers are full.

Narrow keys and values have a buffer each, of the rows that a chunk of offsets and P positions
need: row r is key position p - first - CHUNK + 1 + r, where p is that of the tile's first query and
`first` the chunk's first offset. So the rows of one offset follow one another. Shared memory is an
array of units of 16 bytes, and unit c of row r is c · (rows of the buffer) + r: so an offset begins
at any unit, and no two of its rows share a bank.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from csrc_free.hopper.assembly import thread_barrier
from csrc_free.hopper.channels import wait_empty
from csrc_free.hopper.tile_reach import place, rows_reach, tile_reach

ROWS = gl.constexpr(64)
# Elements of a unit.
UNIT = gl.constexpr(8)

# A plan of a chunk, of which there are two in turn.
CHUNKS = gl.constexpr(0)  # of the item
GROUPS = gl.constexpr(1)  # of wide tiles; 0 where the item sees nothing
HIGH = gl.constexpr(2)  # the wide row after the newest tile
NEW_EDGE = gl.constexpr(3)  # all rows see all keys of the tiles from this one on
OLD_EDGE = gl.constexpr(4)  # and before this one
WORD = gl.constexpr(5)  # the bytes below
NUMBERS = gl.constexpr(6)
# Offsets of each warpgroup; all rows see the narrow keys of offsets from `INNER` of the chunk on,
# and before `OUTER`; whether there is a tail.
PASSES = gl.constexpr(0)
INNER = gl.constexpr(8)
OUTER = gl.constexpr(16)
HAS_TAIL = gl.constexpr(24)
# The reach of rows, two in turn: wide rows [LO, HI), offsets of the chunk [NEWEST, OLDEST].
LO = gl.constexpr(0)
HI = gl.constexpr(1)
NEWEST = gl.constexpr(2)
OLDEST = gl.constexpr(3)
SPANS = gl.constexpr(4)


@gluon.jit
def _groups_of(low, high, BLOCK_N: gl.constexpr, TILES: gl.constexpr, TAIL: gl.constexpr):
    """Return how many groups of TILES tiles hold rows [low, high), but for a tail."""
    return gl.maximum(gl.cdiv(high - low - TAIL, TILES * BLOCK_N), 1)


@gluon.jit
def bring_wide(
    q, k_wide, v_wide, k_end, v_end, q_tile, k_tiles, v_tiles, k_tail, v_tail,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty, grid, view,
    P: gl.constexpr, HAS_BOUNDS: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, TAIL: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """Bring the queries of every item, and its wide tiles for each chunk, the newest first."""
    items, _tiles, _kv_heads, _group, seq = grid
    turn = 0
    tail_turn = 0
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, i = place(item, grid, P)
        _start, low, high, _first, offsets, _low, _high, _newest, _oldest = tile_reach(
            view, batch, i, seq, P, HAS_BOUNDS, 1
        )
        groups = _groups_of(low, high, BLOCK_N, TILES, TAIL)
        turns = groups * gl.cdiv(offsets, CHUNK)
        for n in range(turns):
            newest = high - (n % groups) * (TILES * BLOCK_N)
            for t in gl.static_range(TILES):
                if t == TILES - 1:  # noqa: SIM102 (one is of compile time, one of run time)
                    if n == 0:
                        wait_empty(q_empty, 0, count)
                        mbarrier.expect(q_full.index(0), q.block_type.nbytes)
                        tma.async_copy_global_to_shared(
                            q, [batch, kv_head, i, 0, 0], q_full.index(0), q_tile
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
            if TAIL > 0:
                end = newest - TILES * BLOCK_N
                if (n % groups == groups - 1) & (low < end):
                    wait_empty(tail_empty, 0, tail_turn)
                    mbarrier.expect(
                        tail_full.index(0), k_end.block_type.nbytes + v_end.block_type.nbytes
                    )
                    tma.async_copy_global_to_shared(
                        k_end, [batch, kv_head, end - TAIL, 0], tail_full.index(0), k_tail
                    )
                    tma.async_copy_global_to_shared(
                        v_end, [batch, kv_head, end - TAIL, 0], tail_full.index(0), v_tail
                    )
                    tail_turn += 1
        if turns > 0:
            count += 1


@gluon.jit
def _copy_rows(source, units, full, batch, kv_head, row, START: gl.constexpr, BLOCK: gl.constexpr):
    """Copy rows of a narrow key or value, from `row` on, to a buffer, a unit of columns at a time.

    Rows and columns outside the tensor become zeros.
    """
    PITCH: gl.constexpr = source.block_type.shape[2]
    mbarrier.expect(full.index(0), source.block_type.nbytes * (BLOCK // UNIT))
    for unit in range(BLOCK // UNIT):
        target = units.index(START + unit * PITCH)
        target = target._reinterpret(source.dtype, [1, 1, PITCH, UNIT], source.layout)
        tma.async_copy_global_to_shared(
            source, [batch, kv_head, row, unit * UNIT], full.index(0), target
        )


@gluon.jit
def _write(plans, place, number):
    """Write one number of a plan."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    plans.index(place).store(gl.full([1], 0, gl.int32, layout) + number)


@gluon.jit
def bring_rows(
    k_narrow, v_narrow, units, plans, spans, k_full, k_empty, v_full, v_empty, grid, view,
    P: gl.constexpr, HAS_BOUNDS: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, TAIL: gl.constexpr, CHUNK: gl.constexpr,
    V_UNIT: gl.constexpr,
):  # fmt: skip
    """Bring the narrow rows of every item and its plans, a chunk of offsets at a time.

    An item that sees nothing has one chunk, of no groups. Plans are written before the wait for the
    buffers: those of the chunk before last are free once its values are.
    """
    items, _tiles, _kv_heads, _group, seq = grid
    keys, wide_rows, narrow_rows = view[3], view[4], view[5]
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, i = place(item, grid, P)
        start, low, high, first, offsets, all_low, all_high, all_first, all_last = tile_reach(
            view, batch, i, seq, P, HAS_BOUNDS, 1
        )
        groups = _groups_of(low, high, BLOCK_N, TILES, TAIL)
        chunks = gl.maximum(gl.cdiv(offsets, CHUNK), 1)
        for chunk in range(chunks):
            chunk_first = first + chunk * CHUNK
            passes = (gl.minimum(offsets - chunk * CHUNK, CHUNK) + 1) // 2
            inner = gl.minimum(gl.maximum(all_first - chunk_first, 0), 255)
            outer = gl.minimum(gl.maximum(all_last - chunk_first + 1, 0), 255)
            has_tail = (low < high - groups * (TILES * BLOCK_N)).to(gl.int32)
            word = (passes << PASSES) | (inner << INNER) | (outer << OUTER) | (has_tail << HAS_TAIL)
            plan = NUMBERS * (turn & 1)
            _write(plans, plan + CHUNKS, chunks)
            _write(plans, plan + GROUPS, gl.where(passes > 0, groups, 0))
            _write(plans, plan + HIGH, high)
            _write(plans, plan + NEW_EDGE, gl.cdiv(gl.maximum(high - all_high, 0), BLOCK_N))
            _write(plans, plan + OLD_EDGE, gl.maximum(high - all_low, 0) // BLOCK_N)
            _write(plans, plan + WORD, word)
            row_of_both = gl.arange(0, 2 * ROWS, layout=layout)
            # Of the second warpgroup, whose offsets are one further.
            further = row_of_both // ROWS
            query = gl.minimum(i + row_of_both % ROWS // (ROWS // P), seq - 1)
            lo, hi, newest, oldest = rows_reach(view, batch, query, start, seq, HAS_BOUNDS)
            span = SPANS * (turn & 1)
            spans.index(span + LO).store(lo - (keys - wide_rows))
            spans.index(span + HI).store(hi - (keys - wide_rows))
            spans.index(span + NEWEST).store(newest - chunk_first - further)
            spans.index(span + OLDEST).store(oldest - chunk_first - further)
            row = start + i - chunk_first - (CHUNK - 1) - (keys - narrow_rows)
            thread_barrier()  # all lanes have written before one of them announces the rows
            # The copies of a chunk of no groups are of what nobody reads.
            wait_empty(k_empty, 0, turn)
            _copy_rows(k_narrow, units, k_full, batch, kv_head, row, 0, BLOCK_D)
            wait_empty(v_empty, 0, turn)
            _copy_rows(v_narrow, units, v_full, batch, kv_head, row, V_UNIT, BLOCK_DV)
            turn += 1
