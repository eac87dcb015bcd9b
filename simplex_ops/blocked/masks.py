"""Masks: hide from each query the pairs that it does not see."""

import torch
from torch import Tensor

from simplex_ops.blocked.plan import Tile
from simplex_ops.blocked.sides import Side


def hide_rows(
    tile: Tile, side: Side, columns: tuple[int, int], k: Tensor, v: Tensor, is_masked: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return each query's own rows of k and of v [blocks, C, 1, R, D], zero where it sees none.

    The third result says which ones it does not see [blocks, C, R], None where it sees all. Zeros
    keep what is hidden, however large, out of every product.
    """
    k, v = (tile.windows(side, x, *columns, per_query=True) for x in (k, v))
    if not is_masked:
        return k[:, :, None], v[:, :, None], None
    unseen = tile.hidden(side, *columns, per_query=True)
    k, v = (x.masked_fill(unseen[..., None], 0) for x in (k, v))
    return k[:, :, None], v[:, :, None], unseen


def hide_unseen(
    tile: Tile,
    side: Side,
    columns: tuple[int, int],
    grid: Tensor,
    is_masked: bool,
    unseen: Tensor | None,
    value: float,
) -> None:
    """Fill the hidden pairs of `grid` [blocks, C, G, R, columns] with `value`."""
    if unseen is not None:
        grid.masked_fill_(unseen[:, :, None, :, None], value)
    if is_masked:
        hidden = tile.hidden(side, *columns, per_query=False)
        grid.masked_fill_(hidden[:, :, None, None, :], value)


def hide_edges(grid: Tensor, value: float) -> None:
    """Fill with `value` what a sliding window hides: query c sees columns [c, c + width).

    `grid` is [blocks, C, G, R, width + C - 1], so only its first and last C - 1 columns are cut.
    """
    edge = grid.shape[1] - 1
    if edge == 0:
        return
    query = torch.arange(edge + 1, device=grid.device).view(-1, 1, 1, 1)
    column = torch.arange(edge, device=grid.device)
    grid[..., :edge].masked_fill_(column < query, value)
    grid[..., -edge:].masked_fill_(column >= query, value)
