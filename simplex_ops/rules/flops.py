"""FLOPs, for `torch.utils.flop_counter.FlopCounterMode`, from shapes and windows alone.

A visible pair (j, k) of a query costs 2 (D + Dv) useful FLOPs a head, in the forward, by virtual
queries; the backward counts 2.5 times that, as is the custom for attention.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from simplex_ops.contract.windows import reach


def visible_pairs(
    seq: int, m1: int, m2: int, w1: int | None, w2: int | None, is_causal: bool = True
) -> int:
    """Count the pairs (j, k) that all queries of one sequence see, standing bottom right aligned.

    kv_bounds and q_start are values of tensors, and do not count.
    """
    m = max(m1, m2)

    def bounds(rows: int, window: int | None) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the two ends of what position p sees, [max(a, p + b), min(c, p + d)], as pairs."""
        left, right = reach(window, is_causal)
        return (m - rows, -left), (m - 1, right)

    (first1, back1), (last1, ahead1) = bounds(m1, w1)
    (first2, back2), (last2, ahead2) = bounds(m2, w2)
    # Between turns both counts are linear in p: their product is a polynomial of degree 2.
    turns = {m - seq, m}
    for first, back, last, ahead in (
        (first1, back1, last1, ahead1),
        (first2, back2, last2, ahead2),
    ):
        turns |= {first - back, last - ahead, first - ahead - 1, last - back + 1}
    ordered = sorted(min(max(turn, m - seq), m) for turn in turns)

    def product(p: int) -> int:
        one = min(last1, p + ahead1) - max(first1, p + back1) + 1
        two = min(last2, p + ahead2) - max(first2, p + back2) + 1
        return max(0, one) * max(0, two)

    return sum(_sum_of_quadratic(product, lo, hi) for lo, hi in pairwise(ordered))


def _sum_of_quadratic(f: Callable[[int], int], lo: int, hi: int) -> int:
    """Return the sum of f over [lo, hi), where f is a polynomial of degree 2 at most."""
    n = hi - lo
    if n <= 3:
        return sum(f(p) for p in range(lo, hi))
    a, b, c = f(lo), f(lo + 1), f(lo + 2)  # Newton's forward differences
    return a * n + (b - a) * (n * (n - 1) // 2) + (c - 2 * b + a) * (n * (n - 1) * (n - 2) // 6)


def attn(
    q: Any, k1: Any, k2: Any, v1: Any, v2: Any, w1: Any = None, w2: Any = None,
    *, is_causal: bool = True, out_val: Any = None, **_: Any,
) -> int:  # fmt: skip
    """Return the FLOPs of simplex::attn, given shapes in place of tensors."""
    batch, heads, seq, head_dim = q
    pairs = visible_pairs(seq, k1[2], k2[2], w1, w2, is_causal)
    return 2 * (head_dim + v1[3]) * batch * heads * pairs


def attn_backward(
    dout: Any, dlse: Any, q: Any, k1: Any, k2: Any, v1: Any, v2: Any, out: Any, lse: Any,
    w1: Any = None, w2: Any = None, **options: Any,
) -> int:  # fmt: skip
    """Return the FLOPs of simplex::attn_backward, given shapes in place of tensors."""
    return attn(q, k1, k2, v1, v2, w1, w2, **options) * 5 // 2
