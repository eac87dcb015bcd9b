"""Sparse, mkldnn and nested tensors are refused by name, each under its own dispatch keys.

So a call with strided tensors pays for no check.
"""

from typing import Any

import torch

KEYS = (
    "SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA", "MkldnnCPU",
    "NestedTensorCPU", "NestedTensorCUDA",
)  # fmt: skip


def attn(*inputs: Any, **options: Any) -> Any:
    """Raise TypeError for the first tensor that is not dense and strided."""
    tensors = dict(zip(("q", "k1", "k2", "v1", "v2"), inputs, strict=False))
    positions = {name: options.get(name) for name in ("kv_bounds", "q_start")}
    for name, tensor in {**tensors, **positions}.items():
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
