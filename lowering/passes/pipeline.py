"""The passes over Dynamo's graph, in their order.

Each is a function from a graph with its sub-graphs, and names for their modules, to its `Report`,
in a file of its own that shows before and after, and never raises on a graph that it does not
understand. `identity` names them and their order; it joins the compile caches' keys beside the
digest of all sources.
"""

from collections.abc import Callable

from torch import fx

from lowering.graphs.names import Names
from lowering.graphs.subgraphs import Subgraphs
from lowering.passes import folded_heads, marks, spelled_out
from lowering.report import Report

Pass = Callable[[Subgraphs, Names], Report]

PASSES: tuple[Pass, ...] = (spelled_out.join, folded_heads.fold, marks.rewrite)


def identity() -> str:
    """Return the passes by name, in their order."""
    return " ".join(f"{run.__module__}.{run.__name__}" for run in PASSES)


def run_passes(gm: fx.GraphModule) -> Report:
    """Run every pass on a graph and its sub-graphs, and report on all."""
    subgraphs, names = Subgraphs(gm), Names()
    found = [run(subgraphs, names) for run in PASSES]
    return Report(
        tuple(r for report in found for r in report.rewritten),
        tuple(r for report in found for r in report.refused),
        tuple(r for report in found for r in report.unmarked),
        tuple(r for report in found for r in report.joined),
        tuple(r for report in found for r in report.folded),
    )
