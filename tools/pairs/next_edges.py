"""Where the edges stand that follow an edge in a graph of `hops`, and who attends to them."""

import torch
from torch import Tensor

from simplex_ops import AttendedPairs
from tools.experiments.hops import Hops


def edges_in_order(task: Hops, generator: torch.Generator) -> Tensor:
    """Return one graph's edges [1, nodes, 2], each followed by the one that it leads to.

    A permutation is walked cycle after cycle, the longest first.
    """
    edges = task.draw(1, generator)[0][0]
    target = dict(edges.tolist())

    def walk(node: int) -> list[int]:
        walked: list[int] = []
        while node not in walked:
            walked.append(node)
            node = target[node]
        return walked

    walks = sorted(map(walk, range(task.nodes)), key=len, reverse=True)
    order = dict.fromkeys(node for walked in walks for node in walked)
    return torch.tensor([[[node, target[node]] for node in order]])


def next_two(edges: Tensor) -> Tensor:
    """Return [B, N, 2]: where the next edge of each edge stands, and the one after that."""
    place = edges[..., 0].argsort(-1)  # of the edge that leaves a node
    following = place.gather(-1, edges[..., 1])
    return torch.stack((following, following.gather(-1, following)), -1)


def heaviest_is_next_two(pairs: AttendedPairs, edges: Tensor) -> Tensor:
    """Return [B, H, N]: is each query's heaviest pair its next two edges, in either order?"""
    found = torch.stack((pairs.j[..., 0], pairs.k[..., 0]), -1).sort(-1).values
    return (found == next_two(edges).sort(-1).values[:, None]).all(-1)


def weight_by_steps(pairs: AttendedPairs, edges: Tensor) -> Tensor:
    """Return [H, N, N]: the mean weight of the pair whose j is so many steps on, and k so many.

    A step is from an edge to the next; queries whose next two edges are no two others are left out.
    `pairs` must hold all pairs of a query.
    """
    steps = _steps_on(edges)  # [B, query, key]
    nodes = steps.shape[-1]
    near = next_two(edges)
    own = torch.arange(nodes)
    has_two = (near != own[:, None]).all(-1)
    heads = pairs.weight.shape[1]
    found = torch.zeros(heads, nodes * nodes, dtype=torch.float64)
    for row, query in has_two.nonzero().tolist():
        on = steps[row, query]
        for head in range(heads):
            j, k, weight = (t[row, head, query] for t in pairs)
            reached = (on[j] >= 0) & (on[k] >= 0)
            place = (on[j] * nodes + on[k])[reached]
            found[head].index_add_(0, place, weight[reached].double())
    return found.view(heads, nodes, nodes) / has_two.sum()


def _steps_on(edges: Tensor) -> Tensor:
    """Return [B, N, N]: how many steps lead from an edge to another, -1 where none do."""
    following = next_two(edges)[..., 0]
    batch, nodes = following.shape
    steps = torch.full((batch, nodes, nodes), -1)
    at = torch.arange(nodes).expand(batch, nodes)
    for step in range(nodes):
        known = steps.gather(2, at[..., None])
        steps.scatter_(2, at[..., None], torch.where(known < 0, step, known))
        at = following.gather(1, at)
    return steps
