"""Whether a graph writes into values that a proof has read."""

import functools
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from lowering import compat

_IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
}  # fmt: skip

_KEYWORDS = ("and_", "or_", "not_", "is_")  # of the operator module; these write nothing


def writer_into(graph: fx.Graph, read: Collection[fx.Node]) -> str | None:
    """Return the name of a node that writes into one of `read`, directly or through a view.

    The nodes' names tell who writes; the version that each fake tensor counts tells that someone
    did, whatever the writer is called, but not under inference_mode.
    """
    for node in _writers(graph):
        for base in _written(node):
            while isinstance(base, fx.Node):
                if base in read:
                    return node.name
                base = base.args[0] if base.args else None  # a view's base is its first argument
    for node in read:
        seen = compat.example(node)
        if isinstance(seen, Tensor) and not seen.is_inference() and seen._version:
            return "an operation on it or on a view of it"
    return None


def written_into(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that are written into, directly or through a view."""
    found: set[fx.Node] = set()
    for node in _writers(graph):
        for base in _written(node):
            view = base
            while isinstance(base, fx.Node) and compat.share_memory(view, base):
                found.add(base)
                base = base.args[0] if base.args else None
    return found


def _writers(graph: fx.Graph) -> list[fx.Node]:
    """Return what may write: almost no node does."""
    return [n for n in graph.nodes if _always_written(n.op, n.target) or n.kwargs]


def _written(node: fx.Node) -> list[Any]:
    """Return what a node writes into."""
    places, given, args = _always_written(node.op, node.target), node.kwargs, node.args
    found = [args[at] if at < len(args) else given.get(name) for at, name in places]
    if given.get("inplace") and node.op == "call_function" and args:
        found.append(args[0])
    out = given.get("out")
    return [*found, *(out if isinstance(out, (tuple, list)) else (out,))]


def writes_first(node: fx.Node) -> bool:
    """Say whether a call changes its first argument."""
    places = _always_written(node.op, node.target)
    is_asked_to = node.op == "call_function" and bool(node.kwargs.get("inplace"))
    return is_asked_to or any(at == 0 for at, _ in places)


@functools.lru_cache(maxsize=1024)
def _always_written(kind: str, target: Any) -> tuple[tuple[int, str], ...]:
    """Return the places and names of arguments that every call of a target writes into."""
    first = ((0, "input"),)
    if kind == "call_method":
        return first if target.endswith("_") and not target.endswith("__") else ()
    if kind != "call_function":
        return ()
    if isinstance(target, torch._ops.OpOverload):
        arguments = enumerate(target._schema.arguments)
        return tuple((at, a.name) for at, a in arguments if a.alias_info and a.alias_info.is_write)
    name = getattr(target, "__name__", "")
    ends = name.endswith("_") and not name.startswith("_") and name not in _KEYWORDS
    return first if ends or name == "setitem" or target in _IN_PLACE else ()
