"""The pass: attention that a marked module spells out becomes one call of it.

Before, in Dynamo's graph of a marked module, in any of many spellings (`graphs/spelled.py`):

    x      = simplex::mark(h, ...)
    q, k, v                                  made from x
    scores = matmul(q, k.transpose(2, 3)) * s
    scores = scores.masked_fill(hidden, -inf)
    P      = dropout(softmax(scores, -1, dtype=float32).to(q.dtype), p=0.0)
    out    = matmul(P, v)

After, for the pass that serves marks:

    x      = simplex::mark(h, ...)
    out    = scaled_dot_product_attention(q, k, v, ~hidden, 0.0, False, scale=s, enable_gqa=True)

Axes that stand in another order, or in one, are brought to [B, H, N, D] and back. What no mark is
behind stays as it is, and so does what is no such attention: `marks` then refuses the mark with
what is told here (`why_not`).
"""

import functools
import operator

import torch
from torch import fx

from lowering import compat
from lowering.graphs.calls import (
    dtype_of,
    emit,
    emit_method,
    erase_unused,
    is_permutation,
    name_of,
)
from lowering.graphs.layout import Layout
from lowering.graphs.marked_graphs import rewrite_where_marked
from lowering.graphs.names import Names
from lowering.graphs.pairing import marks_behind, softmaxes_in
from lowering.graphs.spelled import (
    Laid,
    Masking,
    NotSpelled,
    Spelled,
    read_attention,
    scores_of,
)
from lowering.graphs.subgraphs import Subgraphs
from lowering.graphs.writes import written_into
from lowering.report import Report
from simplex_ops.marking.call import SDPA


def join(subgraphs: Subgraphs, names: Names) -> Report:
    """Make one call of each attention that a marked module spells out, and count them.

    It never raises on a graph that it does not understand.
    """
    return Report(joined=rewrite_where_marked(subgraphs, names, softmaxes_in, _join))


def why_not(softmax: fx.Node, mark: fx.Node) -> str | None:
    """Return why what surrounds a softmax did not become a call; None where it could."""
    try:
        _read(softmax, mark, written_into(softmax.graph))
    except NotSpelled as reason:
        return str(reason)
    return None


def _join(softmax: fx.Node, stops: set[fx.Node], written: set[fx.Node]) -> fx.Node | None:
    """Make a call of what surrounds a softmax, and return its mark; None where it stays."""
    marks = _marks_of(softmax, stops)
    if len(marks) != 1:
        return None
    try:
        _put(_read(softmax, marks[0], written), marks[0])
    except Exception:  # noqa: BLE001 (whatever it is, the mark stays, and is refused with it)
        return None
    return marks[0]


def _marks_of(softmax: fx.Node, stops: set[fx.Node]) -> list[fx.Node]:
    scores = scores_of(softmax)
    if scores is None:
        return []
    behind = [m for n in scores.all_input_nodes for m in marks_behind(n, softmax, stops)]
    return list(dict.fromkeys(behind))


def _read(softmax: fx.Node, mark: fx.Node, written: set[fx.Node]) -> Spelled:
    _, k2, _, mask, *_ = mark.args
    found = read_attention(softmax, mark, k2)
    laid = (found.query, found.key, found.value, *(m.mask for m in found.masks))
    for one in laid:
        if one.node in written:
            raise NotSpelled(
                f"{one.node.name}, of which it attends, is written into",
                "make a new tensor instead of writing in place",
            )
    if not found.masks and mask is None and mark.kwargs.get("is_causal", True):
        raise NotSpelled(
            "its attention hides no keys, and the module was marked with is_causal=True",
            "mark it with is_causal=False, or hide the keys after the query",
        )
    return found


def _put(found: Spelled, mark: fx.Node) -> None:
    out = found.out.node
    graph = out.graph
    with graph.inserting_before(out):
        keys = tuple(name for name in found.heads if name != "g")
        layout = Layout(graph, mark.args[1], found.sizes)  # pyright: ignore[reportArgumentType]
        query = layout.laid_as(found.query, (("b",), found.heads, ("i",), ("c",)))
        key = layout.laid_as(found.key, (("b",), keys, ("j",), ("c",)))
        value = layout.laid_as(found.value, (("b",), keys, ("j",), ("d",)))
        call = graph.call_function(
            SDPA,
            (query, key, value, _mask(layout, found), found.dropout_p, False),
            {"scale": found.scale, "enable_gqa": True},
        )
        stands = (("b",), found.heads, ("i",), ("d",))
        call.meta = dict(out.meta)
        if found.out.axes != stands or dtype_of(query) != dtype_of(out):
            like, width = compat.example(query), compat.example(value).shape[-1]
            call.meta["example_value"] = like.new_empty((*like.shape[:-1], width))
        made = layout.laid_as(Laid(call, stands), found.out.axes)
        if dtype_of(made) != dtype_of(out):
            made = emit_method(graph, "to", made, dtype_of(out))
        if _is_viewed(out):
            made = emit_method(graph, "contiguous", made)
    out.replace_all_uses_with(made)
    erase_unused(found.chain)


def _mask(layout: Layout, found: Spelled) -> fx.Node | None:
    """Return all masks as one of scaled_dot_product_attention: added, or true where seen."""
    masks = [_laid_out(layout, m, found) for m in found.masks]
    if not masks:
        return None
    return functools.reduce(lambda a, b: _both(layout.graph, a, b), masks)


def _laid_out(layout: Layout, masking: Masking, found: Spelled) -> fx.Node:
    graph, mask = layout.graph, masking.mask
    wanted = (("b",), found.heads, ("i",), ("j",))
    node, rank = mask.node, len(mask.axes)
    stands = all(
        axis in ((), own) for axis, own in zip(mask.axes, wanted[4 - rank :], strict=False)
    )
    if not (stands and 2 <= rank <= 4):
        held = {name for axis in mask.axes for name in axis} & {*found.heads}
        if held and held != {*found.heads}:
            raise NotSpelled(
                "its mask differs from key-value head to key-value head, or within one",
                "give a mask that is the same to all heads, or unmark() the module",
            )
        node = layout.laid_as(mask, wanted)
    if masking.kind == "hidden":
        return emit(graph, "call_function", operator.invert, node)
    return node


def _both(graph: fx.Graph, a: fx.Node, b: fx.Node) -> fx.Node:
    """Return one mask that hides what either hides."""
    kinds = [dtype_of(n) == torch.bool for n in (a, b)]
    if all(kinds):
        return emit(graph, "call_function", operator.and_, a, b)
    if not any(kinds):
        return emit(graph, "call_function", operator.add, a, b)
    seen, added = (a, b) if kinds[0] else (b, a)
    least = torch.finfo(dtype_of(added)).min
    hidden = emit(graph, "call_function", operator.invert, seen)
    return emit_method(graph, "masked_fill", added, hidden, least)


def _is_viewed(out: fx.Node) -> bool:
    """Say whether a view is taken of what attention makes, which its memory order must allow."""
    return any(
        name_of(user) == "view" or (is_permutation(user) and _is_viewed(user)) for user in out.users
    )
