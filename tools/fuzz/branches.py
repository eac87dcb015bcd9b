"""Which branches of the Hopper kernels a problem takes, told on the host from what each query sees.

Shapes, windows, bounds and starts decide all but one, and are read on the CPU; the guard, which
raises a maximum that came too low, follows from the logits, where these are. So a device is waited
for a few times: one that other programs share takes milliseconds each time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from csrc_free.hopper import forward, tiles_config
from csrc_free.hopper.backward import Choice
from csrc_free.hopper.backward_query import Config as QueryConfig
from csrc_free.hopper.ordered import columns_of
from csrc_free.problem import Problem
from simplex_ops.reference import logits_of

_OF_BOTH = (
    "masked tile", "whole tile", "several groups of tiles", "several chunks of narrow keys",
    "a narrow key of one warpgroup alone", "empty row", "guard",
)  # fmt: skip
_OF_TILES = (
    "tail", "masked tile amid a group", "hidden offset", "empty tile", "guard of an unset row",
)  # fmt: skip
# Every branch that `branches` may name.
BRANCHES = (
    *(f"heads: {name}" for name in _OF_BOTH),
    *(f"tiles: {name}" for name in (*_OF_BOTH, *_OF_TILES)),
    "dq: tail", "dq: masked tile",
    "wide bias", "narrow bias", "bounds", "starts",
)  # fmt: skip


@dataclass(frozen=True)
class Reach:
    """What each query sees: rows [lo, hi) of each pair, int64 [B, N]; `sees`: some of both."""

    lo: Tensor
    hi: Tensor
    narrow_lo: Tensor
    narrow_hi: Tensor
    sees: Tensor
    position: Tensor  # of each query, less that of the narrow pair's first row


def reach_of(problem: Problem) -> Reach:
    """Return what each query sees, as `simplicial_attention` defines it."""
    batch, _, seq, _ = problem.q.shape
    keys = problem.keys
    start = torch.full((batch,), keys - seq)
    if problem.q_start is not None:
        start = problem.q_start.cpu().long()
    position = start[:, None] + torch.arange(seq)
    bounds = None if problem.kv_bounds is None else problem.kv_bounds.cpu().long()

    def of_pair(reach: tuple[int, int], first: int) -> tuple[Tensor, Tensor]:
        left, right = (min(r, 2**40) for r in reach)
        lo, hi = (position - left).clamp(min=first), (position + right + 1).clamp(max=keys)
        if bounds is not None:
            low, high = bounds.unbind(-1)
            lo, hi = torch.maximum(lo, low), torch.minimum(hi, high)
        lo = lo.clamp(max=keys)
        return lo - first, torch.maximum(hi, lo) - first

    lo, hi = of_pair(problem.wide_reach, problem.wide_first)
    narrow_lo, narrow_hi = of_pair(problem.narrow_reach, problem.narrow_first)
    sees = (lo < hi) & (narrow_lo < narrow_hi)
    return Reach(lo, hi, narrow_lo, narrow_hi, sees, position - problem.narrow_first)


def branches(problem: Problem, choice: Choice | None) -> Iterator[str]:
    """Yield the branches of the forward, and of the backward where there is a choice for it."""
    reach = reach_of(problem)
    is_of_heads = problem.group % 64 == 0
    kernel = "heads" if is_of_heads else "tiles"
    if not reach.sees.all():
        yield f"{kernel}: empty row"
    if reach.sees.any():
        of_kernel = _of_heads if is_of_heads else _of_tiles
        names = set(of_kernel(problem, reach, _logits(problem, reach)))
        yield from (f"{kernel}: {name}" for name in sorted(names))
    if choice is not None:
        yield from _of_backward(choice, reach)
    biases = problem.biases()
    given = {
        "wide bias": any(biases[:2]),
        "narrow bias": any(biases[2:]),
        "bounds": problem.kv_bounds is not None,
        "starts": problem.q_start is not None,
    }
    yield from (name for name, holds in given.items() if holds)


def _of_heads(problem: Problem, reach: Reach, logits: Tensor) -> Iterator[str]:
    """Yield the branches of `hopper.forward`: a tile is 64 heads of one query."""
    config = forward.choose(
        _width(problem), *_blocks(problem), has_bias=any(problem.biases()[2:])
    )  # fmt: skip
    length = (reach.hi - reach.lo)[reach.sees]
    group = config.tiles * config.block_n
    yield from _said({
        "masked tile": length % group != 0,
        "whole tile": length % group == 0,
        "several groups of tiles": length > group,
    })  # fmt: skip
    narrow = (reach.narrow_hi - reach.narrow_lo)[reach.sees]
    yield from _of_narrow(narrow, config.chunk)
    yield from _guard(problem, logits, reach.hi - config.block_n, reach.narrow_lo, 1)


def _of_tiles(problem: Problem, reach: Reach, logits: Tensor) -> Iterator[str]:
    """Yield the branches of `hopper.forward_tiles`: a tile is P positions of all heads."""
    config = tiles_config.choose(problem.group, _width(problem), *_blocks(problem))
    block, span = config.block_n, config.tiles * config.block_n
    tiles = _Tiles.of(reach, config.p)
    sees = tiles.low < tiles.high
    groups = (-(-(tiles.high - tiles.low - config.tail) // span)).clamp(min=1)
    number = torch.arange(int(groups.max()) * config.tiles)
    new_edge = -(-(tiles.high - tiles.all_high).clamp(min=0) // block)
    old_edge = (tiles.high - tiles.all_low).clamp(min=0) // block
    is_met = (number < (groups * config.tiles)[..., None]) & sees[..., None]
    is_partial = (number < new_edge[..., None]) | (number >= old_edge[..., None])
    within = number % config.tiles
    is_inner = (within > 0) & (within < config.tiles - 1)
    yield from _said({
        "empty tile": ~sees,
        "masked tile": is_partial & is_met,
        "whole tile": ~is_partial & is_met,
        "masked tile amid a group": is_partial & is_met & is_inner,
        "several groups of tiles": (groups > 1) & sees,
        "tail": (tiles.low < tiles.high - groups * span) & sees,
        "hidden offset": ((tiles.all_first > tiles.first) | (tiles.all_last < tiles.last)) & sees,
    })  # fmt: skip
    yield from _of_narrow((tiles.last - tiles.first + 1)[sees], config.chunk)
    # Of each query, by its tile.
    of_query = torch.arange(problem.q.shape[2]) // config.p
    high, first = tiles.high[:, of_query], tiles.first[:, of_query]
    yield from _guard(problem, logits, high - block, reach.position - first, -1)


def _of_narrow(count: Tensor, chunk: int) -> Iterator[str]:
    yield from _said({
        "several chunks of narrow keys": count > chunk,
        "a narrow key of one warpgroup alone": count % 2 == 1,
    })  # fmt: skip


def _of_backward(choice: Choice, reach: Reach) -> Iterator[str]:
    if not isinstance(choice.query, QueryConfig) or not reach.sees.any():
        return
    config = choice.query
    tiles = _Tiles.of(reach, 64 // config.heads)
    length = tiles.high - tiles.low
    count = -(-length // config.block_n)
    rest = length - (count - 1) * config.block_n
    is_whole = (tiles.all_low <= tiles.low) & (tiles.all_high >= tiles.high)
    yield from _said({
        "dq: tail": (count > 1) & (rest <= config.tail),
        "dq: masked tile": (length > 0) & ~(is_whole & (length % config.block_n == 0)),
    })  # fmt: skip


@dataclass(frozen=True)
class _Tiles:
    """What some query of a tile sees, [low, high) and offsets [first, last], and what all see."""

    low: Tensor
    high: Tensor
    first: Tensor
    last: Tensor
    all_low: Tensor
    all_high: Tensor
    all_first: Tensor
    all_last: Tensor

    @classmethod
    def of(cls, reach: Reach, p: int) -> "_Tiles":
        """Gather tiles of p queries; where none of them sees anything, high is low."""
        seq = reach.lo.shape[1]
        index = torch.arange(-(-seq // p) * p).clamp(max=seq - 1)

        def gathered(t: Tensor) -> Tensor:
            return t[:, index].unflatten(1, (-1, p))

        far = 2**40
        sees = gathered(reach.sees)
        newest = gathered(reach.position - reach.narrow_hi + 1)
        oldest = gathered(reach.position - reach.narrow_lo)

        def least(t: Tensor) -> Tensor:
            return torch.where(sees, t, far).amin(2)

        def most(t: Tensor) -> Tensor:
            return torch.where(sees, t, -far).amax(2)

        lo, hi = gathered(reach.lo), gathered(reach.hi)
        none = ~sees.any(2)
        low, high = (t.masked_fill(none, 0) for t in (least(lo), most(hi)))
        first, last = least(newest).masked_fill(none, 0), most(oldest).masked_fill(none, -1)
        # A query that sees nothing hides all from "all".
        return cls(
            low, high, first, last,
            torch.where(sees, lo, far).amax(2), torch.where(sees, hi, 0).amin(2),
            torch.where(sees, newest, far).amax(2), torch.where(sees, oldest, -far).amin(2),
        )  # fmt: skip


def _logits(problem: Problem, reach: Reach) -> Tensor:
    """Return the logits [B, H, N, wide, narrow] in log2 units, -inf where they are not seen."""
    k_wide, k_narrow = (
        t.float().repeat_interleave(problem.group, 1) for t in (problem.k_wide, problem.k_narrow)
    )
    k_wide_bias, _, k_narrow_bias, _ = problem.biases()
    keys = problem.by_role(k_wide + k_wide_bias, k_narrow + k_narrow_bias)
    s = logits_of(problem.form, problem.q.float(), *keys)
    s = s.mT if problem.is_exchanged else s
    s = s * problem.log2_scale

    def seen(lo: Tensor, hi: Tensor, rows: int) -> Tensor:
        row = torch.arange(rows)
        return ((row >= lo[..., None]) & (row < hi[..., None])).to(s.device)

    wide = seen(reach.lo, reach.hi, s.shape[3])
    narrow = seen(reach.narrow_lo, reach.narrow_hi, s.shape[4])
    return s.masked_fill_(~(wide[..., :, None] & narrow[..., None, :])[:, None], -torch.inf)


def _guard(
    problem: Problem, logits: Tensor, first_tile: Tensor, first_narrow: Tensor, step: int
) -> Iterator[str]:
    """Yield whether a maximum is certain to be raised after a warpgroup's first tile.

    That tile is of the wide rows from `first_tile` on and one narrow row, [B, N] both; the other
    warpgroup begins `step` narrow rows further, and each takes every second one.
    """
    # From its first maximum to where the guard stands, and what rounding the virtual queries moves.
    visible = torch.where(logits.isfinite(), logits.abs(), 0.0).amax()
    room = (15.0 if problem.q.dtype == torch.float16 else 60.0) + 1.0 + 0.01 * visible
    in_tile = torch.arange(logits.shape[3]) >= first_tile[..., None]  # [B, N, wide]
    narrow = torch.arange(logits.shape[4])
    found = []
    for side in (0, 1):
        first = (first_narrow + side * step)[..., None]
        own = (narrow - first) % 2 == 0  # [B, N, narrow]
        begun = in_tile[..., :, None] & (narrow == first)[..., None, :]
        begun, own = begun[:, None].to(logits.device), own[:, None, :, None].to(logits.device)
        before = logits.masked_fill(~begun, -torch.inf).amax((3, 4))
        after = logits.masked_fill(~own, -torch.inf).amax((3, 4))
        is_some = after.isfinite()
        unset = is_some & before.isneginf()
        found += [(is_some & ~unset & (after > before + room)).any(), unset.any()]
    guards = torch.stack(found).view(2, 2).any(0).cpu()
    yield from _said({"guard": guards[0], "guard of an unset row": guards[1]})


def _said(named: dict[str, Tensor]) -> Iterator[str]:
    yield from (name for name, holds in named.items() if holds.any())


def _width(problem: Problem) -> int:
    return min(sum(problem.wide_reach) + 1, problem.k_wide.shape[2])


def _blocks(problem: Problem) -> tuple[int, int]:
    block_d, block_dv = (
        64 if dim <= 64 else 128 for dim in (columns_of(problem), problem.v_wide.shape[3])
    )  # fmt: skip
    return block_d, block_dv
