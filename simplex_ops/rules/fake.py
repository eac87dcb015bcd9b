"""Fake kernels: the outputs' shapes, dtypes and strides, after the same checks as the real ones.

Since tracing runs them, they also see to it that what is cached of a trace is known by its sources.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from simplex_ops.contract.checks import check_attn, check_attn_backward
from simplex_ops.contract.layout import empty_gradients, empty_outputs
from simplex_ops.contract.schema import ALL_GRADS
from simplex_ops.rules import cache_key, lowered


def attn(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    w1: Any = None,
    w2: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return empty out [B, H, N, Dv] in q's memory order, and lse [B, H, N]."""
    cache_key.extend()
    lowered.register()
    lowered.guard_precision(q)
    check_attn(q, k1, k2, v1, v2, w1, w2, **options)
    return empty_outputs(q, v1)


def attn_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    out: Tensor,
    lse: Tensor,
    w1: Any = None,
    w2: Any = None,
    *,
    grad_mask: Sequence[bool] = ALL_GRADS,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Return an empty gradient in the memory order of each input, or [0] where none is wanted."""
    cache_key.extend()
    lowered.register()
    check_attn_backward(dout, dlse, q, k1, k2, v1, v2, out, lse, w1, w2, **options)
    return empty_gradients((q, k1, k2, v1, v2), grad_mask)
