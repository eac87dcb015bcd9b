"""What a node of Dynamo's graph calls, and with what, whichever way it was written."""

import functools
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lowering import compat
from lowering.graphs.writes import writes_first

_PLACES = (operator, torch, F)
_SAME = {
    "iadd": "add", "imul": "mul", "multiply": "mul", "itruediv": "div", "truediv": "div",
    "divide": "div", "true_divide": "div", "isub": "sub", "subtract": "sub",
}  # fmt: skip
_PERMUTATIONS = {
    "transpose", "permute", "mT", "T", "movedim", "moveaxis", "swapaxes", "swapdims", "t",
}  # fmt: skip
_VIEWS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"}
_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as"}
_COPIES = {"contiguous", "clone"}
_PRIMES = (2, 3, 5, 7, 11, 13)


def name_of(node: fx.Node) -> str:
    """Return PyTorch's name of what a node calls, the same for a function, a method, an operator.

    In place or not it is the same name. It is empty of a function of anyone else's, and of one that
    is given a tensor to write its result to.
    """
    target: Any = node.target
    if node.op == "call_function":
        name = _plain(str(node.args[1])) if target is getattr else _function(target)
    else:
        name = _plain(target) if node.op == "call_method" else ""
    return "" if name and "out" in node.kwargs else name


@functools.cache
def _plain(name: str) -> str:
    name = name.removeprefix("__").removesuffix("__") if name.startswith("__") else name
    name = name.removesuffix("_")
    return _SAME.get(name, name)


@functools.lru_cache(maxsize=1024)
def _function(target: Any) -> str:
    name = getattr(target, "__name__", "")
    is_packet = isinstance(target, torch._ops.OpOverloadPacket)  # as 2.15 writes mT
    known = any(getattr(place, name, None) is target for place in _PLACES)
    return _plain(name) if known or is_packet or _makes_tensor(target) else ""


def _makes_tensor(target: Any) -> bool:
    return getattr(target, "__name__", "") == "tensor"  # Dynamo's own, where a symbol is in it


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call by its place or its name."""
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the sizes that a tensor has in the example, as plain numbers."""
    sizes = compat.example(node).shape
    return tuple(size if type(size) is int else compat.hint(size) for size in sizes)


def is_tensor(value: Any) -> bool:
    """Say whether a value is a node that stands for a tensor."""
    return isinstance(value, fx.Node) and isinstance(compat.example(value), Tensor)


def dtype_of(node: fx.Node) -> torch.dtype:
    """Return a tensor's dtype."""
    return compat.example(node).dtype


def needs_gradient(node: fx.Node) -> bool:
    """Say whether a tensor is differentiated."""
    return compat.example(node).requires_grad


def constant(value: Any) -> float | None:
    """Return the number that a value always is; None of anything else.

    A symbolic one becomes a constant, by a guard; so does a tensor without dimensions that is made
    of a number alone.
    """
    if isinstance(value, fx.Node) and is_tensor(value):
        made = {"full": 1, "tensor": 0, "sqrt": 0}.get(name_of(value))
        if made is None or compat.example(value).dim() != 0 or len(value.args) <= made:
            return None
        number = constant(value.args[made])
        if number is None:
            return None
        return number**0.5 if name_of(value) == "sqrt" else number
    number = compat.make_constant(compat.example(value))
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return None
    return float(number)


def is_permutation(node: fx.Node) -> bool:
    """Say whether a node gives the axes of its input another order."""
    return name_of(node) in _PERMUTATIONS


def is_view(node: fx.Node) -> bool:
    """Say whether a node gives its input another shape, elements in the same order."""
    return name_of(node) in _VIEWS


def is_cast(node: fx.Node) -> bool:
    """Say whether a node turns floating point numbers into others."""
    return (
        name_of(node) in _CASTS
        and is_tensor(node.args[0])
        and dtype_of(node).is_floating_point
        and dtype_of(node.args[0]).is_floating_point  # pyright: ignore[reportArgumentType]
        and compat.example(node).device == compat.example(node.args[0]).device
    )


def is_copy(node: fx.Node) -> bool:
    """Say whether a node returns its input, in other memory perhaps."""
    return name_of(node) in _COPIES


def order_of(node: fx.Node) -> tuple[int, ...]:
    """Return, for each axis of a permutation's output, the axis of its input."""
    rank = compat.example(node).dim()
    probe = torch.empty(_PRIMES[:rank], device="meta")
    args = (probe, *node.args[1:])
    if node.op == "call_method":
        permuted = getattr(probe, str(node.target))(*node.args[1:], **node.kwargs)
    else:
        assert callable(node.target)
        permuted = node.target(*args, **node.kwargs)
    return tuple(_PRIMES.index(size) for size in permuted.shape)


def live_users(node: fx.Node) -> list[fx.Node]:
    """Return the users of a node whose results are used."""
    return [user for user in node.users if not _is_dead(user)]


def _is_dead(node: fx.Node, depth: int = 4) -> bool:
    if node.op == "output" or writes_first(node) or not depth:
        return False
    return all(_is_dead(user, depth - 1) for user in node.users)


def is_discarded_write(node: fx.Node, into: fx.Node) -> bool:
    """Say whether a node is a statement that changes a tensor in place."""
    return writes_first(node) and node.args[0] is into and not node.users


def emit(graph: fx.Graph, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call, with the example of its result; where, the graph's insertion point says."""
    node = graph.create_node(kind, target, args, kwargs)
    given, named = fx.map_arg((args, kwargs), compat.example)
    run = getattr(given[0], target) if kind == "call_method" else target
    node.meta["example_value"] = run(*(given[1:] if kind == "call_method" else given), **named)
    return node


def emit_method(graph: fx.Graph, name: str, *args: Any) -> fx.Node:
    """Insert a call of a tensor's method."""
    return emit(graph, "call_method", name, *args)


def erase_unused(nodes: Iterable[fx.Node]) -> None:
    """Erase nodes that nothing uses, and the views that only they were given."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node.users or node.op == "placeholder":
            continue
        inputs = [
            n for n in node.all_input_nodes if is_view(n) or is_permutation(n) or is_repeat(n)
        ]
        node.graph.erase_node(node)
        pending = [n for n in inputs if n not in pending] + pending


def is_repeat(node: fx.Node) -> bool:
    """Say whether a node repeats what it is given, or makes room to."""
    none_index = name_of(node) == "getitem" and is_tensor(node.args[0])
    return none_index or name_of(node) in (
        "expand", "broadcast_to", "repeat", "tile", "repeat_interleave",
    )  # fmt: skip
