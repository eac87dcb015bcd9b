"""The CPU implementation: the blocked path in PyTorch operations.

It serves any other device too, where no kernel does.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from simplex_ops.blocked.backward import attn_backward as blocked_backward
from simplex_ops.blocked.forward import attn_forward as blocked_forward
from simplex_ops.checks import check_attn, check_attn_backward
from simplex_ops.schema import ALL_GRADS, DEFAULTS


def attn(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    w1: int | None = None,
    w2: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run simplex::attn."""
    check_attn(q, k1, k2, v1, v2, w1, w2, **options)
    return blocked_forward(q, k1, k2, v1, v2, w1, w2, **(DEFAULTS | options))


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
    w1: int | None = None,
    w2: int | None = None,
    *,
    grad_mask: Sequence[bool] = ALL_GRADS,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Run simplex::attn_backward."""
    check_attn_backward(dout, dlse, q, k1, k2, v1, v2, out, lse, w1, w2, **options)
    return blocked_backward(
        dout, dlse, q, k1, k2, v1, v2, out, lse, w1, w2,
        grad_mask=grad_mask, **(DEFAULTS | options),
    )  # fmt: skip
