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
from csrc_free.steps.delta import statistics_of

__all__ = [
    "attn_backward", "attn_forward", "backward_served_by", "forward_served_by", "portable_alone",
]  # fmt: skip


class PortableWarning(UserWarning):
    """The kernels for this device cannot be compiled here, so the portable ones run."""


_IS_GLUON = "the Hopper kernels are of Gluon, which Inductor cannot write out"
# Why the Hopper kernels are out of use in this process, once one could not be compiled.
_broken: list[str] = []


def attn_forward(
    q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, *,
    out: Tensor, lse: Tensor, **arguments: Any,
) -> None:  # fmt: skip
    """Write out [B, H, N, Dv] and lse [B, H, N]; see `problem_of` for the arguments."""
    if tracing.holds(out.numel() == 0):
        return
    with on_device_of(q):
        problem = problem_of(q, k1, k2, v1, v2, **arguments)

        def on_hopper() -> None:
            from csrc_free.hopper import forward as hopper

            hopper.compute(within_int32(problem), out, lse)

        if _why_not_forward(problem) is None:
            tracing.leave(_IS_GLUON)
            if _ran(on_hopper):
                return
        forward.compute(problem, out, lse)


def attn_backward(
    dout: Tensor | None, dlse: Tensor | None,
    q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, out: Tensor, lse: Tensor, *,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    **arguments: Any,
) -> None:  # fmt: skip
    """Write the gradients of q, k1, k2, v1 and v2, each where `grads` has a tensor for it."""
    if any(tracing.holds(t.numel() == 0) for t in (q, k1, k2)):
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    dq, dk1, dk2, dv1, dv2 = grads
    with on_device_of(q):
        problem = problem_of(q, k1, k2, v1, v2, **arguments)
        is_for_hopper = _why_not(problem) is None
        if is_for_hopper:
            tracing.leave(_IS_GLUON)
        wide, narrow = problem.by_role((dk1, dv1), (dk2, dv2))
        statistics = statistics_of(problem, dout, dlse, out, lse)

        def on_hopper() -> None:
            from csrc_free.hopper import backward as hopper

            choice = hopper.choose(problem, statistics.dout)
            hopper.write_gradients(problem, statistics, choice, dq, wide, narrow)

        if not (is_for_hopper and _ran(on_hopper)):
            backward.write_gradients(problem, statistics, dq, wide, narrow)


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


def backward_served_by(
    dout: Tensor, q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, **arguments: Any
) -> str:
    """Say which kernels `attn_backward` runs, and why not faster ones."""
    problem = problem_of(q, k1, k2, v1, v2, **arguments)
    reason = _why_not(problem)
    if reason is not None:
        return f"portable: {reason}"
    from csrc_free.hopper import backward as hopper

    return hopper.choose(problem, dout).served_by


def _why_not(problem: Problem) -> str | None:
    return _out_of_use() or serve.why_not(problem)


def _why_not_forward(problem: Problem) -> str | None:
    return _out_of_use() or serve.why_not_forward(problem)


def _out_of_use() -> str | None:
    """Return why no Hopper kernel runs, whatever the problem."""
    if _broken:
        return _broken[0]
    return _IS_GLUON if tracing.is_for_package() else None


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
