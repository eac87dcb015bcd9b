"""The two entries of this package: which implementation runs one problem.

A launch takes the current device and its current stream: each entry makes them those of q.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import TritonError

from csrc_free import tracing
from csrc_free.hopper import serve
from csrc_free.hopper.within_int32 import within_int32
from csrc_free.launch import on_device_of
from csrc_free.portable import backward, forward
from csrc_free.problem import Problem, problem_of

__all__ = ["attn_backward", "attn_forward", "forward_served_by", "portable_alone"]


class PortableWarning(UserWarning):
    """The kernels for this device cannot be compiled here, so the portable ones run."""


_IS_GLUON = "the Hopper kernels are of Gluon, which Inductor cannot write out"
# Why the Hopper kernels are out of use in this process, once one could not be compiled.
_broken: list[str] = []


def attn_forward(
    q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, *,
    out: Tensor, lse: Tensor, **arguments: Any,
) -> None:  # fmt: skip
    """Write out and lse; see `portable.forward.attn_forward` for the arguments."""
    if tracing.holds(out.numel() == 0):
        return
    this = problem_of(q, k1, k2, v1, v2, **arguments)

    def on_hopper() -> None:
        from csrc_free.hopper import forward as hopper

        hopper.compute(within_int32(this), out, lse)

    with on_device_of(q):
        if _why_not_forward(this) is None:
            tracing.leave(_IS_GLUON)
            if _ran(on_hopper):
                return
        forward.attn_forward(q, k1, k2, v1, v2, out=out, lse=lse, **arguments)


def attn_backward(
    dout: Tensor | None, dlse: Tensor | None,
    q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, out: Tensor, lse: Tensor, *,
    grads: tuple[Tensor | None, ...], **arguments: Any,
) -> None:  # fmt: skip
    """Write the wanted gradients; see `portable.backward.attn_backward` for the arguments."""
    given = (dout, dlse, q, k1, k2, v1, v2, out, lse)

    def on_hopper() -> None:
        from csrc_free.hopper import backward as hopper

        hopper.attn_backward(*given, grads=grads, **arguments)

    with on_device_of(q):
        if not _broken and serve.why_not(problem_of(q, k1, k2, v1, v2, **arguments)) is None:
            tracing.leave(_IS_GLUON)
            if _ran(on_hopper):
                return
        backward.attn_backward(*given, grads=grads, **arguments)


@contextlib.contextmanager
def portable_alone(reason: str = "they are out of use here") -> Iterator[None]:
    """Run the portable kernels inside, in all threads, where others would be faster."""
    _broken.append(reason)
    try:
        yield
    finally:
        _broken.remove(reason)


def forward_served_by(
    q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, **arguments: Any
) -> str:
    """Say which implementation `attn_forward` runs, and why not a faster one."""
    reason = _why_not_forward(problem_of(q, k1, k2, v1, v2, **arguments))
    return "hopper" if reason is None else f"portable: {reason}"


def _why_not_forward(problem: Problem) -> str | None:
    return _broken[0] if _broken else serve.why_not_forward(problem)


def _ran(kernels: Callable[[], None]) -> bool:
    """Run Hopper kernels; False, with one warning, where Gluon cannot compile them."""
    try:
        kernels()
    except (ImportError, AttributeError, TypeError, CompilationError, TritonError) as error:
        _give_up(error)
    except RuntimeError as error:
        # What the compiler's passes raise. What the device says is not ours to hide.
        if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
            raise
        _give_up(error)
    else:
        return True
    return False


def _give_up(error: Exception) -> None:
    said = str(error).strip().splitlines()
    _broken.append(f"{type(error).__name__}: {said[0] if said else 'no message'}")
    warnings.warn(
        f"simplex::attn: the Hopper kernels could not be compiled ({_broken[0]}), so the portable "
        "kernels run, slower; the Triton that PyTorch was built with compiles them",
        PortableWarning,
        stacklevel=4,
    )
