"""Gradients that several programs share: each has float32 sums of its own, which are added."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sums_of_splits(grads: Sequence[Tensor], splits: int) -> Sequence[Tensor]:
    """Return where the splits write their sums [splits, ...]; of one split the gradients."""
    if splits == 1:
        return grads
    return [torch.empty(splits, *t.shape, dtype=torch.float32, device=t.device) for t in grads]


def add_splits(grads: Sequence[Tensor], sums: Sequence[Tensor], splits: int) -> None:
    """Write the sums over splits."""
    if splits > 1:
        for grad, total in zip(grads, sums, strict=True):
            grad.copy_(total.sum(0))
