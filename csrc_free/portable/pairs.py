"""All four key-value gradients of the trilinear form in four matrix products, for large groups.

For a narrow key m and a tile of wide keys j, with X = sum of dS · q and Y = sum of P · dout over
the queries that see m:

    dk_wide += scale · k_m ∘ X      dk_m = scale · sum over j of k_j ∘ X[j]
    dv_wide += v_m ∘ Y              dv_m = sum over j of v_j ∘ Y[j]

so the inner loop is that of plain flash attention, with virtual keys k_j ∘ k_m.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_free import measured, tracing
from csrc_free.device.descriptors import describe, load_described
from csrc_free.device.pair import biases_of, load_pair, pairs_of
from csrc_free.device.products import operand, product, rounded_operand, transposed
from csrc_free.device.tiles import heads_of, key_ranges, place, query_rows, sizes_of, windows_of
from csrc_free.portable.gradients import PairGradients, inputs_of, launch_backward, sum_parts
from csrc_free.portable.rows import load_dout, load_queries, load_stats, queries_of
from csrc_free.portable.shared_memory import backward_bytes
from csrc_free.problem import NOT_SPECIALIZED, Problem, block
from csrc_free.rounding import ceil_div
from csrc_free.steps.delta import Statistics
from csrc_free.steps.parts import parts_of_wide_keys
from csrc_free.traits import Device, Traits


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_N wide keys that meet BLOCK_Q rows at a time."""

    block_q: int
    block_n: int
    tile_stages: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # the rows are read through tensor descriptors

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        return backward_bytes(self.block_n, self.block_q, self.tile_stages, traits, device)


MOST_SPLITS = 16
SPACE = {
    "block_q": (16, 32, 64, 128), "block_n": (16, 32, 64, 128), "tile_stages": (1, 2, 3, 4),
    "num_warps": (4, 8), "num_stages": (1, 2, 3, 4),
}  # fmt: skip


def choose(traits: Traits, device: Device) -> Config | None:
    """Choose the tiles of all four key-value gradients at once; None: take the other kernels.

    Rows are read by descriptor where a tile is of one position.
    """
    for config in _configs(traits, device):
        if config.shared_bytes(traits, device) <= device.shared_limit:
            is_of_one_position = traits.group % config.block_q == 0
            can = traits.is_describable and traits.are_rows_describable
            return dataclasses.replace(config, descriptors=can and is_of_one_position)
    return None


def splits_of(programs: int, device: Device) -> int:
    """Choose among how many programs each tile's narrow keys are shared.

    A multiprocessor holds two programs; while some would hold none, each is split in two. Every
    split has sums of its own for the wide pair, which are then added up.
    At G = 64 and N = 2048, on an H100 (2026-11-25), the backward took 9.5 ms for 31.6 with one
    batch row in 8 splits, 18.8 for 40.6 with two in 4, 38.2 for 54.9 with four in 2.
    """
    splits = 1
    while splits < MOST_SPLITS and tracing.likely(splits * programs <= device.multiprocessors):
        splits *= 2
    return splits


def _configs(traits: Traits, device: Device) -> Iterator[Config]:
    if device.is_interpreted:  # which meets every kernel, each at one range of group sizes
        if traits.group >= 4 and traits.form == "trilinear":
            yield Config(16, 16, 1, 4, 1)
        return
    yield from measured.configs("pairs", Config, traits, device)


@triton.jit
def _narrow_key(
    narrow, narrow_row, has_key, dims: tl.constexpr
):  # fmt: skip
    """Return one narrow key [BLOCK_D] and its value [BLOCK_DV], with their biases."""
    HEAD_DIM: tl.constexpr = dims[0]
    VALUE_DIM: tl.constexpr = dims[1]
    BLOCK_D: tl.constexpr = dims[2]
    BLOCK_DV: tl.constexpr = dims[3]
    k_narrow, v_narrow, stride_k_n, stride_v_n, k_bias, v_bias, _b, _h, _first, _count = narrow
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    row = narrow_row.to(tl.int64)
    # Not `has_key & ...`: Triton 3.9's interpreter takes no mask made of a scalar and a block.
    k = tl.load(
        k_narrow + row * stride_k_n + columns,
        mask=tl.where(has_key, columns < HEAD_DIM, False), other=0.0,
    )  # fmt: skip
    v = tl.load(
        v_narrow + row * stride_v_n + value_columns,
        mask=tl.where(has_key, value_columns < VALUE_DIM, False), other=0.0,
    )  # fmt: skip
    return k.to(tl.float32) + k_bias, v.to(tl.float32) + v_bias


@triton.jit
def _wide_tile(
    wide, row, key_mask, dims: tl.constexpr
):  # fmt: skip
    """Return the program's wide keys [BLOCK_N, BLOCK_D] and values, with their biases."""
    k_bias, v_bias = biases_of(wide)
    k, v = load_pair(wide, row, key_mask, dims)
    return k.to(tl.float32) + k_bias, v.to(tl.float32) + v_bias


@triton.jit
def _virtual_keys(
    wide, narrow, row, key_mask, narrow_row, has_key, dims: tl.constexpr, dot: tl.constexpr
):  # fmt: skip
    """Return k_j ∘ k_m [BLOCK_N, BLOCK_D] and v_j ∘ v_m [BLOCK_N, BLOCK_DV]."""
    k, v = _wide_tile(wide, row, key_mask, dims)
    k_row, v_row = _narrow_key(narrow, narrow_row, has_key, dims)
    vk = rounded_operand(k * k_row[None, :], dot[0], dot[1])
    vv = rounded_operand(v * v_row[None, :], dot[0], dot[1])
    return vk, vv


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def backward_pairs_kernel(
    q, k_wide, v_wide, k_narrow, v_narrow, dout, delta, lse2, has_huge,
    dk_wide, dv_wide, dk_parts, dv_parts,
    kv_bounds, q_start,
    kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
    q_start_default, slots, part_rows, part_shift,
    stride_q_b, stride_q_h, stride_q_n,
    stride_kw_b, stride_kw_h, stride_kw_n, stride_vw_b, stride_vw_h, stride_vw_n,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_do_b, stride_do_h, stride_do_n,
    scale, log2_scale, k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
    FORM: tl.constexpr, SIGN: tl.constexpr, GROUP: tl.constexpr, INDEX: tl.constexpr,
    IS_SMALL_GRID: tl.constexpr, HAS_BOUNDS: tl.constexpr, HAS_Q_START: tl.constexpr,
    HAS_WIDE_BIAS: tl.constexpr, HAS_NARROW_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, TILE_STAGES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """`SPLITS` programs own BLOCK_N wide keys of one key-value head, and one part of the narrow's.

    Each has its share of the narrow keys. It loops over them, and inside over the rows (position,
    head) that see both. dk_wide and dv_wide are zeroed float32 [SPLITS, B, Hkv, rows, D]: between
    narrow keys the owner keeps its sums there. Parts are zeroed too, and each slot is written once.
    With DESCRIPTORS, q and dout are descriptors of [B, N, H, D], delta and lse2 of [B, Hkv, N, G];
    a tile of rows is then of one position.
    """
    form: tl.constexpr = (FORM, SIGN, HAS_WIDE_BIAS, HAS_NARROW_BIAS)
    dims: tl.constexpr = (HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV)
    dot: tl.constexpr = (DOT_DTYPE, PRECISION)
    shares = tl.cdiv(wide_rows, BLOCK_N) * SPLITS
    share, bh, batch, kv_head = place(shares, kv_heads, IS_SMALL_GRID, False)
    tile = share // SPLITS
    heads = tl.num_programs(0) // shares
    sizes = sizes_of(seq, wide_rows, narrow_rows)
    _seq, key_count, _wide_rows, _narrow_rows, wide_first, narrow_first = sizes
    start = tl.load(q_start + batch) if HAS_Q_START else q_start_default
    windows = windows_of(start, wide_left, wide_right, narrow_left, narrow_right, sizes)
    wide_begin, wide_end, narrow_begin, narrow_end = windows
    scale = tl.cast(scale, tl.float32)
    log2_scale = tl.cast(log2_scale, tl.float32)
    tile_row = (tile * BLOCK_N).to(tl.int64)
    wide, narrow = pairs_of(
        (k_wide + tile_row * stride_kw_n, stride_kw_b, stride_kw_h, stride_kw_n, k_wide_bias),
        (v_wide + tile_row * stride_vw_n, stride_vw_b, stride_vw_h, stride_vw_n, v_wide_bias),
        (k_narrow, stride_kn_b, stride_kn_h, stride_kn_n, k_narrow_bias),
        (v_narrow, stride_vn_b, stride_vn_h, stride_vn_n, v_narrow_bias),
        batch, kv_head, sizes, False,
    )  # fmt: skip
    if not DESCRIPTORS:
        q_heads = heads_of((q, stride_q_b, stride_q_h, stride_q_n), batch, kv_head, GROUP)
        dout_heads = heads_of((dout, stride_do_b, stride_do_h, stride_do_n), batch, kv_head, GROUP)
    is_huge = tl.load(has_huge + bh) != 0
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)

    keys = tl.arange(0, BLOCK_N).to(INDEX)
    key_mask = tile * BLOCK_N + keys < wide_rows
    key_first = wide_first + tile * BLOCK_N
    key_last = tl.minimum(key_first + BLOCK_N, key_count) - 1
    sum_rows = ((share % SPLITS * heads + bh) * wide_rows + tile_row + keys)[:, None]
    dk_sums = dk_wide + sum_rows * HEAD_DIM + columns[None, :]
    dv_sums = dv_wide + sum_rows * VALUE_DIM + value_columns[None, :]
    dk_mask = key_mask[:, None] & (columns < HEAD_DIM)[None, :]
    dv_mask = key_mask[:, None] & (value_columns < VALUE_DIM)[None, :]
    part_slot = (tile * heads + bh) * slots - narrow_first
    part_slot -= tile * part_rows + part_shift

    query_first = tl.maximum(key_first - wide_end + 1, 0)
    query_end = tl.minimum(key_last - wide_begin + 1, seq)
    m_first = tl.maximum(query_first + narrow_begin, narrow_first)
    m_end = tl.minimum(query_end - 1 + narrow_end, key_count)
    count = m_end - m_first
    if query_first >= query_end:
        count = 0
    if SPLITS > 1:
        each = tl.cdiv(tl.maximum(count, 0), SPLITS)
        m_first += share % SPLITS * each
        count = tl.minimum(count - share % SPLITS * each, each)
    # At turn t a program is at the narrow key congruent to t: tiles that share narrow keys, and so
    # queries, meet them at the same time, and read them from the cache.
    shift = count - m_first % tl.maximum(count, 1)
    m = m_first + shift % tl.maximum(count, 1)
    vk, vv = _virtual_keys(wide, narrow, keys, key_mask, m - narrow_first, count > 0, dims, dot)
    for turn in range(count):
        flat_first = tl.maximum(query_first, m - narrow_end + 1) * GROUP
        flat_end = tl.minimum(query_end, m - narrow_begin + 1) * GROUP
        x = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        y = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        for flat in tl.range(flat_first, flat_end, BLOCK_Q, num_stages=TILE_STAGES):
            row = flat + tl.arange(0, BLOCK_Q)
            i, head, mask = query_rows(row, seq, GROUP, GROUP, INDEX)
            mask = mask & (row < flat_end)
            rows = (i, head, mask)
            if DESCRIPTORS:
                query_i, first_head = flat // GROUP, flat % GROUP
                of_all = kv_head * GROUP + first_head
                query = load_described(q, batch, query_i, of_all, 0, BLOCK_Q, BLOCK_D)
                do = load_described(dout, batch, query_i, of_all, 0, BLOCK_Q, BLOCK_DV)
                row_lse2 = load_described(lse2, batch, kv_head, query_i, first_head, 1, BLOCK_Q)
                row_delta = load_described(delta, batch, kv_head, query_i, first_head, 1, BLOCK_Q)
                row_lse2 = tl.reshape(row_lse2, [BLOCK_Q])
                row_delta = tl.reshape(row_delta, [BLOCK_Q])
            else:
                queries = queries_of(q_heads, dout_heads, rows)
                query, _query_prev = load_queries(queries, form, dims)
                do = load_dout(queries, dims)
                row_lse2, row_delta = load_stats(lse2, delta, bh * seq * GROUP + row, mask)
            query = operand(query, DOT_DTYPE, PRECISION)
            do = operand(do, DOT_DTYPE, PRECISION)
            s = product(vk, transposed(query, PRECISION), None, PRECISION)  # [BLOCK_N, BLOCK_Q]
            dp = product(vv, transposed(do, PRECISION), None, PRECISION)
            p = tl.exp2(s * log2_scale - row_lse2[None, :])
            # Scalars where they decide: a reduction over rows would cost a barrier an iteration.
            last_flat = tl.minimum(flat + BLOCK_Q, flat_end) - 1
            is_partial = (
                (key_last >= flat // GROUP + wide_end)
                | (key_first < last_flat // GROUP + wide_begin)
                | (key_last - key_first + 1 < BLOCK_N)
                | is_huge
            )
            if HAS_BOUNDS | is_partial:
                lo, hi, narrow_lo, narrow_hi = key_ranges(
                    rows, batch, kv_bounds, windows, sizes, HAS_BOUNDS
                )
                hi = tl.where((m >= narrow_lo) & (m < narrow_hi), hi, 0)
                key = (key_first + keys)[:, None]
                visible = (key >= lo[None, :]) & (key < hi[None, :])
                p = tl.where(visible, tl.minimum(p, 1.0), 0.0)
            y = product(operand(p, DOT_DTYPE, PRECISION), do, y, PRECISION)
            ds = p * (dp - row_delta[None, :])
            x = product(operand(ds, DOT_DTYPE, PRECISION), query, x, PRECISION)

        k, v = _wide_tile(wide, keys, key_mask, dims)
        k_row, v_row = _narrow_key(narrow, m - narrow_first, True, dims)
        dk = tl.sum(x * k, 0) * scale
        dv = tl.sum(y * v, 0)
        tl.store(dk_parts + (part_slot + m) * HEAD_DIM + columns, dk, mask=columns < HEAD_DIM)
        tl.store(
            dv_parts + (part_slot + m) * VALUE_DIM + value_columns, dv,
            mask=value_columns < VALUE_DIM,
        )  # fmt: skip
        x *= (k_row * scale)[None, :]
        y *= v_row[None, :]
        tl.store(dk_sums, tl.load(dk_sums, mask=dk_mask, other=0.0) + x, mask=dk_mask)
        tl.store(dv_sums, tl.load(dv_sums, mask=dv_mask, other=0.0) + y, mask=dv_mask)
        # The next turn may load the sums in another layout: by other threads than stored them.
        tl.debug_barrier()
        m = m_first + (turn + 1 + shift) % count
        vk, vv = _virtual_keys(wide, narrow, keys, key_mask, m - narrow_first, True, dims, dot)


def write_pairs(
    problem: Problem, statistics: Statistics, config: Config,
    wide: PairGradients, narrow: PairGradients,
) -> bool:  # fmt: skip
    """Write the gradients of both pairs, unless the narrow one's parts would be too large."""
    parts = parts_of_wide_keys(problem, config.block_n)
    if parts is None:
        return False
    tiles = ceil_div(problem.k_wide.shape[2], config.block_n)
    splits = splits_of(tiles * problem.k_wide.shape[0] * problem.k_wide.shape[1], problem.device)
    sums = [
        torch.zeros(splits, *t.shape, dtype=torch.float32, device=t.device)
        for t in (problem.k_wide, problem.v_wide)
    ]
    launch_backward(
        backward_pairs_kernel, tiles * splits,
        problem, statistics, _inputs(problem, statistics, config),
        (*sums, parts.dk, parts.dv), parts.numbers, config=config, SPLITS=splits,
    )  # fmt: skip
    for grad, total in zip(wide, sums, strict=True):
        if grad is not None:
            grad.copy_(total[0] if splits == 1 else total.sum(0))
    sum_parts(parts, narrow, problem)
    return True


def _inputs(
    problem: Problem, statistics: Statistics, config: Config
) -> tuple[Tensor | TensorDescriptor, ...]:
    """Return the inputs, what is read by rows through descriptors where the config says so."""
    if not config.descriptors:
        return inputs_of(problem, statistics)
    q, *kept = problem.tensors
    dout, delta, lse2, has_huge = statistics
    q_tile, dout_tile = (
        describe(t.transpose(1, 2), config.block_q, block(t.shape[3])) for t in (q, dout)
    )
    of_rows = (describe(t, 1, config.block_q) for t in (delta, lse2))
    return q_tile, *kept, dout_tile, *of_rows, has_huge
