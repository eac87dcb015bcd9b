"""FLOPs, for `torch.utils.flop_counter.FlopCounterMode`, from shapes and windows alone.

A visible pair (j, k) of a query costs 2 (D + Dv) useful FLOPs a head, in the forward, by virtual
queries; the backward counts 2.5 times that, as is the custom for attention.
"""

from typing import Any

from simplex_ops.contract.windows import reach


def visible_pairs(
    seq: int, m1: int, m2: int, w1: int | None, w2: int | None, is_causal: bool = True
) -> int:
    """Count the pairs (j, k) that all queries of one sequence see, standing bottom right aligned.

    kv_bounds and q_start are values of tensors, and do not count.
    """
    m = max(m1, m2)

    def seen(position: int, rows: int, window: int | None) -> int:
        left, right = reach(window, is_causal)
        return max(0, min(position + right, m - 1) - max(position - left, m - rows) + 1)

    return sum(seen(p, m1, w1) * seen(p, m2, w2) for p in range(m - seq, m))


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
