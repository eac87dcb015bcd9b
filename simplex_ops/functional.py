"""The operator as a function; what every argument means stands here, once."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from simplex_ops.contract.checks import check_numbers

Window = tuple[int | None, int | None] | None
"""(w1, w2) in keys, each counting the query's own position; None is unbounded."""


@overload
def simplicial_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    window: Window = (512, 32),
    scale: float | None = None,
    is_causal: bool = True,
    form: str = "trilinear",
    k2_bias: float = 0.0,
    v2_bias: float = 0.0,
    kv_bounds: Tensor | None = None,
    q_start: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def simplicial_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    window: Window = (512, 32),
    scale: float | None = None,
    is_causal: bool = True,
    form: str = "trilinear",
    k2_bias: float = 0.0,
    v2_bias: float = 0.0,
    kv_bounds: Tensor | None = None,
    q_start: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def simplicial_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *,
    window: Window = (512, 32),
    scale: float | None = None,
    is_causal: bool = True,
    form: str = "trilinear",
    k2_bias: float = 0.0,
    v2_bias: float = 0.0,
    kv_bounds: Tensor | None = None,
    q_start: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each query to pairs of keys, one from each of two key-value sets.

    For every visible pair (j, k) of query i::

        s[j,k] = scale * form(q_i, k1_j, k2_k + k2_bias)
        P      = softmax of s over all visible pairs together
        out_i  = sum over (j,k) of P[j,k] * (v1_j * (v2_k + v2_bias))

    with ``form`` one of

    - "trilinear": sum over d of q_d k1_d k2_d;
    - "determinant": det[q, k1, k2], summed over consecutive 3-vectors; the D mod 3 last
      dimensions are trilinear;
    - "strassen": q·k1 + q·k2 + k1·k2.

    Positions: M = max(M1, M2), and row r of a pair that has Ms rows is key position r + M - Ms.
    Query i of batch row b stands at p = q_start[b] + i, so that by default the last query stands
    at the last key (bottom-right aligned, unlike the `is_causal` of PyTorch's
    `scaled_dot_product_attention` when N != M). Key position j is visible through a window w when
    p - w < j <= p if causal, |p - j| < w if not.

    A query that sees no pair gives out = 0, lse = -inf and zero gradients.

    Precision: products and sums are in float32 (float64 for float64 inputs), whatever the dtype
    of the inputs. On a GPU float32 inputs are multiplied to float32's precision on tensor cores
    where these serve; where `torch.backends.cuda.matmul.fp32_precision` was set (by
    `torch.set_float32_matmul_precision`, say), "ieee" or "tf32" products are what it asks for.
    Differentiable in q, k1, k2, v1 and v2, through both out and lse.

    Args:
        q: [B, H, N, D] queries.
        k1: [B, Hkv, M1, D] first keys; H is a multiple of Hkv, and H / Hkv query heads share one
            key-value head.
        k2: [B, Hkv, M2, D] second keys.
        v1: [B, Hkv, M1, Dv] first values.
        v2: [B, Hkv, M2, Dv] second values.
        window: (w1, w2), in keys, the query's own position included: w1 for (k1, v1), w2 for
            (k2, v2). None in place of either, or of both, is unbounded.
        scale: multiplies the logits; None is 1 / sqrt(D).
        is_causal: whether a query sees only keys at its own position and before.
        form: how a logit is made from (q, k1, k2).
        k2_bias: added to k2 inside the operator, in float32: a k2 stored near zero keeps its bits.
        v2_bias: added to v2 in the same way.
        kv_bounds: int32 [B, N, 2], the half-open range [start, end) of key positions that each
            query may see; it narrows both windows. Values are not checked, which would
            synchronise: they are clipped to [0, M], and start >= end sees nothing. For packed
            documents and padding, `simplex_ops.bounds` makes it.
        q_start: int32 [B], position of the first query of each batch row; None is M - N.
        return_lse: whether to return lse as well.

    Returns:
        out [B, H, N, Dv] in q's dtype and memory order (where q is a transposed view of
        [B, N, H, D], `out.transpose(1, 2).flatten(2)` is a view); with `return_lse`, also lse
        [B, H, N], the natural logarithm of the softmax's denominator, in float32 (float64 for
        float64 inputs).

    Raises:
        TypeError: an integer or unknown dtype, tensors of different dtypes, None in place of a
            tensor, or a scale or bias that requires a gradient (none goes there).
        ValueError: a wrong rank or shape, a window below 1, an unknown form.
        RuntimeError: tensors on different devices.

    Source: Roy et al. 2025, "Fast and Simplex: 2-Simplicial Attention in Triton", sections 4, 5,
    7 and appendix B; Clift et al. 2019, "Logic and the 2-Simplicial Transformer".
    """
    w1, w2 = window_pair(window)
    check_numbers(scale=scale, k2_bias=k2_bias, v2_bias=v2_bias)
    if q is None or k1 is None or k2 is None or v1 is None or v2 is None:
        _refuse_none(q=q, k1=k1, k2=k2, v1=v1, v2=v2)
    out, lse = torch.ops.simplex.attn(
        q,
        k1,
        k2,
        v1,
        v2,
        w1,
        w2,
        scale=scale,
        is_causal=is_causal,
        form=form,
        k2_bias=k2_bias,
        v2_bias=v2_bias,
        kv_bounds=kv_bounds,
        q_start=q_start,
    )
    return (out, lse) if return_lse else out


def _refuse_none(**tensors: Tensor | None) -> None:
    """Raise TypeError for the first None, which the dispatcher takes in place of any tensor."""
    name = next(name for name, tensor in tensors.items() if tensor is None)
    raise TypeError(f"{name} must be a tensor, got None")


def window_pair(window: Any) -> tuple[int | None, int | None]:
    """Return (w1, w2) from a pair, or (None, None) from None.

    Raises:
        ValueError: anything else.
    """
    if window is None:
        return None, None
    if not (isinstance(window, (tuple, list)) and len(window) == 2):
        raise ValueError(
            f"window must be None or a pair (w1, w2), each an int or None, got {window!r}"
        )
    w1, w2 = window
    return w1, w2
