"""What one query sees, as scalars: every window is an interval of rows of its pair."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def narrowed(kv_bounds, has_bounds, batch, i, seq, low, high):
    """Return an interval of key positions within the bounds of query i."""
    if has_bounds != 0:
        pair = kv_bounds + (batch.to(gl.int64) * seq + i) * 2
        low = gl.maximum(low, gl.load(pair))
        high = gl.minimum(high, gl.load(pair + 1))
    return low, high


@gluon.jit
def position_of(q_start, has_q_start, batch, i, default_start):
    """Return where query i of a batch row stands among the keys."""
    start = default_start
    if has_q_start != 0:
        start = gl.load(q_start + batch)
    return start + i


@gluon.jit
def query_reach(view, batch, i, seq):
    """Return [low, high) of the wide pair's rows and [first, end) of the narrow pair's.

    All four are 0 where one of them would be empty. The pointers are read where they are said to
    be there: a branch for each query costs nothing, and one compiled kernel serves all.
    """
    (
        kv_bounds, q_start, has_bounds, has_q_start, keys, wide_rows, narrow_rows,
        wide_left, wide_right, narrow_left, narrow_right, default_start,
    ) = view  # fmt: skip
    position = position_of(q_start, has_q_start, batch, i, default_start)
    wide_first = keys - wide_rows
    narrow_first = keys - narrow_rows
    low = gl.maximum(position - wide_left, wide_first)
    high = gl.minimum(position + wide_right + 1, keys)
    first = gl.maximum(position - narrow_left, narrow_first)
    end = gl.minimum(position + narrow_right + 1, keys)
    low, high = narrowed(kv_bounds, has_bounds, batch, i, seq, low, high)
    first, end = narrowed(kv_bounds, has_bounds, batch, i, seq, first, end)
    sees_nothing = (low >= high) | (first >= end)  # asked first: bounds may be far outside
    low -= wide_first
    high -= wide_first
    first -= narrow_first
    end -= narrow_first
    if sees_nothing:
        low = 0
        high = 0
        first = 0
        end = 0
    return low, high, first, end
