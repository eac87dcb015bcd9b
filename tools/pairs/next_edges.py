"""Where the edges stand that follow an edge in a graph of `hops`, and who attends to them."""

import torch
from torch import Tensor

from simplex_ops import AttendedPairs
from tools.experiments.hops import Hops


def edges_in_order(task: Hops, generator: torch.Generator) -> Tensor:
    """Return one graph's edges [1, nodes, 2], each followed by the one that it leads to.

    A permutation is walked cycle after cycle.
    """
    edges = task.draw(1, generator)[0][0]
    target = dict(edges.tolist())
    order: list[int] = []
    for start in range(task.nodes):
        node = start
        while node not in order:
            order.append(node)
            node = target[node]
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
