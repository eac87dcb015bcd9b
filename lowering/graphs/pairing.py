"""Which mark an attention belongs to, by dataflow: from its query back to marks.

Not through other attention: that belongs to an earlier layer, and without this stop, a layer that
nobody marked would take the mark of the layer before it.
"""

from collections.abc import Collection
from typing import Any

from torch import fx

from lowering import compat
from lowering.graphs.calls import name_of
from lowering.graphs.products import is_product
from simplex_ops.contract.schema import ATTN_OP
from simplex_ops.marking.call import SDPA
from simplex_ops.marking.mark_op import MARK_OP

_FAR = 12  # nodes between a softmax and the product with values, of any spelling


def calls_op(node: fx.Node, op: Any) -> bool:
    """Say whether a node calls an operator of ours."""
    return node.op == "call_function" and node.target in (op, op.overloadpacket)


def is_mark(node: fx.Node) -> bool:
    """Say whether a node is a mark."""
    return calls_op(node, MARK_OP)


def is_softmax(node: fx.Node) -> bool:
    """Say whether a node is a softmax."""
    return name_of(node) == "softmax"


def spelled_out_outputs(graph: fx.Graph) -> set[fx.Node]:
    """Return the products that follow from a softmax first: outputs of attention, if it is that."""
    found: set[fx.Node] = set()
    for softmax in filter(is_softmax, graph.nodes):
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
        elif node.target is not SDPA and not calls_op(node, ATTN_OP):
            pending.extend(node.all_input_nodes)
    return found


def _traced_within(call: fx.Node, mark: fx.Node) -> bool:
    """Say whether a call was traced inside the module that emitted a mark, where both are known.

    Where what an attention makes cannot be told from other nodes, dataflow alone would pair a mark
    with the next layer's call.
    """
    known = compat.module_stack(call) and compat.module_stack(mark)
    return not known or within(call, mark)


def within(node: fx.Node, mark: fx.Node) -> bool:
    """Say whether a node was traced inside the module that emitted a mark."""
    owner = compat.module_stack(mark)
    if not owner:  # the frame that Dynamo traced is the module's own
        return compat.is_dynamos(mark.graph)
    return next(reversed(owner)) in compat.module_stack(node)
