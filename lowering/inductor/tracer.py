"""What stands in for a device while a launcher is traced into Inductor's graph."""

from typing import Any, NoReturn

from torch import Tensor

from csrc_free.tracing import Tracer
from lowering import compat


class NotTraceable(Exception):  # noqa: N818 (a finding, not an error)
    """A launcher launches what Inductor cannot write out."""


class Descriptor:
    """A tile's view of a tensor, as a launch's argument."""

    def __init__(self, tensor: Tensor, block_shape: list[int]) -> None:
        self.tensor = tensor
        self.block_shape = block_shape


class InductorTracer(Tracer):
    """Turns launches into graph nodes, and decides by guards where the graph's guards are kept."""

    def launch(
        self, kernel: Any, programs: Any, arguments: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """Record a node that launches the kernel."""
        if not compat.is_rewritable(kernel):
            self.leave(f"{kernel.__name__} is no plain Triton kernel")
        blocks = {
            name: value.block_shape
            for name, value in arguments.items()
            if isinstance(value, Descriptor)
        }
        plain = {
            name: value.tensor if isinstance(value, Descriptor) else value
            for name, value in arguments.items()
        }
        compat.record_launch(kernel, programs, plain, blocks, options)

    def describe(self, tensor: Tensor, block_shape: list[int]) -> Descriptor:
        """Return what Inductor makes a descriptor of when the compiled code runs."""
        return Descriptor(tensor, block_shape)

    def can_describe(self, row_bytes: int) -> bool:
        """Tell whether the compiled code can make descriptors of such rows."""
        return compat.can_describe_in_graph(row_bytes)

    def leave(self, reason: str) -> NoReturn:
        """End the trace."""
        raise NotTraceable(reason)

    def is_for_package(self) -> bool:
        """Tell whether AOTInductor compiles the graph, for a process that imports torch alone."""
        return compat.is_for_package()

    def keeps_precision(self) -> bool:
        """Guard the setting; a package has that of its build."""
        return self.is_for_package() or compat.guard_precision()

    def holds(self, claim: Any) -> bool:
        """Guard the claim, or leave it where this graph's guards are not kept."""
        return compat.known(claim) or (not self.is_for_package() and compat.guarded(claim))

    def likely(self, claim: Any) -> bool:
        """Take the example's answer."""
        return compat.hint(claim)
