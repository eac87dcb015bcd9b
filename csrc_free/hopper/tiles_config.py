"""The tiles of `forward_tiles`, told without Gluon: positions, wide keys, shared memory."""

import dataclasses
import functools

from csrc_free.rounding import next_power_of_2
from csrc_free.traits import Device, Traits


@dataclasses.dataclass(frozen=True)
class Config:
    """TILES wide tiles stay in shared memory through all offsets of a chunk, and a tail of keys."""

    p: int  # positions of a tile
    tiles: int
    tail: int = 0  # keys beyond the last group of tiles, or 0
    block_n: int = 64
    chunk: int = 32
    num_warps: int = 8
    num_stages: int = 1
    maxnreg: int = 168  # on average: 240 for the two warpgroups, 24 for the warps that bring

    @property
    def heads(self) -> int:
        """Return the rows of a position."""
        return 64 // self.p

    @property
    def narrow_rows(self) -> int:
        """Return the rows that the buffers of narrow rows have room for."""
        return next_power_of_2(self.chunk + self.p - 1)

    def covered(self, width: int) -> int:
        """Return how many wide keys a tile meets, of which each of its queries sees `width`."""
        kept = self.tiles * self.block_n
        seen = width + self.p - 1
        groups = max(1, -(-(seen - self.tail) // kept))
        return groups * kept + (self.tail if seen > groups * kept else 0)

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        del device
        return self.bytes_of(traits.block_d, traits.block_dv)

    def bytes_of(self, block_d: int, block_dv: int) -> int:
        """Return the same for tiles of so many columns."""
        rows = self.tiles * self.block_n + self.tail + self.narrow_rows
        return 2 * rows * (block_d + block_dv) + 2 * 64 * block_d + 4 * 64 * block_dv + 7168


# Bytes of shared memory that a program may have on sm_90.
_SHARED = 232_448


@functools.cache
def choose(group: int, width: int, block_d: int, block_dv: int) -> Config:
    """Choose the tiles for a wide window of so many keys: the fewest keys that cover it."""
    p = 64 // next_power_of_2(group)
    seen = width + p - 1
    block_n = 128 if block_d == block_dv == 64 and seen > 128 else 64

    def cost(config: Config) -> float:
        kept = config.tiles * config.block_n
        groups = max(1, -(-(seen - config.tail) // kept))
        # A pass over a group goes through the output once; a tail waits for its products.
        return groups * (kept + 0.6 * 64) + 3 * config.tail

    configs = (
        Config(p, tiles, tail, block_n)
        for tail in (0, max(16, next_power_of_2(p - 1)))
        for tiles in (4, 3, 2, 1)
        if tail <= 32
    )
    return min((c for c in configs if c.bytes_of(block_d, block_dv) <= _SHARED), key=cost)
