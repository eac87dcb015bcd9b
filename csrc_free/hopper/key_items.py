"""What an item of the key side is, and what its wide keys meet: turns of two narrow keys.

Sizes are scalars, and positions count from the first key. WIDE keys of a tile meet NARROW narrow
keys at once in either warpgroup, WIDE · NARROW = KEYS.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def log2(power):
    return power.bit_length() - 1


@gluon.constexpr_function
def apart_of(lag, positions, narrow):
    """Return how many narrow keys the second warpgroup's are from the first one's."""
    return max(lag * positions, narrow)


@gluon.jit
def known(sizes, IS_CAUSAL: gl.constexpr, IS_SQUARE: gl.constexpr):
    """Return the sizes, with what the usual problem knows of them: numbers cost no registers.

    A causal window reaches no key after the query; in a square problem there are as many rows in
    each pair as queries, and the first query stands at the first key.
    """
    (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        start,
    ) = sizes  # fmt: skip
    if IS_CAUSAL:
        wide_right = 0
        narrow_right = 0
    if IS_SQUARE:
        wide_rows = seq
        narrow_rows = seq
        start = 0
    return (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        start,
    )  # fmt: skip


@gluon.jit
def item_of(
    item, heads, splits, kv_heads, q_start, q_start_default, HAS_Q_START: gl.constexpr
):  # fmt: skip
    """Return an item's key-value head of all, batch row, head, part, split and first position.

    Items of the last keys, which a causal window shows to few queries, come last.
    """
    bh = item % heads
    batch = bh // kv_heads
    start = q_start_default
    if HAS_Q_START:
        start = gl.load(q_start + batch)
    rest = item // heads
    return bh, batch, bh % kv_heads, rest // splits, rest % splits, start


@gluon.jit
def span_of(
    tile, batch, tiles, start, spans, seq, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right,
    HAS_BOUNDS: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Return what a tile of wide keys meets, and the bounds that all its queries share.

    That is its first key, [first, end) of the queries that see it and of the narrow keys that
    these see, and [lo, hi) of the keys that no bounds hide from any of them.
    """
    keys = gl.maximum(wide_rows, narrow_rows)
    key_first = keys - wide_rows + tile * WIDE
    if HAS_BOUNDS:
        span_ptr = spans + (batch * tiles + tile) * 6
        query_first = gl.load(span_ptr)
        query_end = gl.load(span_ptr + 1)
        narrow_first = gl.load(span_ptr + 2)
        narrow_end = gl.load(span_ptr + 3)
        lo = gl.load(span_ptr + 4)
        hi = gl.load(span_ptr + 5)
    else:
        key_end = gl.minimum(key_first + WIDE, keys)
        query_first = gl.maximum(key_first - wide_right - start, 0)
        query_end = gl.minimum(key_end + wide_left - start, seq)
        narrow_first = gl.maximum(start + query_first - narrow_left, keys - narrow_rows)
        narrow_end = gl.minimum(start + query_end + narrow_right, keys)
        if query_first >= query_end:
            narrow_end = narrow_first
        narrow_end = gl.maximum(narrow_end, narrow_first)
        lo = 0
        hi = keys
    return key_first, query_first, query_end, narrow_first, narrow_end, lo, hi


@gluon.jit
def turns_of(narrow_first, narrow_end, APART: gl.constexpr, NARROW: gl.constexpr):
    """Return the first narrow key of the first turn, and the number of turns.

    A turn is of NARROW narrow keys for either warpgroup, those of the second one APART further on.
    """
    log: gl.constexpr = log2(2 * APART)
    base = (narrow_first >> log) << log
    return base, ((narrow_end - base + 2 * APART - 1) >> log) * (APART // NARROW)


@gluon.jit
def places(base, turns, split, splits, NARROW: gl.constexpr):
    """Return the turn that a split begins with, and how many it has.

    Programs begin at congruent turns: those whose tiles overlap then read the same queries, from
    the cache.
    """
    first = turns * split // splits
    around = gl.maximum(turns, 1)
    place = (first + around - (base // (2 * NARROW)) % around) % around
    return place, turns * (split + 1) // splits - first


@gluon.jit
def narrow_key(place, base, APART: gl.constexpr, NARROW: gl.constexpr):
    """Return the first narrow key of a turn."""
    log: gl.constexpr = log2(APART)
    first = place * NARROW
    return base + ((first >> log) << (log + 1)) + (first & (APART - 1))


@gluon.jit
def rows_of_turn(
    m, narrow_first, narrow_end, query_first, query_end, start, narrow_left, narrow_right,
    APART: gl.constexpr, POSITIONS: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """Return the first query that sees a narrow key of a turn, and how many tiles of rows do.

    And of these tiles, [begin, end) of those that see the keys of the first warpgroup, from m on,
    and of those that see the second one's.
    """
    log: gl.constexpr = log2(POSITIONS)
    first = gl.maximum(m - narrow_right - start, query_first)
    end = gl.minimum(m + APART + narrow_left + NARROW - start, query_end)
    count = gl.maximum(end - first + POSITIONS - 1, 0) >> log
    end = gl.minimum(m + narrow_left + NARROW - start, query_end)
    own_end = gl.maximum(end - first + POSITIONS - 1, 0) >> log
    own_end = gl.where((m > narrow_first - NARROW) & (m < narrow_end), own_end, 0)
    m += APART
    begin = gl.maximum(m - narrow_right - start, query_first)
    begin = gl.minimum((begin - first) >> log, count)
    begin = gl.where((m > narrow_first - NARROW) & (m < narrow_end), begin, count)
    return first, count, 0, own_end, begin, count
