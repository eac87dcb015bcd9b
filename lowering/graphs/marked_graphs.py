"""What the passes before `marks` have in common: they rewrite nodes, where a graph has marks."""

from collections.abc import Callable

from torch import fx

from lowering.graphs.names import Names
from lowering.graphs.pairing import marks_in, spelled_out_outputs
from lowering.graphs.subgraphs import Subgraphs
from lowering.graphs.writes import written_into


def rewrite_where_marked(
    subgraphs: Subgraphs,
    names: Names,
    wanted_in: Callable[[fx.Graph], list[fx.Node]],
    rewrite: Callable[[fx.Node, set[fx.Node], set[fx.Node]], fx.Node | None],
) -> tuple[str, ...]:
    """Rewrite what is wanted of each graph with a mark in it, and name the modules of what was.

    `rewrite` is given a node, the outputs of attention that is spelled out in its graph, and what
    is written into there; it returns the node's mark, or None where it did nothing.
    """
    rewritten: list[str] = []
    for graph, modules in subgraphs.modules.items():
        wanted = wanted_in(graph) if marks_in(graph) else []
        if not wanted:
            continue
        stops, written = spelled_out_outputs(graph), written_into(graph)
        marks = [m for node in wanted if (m := rewrite(node, stops, written)) is not None]
        if marks:
            for module in modules:
                module.recompile()
        rewritten.extend(map(names.of_mark, marks))
    return tuple(rewritten)
