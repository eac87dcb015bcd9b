"""Products of two tensors, however they are written, as einsum writes them: axes by letters.

matmul(q, k.mT), q @ k.mT, bmm, and baddbmm with beta=0, are ABic, ABcj -> ABij, with as many
leading axes as there are; einsum("bihd,bjhd->bhij", q, k) says itself what it is.
"""

import string
from dataclasses import dataclass
from typing import Any

from torch import fx

from lowering.graphs.calls import argument, constant, is_tensor, name_of, shape_of

_NAMES = {"matmul", "bmm", "einsum", "baddbmm"}


@dataclass(frozen=True)
class Operand:
    """One factor: a tensor and a letter for each of its axes, "" for one that is only stretched."""

    node: fx.Node
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Product:
    """left times right, summed over the letters that are not in `axes`; times a factor."""

    left: Operand
    right: Operand
    axes: tuple[str, ...]
    factor: float = 1.0


def is_product(node: fx.Node) -> bool:
    """Say whether a node multiplies two tensors and sums."""
    return name_of(node) in _NAMES


def read_product(node: fx.Node) -> Product | None:
    """Return the product that a node is; None where it is none, or of an unknown kind."""
    name = name_of(node)
    if name == "einsum":
        return _einsum(node)
    if name == "baddbmm":
        added, factor = argument(node, 3, "beta", 1), constant(argument(node, 4, "alpha", 1))
        if added != 0 or factor is None:
            return None
        return _matmul(node, argument(node, 1, "batch1"), argument(node, 2, "batch2"), factor)
    if name in ("matmul", "bmm"):
        other = argument(node, 1, "mat2" if name == "bmm" else "other")
        return _matmul(node, argument(node, 0, "input"), other, 1.0)
    return None


def _matmul(node: fx.Node, left: Any, right: Any, factor: float) -> Product | None:
    if not (is_tensor(left) and is_tensor(right)):
        return None
    sizes, a, b = shape_of(node), shape_of(left), shape_of(right)
    if len(a) < 2 or len(b) < 2:
        return None
    shared = tuple(string.ascii_uppercase[: len(sizes) - 2])
    return Product(
        Operand(left, (*_stretched(shared, sizes, a), "i", "c")),
        Operand(right, (*_stretched(shared, sizes, b), "c", "j")),
        (*shared, "i", "j"),
        factor,
    )


def _stretched(
    shared: tuple[str, ...], sizes: tuple[int, ...], own: tuple[int, ...]
) -> tuple[str, ...]:
    """Return the letters of an operand's leading axes, which broadcast."""
    at = len(sizes) - len(own)
    pairs = zip(shared[at:], sizes[at:-2], own[:-2], strict=True)
    return tuple(letter if size == mine else "" for letter, size, mine in pairs)


def _einsum(node: fx.Node) -> Product | None:
    equation, operands = node.args[0], tuple[Any, ...](node.args[1:])
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or not all(map(is_tensor, operands)):
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        return None
    hidden = {
        len(shape_of(operand)) - len(term.replace("...", ""))
        for operand, term in zip(operands, terms, strict=True)
    }
    if len(hidden) != 1 and "..." in equation:
        return None
    spare = "".join(letter for letter in string.ascii_letters if letter not in equation)
    first, second, out = (
        tuple(term.replace("...", spare[: max(hidden)])) for term in (*terms, output)
    )
    if any(len({*term}) < len(term) for term in (first, second)) or ({*first} ^ {*second}) - {*out}:
        return None  # a diagonal, or a sum of one factor by itself
    sizes = dict(zip(out, shape_of(node), strict=True))
    left, right = (
        Operand(operand, tuple(map(lambda a, n: _kept(a, n, sizes), term, shape_of(operand))))
        for operand, term in zip(operands, (first, second), strict=True)
    )
    return Product(left, right, out)


def _kept(letter: str, size: int, sizes: dict[str, int]) -> str:
    return "" if size == 1 and sizes.get(letter, 1) != 1 else letter
