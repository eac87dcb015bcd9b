"""The plan of a call: the narrow side becomes virtual queries, the wide side is swept by tiles."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from simplex_ops.blocked.sides import Side, extent, make_side

CPU_TILE = 2**18  # logits in a tile: 1 MiB of float32, so that a core's share stays in its L2
DEVICE_TILE = 2**24  # elsewhere a larger tile hides the launches
WIDE_STEP = 4096  # columns in a tile at most, however wide the window


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
        return buffer[self.heads, self.queries].unflatten(1, (-1, self.block)).flatten(0, 1)

    def windows(
        self, side: Side, rows: Tensor, start: int, stop: int, *, per_query: bool
    ) -> Tensor:
        """View columns [start, stop) of every block's window as [blocks, columns, D].

        `per_query` gives each query its own window: [blocks, C, columns, D].
        """
        per_head, per_row, _ = rows.stride()
        per_step = per_row if side.slides else 0  # from one query to the next
        count = (self.heads.stop - self.heads.start) * (self.blocks.stop - self.blocks.start)
        size = [count, stop - start, rows.shape[2]]
        stride = [per_step * self.block if self.is_along_seq else per_head, per_row, 1]
        if per_query:
            size.insert(1, self.block)
            stride.insert(1, per_step)
        offset = self.heads.start * per_head + per_step * self.queries.start + per_row * start
        return rows.as_strided(size, stride, rows.storage_offset() + offset)

    def add_to_windows(self, side: Side, rows: Tensor, start: int, x: Tensor) -> None:
        """Add x [blocks, columns, D] to the columns from `start` on of every block's window."""
        if not (side.slides and self.is_along_seq):  # windows that do not overlap
            windows = self.windows(side, rows, start, start + x.shape[1], per_query=False)
            windows.add_(x if side.slides or not self.is_along_seq else x.sum(0))
            return
        windows = self.windows(side, rows, start, start + x.shape[1], per_query=False)
        for window, addend in zip(windows.unbind(), x.unbind(), strict=True):
            window.add_(addend)

    def add_to_windows_of_queries(self, side: Side, rows: Tensor, start: int, x: Tensor) -> None:
        """Add x [blocks, C, columns, D] to the columns from `start` on of each query's window."""
        heads = self.heads.stop - self.heads.start
        x = x.view(heads, -1, *x.shape[2:])  # [heads, queries, columns, D]
        queries, columns = x.shape[1:3]
        if not side.slides:
            rows[self.heads, start : start + columns] += x.sum(1)
            return
        first = self.queries.start + start
        if queries < columns:
            for query in range(queries):
                rows[self.heads, first + query : first + query + columns] += x[:, query]
        else:
            for column in range(columns):
                rows[self.heads, first + column : first + column + queries] += x[:, :, column]

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
        if side.seen is None:
            return Span(0, columns, is_masked=True)
        batch = range(self.heads.start // self.kv_heads, (self.heads.stop - 1) // self.kv_heads + 1)
        at = list(product(batch, range(self.blocks.start, self.blocks.stop)))
        lowest = min(side.seen.lowest[b][n] for b, n in at)
        highest = max(side.seen.highest[b][n] for b, n in at)
        if highest <= lowest:
            return Span(0, 0, is_masked=False)
        if side.slides:
            return Span(0, columns, is_masked=not all(side.seen.full[b][n] for b, n in at))
        is_uniform = all(
            side.seen.uniform[b][n]
            and side.seen.lowest[b][n] == lowest
            and side.seen.highest[b][n] == highest
            for b, n in at
        )
        return Span(lowest, highest, is_masked=not is_uniform)


@dataclass(frozen=True)
class Plan:
    """How a call is cut."""

    batch: int
    kv_heads: int
    group: int  # query heads of a kv head, G
    seq: int
    padded: int  # queries filled up to whole blocks
    block: int  # queries in a block, C
    blocks_in_tile: int
    is_along_seq: bool
    exchanged: bool  # is the first pair the narrow side?
    narrow: Side
    wide: Side
    narrow_step: int  # columns of a side in one step of a tile
    wide_step: int

    def tiles(self) -> Iterator[Tile]:
        """Yield tiles that cover every query of every kv head once."""
        heads, blocks = self.batch * self.kv_heads, self.padded // self.block
        in_heads, in_blocks = 1, self.blocks_in_tile
        if not self.is_along_seq:
            in_heads, in_blocks = in_blocks, in_heads
        for head, block in product(range(0, heads, in_heads), range(0, blocks, in_blocks)):
            yield Tile(
                slice(head, min(head + in_heads, heads)),
                self.kv_heads,
                slice(block, min(block + in_blocks, blocks)),
                self.block,
            )


def make_plan(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    w1: int | None,
    w2: int | None,
    is_causal: bool,
    kv_bounds: Tensor | None,
    q_start: Tensor | None,
    *,
    rows: int,
    block: int,
) -> Plan:
    """Plan a call whose blocks have at least `rows` virtual queries and `block` queries."""
    batch, heads, seq, _ = q.shape
    kv_heads = k1.shape[1]
    group = heads // kv_heads
    wide = extent(k1.shape[2], w1, is_causal, seq)
    narrow = extent(k2.shape[2], w2, is_causal, seq)
    exchanged = wide.width < narrow.width
    if exchanged:
        wide, narrow = narrow, wide

    tile = CPU_TILE if q.device.type == "cpu" else DEVICE_TILE
    wide_step = min(wide.width, WIDE_STEP)
    narrow_step = min(narrow.width, max(1, tile // (group * wide_step)))
    room = max(1, tile // (group * narrow_step * wide_step))  # queries that fit a tile
    if wide.width > WIDE_STEP:
        block = 1
    elif wide.slides:
        wasteless = max(1, wide.width // 8)  # a block sweeps width + C - 1 columns
        block = min(max(block, -(-rows // (group * narrow_step))), wasteless, room, seq)
        wide_step = wide.width + block - 1
    else:
        block = min(room, seq)
    padded = -(-seq // block) * block
    blocks_in_tile = max(1, room // block)

    if q_start is None:
        start = torch.full((batch,), max(wide.rows, narrow.rows) - seq, device=q.device)
    else:
        start = q_start.long()
    is_static = q_start is None and kv_bounds is None
    m = max(wide.rows, narrow.rows)
    narrow_side, wide_side = (
        make_side(side, m, start, seq, padded, block, kv_bounds, is_static=is_static)
        for side in (narrow, wide)
    )
    return Plan(
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        seq=seq,
        padded=padded,
        block=block,
        blocks_in_tile=blocks_in_tile,
        is_along_seq=wide.slides and padded // block >= min(blocks_in_tile, batch * kv_heads),
        exchanged=exchanged,
        narrow=narrow_side,
        wide=wide_side,
        narrow_step=narrow_step,
        wide_step=wide_step,
    )
