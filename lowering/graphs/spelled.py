"""Attention that is spelled out around a softmax, read as one call.

    scores = scale * q k^T, then in any order: factors, masks added or filled in, casts
    P      = softmax(scores) over the keys, then casts, dropout
    out    = P v

Every axis is told by what it holds: "b" the batch, "h" the heads, or "k" and "g" where key-value
heads and the groups that share them are axes of their own, "i" the queries, "j" the keys, "c" what
scores sum over, "d" the width of v. An axis may hold several, outermost first, as that of bmm.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lowering.graphs.axes import axis_in_mark
from lowering.graphs.calls import (
    argument,
    constant,
    dtype_of,
    is_cast,
    is_copy,
    is_discarded_write,
    is_permutation,
    is_tensor,
    is_view,
    live_users,
    name_of,
    needs_gradient,
    order_of,
    shape_of,
)
from lowering.graphs.products import Operand, Product, is_product, read_product
from simplex_ops.marking.call import Refusal

Axis = tuple[str, ...]  # what an axis holds; nothing where it is only stretched

_HIDING = -1e4  # exp of it is 0 in float32 beside anything visible, unless logits are thousands
_FAR = 24
# Of a tensor these take its sizes alone.
_LIKE = {
    "ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full", "size",
}  # fmt: skip
_LEAVE_OUT = "leave that out, or unmark() the module"
_NO_WEIGHTS = "ask for none (output_attentions=False), or unmark() the module"


class NotSpelled(Exception):  # noqa: N818 (a finding, not an error)
    """Why what surrounds a softmax is no attention that a mark can take over."""

    def __init__(self, why: str, remedy: str = _LEAVE_OUT) -> None:
        self.refusal = Refusal(why, remedy)
        super().__init__(str(self.refusal))


@dataclass(frozen=True)
class Laid:
    """A tensor and what each of its axes holds."""

    node: fx.Node
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Masking:
    """A mask: `added` to the scores, or true where keys are `hidden`, or where they are `seen`."""

    mask: Laid
    kind: str


@dataclass(frozen=True)
class Spelled:
    """One attention. `out` is the node that holds what it makes, `heads` what counts its heads.

    `chain` has all nodes from the product of queries and keys on, in the graph's order.
    """

    query: Laid
    key: Laid
    value: Laid
    masks: tuple[Masking, ...]
    scale: float
    dropout_p: float
    out: Laid
    heads: Axis
    sizes: dict[str, int]
    chain: tuple[fx.Node, ...]


def scores_of(softmax: fx.Node) -> fx.Node | None:
    """Return the product that a softmax's scores begin with, if any."""
    return _product_before(argument(softmax, 0, "input"), {softmax})


def _product_before(node: Any, seen: set[fx.Node]) -> fx.Node | None:
    if not is_tensor(node) or node in seen or len(seen) > _FAR:
        return None
    seen.add(node)
    if is_product(node):
        return node
    size = math.prod(shape_of(node))
    inputs = [n for n in node.all_input_nodes if is_tensor(n)]
    alike = [n for n in inputs if math.prod(shape_of(n)) == size]
    return next((found for n in alike if (found := _product_before(n, seen)) is not None), None)


def read_attention(softmax: fx.Node, mark: fx.Node, k2: Any) -> Spelled:
    """Read the attention around a softmax, of the module that emitted `mark`.

    `k2` [B, Hkv, N, D] is the mark's own.

    Raises:
        NotSpelled: it is something else, and why.
    """
    batch, _, rows, _ = shape_of(k2)
    return _Reader(softmax, mark, batch, rows).read()


@dataclass
class _Reader:
    """Reads one attention. Until the softmax tells, "l" and "r" are the queries and the keys."""

    softmax: fx.Node
    mark: fx.Node
    batch: int
    rows: int
    masks: list[Masking] = field(default_factory=list)
    hidden: list[float] = field(default_factory=list)  # the scores where each mask hides a key
    scale: float = 1.0
    dropout_p: float = 0.0
    sizes: dict[str, int] = field(default_factory=dict)

    def read(self) -> Spelled:
        """Read the scores, the softmax and the values, in that order.

        Raises:
            NotSpelled: one of them is not attention's, or more stands between them.
        """
        start = scores_of(self.softmax)
        first = None if start is None else read_product(start)
        if start is None or first is None:
            raise NotSpelled(
                "its softmax is of no product of queries and keys that the pass can read",
                "attend by scaled_dot_product_attention, or unmark() the module",
            )
        end, last, between = self._after_softmax()
        made_of = (first.left.node, first.right.node)
        if not needs_gradient(self.softmax) and any(map(needs_gradient, made_of)):
            raise NotSpelled("its attention weights are made without gradients")
        left, right = _peeled(first.left), _peeled(first.right)
        held = self._held(first, shape_of(start), left, right)
        axes = self._before_softmax(start, [held[a] for a in first.axes])
        self.scale *= first.factor
        keys = self._softmax_axis(axes)
        names = {"l": "i", "r": "j"} if keys == "r" else {"r": "i", "l": "j"}
        query, key = (left, right) if keys == "r" else (right, left)
        value, held_last = self._values(last, between, axes, keys)

        def laid(operand: Operand, held: dict[str, Axis]) -> Laid:
            axes = tuple(held[a] if a else () for a in operand.axes)
            return Laid(operand.node, _renamed(axes, names))

        self.sizes = {names.get(name, name): size for name, size in self.sizes.items()}
        found = Spelled(
            query=laid(query, held),
            key=laid(key, held),
            value=laid(value, held_last),
            masks=tuple(
                Masking(Laid(m.mask.node, _renamed(m.mask.axes, names)), m.kind) for m in self.masks
            ),
            scale=self.scale,
            dropout_p=self.dropout_p,
            out=Laid(end, _renamed(tuple(held_last[a] for a in last.axes), names)),
            heads=tuple(name for name in ("h", "k", "g") if name in self.sizes),
            sizes=self.sizes,
            chain=(start, *(n for n, _ in self._steps(start)), self.softmax, *between, end),
        )
        _check_heads(found)
        return found

    def _values(
        self, last: Product, between: list[fx.Node], axes: list[Axis], keys: str
    ) -> tuple[Operand, dict[str, Axis]]:
        """Return the values, and what each letter of the product with the weights holds.

        `between` are the nodes from the softmax to that product, `axes` what those of the softmax
        hold, `keys` the name of the keys there.
        """
        weights, value = last.left, last.right
        if weights.node is not (between[-1] if between else self.softmax):
            weights, value = value, weights
        value = _peeled(value)
        after = self._through(between, axes)
        held = {a: axis for a, axis in zip(weights.axes, after, strict=True) if a}
        if held.get(self._summed(weights, last)) != (keys,):
            raise NotSpelled(
                "its softmax does not run over the keys whose values are summed",
                "take the softmax over those, or unmark() the module",
            )
        own = [a for a in value.axes if a and a not in held]
        if len(own) != 1 or own[0] not in last.axes:
            raise self._no_product()
        held[own[0]] = ("d",)
        return value, held

    @staticmethod
    def _summed(weights: Operand, last: Product) -> str:
        summed = [a for a in weights.axes if a and a not in last.axes]
        return summed[0] if len(summed) == 1 else ""

    # What the axes of the product of queries and keys hold.

    def _held(
        self, first: Product, sizes: tuple[int, ...], left: Operand, right: Operand
    ) -> dict[str, Axis]:
        of = dict(zip(first.axes, sizes, strict=True))
        alone = {
            name: [a for a in first.axes if a in one.axes and a not in other.axes]
            for name, one, other in (("l", first.left, first.right), ("r", first.right, first.left))
        }
        summed = {a for a in first.left.axes if a} - {*first.axes}
        stretched = [a for a in first.axes if a not in left.axes or a not in right.axes]
        if len(summed) != 1 or not alone["l"] or not alone["r"]:
            raise self._no_product()
        rows = {name: self._rows(letters, of, first) for name, letters in alone.items()}
        shared = [a for a in first.axes if a not in rows.values()]
        held: dict[str, Axis] = {rows["l"]: ("l",), rows["r"]: ("r",), summed.pop(): ("c",)}
        held |= self._batch_and_heads(shared, of, first, rows["l"], stretched)
        self.sizes |= {"l": of[rows["l"]], "r": of[rows["r"]]}
        return held

    def _rows(self, letters: list[str], of: dict[str, int], first: Product) -> str:
        """Return which axis of one side alone has its rows; others are heads that share a key."""
        rows = [a for a in letters if of[a] == self.rows] if len(letters) > 1 else letters
        if len(rows) > 1:
            rows = [a for a in rows if self._from_mark(first, a) == 1]
        if len(rows) != 1:
            raise self._no_product()
        return rows[0]

    def _batch_and_heads(
        self, shared: list[str], of: dict[str, int], first: Product, row: str, stretched: list[str]
    ) -> dict[str, Axis]:
        if len(shared) == 1 and of[shared[0]] == self.batch:
            self.sizes = {"b": self.batch}
            return {shared[0]: ("b",)}
        if len(shared) == 1 and self.batch and of[shared[0]] % self.batch == 0:
            if self.batch > 1 and self._from_mark(first, shared[0]) != 0:
                raise self._no_batch("batch and heads are one axis, of an order")
            self.sizes = {"b": self.batch, "h": of[shared[0]] // self.batch}
            return {shared[0]: ("b", "h")}
        if len(shared) not in (2, 3):
            raise self._no_product()
        rows = [a for a in shared if of[a] == self.batch]
        if len(rows) > 1 and self.batch > 1:
            rows = [a for a in rows if self._from_mark(first, a) == 0]
        if not rows:
            raise self._no_batch(f"its scores have the sizes {[*of.values()]}, in an order")
        heads = [a for a in shared if a != rows[0]]
        if any(of[a] == self.rows for a in heads) and self._from_mark(first, row) != 1:
            raise self._no_batch(f"there are {self.rows} rows and as many heads, in an order")
        self.sizes = {"b": self.batch}
        if len(heads) == 1:
            self.sizes["h"] = of[heads[0]]
            return {rows[0]: ("b",), heads[0]: ("h",)}
        groups = [a for a in heads if a in stretched] or heads[1:]
        kept = [a for a in heads if a not in groups] or heads[:1]
        if len(kept) != 1 or kept == groups or not any(a in stretched for a in heads):
            raise self._no_batch("heads are two axes, in an order")
        self.sizes |= {"k": of[kept[0]], "g": of[groups[-1]]}
        return {rows[0]: ("b",), kept[0]: ("k",), groups[-1]: ("g",)}

    def _from_mark(self, product: Product, letter: str) -> int | None:
        found = (
            axis_in_mark(factor.node, factor.axes.index(letter), self.mark)
            for factor in (product.left, product.right)
            if letter in factor.axes
        )
        return next((axis for axis in found if axis is not None), None)

    @staticmethod
    def _no_product() -> NotSpelled:
        return NotSpelled(
            "its softmax is of no product of queries [B, H, N, D] and keys [B, H, N, D]",
            "attend by scaled_dot_product_attention, or unmark() the module",
        )

    @staticmethod
    def _no_batch(what: str) -> NotSpelled:
        return NotSpelled(
            f"{what} that the pass cannot tell", "give queries and keys as [B, H, N, D]"
        )

    # From that product to the softmax.

    def _before_softmax(self, start: fx.Node, axes: list[Axis]) -> list[Axis]:
        for node, scores in self._steps(start):
            name = name_of(node)
            if is_cast(node) or is_copy(node):
                continue
            if is_permutation(node) or is_view(node):
                axes = self._through([node], axes)
            elif name in ("mul", "div"):
                self._factor(node, scores, name)
            elif name == "add" and argument(node, 2, "alpha", 1) == 1:
                first, second = argument(node, 0, "input"), argument(node, 1, "other")
                added = second if first is scores else first
                if not is_tensor(added) or not dtype_of(added).is_floating_point:
                    raise self._unread_scores(node)
                self._mask(added, axes, "added", node)
                self.hidden.append(torch.finfo(dtype_of(added)).min)
            elif name == "masked_fill":
                mask, value = argument(node, 1, "mask"), argument(node, 2, "value")
                self._hide(mask, value, axes, node, is_shown=False)
            elif name == "where":
                self._where(node, scores, axes)
            else:
                raise self._unread_scores(node)
        for score in self.hidden:
            if score > _HIDING:
                raise NotSpelled(
                    f"its attention scores are {score:g} in the end where a mask says so, which "
                    "does not hide",
                    'fill with float("-inf")',
                )
        return axes

    def _steps(self, start: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """Return what is done to the scores, each with the scores that it is done to, in order."""
        found: list[tuple[fx.Node, fx.Node]] = []
        reader, value = self.softmax, argument(self.softmax, 0, "input")
        while True:
            others = [u for u in live_users(value) if u is not reader and not _is_asked(value, u)]
            writes = [u for u in others if is_discarded_write(u, value) and u < reader]
            if len(writes) < len(others):
                used = next(u for u in others if u not in writes)
                raise NotSpelled(
                    f"its attention scores are used twice, in {_shown(used)} too, and there are "
                    "none of single keys to give back"
                )
            found.extend((write, value) for write in sorted(writes, reverse=True))
            if value is start:
                return found[::-1]
            inputs = [n for n in value.all_input_nodes if is_tensor(n)]
            source = next(n for n in inputs if _product_before(n, set()) is start)
            found.append((value, source))
            reader, value = value, source

    def _factor(self, node: fx.Node, scores: fx.Node, name: str) -> None:
        first, second = argument(node, 0, "input"), argument(node, 1, "other")
        factor = constant(second if first is scores else first)
        if factor is None or not factor or (name == "div" and first is not scores):
            raise NotSpelled(
                f"its attention scores are multiplied by what is no constant ({node.name})",
                "multiply the queries by it instead, or unmark() the module",
            )
        if "rounding_mode" in node.kwargs:
            raise self._unread_scores(node)
        if factor < 0 and self.masks:
            raise NotSpelled(
                f"its attention scores are multiplied by {factor} after they were masked",
                "multiply them before",
            )
        factor = factor if name == "mul" else 1 / factor
        self.scale *= factor
        self.hidden = [score * factor for score in self.hidden]

    def _where(self, node: fx.Node, scores: fx.Node, axes: list[Axis]) -> None:
        condition, shown, other = node.args
        if node.op == "call_method":
            condition, shown = shown, condition
        is_shown = shown is scores
        self._hide(condition, other if is_shown else shown, axes, node, is_shown)

    def _hide(self, mask: Any, value: Any, axes: list[Axis], node: fx.Node, is_shown: bool) -> None:
        filled = constant(value)
        if filled is None:
            raise NotSpelled(
                f"its attention scores are filled from a tensor where a mask says so ({node.name})",
                'fill with float("-inf")',
            )
        self.hidden.append(filled)
        self._mask(mask, axes, "seen" if is_shown else "hidden", node)

    def _mask(self, mask: Any, axes: list[Axis], kind: str, node: fx.Node) -> None:
        if not is_tensor(mask) or len(shape_of(mask)) > len(axes):
            raise self._unread_scores(node)
        if _reaches(mask, self.mark):
            raise NotSpelled(
                f"what is added to its attention scores or hidden of them ({mask.name}) is made "
                "from the module's input, as relative positions and selected keys are"
            )
        sizes = shape_of(mask)
        held = axes[len(axes) - len(sizes) :]
        own = tuple(() if n == 1 else axis for n, axis in zip(sizes, held, strict=True))
        self.masks.append(Masking(Laid(mask, own), kind))

    def _softmax_axis(self, axes: list[Axis]) -> str:
        dim = argument(self.softmax, 1, "dim")
        axis: Axis = axes[dim] if isinstance(dim, int) else ()
        if len(axis) != 1 or axis[0] not in ("l", "r"):
            raise NotSpelled(
                f"its softmax runs over axis {dim} of the scores, which are not keys",
                "take it over the keys, or unmark() the module",
            )
        return axis[0]

    @staticmethod
    def _unread_scores(node: fx.Node) -> NotSpelled:
        name = name_of(node) or str(node.target)
        if name in ("tanh", "clamp", "hardtanh"):
            return NotSpelled(
                f"its attention scores pass through {name}, as a softcap does, and 2-simplicial "
                "attention has none",
                "take the softcap away (attn_logit_softcapping=None), or unmark() the module",
            )
        return NotSpelled(f"its attention scores pass through {name}, which no mark serves")

    # From the softmax to the product with the values.

    def _after_softmax(self) -> tuple[fx.Node, Product, list[fx.Node]]:
        """Return the product with the values, its reading, and what lies between."""
        node, between = self.softmax, []
        while True:
            users = live_users(node)
            if len(users) != 1:
                used = " and ".join(map(_shown, users)) or "nothing"
                raise NotSpelled(
                    f"its attention weights are used {len(users)} times, in {used}, and there are "
                    "none of single keys to give back",
                    _NO_WEIGHTS,
                )
            node, before = users[0], node
            if is_product(node):
                product = read_product(node)
                if product is None or product.left.node is product.right.node:
                    raise self._unread_weights(node)
                return node, product, between
            if name_of(node) == "dropout":
                self._drop(node)
            elif name_of(node) == "nan_to_num":
                if argument(node, 1, "nan", 0.0) not in (None, 0.0):
                    raise self._unread_weights(node)
            elif not (is_cast(node) or is_copy(node) or is_view(node) or is_permutation(node)):
                raise self._unread_weights(node)
            if node.args[0] is not before:
                raise self._unread_weights(node)
            between.append(node)

    def _drop(self, node: fx.Node) -> None:
        rate, training = constant(argument(node, 1, "p", 0.5)), argument(node, 2, "training", True)
        training = node.kwargs.get("train", training)  # torch.dropout's name
        if rate is None or not isinstance(training, bool):
            raise self._unread_weights(node)
        self.dropout_p = rate if training else self.dropout_p

    @staticmethod
    def _unread_weights(node: fx.Node) -> NotSpelled:
        name = name_of(node) or str(node.target)
        if node.op == "output":
            return NotSpelled(
                "its attention weights are given back, and there are none of single keys",
                _NO_WEIGHTS,
            )
        if name in ("mul", "div", "masked_fill", "where"):
            return NotSpelled(
                f"its attention weights are multiplied or filled ({node.name}) before the values "
                "are summed, as a head mask does",
                "leave that out (head_mask=None), or unmark() the module",
            )
        return NotSpelled(
            f"its attention weights pass through {name} before the values are summed, which no "
            "mark serves"
        )

    def _through(self, nodes: list[fx.Node], axes: list[Axis]) -> list[Axis]:
        """Return what axes hold after permutations and views; all else keeps them."""
        for node in nodes:
            if is_permutation(node):
                axes = [axes[a] for a in order_of(node)]
            elif is_view(node):
                axes = self._regrouped([name for axis in axes for name in axis], node)
        return axes

    def _regrouped(self, names: list[str], node: fx.Node) -> list[Axis]:
        sizes, left, axes = shape_of(node), [*names], []
        for at, size in enumerate(sizes):
            axis: list[str] = []
            held = 1
            spare = len(sizes) - at - 1  # axes that what is left must still fill
            while left and (held < size or (self.sizes[left[0]] == 1 and len(left) > spare)):
                axis.append(left.pop(0))
                held *= self.sizes[axis[-1]]
            if held != size:
                raise NotSpelled(
                    f"its attention scores or weights get another shape ({node.name}) that the "
                    "pass cannot tell",
                    "keep them [B, H, N, N]",
                )
            axes.append(tuple(axis))
        return axes


def _check_heads(found: Spelled) -> None:
    queries, keys, values = (
        {name for axis in laid.axes for name in axis}
        for laid in (found.query, found.key, found.value)
    )
    if not {"b", *found.heads} <= queries or "b" not in keys & values:
        raise NotSpelled("its queries, keys or values are the same for all rows of the batch")
    if keys & {"h", "k", "g"} != values & {"h", "k", "g"} or "g" in keys:
        raise NotSpelled(
            "its keys and its values have not the same heads",
            "give both their key-value heads, or unmark() the module",
        )


def _renamed(axes: tuple[Axis, ...], names: dict[str, str]) -> tuple[Axis, ...]:
    return tuple(tuple(names.get(name, name) for name in axis) for axis in axes)


def _peeled(operand: Operand) -> Operand:
    """Return an operand before its axes were permuted or stretched, and its numbers widened."""
    node, axes = operand.node, operand.axes
    while node.args and is_tensor(node.args[0]):
        source: Any = node.args[0]
        if is_permutation(node):
            order = order_of(node)
            axes = tuple(axes[order.index(a)] for a in range(len(order)))
        elif name_of(node) in ("expand", "broadcast_to") and len(shape_of(source)) == len(axes):
            pairs = zip(axes, shape_of(source), shape_of(node), strict=True)
            axes = tuple(a if before == after else "" for a, before, after in pairs)
        elif not (is_copy(node) or (is_cast(node) and _widens(node, source))):
            break
        node = source
    return Operand(node, axes)


def _widens(node: fx.Node, source: fx.Node) -> bool:
    return dtype_of(source).itemsize <= dtype_of(node).itemsize


def _is_asked(node: fx.Node, by: fx.Node) -> bool:
    """Say whether a node is given to another for its sizes or its dtype alone."""
    name = name_of(by)
    return name in _LIKE or (name in ("to", "type_as", "view_as") and by.args[0] is not node)


def _reaches(node: fx.Node, mark: fx.Node) -> bool:
    pending, seen = [node], {node}
    while pending:
        for source in pending.pop().all_input_nodes:
            if source is mark:
                return True
            if source not in seen and is_tensor(source) and name_of(source) not in _LIKE:
                seen.add(source)
                pending.append(source)
    return False


def _shown(node: fx.Node) -> str:
    return "what the graph gives back" if node.op == "output" else node.name
