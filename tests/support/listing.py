"""A graph in print: numbered values, shapes, and neither files nor what differs by torch's version.

What a module's part of a graph takes from outside is shown by its shape, a weight by its name.
"""

import re
from typing import Any

from torch import fx

from lowering import compat


def listing(graph: fx.Graph, within: str | None = None) -> str:
    """Print a graph, or what was traced in the module of a path and in those below it."""
    nodes = list(graph.nodes)
    if within is not None:
        nodes = [node for node in nodes if node.op != "placeholder"]
        own = [at for at, node in enumerate(nodes) if within in compat.paths_of(node)]
        nodes = nodes[min(own) : max(own) + 1]
    names: dict[fx.Node, str] = {}

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names.get(value) or _outside(value)
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(text, value))})"
        if isinstance(value, float):
            return f"{value:.6g}"
        return re.sub(r"<built-in (method|function) (\w+).*>", r"\2", repr(value))

    lines = []
    for node in nodes:
        names[node] = f"%{len(names)}"
        args = ", ".join([*map(text, _args(node)), *_kwargs(node, text)])
        line = f"{names[node]}{_shape(node)} = {_target(node)}({args})"
        lines += [line] if len(line) <= 88 else _broken(line)
    return "\n".join(lines)


def _broken(line: str) -> list[str]:
    """Break a line before the keywords."""
    head, *rest = re.split(r", (?=\w+=)", line)
    return (
        [head + ",", *(f"    {part}," for part in rest[:-1]), f"    {rest[-1]}"] if rest else [head]
    )


def _shape(node: fx.Node) -> str:
    shape = getattr(node.meta.get("example_value"), "shape", None)
    return "" if shape is None else f" {list(shape)}"


def _outside(node: fx.Node) -> str:
    if compat.weight_of(node) is not None:
        return _target(node)
    return f"<{_shape(node).strip()}>"


def _target(node: fx.Node) -> str:
    target: Any = node.target
    if target is getattr:
        return str(node.args[1])
    if callable(target):
        return getattr(target, "__name__", str(target)).strip("_")
    return str(target).split("_modules_")[-1].strip("_").replace("_parameters_", ".")


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args[:1] if node.target is getattr else node.args


def _kwargs(node: fx.Node, text: Any) -> list[str]:
    return [f"{key}={text(value)}" for key, value in node.kwargs.items() if key[0] != "_"]
