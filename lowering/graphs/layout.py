"""Bringing what axes hold into another order, with views alone where views will do."""

from typing import Any

from torch import fx

from lowering import compat
from lowering.graphs.calls import emit, emit_method
from lowering.graphs.spelled import Axis, Laid


class Layout:
    """Emits views at a graph's insertion point. `k2` [B, ...] tells how many rows a batch has."""

    def __init__(self, graph: fx.Graph, k2: fx.Node, sizes: dict[str, int]) -> None:
        self.graph, self.k2, self.sizes = graph, k2, sizes

    def laid_as(self, laid: Laid, wanted: tuple[Axis, ...]) -> fx.Node:
        """Return a tensor with the axes that are wanted; one that it lacks has size 1."""
        node, axes = laid.node, [*laid.axes]
        for at in reversed(range(len(axes))):
            axis = axes[at]
            if not axis and () not in wanted:
                node = emit_method(self.graph, "squeeze", node, at)
                del axes[at]
            elif len(axis) > 1 and axis not in wanted:
                node = emit_method(self.graph, "unflatten", node, at, (self._size(axis[0]), -1))
                axes[at : at + 1] = [(name,) for name in axis]
        units: list[list[Axis]] = [self._parts(axis, axes) for axis in wanted]
        order = [axes.index(unit) for parts in units for unit in parts]
        if order != sorted(order):
            node = emit_method(self.graph, "permute", node, *order)
        for at, parts in enumerate(units):
            if not parts:
                node = emit_method(self.graph, "unsqueeze", node, at)
            elif len(parts) > 1:
                node = emit_method(self.graph, "flatten", node, at, at + len(parts) - 1)
        return node

    @staticmethod
    def _parts(axis: Axis, axes: list[Axis]) -> list[Axis]:
        return [axis] if axis in axes else [(name,) for name in axis if (name,) in axes]

    def _size(self, name: str) -> Any:
        batch = compat.example(self.k2).shape[0]
        if name != "b":
            return self.sizes[name]
        if not compat.is_symbolic(batch):
            return batch
        return emit(self.graph, "call_method", "size", self.k2, 0)
