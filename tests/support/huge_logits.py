"""The law of huge logits, which the tests of the operator and of its kernels share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simplex_ops import reference


def assert_finite(attn: Callable[..., Any], *inputs: Tensor) -> None:
    """Hold out, lse and all gradients to be finite, and out and lse to be near float64's.

    Gradients are not: a step of so large an lse is many times 1, and P = exp(s - lse) is known no
    better than that. k2 is rounded to powers of two first, so that no product with it rounds:
    softmax is one pair here, and a rounding of q∘k2 may make it the second largest.
    """
    q, k1, k2, v1, v2 = inputs
    inputs = (q, k1, _power_of_two(k2), v1, v2)
    got, exact = _run(attn, inputs), _run(reference.attn, [t.double() for t in inputs])
    for name, value in got.items():
        assert value.isfinite().all(), name
    largest = torch.finfo(got["lse"].dtype).max
    exact["lse"].clamp_(-largest, largest)
    for name in ("out", "lse"):
        error = (got[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < 10 * torch.finfo(inputs[0].dtype).eps, f"{name}: {error:.1e}"


def _run(attn: Callable[..., Any], inputs: Any) -> dict[str, Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out, lse = attn(*leaves, 6, 3)
    grads = torch.autograd.grad(out.sum(), leaves)
    names = ("dq", "dk1", "dk2", "dv1", "dv2")
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, grads, strict=True))}


def _power_of_two(t: Tensor) -> Tensor:
    return torch.exp2(t.double().abs().log2().round()).mul(t.sign()).to(t.dtype)
