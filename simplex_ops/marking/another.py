"""Attention beside the one call that a mark takes over, told by the names of what is called.

Eager code and the compiler's pass ask the same questions, of functions, operators and names of
methods. The mode under which a marked module runs sees operators of torch.ops as well as functions.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from simplex_ops.marking.call import SDPA

_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_NAMES = re.compile("attention|attn", re.IGNORECASE)
_PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum")
_EXPONENTIALS = ("exp", "exp_", "exp2", "exp2_")


def name_of(called: Any) -> str:
    """Return the name of a function, an operator (without its overload) or a method."""
    name = called if isinstance(called, str) else getattr(called, "__name__", "")
    return name.partition(".")[0]


def is_attention(called: Any, arguments: Iterable[Any], kind: type) -> bool:
    """Say whether what is called attends: by its name, or its library's, and by three tensors.

    scaled_dot_product_attention, which a mark takes over, and this package's own are left out.
    """
    name = str(called) if isinstance(called, _OPERATORS) else name_of(called)
    if called is SDPA or _NAMES.search(name) is None or name.startswith("simplex."):
        return False
    return sum(isinstance(given, kind) for given in arguments) >= 3


def weighs(called: Any) -> bool:
    """Say whether what is called may make weights of scores, be it on the way to a softmax."""
    name = name_of(called)
    return name.endswith("softmax") or name in _EXPONENTIALS


class Another:
    """Notes, in eager code, what a module calls that may be attention."""

    def __init__(self) -> None:
        self._attention = ""
        self._weights: dict[tuple[int, ...], str] = {}
        self._products: set[tuple[int, ...]] = set()

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Look at a call, and at what it returned."""
        name = name_of(func)
        if name in _PRODUCTS and _are_numbers(out.shape):
            self._products.add(tuple(out.shape[-2:]))
        elif weighs(func) and _are_numbers(out.shape):
            if name not in _EXPONENTIALS or tuple(out.shape[-2:]) in self._products:
                self._weights[tuple(out.shape)] = name
        elif is_attention(func, (*args, *kwargs.values()), Tensor):
            self._attention = name

    def beside(self, scores: tuple[int, ...]) -> str | None:
        """Return by what a module attended beside a call with scores of these sizes, if it did."""
        if self._attention or not _are_numbers(scores) or scores[2] == 1:
            return self._attention or None
        return self._weights.get(scores)


def _are_numbers(sizes: tuple[int, ...]) -> bool:
    return all(isinstance(size, int) for size in sizes)  # traced, they may be symbols
