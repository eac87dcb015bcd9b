"""The pass: keys and values repeated to all heads go to a mark's attention as they were before.

Before, in Dynamo's graph of a marked module with Hkv key-value heads and H = G Hkv heads:

    key   = k[:, :, None].expand(B, Hkv, G, N, D).reshape(B, H, N, D)
    value = repeat_interleave(v, G, dim=1)
    out   = scaled_dot_product_attention(q, key, value)

After, for the pass that serves marks, which has k2 and v2 of Hkv heads:

    out   = scaled_dot_product_attention(q, k, v, enable_gqa=True)

Only where head h of both has key-value head h // G, as grouped queries share them: a repeat in
another order (`k.repeat(1, G, 1, 1)`, which gives h % Hkv) stays, and the mark is refused.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import fx

from lowering import compat
from lowering.graphs.calls import (
    argument,
    emit,
    erase_unused,
    is_cast,
    is_copy,
    is_permutation,
    is_tensor,
    is_view,
    name_of,
    order_of,
    shape_of,
)
from lowering.graphs.marked_graphs import rewrite_where_marked
from lowering.graphs.names import Names
from lowering.graphs.pairing import calls_in, marks_behind
from lowering.graphs.subgraphs import Subgraphs
from lowering.report import Report
from simplex_ops.marking.call import SdpaCall


def fold(subgraphs: Subgraphs, names: Names) -> Report:
    """Fold the keys and values of every marked attention, and count what was folded.

    It never raises on a graph that it does not understand.
    """
    return Report(folded=rewrite_where_marked(subgraphs, names, calls_in, _fold))


def _fold(call: fx.Node, stops: set[fx.Node], written: set[fx.Node]) -> fx.Node | None:
    """Fold the keys and values of a marked call, and return its mark; None where they stay."""
    try:
        found = _read(call, stops, written)
    except Exception:  # noqa: BLE001 (whatever it is, the keys stay as they are)
        return None
    if found is None:
        return None
    mark, given, sources = found
    with call.graph.inserting_before(call):
        key, value = (source.emit(call.graph) for source in sources)
    new = replace(given, key=key, value=value, enable_gqa=True)
    names = [field.name for field in fields(SdpaCall)]
    call.args, call.kwargs = tuple(getattr(new, name) for name in names), {}
    erase_unused([given.key, given.value])
    return mark


def _read(
    call: fx.Node, stops: set[fx.Node], written: set[fx.Node]
) -> "tuple[fx.Node, SdpaCall, list[_Source]] | None":
    """Return a mark, its call, and where keys and values come from; None: it stays as it is."""
    given = SdpaCall.bind(call.args, call.kwargs)
    marks = marks_behind(given.query, call, stops)
    if len(marks) != 1 or not (is_tensor(given.key) and is_tensor(given.value)):
        return None
    heads = shape_of(marks[0].args[1])[1]
    if any(len(shape_of(n)) != 4 or shape_of(n)[1] <= heads for n in (given.key, given.value)):
        return None
    sources = [_before_repeat(n, heads) for n in (given.key, given.value)]
    known = [source for source in sources if source is not None and source.node not in written]
    return (marks[0], given, known) if len(known) == len(sources) else None


@dataclass(frozen=True)
class _Source:
    """A tensor as it was before it was repeated, and what else was done to it after."""

    node: fx.Node
    done: tuple[fx.Node, ...]

    def emit(self, graph: fx.Graph) -> fx.Node:
        node = self.node
        for step in self.done:
            node = emit(graph, step.op, step.target, node, *step.args[1:], **step.kwargs)
        return node


def _before_repeat(node: fx.Node, heads: int) -> _Source | None:
    """Return where `node` [B, H, N, D] comes from with so many heads; None where it does not."""
    axis, done = 1, []
    while True:
        source = _repeated(node, axis)
        if source is not None:
            node, axis = source
            if shape_of(node)[axis] == heads:
                return _Source(node, tuple(reversed(done)))
            continue
        if not node.args or not is_tensor(node.args[0]):
            return None
        first: Any = node.args[0]
        if is_view(node) and is_view(first) and _same_shape(node, first.args[0]):
            node = first.args[0]
            continue
        if is_permutation(node):
            axis = order_of(node)[axis]
        elif not (is_cast(node) or is_copy(node) or name_of(node) in ("mul", "div")):
            return None
        if any(isinstance(value, fx.Node) for value in (*node.args[1:], *node.kwargs.values())):
            return None
        done.append(node)
        node = first


def _same_shape(node: fx.Node, other: Any) -> bool:
    if not is_tensor(other):
        return False
    sizes, others = compat.example(node).shape, compat.example(other).shape
    return len(sizes) == len(others) and all(map(compat.known, map(_equal, sizes, others)))


def _equal(a: Any, b: Any) -> Any:
    return a == b


def _repeated(node: fx.Node, axis: int) -> tuple[fx.Node, int] | None:
    """Return what a node repeats along an axis, each row G times in a row, and its axis there."""
    first: Any = node.args[0] if node.args else None
    if not is_tensor(first):
        return None
    sizes, name = shape_of(node), name_of(node)
    if name == "repeat_interleave":
        dim = argument(node, 2, "dim")
        times = compat.example(argument(node, 1, "repeats"))
        is_this = isinstance(dim, int) and dim % len(sizes) == axis and isinstance(times, int)
        return (first, axis) if is_this else None
    if name in ("expand", "broadcast_to", "repeat", "tile"):
        own = shape_of(first)
        others = [n for at, n in enumerate(own) if at != axis]
        one = len(own) == len(sizes) and own[axis] == 1
        return (first, axis) if one and others == [*sizes[:axis], *sizes[axis + 1 :]] else None
    if not is_view(node):
        return None
    while is_copy(first):
        first = first.args[0]
    return _merged(first, sizes, axis)


def _merged(wide: fx.Node, sizes: tuple[int, ...], axis: int) -> tuple[fx.Node, int] | None:
    """Read what a view makes of [..., Hkv, G, ...], where G was made by stretching an axis of 1."""
    group = axis + 1
    if name_of(wide) not in ("expand", "broadcast_to", "repeat", "tile"):
        return None
    thin: Any = wide.args[0]
    own, full = shape_of(thin), shape_of(wide)
    if len(own) != len(full) or len(full) != len(sizes) + 1 or own[group] != 1:
        return None
    kept = [n for at, n in enumerate(own) if at != group]
    merged = (*full[:axis], full[axis] * full[group], *full[group + 1 :])
    if kept != [n for at, n in enumerate(full) if at != group] or merged != sizes:
        return None
    source: Any = thin.args[0]
    index = thin.args[1] if name_of(thin) == "getitem" else ()
    slices = all(i is None or i is Ellipsis or isinstance(i, slice) for i in _all(index))
    makes_room = name_of(thin) == "unsqueeze" or (name_of(thin) == "getitem" and slices)
    if makes_room and is_tensor(source) and [*shape_of(source)] == kept:
        return source, axis
    return None


def _all(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)
