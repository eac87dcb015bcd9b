"""The law of huge logits, which the tests of the operator and of its kernels share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from simplex_ops import reference


def assert_finite(attn: Callable[..., Any], *inputs: Tensor) -> None:
    """Hold out, lse and all gradients to be finite, and out and lse to be near float64's.

    Gradients are not: a step of so large an lse is many times 1, and P = exp(s - lse) is known no
    better than that.
    """
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
