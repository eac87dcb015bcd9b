"""Memory order: outputs and gradients are dense, in the order of the input they follow."""

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_outputs(q: Tensor, v1: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate out [B, H, N, Dv] in q's memory order, and lse [B, H, N]."""
    lse = torch.empty(q.shape[:3], dtype=lse_dtype(q.dtype), device=q.device)
    return empty_in_order_of(q, v1.shape[3]), lse


def empty_gradients(inputs: Sequence[Tensor], grad_mask: Sequence[bool]) -> tuple[Tensor, ...]:
    """Allocate a gradient in the memory order of each input, or [0] where none is wanted."""
    return tuple(
        empty_in_order_of(t, t.shape[3]) if wanted else t.new_empty(0)
        for t, wanted in zip(inputs, grad_mask, strict=True)
    )


def empty_in_order_of(
    like: Tensor, last_dim: int | torch.SymInt, dtype: torch.dtype | None = None
) -> Tensor:
    """Allocate [*like.shape[:-1], last_dim], dense, its dimensions ordered in memory as in `like`.

    The last dimension is always contiguous. Where `like` is [B, H, N, D] seen through a transpose
    of [B, N, H, D], so is the result.
    """
    outer = sorted(range(like.dim() - 1), key=like.stride, reverse=True)
    return torch.empty_permuted(
        (*like.shape[:-1], last_dim),
        (*outer, like.dim() - 1),
        dtype=dtype or like.dtype,
        device=like.device,
    )


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the statistics: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
