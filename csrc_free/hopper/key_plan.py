"""How the key side of the backward divides its work, or why it does not serve: a pure choice."""

import functools
from dataclasses import dataclass

import torch

from csrc_free.device.descriptors import can_describe
from csrc_free.hopper.ordered import bytes_of, columns_of
from csrc_free.problem import Problem, block
from csrc_free.rounding import ceil_div, next_power_of_2
from csrc_free.steps.parts import LIMIT_BYTES

# Virtual keys, and a tile of rows (position, head): the shape of a warpgroup's product.
KEYS = 64
ROWS = 64
# Each narrow key costs its sums over keys, whoever sees it. Measured down to 128 rows (4 heads to
# one, 32 narrow keys: 24.8 ms for 34.7 of the portable kernels).
FEWEST_ROWS = 64
# Query heads of a key-value head that `wide` and `narrow` serve.
MOST_HEADS = 64
# Small problems may take this much, whatever their gradients are: else few programs would share
# the work.
FLOOR_BYTES = 2**27
_TILES = (1, 2, 3, 4, 6, 8)
_SPLITS = (1, 2, 3, 4, 6, 8)
# What sums of an earlier tile cost that are read again: 26.9 ms for 23.9 (8 heads to one; H100,
# 2026-11-25).
_SHARED_PART = 1.12
_SPLIT = 0.03  # what each program more that shares a tile adds to the time
# Tiles of 16 wide keys that meet four narrow keys at once, for 64 and one: 32.5 ms for 45.7 at
# 128 x 128, 32.3 for 37.2 at 256 x 64, 31.3 for 31.3 at 512 x 32 (B4 N4096 H64 Hkv1); 8 heads to
# one, 128 x 128, 10.8 for 12.8 (H200, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-30). By the rows
# they meet that is 0.93 to 1.06 of what it should take.
_FEWER_KEYS = 16
_SHARED_PRODUCT = 1.05
_SHARED_FROM = 48  # narrow keys: not measured below
_MOST_ITEMS = 4096  # beyond, programs are even without help


@dataclass(frozen=True)
class Plan:
    """How the work of one problem is divided among programs."""

    keys: int  # wide keys of a tile
    tiles: int  # of wide keys, that share one part of the narrow pair's gradients
    splits: int  # programs that share the turns of one tile
    batch: int  # rows of the batch, and key-value heads, of one launch: the next ones take the
    kv_heads: int  # same memory


def plan_of(problem: Problem, dout: torch.Tensor) -> Plan | str:
    """Return how the work is divided, or why the kernel of all four gradients does not serve."""
    reason = _why_not(problem, dout) or why_not_half(problem)
    if reason is None and not 3 <= problem.group <= ROWS:
        reason = f"for 3 to {ROWS} query heads of a key-value head, got {problem.group}"
    if reason is None and problem.group * problem.narrow_width < FEWEST_ROWS:
        reason = (
            f"for {FEWEST_ROWS} rows or more that see a narrow key, "
            f"got {problem.group * problem.narrow_width}"
        )
    if reason is not None:
        return reason
    batch, kv_heads, rows, _ = problem.k_wide.shape
    plan = _division(
        batch, kv_heads, rows, problem.k_narrow.shape[2], problem.q.shape[2],
        problem.wide_reach, problem.narrow_reach, problem.keys - problem.q.shape[2],
        problem.wide_first, columns_of(problem) + problem.v_wide.shape[3],
        _bytes_of_gradients(problem),
        _bytes_of_statistics(problem) + _bytes_of_padded(problem) + bytes_of(problem),
        problem.device.multiprocessors, _kinds(problem.group, problem.narrow_width),
    )  # fmt: skip
    if plan is None:
        return "the parts of the narrow pair's gradients would take more memory than they may"
    return plan


def _kinds(group: int, narrow: int) -> tuple[tuple[int, float], ...]:
    """Return how many wide keys a tile may have, and the work of each query that sees one of them.

    A tile of 64 meets one narrow key at once. One of 16 meets four: fewer of its rows see only some
    of its wide keys, and some see only some of the narrow ones.
    """
    positions = ROWS // next_power_of_2(group)

    def work(keys: int) -> float:
        at_once = KEYS // keys
        return ceil_div(narrow + at_once - 1, positions) * positions / at_once

    if narrow < _SHARED_FROM:
        return ((KEYS, work(KEYS)),)
    return (KEYS, work(KEYS)), (_FEWER_KEYS, _SHARED_PRODUCT * work(_FEWER_KEYS))


def splits_of_wide(problem: Problem, dout: torch.Tensor) -> int | str:
    """Return how many programs share a tile, or why the wide pair's kernel does not serve."""
    reason = _why_not(problem, dout) or why_not_half(problem)
    if reason is not None:
        return reason
    if problem.group > MOST_HEADS:
        return f"for 1 to {MOST_HEADS} query heads of a key-value head, got {problem.group}"
    columns, value_dim = columns_of(problem), problem.v_wide.shape[3]
    if block(columns) != block(value_dim):
        return f"D and Dv take other tiles: {problem.q.shape[3]}, {value_dim}"
    if any(problem.biases()[:2]):
        return "a bias of the wide pair"
    for name, tensor in (
        ("the narrow keys", problem.k_narrow), ("the narrow values", problem.v_narrow)
    ):  # fmt: skip
        if not can_describe(tensor):
            return f"{name}: strides {tuple(tensor.stride())} are no positive multiples of 16 bytes"
    batch, kv_heads, rows, _ = problem.k_wide.shape
    items = batch * kv_heads * ceil_div(rows, 2 * KEYS)
    row_bytes = 4 * batch * kv_heads * rows * (columns + value_dim)
    limit = memory_for_parts(problem)

    def time(splits: int) -> float:
        rounds = ceil_div(items * splits, problem.device.multiprocessors)
        return rounds / splits * (1 + _SPLIT * (splits - 1))

    # The splits' sums, and the sum over them.
    return min((n for n in _SPLITS if n == 1 or row_bytes * (n + 1) <= limit), key=time)


def _why_not(problem: Problem, dout: torch.Tensor) -> str | None:
    """Return why no kernel of the key side here serves, or None."""
    device, head_dim, value_dim = problem.device, problem.q.shape[3], problem.v_wide.shape[3]
    if (device.backend, device.arch) != ("cuda", 90):
        return f"compiled for sm_90 alone, and the device is {device.name}"
    if problem.q.dtype not in (torch.bfloat16, torch.float16):
        return f"for bfloat16 and float16, got {problem.q.dtype}"
    if max(head_dim, value_dim) > 128 or min(head_dim, value_dim) < 33:
        return f"for head_dim from 33 to 128, got {head_dim} and {value_dim}"
    for name, tensor in (("q", problem.q), ("the wide keys", problem.k_wide),
                         ("the wide values", problem.v_wide), ("dout", dout)):  # fmt: skip
        if not can_describe(tensor):
            return f"{name}: strides {tuple(tensor.stride())} are no positive multiples of 16 bytes"
    return None


def why_not_half(problem: Problem) -> str | None:
    """Return what of a float16 problem cannot be scaled by powers of two, or None."""
    if problem.q.dtype != torch.float16:
        return None
    if problem.form != "trilinear":
        return f"in float16 for the trilinear form alone, got {problem.form}"
    return "a bias of the wide pair in float16" if any(problem.biases()[:2]) else None


def _bytes_of_statistics(problem: Problem) -> int:
    """Return the bytes of delta and lse2."""
    batch, heads, seq, _ = problem.q.shape
    return 2 * 4 * batch * seq * heads


def _bytes_of_padded(problem: Problem) -> int:
    """Return the bytes of delta and lse2 with a power of two of heads, where G is none."""
    batch, heads, seq, _ = problem.q.shape
    padded = next_power_of_2(problem.group)
    return 2 * 4 * batch * seq * heads // problem.group * padded if padded > problem.group else 0


@functools.cache
def _division(
    batch: int, kv_heads: int, rows: int, narrow_rows: int, seq: int,
    wide_reach: tuple[int, int], narrow_reach: tuple[int, int], start: int, wide_first: int,
    columns: int, gradient_bytes: int, statistics_bytes: int, processors: int,
    kinds: tuple[tuple[int, float], ...],
) -> Plan | None:  # fmt: skip
    """Return the division that takes the least time, of those whose memory may be had."""
    limit = _limit(gradient_bytes) - statistics_bytes
    left, right = wide_reach
    best: tuple[float, Plan] | None = None
    for keys, work in kinds:
        count = ceil_div(rows, keys)
        weights = []  # of each tile: the work of the queries that see it
        for tile in range(count):
            key = wide_first + tile * keys
            seen = min(key + keys + left - start, seq) - max(key - right - start, 0)
            weights.append(max(0, seen) * work)
        for some_batch, some_heads in shares(batch, kv_heads):
            launches = ceil_div(batch, some_batch) * ceil_div(kv_heads, some_heads)
            heads = some_batch * some_heads
            for tiles in _TILES:
                slots = min(keys * tiles + left + right + sum(narrow_reach), narrow_rows)
                parts = ceil_div(count, tiles)
                # Programs that share a tile divide its narrow keys, each tile's otherwise: two
                # would add to one row of a part that several tiles share.
                for splits in _SPLITS if tiles == 1 else (1,):
                    taken = 4 * columns * heads * parts * slots
                    # The splits' sums, and the sum over them.
                    taken += 4 * columns * heads * rows * (splits + 1) if splits > 1 else 0
                    if taken > limit:
                        continue
                    time = launches * _time(weights, heads, tiles, splits, processors)
                    time *= (_SHARED_PART if tiles > 1 else 1.0) + _SPLIT * (splits - 1)
                    time *= 1 + 0.01 * (launches - 1)
                    if best is None or time < best[0]:
                        best = time, Plan(keys, tiles, splits, some_batch, some_heads)
    return None if best is None else best[1]


def memory_for_parts(problem: Problem) -> int:
    """Return how many bytes the narrow pair's parts may take beside the statistics."""
    taken = _bytes_of_statistics(problem) + bytes_of(problem)
    return _limit(_bytes_of_gradients(problem)) - taken


def shares(batch: int, kv_heads: int) -> list[tuple[int, int]]:
    """Return (batch rows, key-value heads) that one launch may take, all of them first."""
    return [(n, kv_heads) for n in _halves(batch)] + [(1, n) for n in _halves(kv_heads)[1:]]


def _bytes_of_gradients(problem: Problem) -> int:
    return 2 * sum(t.numel() for t in problem.tensors)


def _limit(gradient_bytes: int) -> int:
    return min(LIMIT_BYTES, max(2 * gradient_bytes, FLOOR_BYTES))


def _halves(count: int) -> list[int]:
    """Return count, half of it, a quarter and so on, to 1."""
    found = [count]
    while found[-1] > 1:
        found.append((found[-1] + 1) // 2)
    return found


def _time(weights: list[float], heads: int, tiles: int, splits: int, processors: int) -> float:
    """Return the work of the program that has most: items go round by number."""
    parts = [sum(weights[i : i + tiles]) / splits for i in range(0, len(weights), tiles)]
    items = len(parts) * splits * heads
    if items > _MOST_ITEMS:
        return sum(parts) * splits * heads / processors
    work = [0.0] * min(processors, items)
    for item in range(items):
        work[item % len(work)] += parts[item // heads // splits]
    return max(work)
