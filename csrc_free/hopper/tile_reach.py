"""What a tile of P consecutive queries sees: intervals of keys, and of offsets.

An offset says how far before its query a narrow key stands.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from csrc_free.hopper.reach import narrowed, position_of

_FAR = gl.constexpr(2**31 - 1)


@gluon.jit
def place(item, grid, P: gl.constexpr):
    """Return (batch, kv_head, i) of an item: i is its first query, and the last come first."""
    _items, tiles, kv_heads, _group, _seq = grid
    bh = item // tiles
    return bh // kv_heads, bh % kv_heads, (tiles - 1 - item % tiles) * P


@gluon.jit
def rows_reach(view, batch, i, start, seq, HAS_BOUNDS: gl.constexpr):
    """Return what queries i, a tensor, see: key positions [lo, hi) and offsets [newest, oldest].

    Where a query sees nothing of a pair, hi is lo, or oldest is before newest.
    """
    (
        kv_bounds, _q_start, _has_q_start, keys, wide_rows, narrow_rows,
        wide_left, wide_right, narrow_left, narrow_right, _default_start,
    ) = view  # fmt: skip
    position = start + i
    lo = gl.maximum(position - wide_left, keys - wide_rows)
    hi = gl.minimum(position + wide_right + 1, keys)
    narrow_lo = gl.maximum(position - narrow_left, keys - narrow_rows)
    narrow_hi = gl.minimum(position + narrow_right + 1, keys)
    if HAS_BOUNDS:
        lo, hi = narrowed(kv_bounds, 1, batch, i, seq, lo, hi)
        narrow_lo, narrow_hi = narrowed(kv_bounds, 1, batch, i, seq, narrow_lo, narrow_hi)
    # Bounds may be far outside: within the keys no sum leaves int32.
    lo = gl.minimum(lo, keys)
    narrow_lo = gl.minimum(narrow_lo, keys)
    hi = gl.maximum(hi, lo)
    narrow_hi = gl.maximum(narrow_hi, narrow_lo)
    return lo, hi, position - narrow_hi + 1, position - narrow_lo


@gluon.jit
def tile_reach(view, batch, i, seq, P: gl.constexpr, HAS_BOUNDS: gl.constexpr, WARPS: gl.constexpr):
    """Return what some query of a tile sees, and what all of them see.

    That is the position of the batch row's first query; rows [low, high) of the wide pair and
    `offsets` offsets from `first` on, outside which no query sees anything, or no offsets; and
    rows [all_low, all_high) and offsets [all_first, all_last] which every query sees. Computed by
    WARPS warps, each for itself.
    """
    (
        _kv_bounds, q_start, has_q_start, keys, wide_rows, narrow_rows,
        wide_left, wide_right, narrow_left, narrow_right, default_start,
    ) = view  # fmt: skip
    start = position_of(q_start, has_q_start, batch, 0, default_start)
    wide_first = keys - wide_rows
    narrow_first = keys - narrow_rows
    top = start + i
    end = start + gl.minimum(i + P, seq) - 1
    if HAS_BOUNDS:
        layout: gl.constexpr = gl.SliceLayout(
            1, gl.BlockedLayout([(P + 31) // 32, 1], [32, 1], [1, WARPS], [1, 0])
        )
        # Those past the last query are copies of it.
        query = gl.minimum(i + gl.arange(0, P, layout=layout), seq - 1)
        lo, hi, newest, oldest = rows_reach(view, batch, query, start, seq, True)
        sees = (lo < hi) & (newest <= oldest)
        low = gl.min(gl.where(sees, lo, _FAR), 0)
        high = gl.max(gl.where(sees, hi, 0), 0)
        first = gl.min(gl.where(sees, newest, _FAR), 0)
        last = gl.max(gl.where(sees, oldest, -_FAR), 0)
        all_low = gl.max(gl.where(sees, lo, _FAR), 0)
        all_high = gl.min(gl.where(sees, hi, 0), 0)
        all_first = gl.max(gl.where(sees, newest, _FAR), 0)
        all_last = gl.min(gl.where(sees, oldest, -_FAR), 0)
    else:
        low = gl.maximum(top - wide_left, wide_first)
        high = gl.minimum(end + wide_right + 1, keys)
        first = gl.maximum(-narrow_right, top - keys + 1)
        last = gl.minimum(narrow_left, end - narrow_first)
        all_low = gl.maximum(end - wide_left, wide_first)
        all_high = gl.minimum(top + wide_right + 1, keys)
        all_first = gl.maximum(-narrow_right, end - keys + 1)
        all_last = gl.minimum(narrow_left, top - narrow_first)
    offsets = last - first + 1
    if (low >= high) | (last < first):
        low = wide_first
        high = wide_first
        first = 0
        offsets = 0
    return (
        start, low - wide_first, high - wide_first, first, offsets,
        all_low - wide_first, all_high - wide_first, all_first, all_last,
    )  # fmt: skip
