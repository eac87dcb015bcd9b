"""What a tile of P consecutive queries sees, on the device: ranges of keys and of offsets.

An offset says how far before its query a narrow key stands.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Beyond every position, and so are its sums with a reach.
_FAR = gl.constexpr(2**31 - 1)


@gluon.jit
def place(item, tiles, kv_heads, P: gl.constexpr):
    """Return (batch, kv_head, i) of an item; i is its first query, the last queries come first."""
    bh = item // tiles
    i = (tiles - 1 - item % tiles) * P
    return bh // kv_heads, bh % kv_heads, i


@gluon.jit
def first_position(q_start, has_q_start, batch, default_start):
    """Return the position of a batch row's first query."""
    start = default_start
    if has_q_start != 0:
        start = gl.load(q_start + batch)
    return start


@gluon.jit
def row_range(
    kv_bounds, has_bounds, batch, i, position, left, right, first, seq, keys
):  # fmt: skip
    """Return [lo, hi), the key positions that each row sees through one window; lo >= hi: none."""
    lo = gl.maximum(position - left, first)
    hi = gl.minimum(position + right + 1, keys)
    if has_bounds != 0:
        bounds = kv_bounds + (batch.to(gl.int64) * seq + i) * 2
        lo = gl.maximum(lo, gl.load(bounds))
        hi = gl.minimum(hi, gl.load(bounds + 1))
    return lo, hi


@gluon.jit
def tile_reach(
    kv_bounds, has_bounds, batch, i, start, seq, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, P: gl.constexpr,
):  # fmt: skip
    """Return what some row sees, and what every row sees: four scalars each.

    These are [low, high), rows of the wide pair, and first and last offset. Where no row sees any
    pair the first range is empty, and the first and last offset are the same. Called by one warp.
    """
    keys = gl.maximum(wide_rows, narrow_rows)
    wide_first = keys - wide_rows
    narrow_first = keys - narrow_rows
    top = start + i
    end = start + gl.minimum(i + P, seq) - 1
    low = gl.maximum(top - wide_left, wide_first)
    high = gl.minimum(end + wide_right + 1, keys)
    first = gl.maximum(0 - narrow_right, top - keys + 1)
    last = gl.minimum(narrow_left, end - narrow_first)
    all_low = gl.maximum(end - wide_left, wide_first)
    all_high = gl.minimum(top + wide_right + 1, keys)
    all_first = gl.maximum(0 - narrow_right, end - keys + 1)
    all_last = gl.minimum(narrow_left, top - narrow_first)
    if has_bounds != 0:
        LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        # The rows past the last query are copies of it.
        rows = gl.minimum(i + gl.arange(0, P, layout=LAYOUT), seq - 1)
        position = start + rows
        lo, hi = row_range(
            kv_bounds, 1, batch, rows, position, wide_left, wide_right, wide_first, seq, keys
        )
        narrow_lo, narrow_hi = row_range(
            kv_bounds, 1, batch, rows, position, narrow_left, narrow_right, narrow_first, seq, keys
        )
        sees = (lo < hi) & (narrow_lo < narrow_hi)
        newest = position - narrow_hi + 1
        oldest = position - narrow_lo
        low = gl.min(gl.where(sees, lo, _FAR), 0)
        high = gl.max(gl.where(sees, hi, 0), 0)
        first = gl.min(gl.where(sees, newest, _FAR), 0)
        last = gl.max(gl.where(sees, oldest, 0 - _FAR), 0)
        all_low = gl.max(gl.where(sees, lo, _FAR), 0)
        all_high = gl.min(gl.where(sees, hi, 0), 0)
        all_first = gl.max(gl.where(sees, newest, _FAR), 0)
        all_last = gl.min(gl.where(sees, oldest, 0 - _FAR), 0)
    if (high <= low) | (last < first):
        low = wide_first
        high = wide_first
        first = 0
        last = 0
        all_low = _FAR
    return (
        low - wide_first, high - wide_first, first, last,
        all_low - wide_first, all_high - wide_first, all_first, all_last,
    )  # fmt: skip
