"""Proof that a mask computed inside a graph is the causal mask and nothing more.

Hugging Face hands a compiled model a dense mask where eager code gets None. It is computed from
`arange` alone; a mask that knows of padding or packed documents comes from an input tensor. So the
mask's own nodes are run, at the example's sizes, and the result is compared.
"""

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from lowering import compat
from lowering.graphs.subgraphs import Subgraphs

_IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
}  # fmt: skip

_KEYWORDS = ("and_", "or_", "not_", "is_")  # of the operator module; these write nothing


class NotProven(Exception):  # noqa: N818 (a finding, not an error)
    """Why a mask may be more than causal."""


def why_not_causal(mask: fx.Node, subgraphs: Subgraphs) -> str | None:
    """Return why `mask` is not known to be causal; None where it is, in every call of its graph."""
    try:
        with compat.real_tensors():
            for source in subgraphs.sources_of(mask):
                evaluation = _Evaluation()
                _check(evaluation.value_of(source))
                _check_unwritten(source.graph, evaluation.known)
    except NotProven as reason:
        return (
            f"its attention mask is not known to be the causal one: {reason}. "
            "Where nothing is padded or packed, leave attention_mask and position_ids out"
        )
    return None


def _check(mask: Any) -> None:
    if not isinstance(mask, Tensor):
        raise NotProven(f"it is {mask!r}, no tensor")
    queries, keys = mask.shape[-2:]
    if queries != keys:
        raise NotProven(f"it has {queries} queries and {keys} keys, as with a key-value cache")
    causal = torch.ones(queries, keys, dtype=torch.bool).tril()
    seen = mask if mask.dtype == torch.bool else mask == 0
    hidden = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min
    for row_seen, row_hidden in zip(
        seen.flatten(0, -3), hidden.flatten(0, -3), strict=True
    ):  # one [queries, keys] at a time
        if not (torch.equal(row_seen, causal) and torch.equal(row_hidden, ~causal)):
            raise NotProven("it hides other keys than those after the query")


class _Evaluation:
    """Runs the nodes that a mask comes from, on the CPU."""

    def __init__(self) -> None:
        self.known: dict[fx.Node, Any] = {}

    def value_of(self, wanted: fx.Node) -> Any:
        pending = [wanted]
        while pending:
            node = pending[-1]
            missing = [n for n in node.all_input_nodes if n not in self.known]
            if missing:
                pending.extend(missing)
                continue
            pending.pop()
            if node not in self.known:
                self.known[node] = self.run(node)
        return self.known[wanted]

    def run(self, node: fx.Node) -> Any:
        found = compat.example(node)
        if isinstance(found, (int, float, torch.SymInt)):
            return compat.hint(found)
        if node.op == "placeholder":
            raise NotProven(f"it depends on the input {node.name}")
        if node.op not in ("call_function", "call_method"):
            raise NotProven(f"it depends on {node.op} {node.name}")
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.known[n])
        args, kwargs = tree_map(_on_cpu, (args, kwargs))
        try:
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)
        except Exception as error:  # whatever failed, it is unproven
            raise NotProven(f"{node.name} could not be run ahead of time ({error})") from error


def _check_unwritten(graph: fx.Graph, read: Collection[fx.Node]) -> None:
    """Raise where a node writes into one of those that were run, directly or through a view."""
    for node in graph.nodes:
        if not _writes(node):
            continue
        base = node.args[0] if node.args else None
        while isinstance(base, fx.Node):
            if base in read:
                raise NotProven(f"{node.name} writes into it")
            base = base.args[0] if base.args else None  # the base of a view is its first argument


def _writes(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    return node.op == "call_function" and (
        "out" in node.kwargs
        or name == "setitem"
        or (name.endswith("_") and not name.startswith("_") and name not in _KEYWORDS)
        or node.target in _IN_PLACE
    )


def _on_cpu(argument: Any) -> Any:
    return torch.device("cpu") if isinstance(argument, torch.device) else argument
