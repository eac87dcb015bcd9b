"""The rule by which a graph makes a mask, read from its nodes: true at every size, unlike a sample.

A value is read as a function of its own coordinates c[0], c[1], ... Integers are linear in them; a
truth value is a conjunction of claims that something linear is at least 0:

    q = arange(n)[:, None]         c[0]
    k = arange(n)[None, :]         c[1]
    (k <= q) & (k > q - 16)        {c[0] - c[1] >= 0, c[1] - c[0] + 15 >= 0}

What cannot be read so is `Unread`, and whoever asks must prove it in another way.
"""

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from lowering import compat

_INTEGERS = (torch.int32, torch.int64)  # a narrower one would wrap round where a number does not


class Unread(Exception):  # noqa: N818 (a finding, not an error)
    """A node does what this reading has no words for."""


@dataclass(frozen=True)
class Linear:
    """sum over d of coefs[d] c[d], plus const, at the coordinates c of a value."""

    coefs: tuple[int, ...]
    const: int = 0

    def plus(self, other: "Linear", times: int = 1) -> "Linear":
        coefs = tuple(a + times * b for a, b in zip(self.coefs, other.coefs, strict=True))
        return Linear(coefs, self.const + times * other.const)

    def plus_const(self, const: int) -> "Linear":
        return replace(self, const=self.const + const)

    def times(self, factor: int) -> "Linear":
        return Linear(tuple(factor * c for c in self.coefs), factor * self.const)

    @property
    def never_negative(self) -> bool:
        return self.const >= 0 and all(c >= 0 for c in self.coefs)

    def map(self, change: "Callable[[Linear], Linear]") -> "Linear":
        return change(self)


@dataclass(frozen=True)
class Claims:
    """True where each of `all_of` is at least 0; `all_of` None is false everywhere."""

    all_of: frozenset[Linear] | None = frozenset()

    @staticmethod
    def that_not_negative(value: Linear) -> "Claims":
        if value.never_negative:
            return Claims()
        if value.const < 0 and all(c <= 0 for c in value.coefs):
            return Claims(None)
        return Claims(frozenset({value}))

    def both(self, other: "Claims") -> "Claims":
        if self.all_of is None or other.all_of is None:
            return Claims(None)
        return Claims(self.all_of | other.all_of)

    def either(self, other: "Claims") -> "Claims":
        for one, another in ((self, other), (other, self)):
            if one.all_of is None or another == Claims():
                return another
        raise Unread

    def negated(self) -> "Claims":
        if self.all_of is None:
            return Claims()
        if len(self.all_of) == 0:
            return Claims(None)
        if len(self.all_of) > 1:
            raise Unread
        (value,) = self.all_of
        return Claims.that_not_negative(value.times(-1).plus_const(-1))

    def map(self, change: Callable[[Linear], Linear]) -> "Claims":
        result = Claims(self.all_of if self.all_of is None else frozenset())
        for value in self.all_of or ():
            result = result.both(Claims.that_not_negative(change(value)))
        return result


@dataclass(frozen=True)
class Filled:
    """The same floating point number everywhere."""

    number: float

    def map(self, change: Callable[[Linear], Linear]) -> "Filled":
        return self


@dataclass(frozen=True)
class Added:
    """A mask that is added to scores: 0 where `seen` is true, the dtype's smallest or less else."""

    seen: Claims

    def map(self, change: Callable[[Linear], Linear]) -> "Added":
        return Added(self.seen.map(change))


Value = Linear | Claims | Filled | Added
_V = TypeVar("_V", Linear, Claims, Added)


@dataclass(frozen=True)
class Operand:
    """A tensor as an argument: how it was read, and the fake tensor that stands for it."""

    value: Value
    example: Tensor


def read_rule(wanted: fx.Node, known: dict[fx.Node, Any]) -> Claims:
    """Return the claims under which a mask shows a key: is true, or adds 0 where it is additive.

    `known` collects what was read.

    Raises:
        Unread: some node that the mask comes from is not understood, or depends on an input.
    """
    pending = [wanted]
    while pending:
        node = pending[-1]
        missing = [n for n in node.all_input_nodes if n not in known]
        if missing:
            pending.extend(missing)
            continue
        pending.pop()
        if node not in known:
            known[node] = _read(node, known)
    rule = known[wanted].value if isinstance(known[wanted], Operand) else None
    rule = rule.seen if isinstance(rule, Added) else rule
    if not isinstance(rule, Claims):
        raise Unread
    return rule


def _read(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    out = compat.example(node)
    if isinstance(out, (int, torch.SymInt)):
        return out
    reader = _READERS.get(_name(node) or "")
    if reader is None or not isinstance(out, Tensor):
        raise Unread
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
    try:
        bound = inspect.signature(reader).bind(out, *args, **kwargs)
    except TypeError as error:
        raise Unread from error
    return Operand(reader(*bound.args, **bound.kwargs), out)


def _name(node: fx.Node) -> str | None:
    """Return PyTorch's name of what a node calls; None for a function of anyone else's."""
    if node.op == "call_method":
        return str(node.target)
    name = getattr(node.target, "__name__", "")
    places = (operator, torch)
    ours = node.op == "call_function" and any(getattr(p, name, None) is node.target for p in places)
    return name if ours else None


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unread  # a symbolic number among them: it may differ from call to call
    return value


def _as(kind: type[_V], operand: Any) -> _V:
    if not isinstance(operand, Operand) or not isinstance(operand.value, kind):
        raise Unread
    return operand.value


def _either(operand: Any) -> Value:
    if not isinstance(operand, Operand):
        raise Unread
    return operand.value


def _spread(operand: Any, kind: type[_V], out: Tensor) -> _V:
    """Return a value in the coordinates of a shape that it broadcasts to."""
    value, sizes = _as(kind, operand), operand.example.shape
    new = out.dim() - len(sizes)
    moves = []
    for size, wanted in zip(sizes, out.shape[new:], strict=True):
        alone = compat.known(size == 1)
        if not alone and not compat.known(size == wanted):
            raise Unread
        moves.append(not alone)

    def change(linear: Linear) -> Linear:
        kept = tuple(c if m else 0 for c, m in zip(linear.coefs, moves, strict=True))
        return Linear((0,) * new + kept, linear.const)

    return value.map(change)  # pyright: ignore[reportReturnType]


def _number(operand: Any, out: Tensor) -> Linear:
    if isinstance(operand, Operand):
        if operand.example.dtype not in _INTEGERS:
            raise Unread
        return _spread(operand, Linear, out)
    return Linear((0,) * out.dim(), _integer(operand))


def _filled(out: Tensor, number: Any) -> Value:
    if isinstance(number, bool) or out.dtype == torch.bool:
        if out.dtype != torch.bool or number not in (0, 1):
            raise Unread
        return Claims() if number else Claims(None)
    if out.dtype.is_floating_point and isinstance(number, (int, float)):
        return Filled(float(number))
    if out.dtype not in _INTEGERS:
        raise Unread
    return Linear((0,) * out.dim(), _integer(number))


def _arange(out: Tensor, *bounds: Any, dtype: Any = None, device: Any = None) -> Value:
    start = _integer(bounds[0]) if len(bounds) > 1 else 0
    if out.dtype not in _INTEGERS or len(bounds) not in (1, 2):
        raise Unread
    return Linear((1,), start)


def _ones(out: Tensor, *sizes: Any, dtype: Any = None, device: Any = None) -> Value:
    return _filled(out, 1)


def _zeros(out: Tensor, *sizes: Any, dtype: Any = None, device: Any = None) -> Value:
    return _filled(out, 0)


def _full(out: Tensor, size: Any, number: Any, *, dtype: Any = None, device: Any = None) -> Value:
    return _filled(out, number)


def _new_full(
    out: Tensor, like: Any, size: Any, number: Any, *, dtype: Any = None, device: Any = None
) -> Value:
    return _filled(out, number)


def _add(out: Tensor, a: Any, b: Any) -> Value:
    return _exact(out, _number(a, out).plus(_number(b, out)))


def _sub(out: Tensor, a: Any, b: Any) -> Value:
    return _exact(out, _number(a, out).plus(_number(b, out), -1))


def _exact(out: Tensor, value: Linear) -> Linear:
    if out.dtype not in _INTEGERS:
        raise Unread
    return value


def _comparison(of: Callable[[Linear, Linear], Linear]) -> Callable[..., Value]:
    def read(out: Tensor, a: Any, b: Any) -> Value:
        return Claims.that_not_negative(of(_number(a, out), _number(b, out)))

    return read


_le = _comparison(lambda a, b: b.plus(a, -1))
_ge = _comparison(lambda a, b: a.plus(b, -1))
_lt = _comparison(lambda a, b: b.plus(a, -1).plus_const(-1))
_gt = _comparison(lambda a, b: a.plus(b, -1).plus_const(-1))


def _eq(out: Tensor, a: Any, b: Any) -> Value:
    apart = _number(a, out).plus(_number(b, out), -1)
    claim = Claims.that_not_negative
    return claim(apart).both(claim(apart.times(-1)))


def _ne(out: Tensor, a: Any, b: Any) -> Value:
    return _eq(out, a, b).negated()  # pyright: ignore[reportAttributeAccessIssue]


def _truth(operand: Any, out: Tensor) -> Claims:
    if isinstance(operand, bool):
        return Claims() if operand else Claims(None)
    return _spread(operand, Claims, out)


def _and(out: Tensor, a: Any, b: Any) -> Value:
    return _truth(a, out).both(_truth(b, out))


def _or(out: Tensor, a: Any, b: Any) -> Value:
    return _truth(a, out).either(_truth(b, out))


def _not(out: Tensor, a: Any) -> Value:
    return _truth(a, out).negated()


def _tril(out: Tensor, x: Any, diagonal: Any = 0) -> Value:
    below = Linear((0,) * (out.dim() - 2) + (1, -1), _integer(diagonal))
    return _cut(out, x, Claims.that_not_negative(below))


def _triu(out: Tensor, x: Any, diagonal: Any = 0) -> Value:
    above = Linear((0,) * (out.dim() - 2) + (-1, 1), -_integer(diagonal))
    return _cut(out, x, Claims.that_not_negative(above))


def _cut(out: Tensor, x: Any, kept: Claims) -> Value:
    """Read what is 0, or false, but for a triangle."""
    if out.dtype.is_floating_point:
        if not _hides(x, out):
            raise Unread
        return Added(kept.negated())
    return _as(Claims, x).both(kept)


def _tensor(out: Tensor, number: Any, dtype: Any = None, device: Any = None) -> Value:
    return _filled(out, number)


def _where(out: Tensor, condition: Any, x: Any, y: Any) -> Value:
    shown = _truth(condition, out)
    if _is_zero(x) and _hides(y, out):
        return Added(shown)
    if _hides(x, out) and _is_zero(y):
        return Added(shown.negated())
    raise Unread


def _masked_fill(out: Tensor, x: Any, mask: Any, number: Any) -> Value:
    if not _hides(number, out):
        raise Unread
    before = Claims() if _is_zero(x) else _spread(x, Added, out).seen
    return Added(before.both(_truth(mask, out).negated()))


def _float(operand: Any) -> float | None:
    value = operand.value if isinstance(operand, Operand) else operand
    number = value.number if isinstance(value, Filled) else value
    return number if isinstance(number, (int, float)) else None


def _is_zero(operand: Any) -> bool:
    return _float(operand) == 0


def _hides(operand: Any, out: Tensor) -> bool:
    number = _float(operand)
    least = torch.finfo(out.dtype).min if out.dtype.is_floating_point else None
    return number is not None and least is not None and number <= least


def _same(out: Tensor, x: Any, *_: Any, dtype: Any = None, device: Any = None) -> Value:
    value = _either(x)
    if out.dtype != x.example.dtype or out.dim() != x.example.dim():
        raise Unread
    return value


def _expand(out: Tensor, x: Any, *_: Any) -> Value:
    if out.dtype.is_floating_point:
        return _spread(x, Added, out)
    return _spread(x, Claims, out) if out.dtype == torch.bool else _spread(x, Linear, out)


def _unsqueeze(out: Tensor, x: Any, dim: Any) -> Value:
    at = _integer(dim) % out.dim()
    return _either(x).map(lambda v: replace(v, coefs=(*v.coefs[:at], 0, *v.coefs[at:])))


def _getitem(out: Tensor, x: Any, index: Any) -> Value:
    index = index if isinstance(index, tuple) else (index,)
    value = _either(x)
    if any(isinstance(i, Operand) for i in index):
        return value.map(lambda v: _gathered(out, v, index))
    if Ellipsis in index:
        at, given = index.index(Ellipsis), sum(i is not None for i in index) - 1
        index = (*index[:at], *[slice(None)] * (x.example.dim() - given), *index[at + 1 :])
    return value.map(lambda v: _sliced(v, index))


def _gathered(out: Tensor, value: Linear, index: tuple[Any, ...]) -> Linear:
    if len(index) != len(value.coefs):
        raise Unread
    result = Linear((0,) * out.dim(), value.const)
    for coef, one in zip(value.coefs, index, strict=True):
        place = _number(one, out)
        if coef and not place.never_negative:
            raise Unread  # it would count from the end
        result = result.plus(place, coef)
    return result


def _sliced(value: Linear, index: tuple[Any, ...]) -> Linear:
    coefs, const, left = [], value.const, list(value.coefs)
    for one in index:
        if one is None:
            coefs.append(0)
            continue
        if not left:
            raise Unread
        coef = left.pop(0)
        if isinstance(one, slice):
            if one.step not in (None, 1):
                raise Unread
            coefs.append(coef)
        start = (one.start or 0) if isinstance(one, slice) else one
        if _integer(start) < 0:
            raise Unread
        const += coef * start
    return Linear((*coefs, *left), const)


def _diff(out: Tensor, x: Any, n: Any = 1, dim: Any = -1, prepend: Any = None) -> Value:
    """Read x[i] - x[i - 1], where what is put before x[0] goes on in the same steps."""
    value, dim = _as(Linear, x), _integer(dim) % out.dim()
    step = value.coefs[dim]
    if n != 1 or out.dtype not in _INTEGERS:
        raise Unread
    if prepend is not None:
        first = replace(value, coefs=tuple(0 if d == dim else c for d, c in enumerate(value.coefs)))
        before = _as(Linear, prepend)
        if not compat.known(prepend.example.shape[dim] == 1):
            raise Unread
        before = replace(
            before, coefs=tuple(0 if d == dim else c for d, c in enumerate(before.coefs))
        )
        if first.plus(before, -1) != Linear((0,) * out.dim(), step):
            raise Unread
    return Linear((0,) * out.dim(), step)


def _cumsum(out: Tensor, x: Any, dim: Any) -> Value:
    if x.value not in (Claims(None), Linear((0,) * out.dim())):
        raise Unread
    return Linear((0,) * out.dim())


_READERS: dict[str, Callable[..., Value]] = {
    "arange": _arange, "ones": _ones, "zeros": _zeros, "full": _full,
    "new_ones": _ones, "new_zeros": _zeros, "new_full": _new_full,
    "ones_like": _ones, "zeros_like": _zeros, "tensor": _tensor,
    "add": _add, "sub": _sub, "diff": _diff, "cumsum": _cumsum,
    "le": _le, "lt": _lt, "ge": _ge, "gt": _gt, "eq": _eq, "ne": _ne,
    "__eq__": _eq, "__ne__": _ne,  # what torch 2.11 traces for == and !=
    "and_": _and, "logical_and": _and, "bitwise_and": _and,
    "or_": _or, "logical_or": _or, "bitwise_or": _or,
    "invert": _not, "inv": _not, "logical_not": _not, "bitwise_not": _not,
    "tril": _tril, "triu": _triu, "where": _where, "masked_fill": _masked_fill,
    "to": _same, "bool": _same, "contiguous": _same, "clone": _same,
    "expand": _expand, "unsqueeze": _unsqueeze, "getitem": _getitem,
}  # fmt: skip
