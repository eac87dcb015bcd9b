"""What a tile of wide keys meets on Hopper: run as plain Python, against the visible pairs."""

import types
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon")

from csrc_free.hopper import key_items
from csrc_free.hopper.key_plan import KEYS, ROWS


def _plain(name):
    """Return a function of `key_items`, which computes with scalars alone, as plain Python."""
    scalars = types.SimpleNamespace(
        maximum=max, minimum=min, where=lambda condition, x, y: x if condition else y,
        constexpr=object,
    )  # fmt: skip
    function = getattr(key_items, name).fn
    return types.FunctionType(
        function.__code__, {**function.__globals__, "gl": scalars}, name, function.__defaults__
    )


span_of, turns_of, places, narrow_key, rows_of_turn = map(
    _plain, ("span_of", "turns_of", "places", "narrow_key", "rows_of_turn")
)


@settings(max_examples=200)
@given(
    wide=st.sampled_from([16, 32, 64]),
    heads=st.sampled_from([4, 8, 16, 32, 64]),
    lag=st.sampled_from([1, 2, 4]),
    splits=st.integers(1, 3),
    lengths=st.tuples(st.integers(1, 90), st.integers(1, 150), st.integers(1, 150)),
    wide_reach=st.tuples(st.integers(0, 80), st.integers(0, 40)),
    narrow_reach=st.tuples(st.integers(0, 30), st.integers(0, 20)),
    start=st.integers(-40, 160),
)
def test_every_visible_pair_is_met_once(
    wide, heads, lag, splits, lengths, wide_reach, narrow_reach, start
):
    """By one warpgroup, in one turn of one program, at one tile of rows."""
    seq, wide_rows, narrow_rows = lengths
    keys = max(wide_rows, narrow_rows)
    positions, narrow = ROWS // heads, KEYS // wide
    apart = key_items.apart_of(lag, positions, narrow)
    tiles = -(-wide_rows // wide)
    met = Counter()
    for tile in range(tiles):
        _key_first, *queries, narrow_first, narrow_end, _lo, _hi = span_of(
            tile, 0, tiles, start, None, seq, wide_rows, narrow_rows, *wide_reach, *narrow_reach,
            HAS_BOUNDS=False, WIDE=wide,
        )  # fmt: skip
        base, turns = turns_of(narrow_first, narrow_end, apart, narrow)
        for split in range(splits):
            place, own_turns = places(base, turns, split, splits, narrow)
            for _ in range(own_turns):
                m = narrow_key(place, base, apart, narrow)
                first, count, *ranges = rows_of_turn(
                    m, narrow_first, narrow_end, *queries, start, *narrow_reach, apart, positions,
                    narrow,
                )  # fmt: skip
                for r in range(2):
                    begin, end = ranges[2 * r : 2 * r + 2]
                    assert begin >= 0
                    assert end <= count
                    met.update(
                        (tile, m + r * apart + number, i)
                        for number in range(narrow)
                        for i in range(first + begin * positions, first + end * positions)
                    )
                place = 0 if place + 1 == turns else place + 1
    for i in range(seq):
        p = start + i
        first_wide = max(p - wide_reach[0], keys - wide_rows)
        end_wide = min(p + wide_reach[1] + 1, keys)
        for m in range(
            max(p - narrow_reach[0], keys - narrow_rows), min(p + narrow_reach[1] + 1, keys)
        ):
            for tile in {(j - (keys - wide_rows)) // wide for j in range(first_wide, end_wide)}:
                assert met[tile, m, i] == 1
