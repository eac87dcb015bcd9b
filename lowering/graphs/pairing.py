"""Which mark an attention belongs to, by dataflow: from its query back to marks.

Not through other attention: that belongs to an earlier layer, and without this stop, a layer that
nobody marked would take the mark of the layer before it.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from lowering import compat
from lowering.graphs.calls import name_of
from lowering.graphs.products import is_product
from simplex_ops.contract.schema import ATTN_OP
from simplex_ops.marking.call import SDPA
from simplex_ops.marking.mark_op import MARK_OP

_FAR = 12  # nodes between a softmax and the product with values, of any spelling


_MARKS = (MARK_OP, MARK_OP.overloadpacket)
_SOFTMAXES = (F.softmax, torch.softmax, torch.ops.aten.softmax)
_ATTENTION = (SDPA, ATTN_OP, ATTN_OP.overloadpacket)


def is_mark(node: fx.Node) -> bool:
    """Say whether a node is a mark."""
    return node.target in _MARKS


def marks_in(graph: fx.Graph) -> list[fx.Node]:
    """Return the marks of a graph, in its order."""
    return _calls_of(graph, _MARKS)


def calls_in(graph: fx.Graph) -> list[fx.Node]:
    """Return a graph's calls of scaled_dot_product_attention, in its order."""
    return _calls_of(graph, (SDPA,))


def softmaxes_in(graph: fx.Graph) -> list[fx.Node]:
    """Return the softmaxes of a graph, in its order."""
    found = [*_calls_of(graph, _SOFTMAXES), *graph.find_nodes(op="call_method", sort=False)]
    return sorted(filter(is_softmax, found))


def _calls_of(graph: fx.Graph, functions: tuple[Any, ...]) -> list[fx.Node]:
    found = (graph.find_nodes(op="call_function", target=f, sort=False) for f in functions)
    return sorted(node for nodes in found for node in nodes)


def is_softmax(node: fx.Node) -> bool:
    """Say whether a node is a softmax."""
    return name_of(node) == "softmax"


def spelled_out_outputs(graph: fx.Graph) -> set[fx.Node]:
    """Return the products that follow from a softmax first: outputs of attention, if it is that."""
    found: set[fx.Node] = set()
    for softmax in softmaxes_in(graph):
        reached = {softmax}
        for _ in range(_FAR):
            reached = {user for node in reached for user in node.users if not is_mark(user)}
            products = {node for node in reached if is_product(node)}
            found |= products
            reached -= products
    return found


def marks_behind(query: Any, call: fx.Node, stops: Collection[fx.Node] = ()) -> list[fx.Node]:
    """Walk back from the query of a call to marks."""
    found: list[fx.Node] = []
    pending, seen = [query], set()
    while pending:
        node = pending.pop()
        if not isinstance(node, fx.Node) or node in seen or node in stops:
            continue
        seen.add(node)
        if is_mark(node):
            if _traced_within(call, node):
                found.append(node)
        elif node.target not in _ATTENTION:
            pending.extend(node.all_input_nodes)
    return found


def _traced_within(call: fx.Node, mark: fx.Node) -> bool:
    """Say whether a call was traced inside the module that emitted a mark, where both are known.

    Where what an attention makes cannot be told from other nodes, dataflow alone would pair a mark
    with the next layer's call.
    """
    known = compat.modules_of(call) and compat.modules_of(mark)
    return not known or within(call, mark)


def within(node: fx.Node, mark: fx.Node) -> bool:
    """Say whether a node was traced inside the module that emitted a mark."""
    owner = compat.modules_of(mark)
    if not owner:  # the frame that Dynamo traced is the module's own
        return compat.is_dynamos(mark.graph)
    return next(reversed(owner)) in compat.modules_of(node)
