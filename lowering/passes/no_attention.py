"""Why no scaled_dot_product_attention takes its query from a mark, and what helps."""

from torch import fx

from lowering import compat
from lowering.graphs.pairing import is_softmax
from lowering.graphs.subgraphs import Subgraphs
from lowering.passes.spelled_out import why_not
from simplex_ops.marking.call import SDPA

_OTHER_WAYS = ("softmax", "multi_head_attention_forward", "flex_attention")


def why_no_attention(mark: fx.Node, subgraphs: Subgraphs) -> str:
    """Return the reason and its remedy, told from what the module makes of the marked input."""
    for node in _made_from(mark):
        inside = [body for body in subgraphs.bodies_of(node) if _attends(body, subgraphs)]
        if inside:
            return (
                "its attention is in a part of the module that is checkpointed, or compiled, apart "
                "from the module's input: do that to the whole module or layer"
            )
        if is_softmax(node):
            reason = why_not(node, mark)
            if reason is not None:
                return reason
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name in _OTHER_WAYS:
            return (
                f"no scaled_dot_product_attention takes its query from the marked input: it "
                f'attends by {name} (attn_implementation="sdpa" sets it right in transformers)'
            )
    return (
        "no scaled_dot_product_attention in its graph takes its query from the marked input. "
        "Either a graph break parts the two (torch.compile(fullgraph=True) shows where), "
        "or DDPOptimizer did (set torch._dynamo.config.optimize_ddp = False), "
        "or the model attends by other means "
        '(attn_implementation="sdpa" sets it right in transformers)'
    )


def _made_from(mark: fx.Node) -> list[fx.Node]:
    """Return the nodes of a mark's module that follow from the mark, in the graph's order."""
    owner = next(reversed(compat.modules_of(mark)), None)
    found, reached = [], {mark}
    for node in mark.graph.nodes:
        if reached.isdisjoint(node.all_input_nodes):
            continue
        stack = compat.modules_of(node)
        if owner is None or not stack or owner in stack:
            reached.add(node)
            found.append(node)
    return found


def _attends(body: fx.Graph, subgraphs: Subgraphs) -> bool:
    return any(
        node.target is SDPA
        or is_softmax(node)
        or any(_attends(b, subgraphs) for b in subgraphs.bodies_of(node))
        for node in body.nodes
    )
