"""What the rows of a tile see: queries, positions and key ranges, on the device.

Rows of a tile are consecutive entries of the list (query position, head of the group); HEADS is
the group size, or the power of two above it where a kernel sums over the heads of a position.
"""

import triton
import triton.language as tl


@triton.jit
def place(tiles, kv_heads, IS_SMALL_GRID: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Return (tile, bh, batch, kv_head) of this program; bh counts key-value heads of the batch.

    In a small grid the tiles with little to see come last, to fill the gaps: under a causal window
    those are the first queries (LAST_FIRST), or the last keys. In a large one the tiles of a head
    follow one another, for the cache. A test of the grid at run time would cost registers.
    """
    heads = tl.num_programs(0) // tiles
    tile = tl.program_id(0) % tiles
    bh = tl.program_id(0) // tiles
    if IS_SMALL_GRID:
        tile = tl.program_id(0) // heads
        bh = tl.program_id(0) % heads
        if LAST_FIRST:
            tile = tiles - 1 - tile
    batch = (bh // kv_heads).to(tl.int64)
    kv_head = (bh % kv_heads).to(tl.int64)
    return tile, bh.to(tl.int64), batch, kv_head


@triton.jit
def query_rows(
    flat, seq, GROUP: tl.constexpr, HEADS: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """Return (i, head, real): the query and head of a row, and whether there is such a row.

    Whatever is computed from i and multiplied by a stride is of type INDEX: int32 where every
    tensor ends within 2^31 elements, for half the registers, else int64.
    """
    i = (flat // HEADS).to(INDEX)
    head = flat % HEADS
    real = i < seq
    if HEADS != GROUP:
        real = real & (head < GROUP)
    return i, head, real


@triton.jit
def positions(q_start, batch, i, default_start, HAS_Q_START: tl.constexpr):
    """Return the positions at which the queries stand among the keys."""
    start = default_start
    if HAS_Q_START:
        start = tl.load(q_start + batch)
    return start + i


@triton.jit
def key_range(
    kv_bounds, batch, i, real, position, left, right, first, seq, keys,
    HAS_BOUNDS: tl.constexpr,
):  # fmt: skip
    """Return [lo, hi), the key positions that each row sees through one window; 0, 0 for none."""
    lo = tl.maximum(position - left, first)
    hi = tl.minimum(position + right + 1, keys)
    if HAS_BOUNDS:
        offset = (batch.to(tl.int64) * seq + i) * 2
        lo = tl.maximum(lo, tl.load(kv_bounds + offset, mask=real, other=0))
        hi = tl.minimum(hi, tl.load(kv_bounds + offset + 1, mask=real, other=0))
    sees = real & (lo < hi)
    return tl.where(sees, lo, 0), tl.where(sees, hi, 0)


@triton.jit
def key_ranges(
    kv_bounds, batch, i, real, position, wide_left, wide_right, narrow_left, narrow_right,
    wide_first, narrow_first, seq, keys, HAS_BOUNDS: tl.constexpr,
):  # fmt: skip
    """Return what each row sees: [lo, hi) of the wide pair and [narrow_lo, narrow_hi)."""
    lo, hi = key_range(
        kv_bounds, batch, i, real, position, wide_left, wide_right, wide_first, seq, keys,
        HAS_BOUNDS,
    )  # fmt: skip
    narrow_lo, narrow_hi = key_range(
        kv_bounds, batch, i, real, position, narrow_left, narrow_right, narrow_first, seq, keys,
        HAS_BOUNDS,
    )  # fmt: skip
    return lo, hi, narrow_lo, narrow_hi


@triton.jit
def offset_range(sees, position, narrow_lo, narrow_hi):
    """Return scalars: the first and the last offset at which any row sees a narrow key.

    The offset of a key is how far before the query it stands. No rows: the first is after the last.
    """
    first = tl.min(tl.where(sees, position - narrow_hi + 1, 2147483647), 0)
    last = tl.max(tl.where(sees, position - narrow_lo, -2147483648), 0)
    return first, last


@triton.jit
def spread(lo, hi, keys):
    """Return scalars: [first, last) key that any row sees, [full_lo, full_hi) that all rows see.

    Rows that see nothing do not widen the first range, and empty the second.
    """
    first = tl.min(tl.where(lo < hi, lo, keys), 0)
    last = tl.max(hi, 0)
    return first, last, tl.max(lo, 0), tl.min(hi, 0)
