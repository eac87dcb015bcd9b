"""The CPU implementation: the blocked path in PyTorch operations.

It serves any other device too, where no kernel does. What may pass float32's range on the way is
computed in float64, where the host may look at values: finite answers stay finite.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simplex_ops.contract.checks import check_attn, check_attn_backward
from simplex_ops.contract.layout import lse_dtype
from simplex_ops.contract.schema import ALL_GRADS, DEFAULTS
from simplex_ops.devices.blocked.backward import attn_backward as blocked_backward
from simplex_ops.devices.blocked.forward import attn_forward as blocked_forward
from simplex_ops.devices.blocked.host import are_tame, can_look


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
    given = DEFAULTS | options
    if not _may_overflow(q, k1, k2, given["scale"], given["k2_bias"]):
        return blocked_forward(q, k1, k2, v1, v2, w1, w2, **given)
    out, lse = blocked_forward(*_doubled(q, k1, k2, v1, v2), w1=w1, w2=w2, **given)
    return out.to(q.dtype), _narrowed(lse, lse_dtype(q.dtype))


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
    given = DEFAULTS | options
    arguments: Any = (dout, dlse, q, k1, k2, v1, v2, out, lse)
    is_wide = _may_overflow(q, k1, k2, given["scale"], given["k2_bias"])
    if is_wide or (dout is not None and _may_overflow(dout, v1, v2, None, given["v2_bias"])):
        # What float32 holds of out and lse is not enough: they are computed again.
        arguments = _doubled(dout, dlse, q, k1, k2, v1, v2)
        arguments += blocked_forward(*arguments[2:], w1=w1, w2=w2, **given)
    found = blocked_backward(*arguments, w1=w1, w2=w2, grad_mask=grad_mask, **given)
    return tuple(grad.to(q.dtype) for grad in found)


def _may_overflow(a: Tensor, b: Tensor, c: Tensor, scale: float | None, bias_of_c: float) -> bool:
    """Tell whether sums over D of products of these rows, or of two of them, may pass float32."""
    if a.dtype == torch.float64 or not can_look(a):
        return False
    room = a.shape[3] * (1 + abs(scale or 0.0)) * (1 + abs(bias_of_c))
    return not are_tame(a, b, c, terms=room)


def _doubled(*tensors: Tensor | None) -> Any:
    return tuple(None if t is None else t.double() for t in tensors)


def _narrowed(lse: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast lse; what is finite stays so."""
    largest = torch.finfo(dtype).max
    return torch.where(lse.isinf(), lse, lse.clamp(-largest, largest)).to(dtype)
