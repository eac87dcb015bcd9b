"""What the passes before `marks` have in common: they rewrite nodes, where a graph has marks."""

from collections.abc import Callable

from torch import fx

from lowering.graphs.names import path_of
from lowering.graphs.pairing import is_mark, spelled_out_outputs
from lowering.graphs.subgraphs import Subgraphs
from lowering.graphs.writes import written_into


def rewrite_where_marked(
    gm: fx.GraphModule,
    is_wanted: Callable[[fx.Node], bool],
    rewrite: Callable[[fx.Node, set[fx.Node], set[fx.Node]], bool],
) -> tuple[str, ...]:
    """Rewrite what is wanted of each graph with a mark in it, and return the paths of what was.

    `rewrite` is given a node, the outputs of attention that is spelled out in its graph, and what
    is written into there; it tells whether it did anything.
    """
    rewritten: list[str] = []
    for graph, modules in Subgraphs(gm).modules.items():
        if not any(map(is_mark, graph.nodes)):
            continue
        stops, written = spelled_out_outputs(graph), written_into(graph)
        wanted = [node for node in graph.nodes if is_wanted(node)]
        found = [path_of(node) for node in wanted if rewrite(node, stops, written)]
        if found:
            for module in modules:
                module.recompile()
        rewritten.extend(found)
    return tuple(rewritten)
