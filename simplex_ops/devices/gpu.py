"""The GPU implementation: the Triton kernels, or the blocked path with a warning that says why."""

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simplex_ops.contract.checks import check_attn, check_attn_backward
from simplex_ops.contract.layout import empty_gradients, empty_outputs
from simplex_ops.contract.scale import scale_of
from simplex_ops.contract.schema import ALL_GRADS, DEFAULTS
from simplex_ops.contract.windows import reach
from simplex_ops.devices import cpu

MAX_HEAD_DIM = 256


class SlowPathWarning(UserWarning):
    """No kernel serves these inputs, so they ran on the blocked path in PyTorch operations."""


def unserved(q: Tensor, v1: Tensor) -> str | None:
    """Return why no kernel serves these inputs, which are well formed, or None where one does.

    Kernels are compiled for CUDA and ROCm devices, which are both called cuda in PyTorch, and
    for no other: there they would be launched unseen.
    """
    if q.device.type != "cuda":
        return f"no kernel runs on {q.device.type} devices"
    if q.dtype == torch.float64:
        return "no kernel computes in float64"
    if max(q.shape[3], v1.shape[3]) > MAX_HEAD_DIM:
        return f"no kernel has head_dim above {MAX_HEAD_DIM}, got {max(q.shape[3], v1.shape[3])}"
    if not _has_triton():
        return "triton is not installed"
    return None


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
    reason = unserved(q, v1)
    if reason:
        _warn(reason)
        return cpu.attn(q, k1, k2, v1, v2, w1, w2, **options)
    from csrc_free.attn import attn_forward

    out, lse = empty_outputs(q, v1)
    attn_forward(q, k1, k2, v1, v2, out=out, lse=lse, **kernel_arguments(w1, w2, q, options))
    return out, lse


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
    reason = unserved(q, v1)
    if reason:
        _warn(reason)
        return cpu.attn_backward(
            dout, dlse, q, k1, k2, v1, v2, out, lse, w1, w2, grad_mask=grad_mask, **options
        )
    from csrc_free.attn import attn_backward as launch

    found = empty_gradients((q, k1, k2, v1, v2), grad_mask)
    wanted: Any = tuple(g if mask else None for g, mask in zip(found, grad_mask, strict=True))
    launch(
        dout, dlse, q, k1, k2, v1, v2, out, lse,
        grads=wanted, **kernel_arguments(w1, w2, q, options),
    )  # fmt: skip
    return found


def kernel_arguments(
    w1: int | None, w2: int | None, q: Tensor, options: dict[str, Any]
) -> dict[str, Any]:
    """Translate the operator's windows and options into the launchers' plain numbers."""
    given = DEFAULTS | options
    causal = given.pop("is_causal")
    scale = given.pop("scale")
    return {
        **given,
        "reach1": reach(w1, causal),
        "reach2": reach(w2, causal),
        "scale": scale_of(q, scale),
    }


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"simplex::attn: {reason}; it runs on the blocked path in PyTorch operations",
        SlowPathWarning,
        stacklevel=3,
    )
