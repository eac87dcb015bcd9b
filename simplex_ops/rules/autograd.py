"""The autograd formula: the backward of simplex::attn is simplex::attn_backward.

It stands on the Autograd dispatch key: `torch.library.register_autograd` refuses operators with
keyword-only tensors (kv_bounds, q_start), and costs twice the time per call.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from simplex_ops.contract.schema import ATTN_BACKWARD_OP, ATTN_OP


class _Attn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w1: Any, w2: Any, options: dict[str, Any], *inputs: Tensor) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = ATTN_OP(*inputs, w1, w2, **options)
        positions = (options.get("kv_bounds"), options.get("q_start"))
        ctx.save_for_backward(*inputs, out, lse, *positions)
        plain = {name: options[name] for name in options if name not in ("kv_bounds", "q_start")}
        ctx.problem = (w1, w2, plain)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *saved, kv_bounds, q_start = ctx.saved_tensors
        w1, w2, plain = ctx.problem
        options = {**plain, "kv_bounds": kv_bounds, "q_start": q_start}
        grad_mask = list(ctx.needs_input_grad[3:])
        if all(grad is None for grad in grads):
            return (None,) * 8
        found = ATTN_BACKWARD_OP(*grads, *saved, w1, w2, **options, grad_mask=grad_mask)
        wanted = (g if mask else None for g, mask in zip(found, grad_mask, strict=True))
        return None, None, None, *wanted


class _AttnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: dict[str, Any], *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return ATTN_BACKWARD_OP(*inputs, **options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(
            "simplex::attn has no second derivative: its backward was differentiated "
            "(create_graph=True); simplex_ops.reference.attn can be differentiated twice"
        )


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
    """Run simplex::attn, recording its backward where a gradient is wanted."""
    inputs = (q, k1, k2, v1, v2)
    _refuse_tangents(inputs)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "simplex::attn has no rule for torch.func's grad, vjp, jacrev or hessian: "
                "differentiate by torch.autograd, or simplex_ops.reference.attn by torch.func"
            )
        return _Attn.apply(w1, w2, options, *inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return ATTN_OP(*inputs, w1, w2, **options)


def _refuse_tangents(inputs: tuple[Tensor, ...]) -> None:
    """Raise in forward-mode differentiation, which would otherwise lose the tangents in silence."""
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        raise NotImplementedError(
            "simplex::attn has no forward-mode derivative (jvp, dual tensors); "
            "simplex_ops.reference.attn has one"
        )


def attn_backward(*inputs: Any, **options: Any) -> tuple[Tensor, ...]:
    """Run simplex::attn_backward; differentiating it raises NotImplementedError."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return _AttnBackward.apply(options, *inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return ATTN_BACKWARD_OP(*inputs, **options)
