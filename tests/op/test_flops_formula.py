"""The FLOP formula's closed form counts what a loop over queries and keys counts."""

from itertools import product

from simplex_ops.rules.flops import visible_pairs


def _counted(seq, m1, m2, w1, w2, is_causal):
    m = max(m1, m2)

    def seen(p, rows, window):
        return sum(
            (not is_causal or j <= p) and (window is None or abs(p - j) < window)
            for j in range(m - rows, m)
        )

    return sum(seen(p, m1, w1) * seen(p, m2, w2) for p in range(m - seq, m))


def test_the_closed_form_is_the_loop_for_every_small_problem():
    sizes, windows = (0, 1, 2, 4, 7), (None, 1, 2, 3, 6, 9)
    for given in product((0, 1, 3, 5, 9), sizes, sizes, windows, windows, (True, False)):
        assert visible_pairs(*given) == _counted(*given), given


def test_the_formula_does_not_visit_each_query():
    # 2^29 queries, w1 = w2 = 2: the first sees one pair, every other one four.
    assert visible_pairs(2**29, 2**29, 2**29, 2, 2) == 4 * 2**29 - 3
