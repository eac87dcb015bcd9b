"""Whether a graph writes into values that a proof has read."""

import operator
from collections.abc import Collection, Iterator
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
    for node in graph.nodes:
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
    for node in graph.nodes:
        for base in _written(node):
            view = base
            while isinstance(base, fx.Node) and compat.share_memory(view, base):
                found.add(base)
                base = base.args[0] if base.args else None
    return found


def _written(node: fx.Node) -> Iterator[Any]:
    out = node.kwargs.get("out")
    yield from out if isinstance(out, (tuple, list)) else (out,)
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        given = {**dict(zip((a.name for a in arguments), node.args, strict=False)), **node.kwargs}
        yield from (given.get(a.name) for a in arguments if a.alias_info and a.alias_info.is_write)
    elif writes_first(node):
        yield node.args[0] if node.args else None


def writes_first(node: fx.Node) -> bool:
    """Say whether a call changes its first argument."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    return node.op == "call_function" and (
        name == "setitem"
        or bool(node.kwargs.get("inplace"))
        or (name.endswith("_") and not name.startswith("_") and name not in _KEYWORDS)
        or node.target in _IN_PLACE
    )
