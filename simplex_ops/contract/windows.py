"""Windows: which key positions a query position sees."""

# Beyond any int32 q_start and any sequence, so that unbounded windows reach back from there.
UNBOUNDED = 2**40


def reach(window: int | None, is_causal: bool) -> tuple[int, int]:
    """Return (left, right): position p sees key position j iff p - left <= j <= p + right.

    `window` is in keys and counts the query's own position; None is unbounded.
    Causal, it is `window` keys ending at p; otherwise |p - j| < window.
    """
    left = UNBOUNDED if window is None else min(window - 1, UNBOUNDED)
    return left, 0 if is_causal else left
