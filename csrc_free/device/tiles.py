"""Which rows a tile has, and what they see: queries and key ranges, on the device.

Rows of a tile are consecutive entries of the list (query, head of the group); HEADS is the group
size, or the power of two above it where a kernel sums over the heads of a query.

What goes together is a tuple, which whoever takes it unpacks by name:

    sizes   (seq, keys, wide_rows, narrow_rows, wide_first, narrow_first): queries, key positions,
            each pair's rows and the position of its first one
    windows (wide_begin, wide_end, narrow_begin, narrow_end): query i sees [i + begin, i + end)
    rows    (i, head, mask): each row's query and head, and whether there is such a row
    bounds  (lo, hi) of kv_bounds for each row
    heads   (source, stride_h, stride_n): the heads of one key-value head in q, dout or dq
    sight   (lo, hi, first, last, full_lo, full_hi): the wide keys [lo, hi) that each row sees,
            [first, last) that any of them sees, [full_lo, full_hi) that all of them see

Plain tuples, and no class: Inductor writes kernels out by source and drops classes that it does not
know, and Triton's cache key does not see the order of a class's fields. q_start is loaded by the
kernels themselves: Inductor follows the addresses of stores back, and where it meets a function
that took a pointer and returned an index, it counts the pointer as written to. Where a loop begins
and ends is not followed, nor a mask: so `key_ranges` may load kv_bounds.
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
def sizes_of(seq, wide_rows, narrow_rows):
    """Return `sizes`: the shorter pair holds the last rows."""
    keys = tl.maximum(wide_rows, narrow_rows)
    return seq, keys, wide_rows, narrow_rows, keys - wide_rows, keys - narrow_rows


@triton.jit
def window_of(start, left, right, seq, keys):
    """Return (begin, end): query i sees the keys [i + begin, i + end) of those there are.

    `left` and `right` come lowered by 2^31, so that what is unbounded is an int32 too. The sums are
    taken in 64 bits; up to `keys` or down to -seq a bound says all that a larger one would.
    """
    begin = start.to(tl.int64) - left - 2147483648
    end = start.to(tl.int64) + right + 2147483649
    # Not tl.clamp, which is for floating-point numbers.
    begin = tl.minimum(tl.maximum(begin, -seq), keys)
    end = tl.minimum(tl.maximum(end, -seq), keys)
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def windows_of(start, wide_left, wide_right, narrow_left, narrow_right, sizes):
    """Return `windows` of a batch row, exact for every int32 start and every window.

    `start` is where its first query stands among the keys.
    """
    seq, keys, _wide_rows, _narrow_rows, _wide_first, _narrow_first = sizes
    wide_begin, wide_end = window_of(start, wide_left, wide_right, seq, keys)
    narrow_begin, narrow_end = window_of(start, narrow_left, narrow_right, seq, keys)
    return wide_begin, wide_end, narrow_begin, narrow_end


@triton.jit
def query_rows(
    flat, seq, GROUP: tl.constexpr, HEADS: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """Return `rows` of entries `flat`.

    Whatever is computed from i and multiplied by a stride is of type INDEX: int32 where every
    tensor ends within 2^31 elements, for half the registers, else int64.
    """
    i = (flat // HEADS).to(INDEX)
    head = flat % HEADS
    mask = i < seq
    if HEADS != GROUP:
        mask = mask & (head < GROUP)
    return i, head, mask


@triton.jit
def heads_of(tensor, batch, kv_head, GROUP: tl.constexpr):
    """Return `heads` of a tensor [B, H, N, ..], given as (source, stride_b, stride_h, stride_n)."""
    source, stride_b, stride_h, stride_n = tensor
    return source + (batch * stride_b + kv_head * GROUP * stride_h), stride_h, stride_n


@triton.jit
def rows_in(heads, rows):
    """Return (source, offs [M]): where rows stand."""
    source, stride_h, stride_n = heads
    i, head, _mask = rows
    return source, i * stride_n + head * stride_h


@triton.jit
def head_offs(stride_b, stride_h, stride_n, batch, kv_head, rows, GROUP: tl.constexpr):
    """Return the offsets of rows in a tensor [B, H, N, ..], for stores: of 64 bits, but no base."""
    i, head, _mask = rows
    return batch * stride_b + (kv_head * GROUP + head) * stride_h + i * stride_n


@triton.jit
def key_range(rows, bounds, begin, end, first, keys, HAS_BOUNDS: tl.constexpr):
    """Return [lo, hi), the key positions that each row sees through one window; 0, 0 for none."""
    i, _head, mask = rows
    lo = tl.maximum(i + begin, first)
    hi = tl.minimum(i + end, keys)
    if HAS_BOUNDS:
        bound_lo, bound_hi = bounds
        lo = tl.maximum(lo, bound_lo)
        hi = tl.minimum(hi, bound_hi)
    sees = mask & (lo < hi)
    return tl.where(sees, lo, 0), tl.where(sees, hi, 0)


@triton.jit
def key_ranges(rows, batch, kv_bounds, windows, sizes, HAS_BOUNDS: tl.constexpr):
    """Return what each row sees: [lo, hi) of the wide pair and [narrow_lo, narrow_hi)."""
    i, _head, mask = rows
    wide_begin, wide_end, narrow_begin, narrow_end = windows
    seq, keys, _wide_rows, _narrow_rows, wide_first, narrow_first = sizes
    bounds = (0, 0)
    if HAS_BOUNDS:
        bound_ptrs = kv_bounds + (batch * seq + i) * 2
        bound_lo = tl.load(bound_ptrs, mask=mask, other=0)
        bound_hi = tl.load(bound_ptrs + 1, mask=mask, other=0)
        bounds = (bound_lo, bound_hi)
    lo, hi = key_range(rows, bounds, wide_begin, wide_end, wide_first, keys, HAS_BOUNDS)
    narrow_lo, narrow_hi = key_range(
        rows, bounds, narrow_begin, narrow_end, narrow_first, keys, HAS_BOUNDS
    )
    return lo, hi, narrow_lo, narrow_hi


@triton.jit
def look(rows, batch, kv_bounds, windows, sizes, HAS_BOUNDS: tl.constexpr):
    """Return (sight, narrow_sight) of rows of a batch row.

    narrow_sight is (lo, hi, sees): each row's narrow keys [lo, hi), and whether it sees a pair.
    """
    _seq, keys, _wide_rows, _narrow_rows, _wide_first, _narrow_first = sizes
    lo, hi, narrow_lo, narrow_hi = key_ranges(rows, batch, kv_bounds, windows, sizes, HAS_BOUNDS)
    first, last, full_lo, full_hi = spread(lo, hi, keys)
    sees = (lo < hi) & (narrow_lo < narrow_hi)
    return (lo, hi, first, last, full_lo, full_hi), (narrow_lo, narrow_hi, sees)


@triton.jit
def offset_range(i, narrow_lo, narrow_hi, sees):
    """Return scalars: the first and the last offset at which any row sees a narrow key.

    A key's offset is i less its position: by how much less than q_start it stands before the query.
    No rows: the first is after the last.
    """
    first = tl.min(tl.where(sees, i - narrow_hi + 1, 2147483647), 0)
    last = tl.max(tl.where(sees, i - narrow_lo, -2147483648), 0)
    return first, last


@triton.jit
def spread(lo, hi, keys):
    """Return scalars: [first, last) key that any row sees, [full_lo, full_hi) that all rows see.

    Rows that see nothing do not widen the first range, and empty the second.
    """
    first = tl.min(tl.where(lo < hi, lo, keys), 0)
    last = tl.max(hi, 0)
    return first, last, tl.max(lo, 0), tl.min(hi, 0)
