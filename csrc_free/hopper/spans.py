"""Which queries see a tile of wide keys, and which narrow keys these see, where there are bounds.

So a document costs what its own pairs cost: tiles that nobody sees are not met.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_free.device.tiles import key_ranges, sizes_of, windows_of
from csrc_free.launch import launch
from csrc_free.problem import Problem
from csrc_free.rounding import ceil_div
from csrc_free.traits import Device, Traits

FIELDS = 6
_FIELDS = tl.constexpr(FIELDS)
_FAR = tl.constexpr(2**30)


@dataclass(frozen=True)
class Config:
    """BLOCK queries at a time."""

    block: int = 128
    num_warps: int = 4
    num_stages: int = 3

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound: one number of every warp, in each of six reductions."""
        return 6 * 4 * self.num_warps


@triton.jit(do_not_specialize=[
    "kv_heads", "seq", "wide_rows", "narrow_rows", "wide_left", "wide_right", "narrow_left",
    "narrow_right", "q_start_default", "tiles",
])  # fmt: skip
def spans_kernel(
    spans, kv_bounds, q_start,
    kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
    q_start_default, tiles,
    HAS_Q_START: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program owns one tile of wide keys of one batch row, and writes its six numbers.

    [first, end) of the queries that see the tile and a narrow key; [first, end) of the narrow keys
    that these see; [lo, hi) of the keys that no bounds hide from any of these.
    """
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    start = q_start_default
    if HAS_Q_START:
        start = tl.load(q_start + batch)
    sizes = sizes_of(seq, wide_rows, narrow_rows)
    windows = windows_of(start, wide_left, wide_right, narrow_left, narrow_right, sizes)
    _seq, keys, _wide_rows, _narrow_rows, wide_first, _narrow_first = sizes
    wide_begin, wide_end, _narrow_begin, _narrow_end = windows
    key_first = wide_first + tile * KEYS
    key_end = tl.minimum(key_first + KEYS, keys)
    begin = tl.maximum(key_first - wide_end + 1, 0)
    end = tl.minimum(key_end - wide_begin, seq)
    query_first = tl.full([BLOCK], _FAR, tl.int32)
    query_end = tl.zeros([BLOCK], tl.int32)
    narrow_first = tl.full([BLOCK], _FAR, tl.int32)
    narrow_end = tl.zeros([BLOCK], tl.int32)
    for first in range(begin, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = i < end
        rows = (i, i, mask)  # of no head
        lo, hi, narrow_lo, narrow_hi = key_ranges(rows, batch, kv_bounds, windows, sizes, True)
        sees = mask & (lo < key_end) & (hi > key_first) & (narrow_lo < narrow_hi)
        query_first = tl.minimum(query_first, tl.where(sees, i, _FAR))
        query_end = tl.maximum(query_end, tl.where(sees, i + 1, 0))
        narrow_first = tl.minimum(narrow_first, tl.where(sees, narrow_lo, _FAR))
        narrow_end = tl.maximum(narrow_end, tl.where(sees, narrow_hi, 0))
    first_of_all = tl.min(query_first, 0)
    end_of_all = tl.max(query_end, 0)
    narrow_first_of_all = tl.min(narrow_first, 0)
    narrow_end_of_all = tl.max(narrow_end, 0)
    # Those between that do not see the tile count as well: they are met, and must be hidden.
    lo_of_all = tl.zeros([BLOCK], tl.int32)
    hi_of_all = tl.full([BLOCK], _FAR, tl.int32)
    for first in range(first_of_all, end_of_all, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = i < end_of_all
        bound = kv_bounds + (batch * seq + i) * 2
        lo_of_all = tl.maximum(lo_of_all, tl.load(bound, mask=mask, other=0))
        hi_of_all = tl.minimum(hi_of_all, tl.load(bound + 1, mask=mask, other=_FAR))
    ptr = spans + (batch * tiles + tile) * _FIELDS
    is_seen = first_of_all < end_of_all
    tl.store(ptr, tl.where(is_seen, first_of_all, 0))
    tl.store(ptr + 1, end_of_all)
    tl.store(ptr + 2, tl.where(is_seen, narrow_first_of_all, 0))
    tl.store(ptr + 3, tl.where(is_seen, narrow_end_of_all, 0))
    tl.store(ptr + 4, tl.max(lo_of_all, 0))
    tl.store(ptr + 5, tl.minimum(tl.min(hi_of_all, 0), keys))


def spans_of(problem: Problem, keys: int) -> Tensor | None:
    """Return int32 [B, tiles of `keys` wide keys, FIELDS], or None where there are no bounds."""
    if problem.kv_bounds is None:
        return None
    batch, tiles = problem.q.shape[0], ceil_div(problem.k_wide.shape[2], keys)
    spans = torch.empty(batch, tiles, FIELDS, dtype=torch.int32, device=problem.q.device)
    launch(
        spans_kernel, batch * tiles,
        spans, problem.kv_bounds, problem.q_start, *problem.numbers(), tiles,
        HAS_Q_START=problem.q_start is not None, KEYS=keys, config=Config(),
    )  # fmt: skip
    return spans
