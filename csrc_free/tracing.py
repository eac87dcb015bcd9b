"""Launchers on tensors without memory: what a tracer answers where a launch would look or act.

A launcher is plain Python, so a tracer that runs it learns which kernels it launches on which
buffers. What it cannot do there: launch, encode a descriptor, look at an address, and decide
by a size that is not known. Inside `traced_by` these are the tracer's.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NoReturn, Protocol

from torch import Tensor


class Tracer(Protocol):
    """What stands in for a device while a launcher is traced."""

    def launch(
        self, kernel: Any, programs: Any, arguments: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """Note a launch in a grid of one dimension; options are num_warps and num_stages."""
        ...

    def describe(self, tensor: Tensor, block_shape: list[int]) -> Any:
        """Return what stands for a tensor descriptor among a launch's arguments."""
        ...

    def can_describe(self, row_bytes: int) -> bool:
        """Tell whether rows of so many bytes can be read by descriptor where the trace will run."""
        ...

    def leave(self, reason: str) -> NoReturn:
        """End the trace: it meets what it cannot write out, and the call stays one."""
        ...

    def is_for_package(self) -> bool:
        """Tell whether the trace will run where none of our code is: no call can be left."""
        ...

    def keeps_precision(self) -> bool:
        """Tell whether another setting of float32 products will be another trace."""
        ...

    def holds(self, claim: Any) -> bool:
        """Decide a claim about sizes. False must be safe; True is taken only where it is certain.

        Where the trace runs for other sizes too, the claim holds there, or it is False.
        """
        ...

    def likely(self, claim: Any) -> bool:
        """Guess a claim on which nothing depends but speed."""
        ...


_TRACER: ContextVar[Tracer | None] = ContextVar("simplex_tracer", default=None)


def tracer() -> Tracer | None:
    """Return who traces, or None where launches are real."""
    return _TRACER.get()


@contextlib.contextmanager
def traced_by(tracer: Tracer) -> Iterator[None]:
    """Let a tracer answer inside."""
    token = _TRACER.set(tracer)
    try:
        yield
    finally:
        _TRACER.reset(token)


def is_for_package() -> bool:
    """Tell whether only what can be traced may run."""
    tracer = _TRACER.get()
    return tracer is not None and tracer.is_for_package()


def keeps_precision() -> bool:
    """Tell whether the setting of float32 products, as it is now, may be built in."""
    tracer = _TRACER.get()
    return tracer is None or tracer.keeps_precision()


def leave(reason: str) -> None:
    """Say that what follows cannot be traced; nothing happens where launches are real."""
    tracer = _TRACER.get()
    if tracer is not None:
        tracer.leave(reason)


def holds(claim: Any) -> bool:
    """Decide a claim about sizes, which are symbols in a trace; False must be safe."""
    if isinstance(claim, bool):
        return claim
    tracer = _TRACER.get()
    return bool(claim) if tracer is None else tracer.holds(claim)


def likely(claim: Any) -> bool:
    """Guess a claim about sizes on which nothing depends but speed."""
    if isinstance(claim, bool):
        return claim
    tracer = _TRACER.get()
    return bool(claim) if tracer is None else tracer.likely(claim)
