"""Memory order: outputs and gradients are dense, in the order of the input they follow."""

import torch
from torch import Tensor


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
