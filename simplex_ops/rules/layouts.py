"""Sparse, mkldnn and nested tensors are refused by name, each under its own dispatch keys.

So a call with strided tensors pays for no check.
"""

from typing import Any

import torch
from torch import Tensor

KEYS = (
    "SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA", "MkldnnCPU",
    "NestedTensorCPU", "NestedTensorCUDA",
)  # fmt: skip


def attn(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    *_: Any,
    kv_bounds: Tensor | None = None,
    q_start: Tensor | None = None,
    **__: Any,
) -> Any:
    """Raise TypeError for the first tensor that is not dense and strided."""
    tensors = {"q": q, "k1": k1, "k2": k2, "v1": v1, "v2": v2}
    for name, tensor in {**tensors, "kv_bounds": kv_bounds, "q_start": q_start}.items():
        if tensor is None:
            continue
        if tensor.is_nested:
            raise TypeError(
                f"{name} must be a dense tensor, got a nested one: pack its rows into one and give "
                "kv_bounds (simplex_ops.kv_bounds_from_cu_seqlens)"
            )
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{name} must be a dense tensor, got {tensor.layout}: give {name}.to_dense()"
            )
