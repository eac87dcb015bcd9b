"""By what else a marked module attends: why no call pairs with its mark, or what is beside one."""

from torch import fx

from lowering import compat
from lowering.graphs.pairing import is_softmax, marks_behind, spelled_out_outputs
from lowering.graphs.spelled import scores_of
from lowering.graphs.subgraphs import Subgraphs
from lowering.passes.spelled_out import why_not
from simplex_ops.marking.another import is_attention, name_of, weighs
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
        name = _name(node)
        if name in _OTHER_WAYS:
            return (
                f"no scaled_dot_product_attention takes its query from the marked input: it "
                f'attends by {name} (attn_implementation="sdpa" sets it right in transformers)'
            )
        if _is_exported(node):
            return (
                "it attends by torch.ops.aten.scaled_dot_product_attention, as a program of "
                "torch.export does: call F.scaled_dot_product_attention, or export the model under "
                "simplex_ops.enable()"
            )
    return (
        "no scaled_dot_product_attention in its graph takes its query from the marked input. "
        "Either a graph break parts the two (torch.compile(fullgraph=True) shows where), "
        "or DDPOptimizer did (set torch._dynamo.config.optimize_ddp = False), "
        "or the model attends by other means "
        '(attn_implementation="sdpa" sets it right in transformers)'
    )


def attends_again(mark: fx.Node) -> str | None:
    """Return by what a mark's module attends beside its call; None where by nothing."""
    stops = spelled_out_outputs(mark.graph)
    for node in _made_from(mark):
        if is_attention(node.target, (*node.args, *node.kwargs.values()), fx.Node):
            source = node
        else:
            source = scores_of(node) if weighs(node.target) else None
        if source is not None and all(
            mark in marks_behind(operand, node, stops) for operand in source.all_input_nodes[:2]
        ):
            return _name(node)
    return None


def _is_exported(node: fx.Node) -> bool:
    return _name(node) == SDPA.__name__ and node.target is not SDPA


def _name(node: fx.Node) -> str:
    return name_of(node.target)


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
