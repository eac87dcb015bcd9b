"""Masks: hide from each query the pairs that it does not see."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from simplex_ops.devices.blocked.sides import Side
from simplex_ops.devices.blocked.tiles import Span, Tile


@dataclass(frozen=True)
class Mask:
    """What is hidden in a grid of logits [blocks, C, G, R, columns].

    `rows` [blocks, C, R] and `columns` [blocks, C, columns] are keys of the narrow and of the wide
    side that a query does not see, None where it sees all. `has_edges` says that the wide window
    slides: query c sees columns [c, c + width) of its block's width + C - 1.
    """

    rows: Tensor | None
    columns: Tensor | None
    has_edges: bool

    def hide(self, grid: Tensor, value: float, *, is_tame: bool) -> None:
        """Fill what is hidden with `value`, -inf where the grid is tame: it holds no NaN.

        There a minimum does it, 6x faster than a masked fill (Sapphire Rapids, torch 2.13).
        """
        parts = []
        if self.rows is not None:
            parts.append((grid, self.rows[:, :, None, :, None]))
        if self.columns is not None:
            parts.append((grid, self.columns[:, :, None, None, :]))
        edge = grid.shape[1] - 1
        if self.has_edges and edge > 0:
            early, late = _edges(edge, grid.device)
            parts += [(grid[..., :edge], early), (grid[..., -edge:], late)]
        for part, hidden in parts:
            if is_tame:
                limit = torch.where(hidden, -torch.inf, torch.inf).to(part.dtype)
                torch.minimum(part, limit, out=part)
            else:
                part.masked_fill_(hidden, value)

    def sees_none(self) -> Tensor | None:
        """Return [blocks, C]: does the query see nothing at all? None where every one sees."""
        blind = [part.all(-1) for part in (self.rows, self.columns) if part is not None]
        return functools.reduce(torch.logical_or, blind) if blind else None


def own_windows(
    tile: Tile, side: Side, columns: tuple[int, int], k: Tensor, v: Tensor, span: Span
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return each query's own rows of k and of v [blocks, C, 1, R, D], zero where it sees none.

    The third result says which ones it does not see [blocks, C, R], None where it sees all. Zeros
    keep what is hidden, however large, out of every product.
    """
    k, v = (tile.windows(side, x, *columns, per_query=True) for x in (k, v))
    if not span.is_masked:
        return k[:, :, None], v[:, :, None], None
    unseen = tile.hidden(side, *columns, per_query=True)
    k, v = (x.masked_fill(unseen[..., None], 0) for x in (k, v))
    return k[:, :, None], v[:, :, None], unseen


def make_mask(
    tile: Tile, side: Side, columns: tuple[int, int], rows: Tensor | None, span: Span
) -> Mask:
    """Return what is hidden in the logits of one step over the wide side."""
    if span.is_masked:
        return Mask(rows, tile.hidden(side, *columns, per_query=False), has_edges=False)
    return Mask(rows, None, has_edges=side.slides)


@functools.lru_cache(maxsize=64)
def _edges(edge: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what C = edge + 1 queries do not see of the first and of the last `edge` columns."""
    query = torch.arange(edge + 1, device=device).view(-1, 1, 1, 1)
    column = torch.arange(edge, device=device)
    return column < query, column >= query
