"""dq and the narrow pair's gradients on Hopper, in four products.

The 64 rows of a warpgroup's products are ENTRIES (position, head) entries times KEYS narrow keys,
which hold the narrow window, or a part of it at a time: so the wide window passes once for each,
and each row is one virtual query. With T = sum of dS · k and U = sum of P · v over the wide keys,
dq is the sum of T ∘ k2 over an entry's rows, and T ∘ q and U ∘ dout are added to the rows of a part
of the narrow gradients. For determinants that is T × k2 and q × T in the threes; for strassen, with
σ = sum of dS, T + σ k2 and T + σ q.

Two entries are a pair: the rows of one key are two rows of the same thread, which adds them before
they leave it. A part is of consecutive positions, belongs to one program, and has a copy for each
of its two warpgroups: so the order of every sum is fixed, though the additions are atomic ones.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from csrc_free.device.descriptors import can_describe
from csrc_free.hopper.attend_narrow import attend_narrow
from csrc_free.hopper.bring_narrow import bring_narrow_rows, bring_wide_tiles
from csrc_free.hopper.channels import barriers
from csrc_free.hopper.describe import describe
from csrc_free.hopper.entries import entries_of_position, positions_of_tile, tiles_of_position
from csrc_free.hopper.half_range import Scaled
from csrc_free.hopper.key_plan import MOST_HEADS, memory_for_parts, shares
from csrc_free.hopper.layouts import permuted_rows
from csrc_free.hopper.query_items import UNIT, aligned
from csrc_free.launch import launch
from csrc_free.problem import NOT_SPECIALIZED, Problem, block
from csrc_free.rounding import ceil_div
from csrc_free.steps.delta import Statistics
from csrc_free.steps.parts import Parts, parts_of_queries
from csrc_free.traits import Device, Traits

ROWS = 64
WIDEST = 512  # keys of a narrow window
_RESERVE = 1024  # bytes: barriers
_COPIES = (
    2  # of a part: its warpgroups took 5.6 ms for 5.0 adding by turns (G = 1; H200, 2026-11-29)
)
_FEWEST_STEPS, _MOST_STEPS = 8, 128  # tiles of an item
_START = 0.5  # what an item costs besides, in tiles
_ROUNDS = 3.5  # of small items: each program has about four
# One compiled kernel serves all sizes and strides.
_NUMBERS = (
    *NOT_SPECIALIZED, "items", "chunks", "steps", "tiles", "kv_heads",
    "stride_q_b", "stride_q_h", "stride_q_n", "stride_do_b", "stride_do_h", "stride_do_n",
    "stride_kn_b", "stride_kn_h", "stride_kn_n", "stride_vn_b", "stride_vn_h", "stride_vn_n",
    "stride_dq_b", "stride_dq_h", "stride_dq_n",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_N wide keys in a ring of SLOTS; a row tile holds KEYS narrow keys an entry."""

    keys: int
    block_n: int
    slots: int
    tail: int  # a last tile with no more keys than this is computed alone; 0: there is none
    num_warps: int = 4
    maxnreg: int = 168  # of 384 threads; a consumer has 240, the producer 24

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        columns = traits.block_d + traits.block_dv
        narrow = 2 * max(ROWS // 2, self.keys) * (4 * traits.block_d + 2 * traits.block_dv)
        made = 2 * 2 * ROWS * columns
        ring = 2 * columns * self.block_n * self.slots
        return narrow + made + ring + 3 * 2 * columns * (ROWS // self.keys) + _RESERVE


def choose(traits: Traits, device: Device, narrow_window: int) -> Config | None:
    """Choose the tiles for a narrow window of so many keys; None: the kernel does not serve."""
    if not _serves(traits, device) or narrow_window > WIDEST:
        return None
    # A wider window passes in parts. Two heads of a position add what they have for a key before it
    # leaves them: twice 32 keys took 47.6 ms for 52.0 of 64 at once (8 heads to one, 256 x 64), and
    # four times 68.5 for 77.1 (128 x 128; H200, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-30).
    sizes = (16, 32) if traits.group > 1 else (16, 32, ROWS)
    for keys in sizes:
        if narrow_window <= keys or keys == sizes[-1]:
            block_n = 64 if traits.block_d == 128 else 128
            found = (Config(keys, block_n, slots, 16) for slots in (4, 3, 2))
            fits = (c for c in found if c.shared_bytes(traits, device) <= device.shared_limit)
            return next(fits, None)
    return None


def _serves(traits: Traits, device: Device) -> bool:
    return (
        device.backend == "cuda"
        and device.arch == 90
        and traits.dtype in (torch.bfloat16, torch.float16)
        and traits.block_d == traits.block_dv
        and traits.block_d in (64, 128)
        and traits.is_describable
        and 1 <= traits.group <= MOST_HEADS
    )


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_backward_narrow_kernel(
    q, k_wide, v_wide, k_narrow, v_narrow, k_rows, v_rows, dout, delta, lse2, has_huge,
    factors, row_factors, dq, dk_parts, dv_parts, kv_bounds, q_start, items, chunks, steps, tiles,
    kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
    q_start_default, slots, part_rows, part_shift,
    stride_q_b, stride_q_h, stride_q_n, stride_do_b, stride_do_h, stride_do_n,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_dq_b, stride_dq_h, stride_dq_n, scale, log2_scale, k_narrow_bias, v_narrow_bias,
    FORM: gl.constexpr, GROUP: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    HAS_NARROW_BIAS: gl.constexpr, PARTS_FOLLOW_QUERIES: gl.constexpr,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    KEYS: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """One program owns every num_programs-th item: `steps` tiles, and their part.

    A tile is P positions of all heads, or some heads of one of TILES_OF_POSITION tiles.

    k_wide and v_wide are descriptors of [B, Hkv, M, D] in blocks of BLOCK_N keys, k_narrow and
    v_narrow in blocks of KEYS keys and 64 columns, of which k_rows and v_rows are the memory. delta
    and lse2 are contiguous [B, Hkv, N, G]. Strides but those of dq are in units of 8 elements.
    Parts come zeroed, with a copy for each warpgroup; no other program writes to them.
    """
    dtype: gl.constexpr = k_wide.dtype
    ENTRIES: gl.constexpr = 64 // KEYS
    P: gl.constexpr = positions_of_tile(GROUP, ENTRIES)
    TILES_OF_POSITION: gl.constexpr = tiles_of_position(GROUP, ENTRIES)
    PAIRS: gl.constexpr = (ENTRIES + 1) // 2
    of_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    of_value_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_DV], dtype)
    of_keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    of_values: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_DV], dtype)
    k_blocks = gl.allocate_shared_memory(
        dtype, [4 * (BLOCK_D // 64) * PAIRS, 1, 1, KEYS, 64], k_narrow.layout
    )
    v_blocks = gl.allocate_shared_memory(
        dtype, [2 * (BLOCK_DV // 64) * PAIRS, 1, 1, KEYS, 64], v_narrow.layout
    )
    k_raw = k_blocks._reinterpret(dtype, [4, PAIRS * KEYS, BLOCK_D], of_rows)
    v_raw = v_blocks._reinterpret(dtype, [2, PAIRS * KEYS, BLOCK_DV], of_value_rows)
    vdo = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_DV], of_value_rows)
    vq = gl.allocate_shared_memory(dtype, [2, 64, BLOCK_D], of_rows)
    k_tiles = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_N, BLOCK_D], k_wide.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_N, BLOCK_DV], v_wide.layout)
    k_ring = k_tiles._reinterpret(dtype, [SLOTS, BLOCK_N, BLOCK_D], of_keys)
    v_ring = v_tiles._reinterpret(dtype, [SLOTS, BLOCK_N, BLOCK_DV], of_values)
    q_rows = gl.allocate_shared_memory(
        dtype, [2, ENTRIES, BLOCK_D], permuted_rows(ENTRIES, BLOCK_D, 2)
    )
    do_rows = gl.allocate_shared_memory(
        dtype, [2, ENTRIES, BLOCK_DV], permuted_rows(ENTRIES, BLOCK_DV, 2)
    )
    k_newest = gl.allocate_shared_memory(
        dtype, [2, PAIRS, BLOCK_D], permuted_rows(PAIRS, BLOCK_D, 2)
    )
    v_newest = gl.allocate_shared_memory(
        dtype, [2, PAIRS, BLOCK_DV], permuted_rows(PAIRS, BLOCK_DV, 2)
    )
    full = barriers(SLOTS, 1)
    empty = barriers(SLOTS, 2)
    rows_full = barriers(2, 1)
    k_empty = barriers(4, 1)
    v_empty = barriers(2, 1)
    fence_async_shared()
    sizes = (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        q_start_default,
    )  # fmt: skip
    q_strides = (stride_q_b, stride_q_h, stride_q_n)
    do_strides = (stride_do_b, stride_do_h, stride_do_n)
    k_strides = (stride_kn_b, stride_kn_h, stride_kn_n)
    v_strides = (stride_vn_b, stride_vn_h, stride_vn_n)
    dq_strides = (stride_dq_b, stride_dq_h, stride_dq_n)
    part_sizes = (slots, part_rows, part_shift)
    gl.warp_specialize(
        [
            (attend_narrow, (
                0, k_raw, v_raw, vq, vdo, q_rows, do_rows, k_newest, v_newest,
                rows_full, k_empty, v_empty, k_ring, v_ring, full, empty,
                q, dout, k_rows, v_rows, delta, lse2, has_huge, factors, row_factors,
                dq, dk_parts, dv_parts, kv_bounds, q_start, sizes,
                q_strides, do_strides, k_strides, v_strides, dq_strides, part_sizes,
                items, chunks, steps, tiles,
                scale, log2_scale, k_narrow_bias, v_narrow_bias,
                FORM, GROUP, HAS_BOUNDS, HAS_Q_START, HAS_NARROW_BIAS, PARTS_FOLLOW_QUERIES,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, KEYS, P,
                TILES_OF_POSITION, BLOCK_N, SLOTS, TAIL,
            )),
            (attend_narrow, (
                1, k_raw, v_raw, vq, vdo, q_rows, do_rows, k_newest, v_newest,
                rows_full, k_empty, v_empty, k_ring, v_ring, full, empty,
                q, dout, k_rows, v_rows, delta, lse2, has_huge, factors, row_factors,
                dq, dk_parts, dv_parts, kv_bounds, q_start, sizes,
                q_strides, do_strides, k_strides, v_strides, dq_strides, part_sizes,
                items, chunks, steps, tiles,
                scale, log2_scale, k_narrow_bias, v_narrow_bias,
                FORM, GROUP, HAS_BOUNDS, HAS_Q_START, HAS_NARROW_BIAS, PARTS_FOLLOW_QUERIES,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, KEYS, P,
                TILES_OF_POSITION, BLOCK_N, SLOTS, TAIL,
            )),
            (bring_wide_tiles, (
                k_wide, v_wide, k_tiles, v_tiles, full, empty, kv_bounds, q_start, sizes,
                items, chunks, steps, tiles, HAS_BOUNDS, HAS_Q_START, P,
                TILES_OF_POSITION, BLOCK_N, SLOTS, TAIL,
            )),
            (bring_narrow_rows, (
                k_narrow, v_narrow, k_blocks, v_blocks, rows_full, k_empty, v_empty,
                kv_bounds, q_start, sizes, items, chunks, steps, tiles,
                GROUP, HAS_BOUNDS, HAS_Q_START, BLOCK_D, BLOCK_DV, ENTRIES, P,
                TILES_OF_POSITION, BLOCK_N, TAIL,
            )),
        ],
        [4, 1, 1], [240, 24, 24],
    )  # fmt: skip


def backward_narrow(
    problem: Problem, statistics: Statistics, dq: Tensor, config: Config,
    scaled: Scaled | None = None,
) -> Parts:  # fmt: skip
    """Write dq [B, H, N, D], and return the parts of the narrow pair's gradients to be summed."""
    dout, delta, lse2, has_huge = statistics
    factors = row_factors = None
    if scaled is not None:
        problem, delta, lse2, factors, row_factors = scaled
    batch, _, seq, _ = problem.q.shape
    constants = problem.constants(dout, dq)
    block_d, block_dv = block(problem.q.shape[3]), block(dout.shape[3])
    kv_heads, *sizes = problem.sizes()
    entries = ROWS // config.keys
    heads = entries_of_position(problem.group, entries)
    processors = problem.device.multiprocessors
    tiles = ceil_div(seq * heads, 2 * entries)
    of_position = tiles_of_position(problem.group, entries)
    steps, chunks = _division(tiles // of_position, batch * kv_heads, processors)
    steps *= of_position
    parts = parts_of_queries(problem, heads, steps * 2 * entries, copies=_COPIES)
    assert parts is not None, "whoever chose this kernel asked `share_of`"
    items = batch * kv_heads * chunks
    q, dout = aligned(problem.q), aligned(dout)
    narrow = [_describable(t) for t in (problem.k_narrow, problem.v_narrow)]
    names = (
        "FORM", "GROUP", "HAS_BOUNDS", "HAS_Q_START", "HAS_NARROW_BIAS", "HEAD_DIM", "VALUE_DIM",
        "BLOCK_D", "BLOCK_DV",
    )  # fmt: skip
    launch(
        hopper_backward_narrow_kernel, min(items, processors),
        q,
        describe(problem.k_wide, [1, 1, config.block_n, block_d]),
        describe(problem.v_wide, [1, 1, config.block_n, block_dv]),
        *(describe(t, [1, 1, config.keys, 64]) for t in narrow), *narrow,
        dout, delta, lse2, has_huge, factors, row_factors,
        dq, parts.dk, parts.dv, problem.kv_bounds, problem.q_start,
        items, chunks, steps, tiles, kv_heads, *sizes, *parts.numbers,
        *(stride // UNIT for t in (q, dout, *narrow) for stride in t.stride()[:3]),
        *dq.stride()[:3],
        problem.scale, problem.log2_scale, *problem.biases()[2:],
        **{name: constants[name] for name in names},
        PARTS_FOLLOW_QUERIES=parts.do_follow_queries,
        config=config,
    )  # fmt: skip
    return parts


def write_query_and_narrow(
    problem: Problem, statistics: Statistics, grads: tuple[Tensor, Tensor, Tensor],
    config: Config, scaled: Scaled | None = None,
) -> None:  # fmt: skip
    """Write dq and the narrow pair's gradients, for a part of the narrow window after another.

    Those of several parts are summed in float32.
    """
    windows = _windows(_reach(problem), config.keys)
    if len(windows) == 1:
        _write(problem, windows[0], statistics, grads, config, scaled)
        return
    dq, *sums = (torch.zeros_like(t, dtype=torch.float32) for t in grads)
    places = [torch.empty_like(t) for t in sums]
    for reach in windows:
        _write(problem, reach, statistics, (dq, *places), config, scaled)
        for total, place in zip(sums, places, strict=True):
            total += place
    for grad, total in zip(grads, (dq, *sums), strict=True):
        grad.copy_(total)


def _write(
    problem: Problem, reach: tuple[int, int], statistics: Statistics, grads: Sequence[Tensor],
    config: Config, scaled: Scaled | None,
) -> None:  # fmt: skip
    """Write the gradients of a narrow window; a dq in float32 is added to."""
    some = dataclasses.replace(problem, narrow_reach=reach)
    dq, dk, dv = grads
    of_parts = None
    if scaled is not None:
        scaled = scaled._replace(problem=dataclasses.replace(scaled.problem, narrow_reach=reach))
        of_parts = scaled.of_parts
    parts = backward_narrow(some, statistics, dq, config, scaled)
    parts.sum_into(dk, dv, some, of_parts)


def width_of(problem: Problem) -> int:
    """Return how many keys the narrow window has, of which a row each."""
    return sum(_reach(problem)) + 1


def _reach(problem: Problem) -> tuple[int, int]:
    """Return the narrow window's reach, less what no query has keys at."""
    left, right = problem.narrow_reach
    if problem.q_start is not None:
        return left, right
    return min(left, problem.k_narrow.shape[2] - 1), min(right, problem.q.shape[2] - 1)


def _windows(reach: tuple[int, int], keys: int) -> list[tuple[int, int]]:
    """Return the reaches of windows of up to so many keys, together the one of that reach."""
    left, right = reach
    firsts = range(-right, left + 1, keys)
    return [(min(first + keys - 1, left), -first) for first in firsts]


def share_of(problem: Problem, config: Config) -> tuple[int, int] | None:
    """Return how many (batch rows, key-value heads) have their parts in memory at once.

    None: the parts of a single head would take more than they may.
    """
    return _share(
        *problem.k_narrow.shape, problem.v_narrow.shape[3], problem.q.shape[2], problem.group,
        _reach(problem), config.keys, memory_for_parts(problem), problem.device.multiprocessors,
    )  # fmt: skip


@functools.cache
def _share(
    batch: int, kv_heads: int, narrow_rows: int, head_dim: int, value_dim: int, seq: int,
    group: int, reach: tuple[int, int], keys: int, limit: int, processors: int,
) -> tuple[int, int] | None:  # fmt: skip
    entries = ROWS // keys
    per_position = entries_of_position(group, entries)
    tiles = ceil_div(seq * per_position, 2 * entries)
    of_position = tiles_of_position(group, entries)
    columns = head_dim + value_dim
    row_bytes = 4 * _COPIES * columns
    windows = _windows(reach, keys)
    farthest = max(left + right for left, right in windows)
    # In float32, if there are several windows: the sums, and a window's of the narrow pair.
    of_windows = 4 * (seq * group * head_dim + 2 * narrow_rows * columns)
    of_windows = of_windows if len(windows) > 1 else 0
    for some_batch, some_heads in shares(batch, kv_heads):
        heads = some_batch * some_heads
        steps, chunks = _division(tiles // of_position, heads, processors)
        steps *= of_position
        span = steps * 2 * entries // per_position + 1 + farthest
        taken = chunks * min(span, narrow_rows) * row_bytes + of_windows
        if heads * taken <= limit:
            return some_batch, some_heads
    return None


@functools.cache
def _division(tiles: int, heads: int, processors: int) -> tuple[int, int]:
    """Return how many tiles, or positions of several, are an item, and how many items a head has.

    So that the program with most to do has little, and in small items where that costs nothing: in
    two rounds of them the programs at work are spread over twice the keys that they are in four
    (10.6 ms for 10.2; B4 N2048 H16 Hkv16, H200, 2026-11-30).
    """

    def work(steps: int) -> float:
        rounds = ceil_div(heads * ceil_div(tiles, steps), processors)
        return rounds * (min(steps, tiles) + _START)

    def is_small(steps: int) -> bool:
        return heads * ceil_div(tiles, steps) >= _ROUNDS * processors

    most = max(min(_MOST_STEPS, tiles), _FEWEST_STEPS)
    some = range(most, _FEWEST_STEPS - 1, -1)
    steps = min(some, key=work)
    small = min(filter(is_small, some), key=work, default=steps)
    if work(small) < 1.05 * work(steps):
        steps = small
    return steps, ceil_div(tiles, steps)


def _describable(tensor: Tensor) -> Tensor:
    """Return a tensor that the copy engine can read: itself, or a copy."""
    if can_describe(tensor):
        return tensor
    *rows, columns = tensor.shape
    space = tensor.new_empty(*rows, ceil_div(columns, UNIT) * UNIT)
    return space[..., :columns].copy_(tensor)
