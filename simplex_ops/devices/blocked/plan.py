"""The plan of a call: the narrow side becomes virtual queries, the wide side is swept by tiles."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor

from simplex_ops.devices.blocked.sides import Side, extent, make_side
from simplex_ops.devices.blocked.tiles import Tile

# Logits in a tile. On the CPU for each thread: 2 MiB of float32, the L2 of a Sapphire Rapids core.
CPU_TILE = 2**19
DEVICE_TILE = 2**24  # elsewhere a larger tile hides the launches
WIDE_STEP = 4096  # columns in a tile at most, however wide the window
Pair = TypeVar("Pair")


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
    is_exchanged: bool  # the first pair is the narrow side
    narrow: Side
    wide: Side
    narrow_step: int  # columns of a side in one step of a tile
    wide_step: int

    def by_role(self, first: Pair, second: Pair) -> tuple[Pair, Pair]:
        """Return what is of the wide side and of the narrow one; the call back is the same."""
        return by_role(self.is_exchanged, first, second)

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
    is_exchanged = wide.width < narrow.width
    wide, narrow = by_role(is_exchanged, wide, narrow)

    tile = DEVICE_TILE
    if q.device.type == "cpu":
        tile = CPU_TILE * min(torch.get_num_threads(), 16)
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
        is_exchanged=is_exchanged,
        narrow=narrow_side,
        wide=wide_side,
        narrow_step=narrow_step,
        wide_step=wide_step,
    )


def by_role(is_exchanged: bool, first: Pair, second: Pair) -> tuple[Pair, Pair]:
    """Return (wide, narrow): the first pair is the wide side, unless they are exchanged."""
    return (second, first) if is_exchanged else (first, second)
