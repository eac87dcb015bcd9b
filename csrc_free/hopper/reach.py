"""What a tile of P consecutive positions sees, as scalars: every window is an interval."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def tile_reach(
    position, seq_keys, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
    P: gl.constexpr,
):  # fmt: skip
    """Return [low, high) rows of the wide pair that some position sees, and the offsets.

    Offsets run from `first` to `last`, both included; none where last < first.
    """
    end = position + P - 1
    wide_first = seq_keys - wide_rows
    narrow_first = seq_keys - narrow_rows
    low = gl.maximum(position - wide_left - wide_first, 0)
    high = gl.minimum(end + wide_right + 1 - wide_first, wide_rows)
    first = gl.maximum(0 - narrow_right, position - seq_keys + 1)
    last = gl.minimum(narrow_left, end - narrow_first)
    if last < first:
        high = low
    return low, gl.maximum(high, low), first, last


@gluon.jit
def item_place(item, tiles, kv_heads, seq, P: gl.constexpr):
    """Return (batch, kv_head, i) of an item; i is its first query, the last queries come first."""
    bh = item // tiles
    i = (tiles - 1 - item % tiles) * P
    return bh // kv_heads, bh % kv_heads, i
