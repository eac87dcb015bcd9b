"""Windows: which key positions a query position sees."""

# Far beyond any sequence, yet position +- UNBOUNDED stays inside int32.
UNBOUNDED = 2**30


def reach(window: int | None, is_causal: bool, unbounded: int = UNBOUNDED) -> tuple[int, int]:
    """Return (left, right): position p sees key position j iff p - left <= j <= p + right.

    `window` is in keys and counts the query's own position; None is unbounded.
    `unbounded` is as far as any window reaches.
    Causal, it is `window` keys ending at p; otherwise |p - j| < window.
    """
    left = unbounded if window is None else min(window - 1, unbounded)
    return left, 0 if is_causal else left
