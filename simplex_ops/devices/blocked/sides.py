"""Sides: one pair of keys and values as the queries see it, and which rows each query sees.

A side either *slides*: its rows are copied so that query i sees the rows [i, i + width) of the
copy; or it is *whole*: every query looks at the rows of the pair itself. In both, a query sees the
rows [begin, end) of its side, so that one rule masks all there is: causality, windows, ragged
edges and kv_bounds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from simplex_ops.contract.windows import reach
from simplex_ops.devices.blocked.host import can_look


@dataclass(frozen=True)
class Seen:
    """What the blocks of queries see, on the host: lists indexed [batch row][block]."""

    lowest: list[list[int]]  # first row that any query of the block sees
    highest: list[list[int]]  # the row after the last one
    full: list[list[bool]]  # does every query see `width` rows?
    uniform: list[list[bool]]  # do all queries see the same rows?


@dataclass(frozen=True)
class Side:
    """One pair of keys and values, as the queries see it."""

    rows: int  # of the pair
    slides: bool
    width: int  # rows that one query sees at most
    length: int  # rows of the copy
    position: Tensor  # [B], key position of row 0 of the copy
    offset: Tensor  # [B], row of the pair that row 0 of the copy holds
    begin: Tensor  # [B, queries], first row seen
    end: Tensor  # [B, queries], the row after the last one; at least `begin`
    seen: Seen | None  # None where looking at `begin` and `end` would synchronise


@dataclass(frozen=True)
class Extent:
    """How a window lies over the rows of a pair."""

    rows: int
    left: int  # of the window, in keys
    right: int
    slides: bool
    width: int


def extent(rows: int, window: int | None, is_causal: bool, seq: int) -> Extent:
    """Let the window slide where that looks at fewer columns than whole rows would."""
    left, right = reach(window, is_causal)
    whole = rows - seq // 2 if is_causal and seq <= rows else rows
    slides = left + right + 1 < whole
    return Extent(rows, left, right, slides, left + right + 1 if slides else rows)


def make_side(
    extent: Extent,
    m: int,
    start: Tensor,
    seq: int,
    padded: int,
    block: int,
    kv_bounds: Tensor | None,
    *,
    is_static: bool,
) -> Side:
    """Work out which rows each query sees.

    `m` counts the key positions, `start` [B] is the first query's position, `padded` the number of
    queries filled up to whole blocks (those beyond `seq` see nothing), `is_static` says that
    nothing but shapes decides.
    """
    first = m - extent.rows  # position of the pair's first row
    position = start - extent.left if extent.slides else torch.full_like(start, first)
    begin, end = _rows_seen(extent, m, first, start, position, seq, padded, kv_bounds)
    seen = None
    if can_look(start):
        seen = _summary(begin, end, block, extent.width)
    elif is_static:
        on_host = torch.full(start.shape, m - seq, dtype=torch.long, device="cpu")
        host_position = on_host - extent.left if extent.slides else torch.full_like(on_host, first)
        rows = _rows_seen(extent, m, first, on_host, host_position, seq, padded, None)
        seen = _summary(*rows, block, extent.width)
    length = padded + extent.width - 1 if extent.slides else extent.rows
    return Side(
        extent.rows, extent.slides, extent.width, length,
        position, position - first, begin, end, seen,
    )  # fmt: skip


def _rows_seen(
    extent: Extent,
    m: int,
    first: int,
    start: Tensor,
    position: Tensor,
    seq: int,
    padded: int,
    kv_bounds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return (begin, end), both [B, padded]."""
    index = torch.arange(padded, device=start.device)
    query = start[:, None] + index
    begin = (query - extent.left).clamp(min=first)
    end = (query + extent.right + 1).clamp(max=m)
    if kv_bounds is not None:
        bounds = torch.nn.functional.pad(kv_bounds.long(), (0, 0, 0, padded - seq))
        begin = torch.maximum(begin, bounds[..., 0])
        end = torch.minimum(end, bounds[..., 1])
    end = torch.where(index < seq, torch.maximum(begin, end), begin)
    return begin - position[:, None], end - position[:, None]


def _summary(begin: Tensor, end: Tensor, block: int, width: int) -> Seen:
    begin, end = begin.unflatten(1, (-1, block)), end.unflatten(1, (-1, block))
    some = end > begin
    largest = torch.iinfo(torch.long).max
    lowest = begin.masked_fill(~some, largest).amin(-1)
    highest = end.masked_fill(~some, 0).amax(-1)
    same = (begin == lowest[..., None]) & (end == highest[..., None])
    return Seen(
        lowest.tolist(),
        highest.tolist(),
        (end - begin == width).all(-1).tolist(),
        same.all(-1).tolist(),
    )
