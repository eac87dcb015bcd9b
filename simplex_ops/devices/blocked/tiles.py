"""Tiles: the queries that are taken together, and strided views of what they see."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from simplex_ops.devices.blocked.sides import Side


@dataclass(frozen=True)
class Span:
    """Columns [start, stop) of a side that a tile needs, and whether all need a mask."""

    start: int
    stop: int
    is_masked: bool

    def steps(self, step: int) -> Iterator[tuple[int, int]]:
        """Cut the span into ranges of at most `step` columns."""
        for start in range(self.start, self.stop, step):
            yield start, min(start + step, self.stop)


@dataclass(frozen=True)
class Tile:
    """Blocks of C queries taken together: several of one kv head, or one each of several."""

    heads: slice  # of the B·Hkv kv heads
    kv_heads: int  # of one batch row
    blocks: slice
    block: int  # C

    @property
    def is_along_seq(self) -> bool:
        """Are the blocks those of one kv head?"""
        return self.heads.stop - self.heads.start == 1

    @property
    def queries(self) -> slice:
        """The queries of each kv head."""
        return slice(self.blocks.start * self.block, self.blocks.stop * self.block)

    def of(self, buffer: Tensor) -> Tensor:
        """View what the tile's queries have in [B·Hkv, queries, ...] as [blocks, C, ...]."""
        part = buffer[self.heads, self.queries]
        return part.view(-1, self.block, *part.shape[2:]) if self.is_along_seq else part

    def windows(
        self, side: Side, rows: Tensor, start: int, stop: int, *, per_query: bool
    ) -> Tensor:
        """View columns [start, stop) of every block's window as [blocks, columns, D].

        `per_query` gives each query its own window: [blocks, C, columns, D].
        """
        per_head, per_row, per_dim = rows.stride()
        per_step = per_row if side.slides else 0  # from one query to the next
        count = (self.heads.stop - self.heads.start) * (self.blocks.stop - self.blocks.start)
        size = [count, stop - start, rows.shape[2]]
        stride = [per_step * self.block if self.is_along_seq else per_head, per_row, per_dim]
        if per_query:
            size.insert(1, self.block)
            stride.insert(1, per_step)
        offset = self.heads.start * per_head + per_step * self.queries.start + per_row * start
        return rows.as_strided(size, stride, rows.storage_offset() + offset)

    def add_to_windows(self, side: Side, rows: Tensor, start: int, x: Tensor) -> None:
        """Add x [blocks, columns, D] to the columns from `start` on of every block's window."""
        windows = self.windows(side, rows, start, start + x.shape[1], per_query=False)
        if not self.is_along_seq:  # windows of different heads do not overlap
            windows.add_(x)
            return
        for window, addend in zip(windows.unbind(), x.unbind(), strict=True):
            window.add_(addend)

    def add_to_windows_of_queries(self, side: Side, rows: Tensor, start: int, x: Tensor) -> None:
        """Add x [blocks, C, columns, D] to the columns from `start` on of each query's window."""
        x = x.view(self.heads.stop - self.heads.start, -1, *x.shape[2:])
        queries, columns = x.shape[1:3]
        if not side.slides:
            rows[self.heads, start : start + columns] += x.sum(1)
            return
        first = self.queries.start + start
        if queries <= columns:
            for query in range(queries):
                rows[self.heads, first + query : first + query + columns] += x[:, query]
        else:
            rows[self.heads, first : first + queries + columns - 1] += _sum_antidiagonals(x)

    def hidden(self, side: Side, start: int, stop: int, *, per_query: bool) -> Tensor:
        """Return [blocks, C, columns]: which columns of these `windows` does a query not see?"""
        device = side.begin.device
        row = torch.arange(start, stop, device=device)
        if side.slides:
            step = 1 if per_query else self.block
            origin = torch.arange(self.queries.start, self.queries.stop, step, device=device)
            row = row + origin.view(self.blocks.stop - self.blocks.start, -1, 1)
        batch = torch.arange(self.heads.start, self.heads.stop, device=device) // self.kv_heads
        begin, end = (
            limit[batch, self.queries].unflatten(1, (-1, self.block)).flatten(0, 1)[..., None]
            for limit in (side.begin, side.end)
        )
        return (row < begin) | (row >= end)

    def span(self, side: Side, *, per_query: bool) -> Span:
        """Return the columns of `windows` that the tile needs."""
        columns = side.width + (0 if per_query or not side.slides else self.block - 1)
        seen = side.seen
        if seen is None:
            return Span(0, columns, is_masked=True)
        batch = range(self.heads.start // self.kv_heads, (self.heads.stop - 1) // self.kv_heads + 1)
        lowest = min(min(seen.lowest[b][self.blocks]) for b in batch)
        highest = max(max(seen.highest[b][self.blocks]) for b in batch)
        if highest <= lowest:
            return Span(0, 0, is_masked=False)
        if side.slides:
            is_full = all(all(seen.full[b][self.blocks]) for b in batch)
            return Span(0, columns, is_masked=not is_full)
        is_uniform = all(
            all(seen.uniform[b][self.blocks])
            and min(seen.highest[b][self.blocks]) == highest
            and max(seen.lowest[b][self.blocks]) == lowest
            for b in batch
        )
        return Span(lowest, highest, is_masked=not is_uniform)


def _sum_antidiagonals(x: Tensor) -> Tensor:
    """Return y[h, u] = sum of x[h, i, r] over i + r = u, for x [heads, queries, columns, D]."""
    heads, queries, columns, dim = x.shape
    padded = queries + 2 * (columns - 1)
    skewed = x.new_zeros(heads, columns, padded, dim)
    skewed[:, :, columns - 1 : columns - 1 + queries] = x.transpose(1, 2)
    return skewed.as_strided(
        (heads, queries + columns - 1, columns, dim),
        (columns * padded * dim, dim, (padded - 1) * dim, 1),
        (columns - 1) * dim,
    ).sum(2)
