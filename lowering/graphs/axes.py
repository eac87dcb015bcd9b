"""Which axis of a mark's input an axis of a tensor follows from.

Where as many rows are in the batch as there are heads, sizes do not tell the two apart; the nodes
between the marked input [B, N, E] and a tensor do.
"""

import math
from typing import Any

from torch import fx

from lowering.graphs.calls import (
    argument,
    is_permutation,
    is_tensor,
    is_view,
    name_of,
    order_of,
    shape_of,
)
from lowering.graphs.products import is_product, read_product

_CUTS = ("chunk", "split", "tensor_split", "split_with_sizes")


def axis_in_mark(node: fx.Node, axis: int, mark: fx.Node) -> int | None:
    """Return the axis of `mark` whose rows the outermost rows of an axis are; None if unknown."""
    seen: set[tuple[fx.Node, int]] = set()

    def follow(node: Any, axis: int) -> int | None:
        if not isinstance(node, fx.Node) or (node, axis) in seen:
            return None
        if node is mark:
            return axis
        seen.add((node, axis))
        return next(
            (found for n, a in _before(node, axis) if (found := follow(n, a)) is not None), None
        )

    return follow(node, axis)


def _before(node: fx.Node, axis: int) -> list[tuple[fx.Node, int]]:
    """Return the inputs of a node that an axis of it may come from, each with its own axis."""
    first = node.args[0] if node.args else None
    if not is_tensor(node):
        return []
    if name_of(node) == "getitem" and isinstance(first, fx.Node) and not is_tensor(first):
        return _before_parts(first, axis)
    if not isinstance(first, (fx.Node, str, list, tuple)):
        return []
    if is_permutation(node):
        return [(first, order_of(node)[axis])]  # pyright: ignore[reportReturnType]
    if is_view(node):
        return _before_view(first, shape_of(node), axis)
    if name_of(node) == "getitem":
        return _before_index(first, argument(node, 1, "index"), axis)
    if is_product(node):
        product = read_product(node)
        if product is None:
            return []
        letter, factors = product.axes[axis], (product.left, product.right)
        return [(f.node, f.axes.index(letter)) for f in factors if letter in f.axes]
    sizes = shape_of(node)
    return [
        (n, axis)
        for n in node.all_input_nodes
        if is_tensor(n) and len(shape_of(n)) == len(sizes) and shape_of(n)[axis] == sizes[axis]
    ]


def _before_parts(cut: fx.Node, axis: int) -> list[tuple[fx.Node, int]]:
    source: Any = cut.args[0]
    if name_of(cut) == "unbind":
        gone = argument(cut, 1, "dim", 0) % len(shape_of(source))
        return [(source, axis + (axis >= gone))]
    return [(source, axis)] if name_of(cut) in _CUTS else []


def _before_view(source: Any, sizes: tuple[int, ...], axis: int) -> list[tuple[fx.Node, int]]:
    own = shape_of(source)
    wanted = math.prod(sizes[:axis])
    found = [
        at
        for at, size in enumerate(own)
        if math.prod(own[:at]) == wanted and size > 1 and sizes[axis] % size == 0
    ]
    return [(source, found[0])] if found else []


def _before_index(source: Any, index: Any, axis: int) -> list[tuple[fx.Node, int]]:
    index = index if isinstance(index, tuple) else (index,)
    rank = len(shape_of(source))
    taken = sum(one is not None and one is not Ellipsis for one in index)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (rank - taken), *index[at + 1 :])
    own: list[int | None] = []
    place = 0
    for one in index:
        if isinstance(one, slice):
            own.append(place)
        elif one is None:
            own.append(None)
        elif not isinstance(one, int):
            return []
        place += one is not None
    own.extend(range(place, rank))
    came = own[axis]
    return [] if came is None else [(source, came)]
