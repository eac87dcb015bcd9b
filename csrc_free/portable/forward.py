"""The portable forward: flash attention with a virtual query for every offset of the narrow window.

A tile's rows are REPLICAS copies of BLOCK_Q (position, head) entries; each copy takes every
REPLICAS-th offset, and the copies are merged by their log-sum-exp at the end.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from csrc_free import measured
from csrc_free.device.forms import store_rows
from csrc_free.device.pair import load_keys, load_narrow_values, load_values, pairs_of
from csrc_free.device.products import operand, product, transposed
from csrc_free.device.tiles import (
    head_offs,
    heads_of,
    look,
    offset_range,
    place,
    query_rows,
    rows_in,
    sizes_of,
    windows_of,
)
from csrc_free.portable.arguments import launch_tiles
from csrc_free.portable.rows import virtual_queries
from csrc_free.portable.shared_memory import forward_bytes
from csrc_free.portable.wide_parts import with_wide_parts
from csrc_free.problem import NOT_SPECIALIZED, Problem
from csrc_free.rounding import ceil_div
from csrc_free.traits import Device, Traits, first_that_fits

LN_2 = tl.constexpr(0.6931471805599453)
# Where the sum of exponentials of one offset stays below this, a maximum that lags behind costs
# nothing: float32 has room for 2^30 times any value below 2^97.
LAGGING_LIMIT = tl.constexpr(2.0**30)
# A settled maximum is subtracted inside a fused multiply-add, from an exponent that is not rounded;
# any other from a rounded one. Up to this size the two differ by less than 2^-14. Beyond it equal
# logits would weigh differently, so there no maximum counts as settled.
SETTLING_LIMIT = tl.constexpr(2.0**10)


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_Q rows, REPLICAS offsets at a time, that meet BLOCK_N wide keys at a time."""

    block_q: int
    replicas: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # the wide pair is read through tensor descriptors

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        return forward_bytes(
            self.block_q * self.replicas, self.block_n, self.num_stages, traits, device
        )


SPACE = {
    "block_q": (16, 32, 64, 128), "replicas": (1, 2, 4), "block_n": (16, 32, 64, 128),
    "num_warps": (4, 8), "num_stages": (1, 2, 3, 4),
}  # fmt: skip


@functools.cache
def choose(traits: Traits, device: Device) -> Config:
    """Choose the forward's tiles."""
    return first_that_fits(_configs(traits, device), traits, device)


def _configs(traits: Traits, device: Device) -> Iterator[Config]:
    described = traits.is_describable
    if device.is_interpreted:
        yield Config(16, 2, 16, 4, 1, described)
        return
    yield from measured.configs("forward", Config, traits, device, descriptors=described)
    side, warps = traits.plain_tile
    has_tall_tile = traits.columns <= 64 and traits.are_keys_aligned
    yield Config(64 if has_tall_tile else side, 1, side, warps, 1)
    yield Config(16, 1, 16, 8, 1)


@triton.jit
def _attend(
    vq, row_constant, top, sees_key, sight, wide, keys, log2_scale,
    dims: tl.constexpr, dot: tl.constexpr, IS_SETTLED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of virtual queries to the wide window; `keys` counts a tile's keys.

    Returns (t [M, BLOCK_DV], total [M], top [M]): sum of P · v, sum of P, and the maximum in P's
    exponents, in log2 units. Settled, the incoming maximum is used as it is.
    """
    lo, hi, first, last, full_lo, full_hi = sight
    BLOCK_DV: tl.constexpr = dims[3]
    DOT_DTYPE: tl.constexpr = dot[0]
    PRECISION: tl.constexpr = dot[1]
    M: tl.constexpr = row_constant.shape[0]
    BLOCK_N: tl.constexpr = keys.shape[0]
    t = tl.zeros([M, BLOCK_DV], tl.float32)
    total = tl.zeros([M], tl.float32)
    totals = tl.zeros([M, 4], tl.float32)
    shift = tl.where(sees_key, top - row_constant, float("inf"))
    for j in range(first, last, BLOCK_N):
        k = load_keys(wide, j, keys, dims, dot, DESCRIPTORS)
        s = product(vq, transposed(k, PRECISION), None, PRECISION)
        if IS_SETTLED:
            p = tl.exp2(s * log2_scale - shift[:, None])
            if (j < full_lo) | (j + BLOCK_N > full_hi):
                visible = (j + keys[None, :] >= lo[:, None]) & (j + keys[None, :] < hi[:, None])
                p = tl.where(visible, p, 0.0)
            # In a tensor core's result a row has four threads, and each of them two columns of
            # every eight: these sums stay within a thread.
            totals += tl.sum(tl.sum(tl.reshape(p, [M, BLOCK_N // 8, 4, 2]), 3), 1)
        else:
            s = s * log2_scale + row_constant[:, None]
            visible = (j + keys[None, :] >= lo[:, None]) & (j + keys[None, :] < hi[:, None])
            s = tl.where(visible & sees_key[:, None], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            decay = tl.exp2(top - base)
            p = tl.exp2(s - base[:, None])
            t = t * decay[:, None]
            total = total * decay
            top = new_top
            total += tl.sum(p, 1)
        v = load_values(wide, j, keys, dims, dot, DESCRIPTORS)
        t = product(operand(p, DOT_DTYPE, PRECISION), v, t, PRECISION)
    return t, total + tl.sum(totals, 1), top


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward_kernel(
    q, k_wide, v_wide, k_narrow, v_narrow, out, lse, kv_bounds, q_start,
    kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
    q_start_default,
    stride_q_b, stride_q_h, stride_q_n,
    stride_kw_b, stride_kw_h, stride_kw_n, stride_vw_b, stride_vw_h, stride_vw_n,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_o_b, stride_o_h, stride_o_n,
    log2_scale, k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
    FORM: tl.constexpr, SIGN: tl.constexpr, GROUP: tl.constexpr, INDEX: tl.constexpr,
    IS_SMALL_GRID: tl.constexpr, HAS_BOUNDS: tl.constexpr, HAS_Q_START: tl.constexpr,
    HAS_WIDE_BIAS: tl.constexpr, HAS_NARROW_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, REPLICAS: tl.constexpr, BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_Q rows (position, head) of one key-value head, and writes only them.

    It loops over the offsets of the narrow window, and inside over tiles of the wide window.
    With DESCRIPTORS, k_wide and v_wide are descriptors.
    """
    M: tl.constexpr = BLOCK_Q * REPLICAS
    form: tl.constexpr = (FORM, SIGN, HAS_WIDE_BIAS, HAS_NARROW_BIAS)
    dims: tl.constexpr = (HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV)
    dot: tl.constexpr = (DOT_DTYPE, PRECISION)
    tiles = tl.cdiv(seq * GROUP, BLOCK_Q)
    tile, bh, batch, kv_head = place(tiles, kv_heads, IS_SMALL_GRID, True)
    sizes = sizes_of(seq, wide_rows, narrow_rows)
    _seq, _keys, _wide_rows, _narrow_rows, _wide_first, narrow_first = sizes
    start = tl.load(q_start + batch) if HAS_Q_START else q_start_default
    windows = windows_of(start, wide_left, wide_right, narrow_left, narrow_right, sizes)
    replica = tl.arange(0, M) // BLOCK_Q
    flat = tile * BLOCK_Q + tl.arange(0, M) % BLOCK_Q
    rows = query_rows(flat, seq, GROUP, GROUP, INDEX)
    i, _head, mask = rows
    sight, narrow_sight = look(rows, batch, kv_bounds, windows, sizes, HAS_BOUNDS)
    narrow_lo, narrow_hi, sees = narrow_sight
    offset_first, offset_last = offset_range(i, narrow_lo, narrow_hi, sees)

    log2_scale = tl.cast(log2_scale, tl.float32)
    wide, narrow = pairs_of(
        (k_wide, stride_kw_b, stride_kw_h, stride_kw_n, k_wide_bias),
        (v_wide, stride_vw_b, stride_vw_h, stride_vw_n, v_wide_bias),
        (k_narrow, stride_kn_b, stride_kn_h, stride_kn_n, k_narrow_bias),
        (v_narrow, stride_vn_b, stride_vn_h, stride_vn_n, v_narrow_bias),
        batch, kv_head, sizes, DESCRIPTORS,
    )  # fmt: skip
    q_heads = heads_of((q, stride_q_b, stride_q_h, stride_q_n), batch, kv_head, GROUP)
    q, query_offs = rows_in(q_heads, rows)
    keys = tl.arange(0, BLOCK_N).to(INDEX)

    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_DV], tl.float32)
    key = i - offset_first - replica
    sees_key = sees & (key >= narrow_lo) & (key < narrow_hi)
    # The virtual queries are made one offset ahead: a loop-carried operand is multiplied from
    # shared memory, one made in the same iteration is reloaded into registers for every product.
    vq, row_constant = virtual_queries(
        q, query_offs, mask, narrow, wide, key - narrow_first, sees_key, log2_scale, form,
        dims, dot,
    )  # fmt: skip
    # The maximum is nearly always settled by the first offset; checked, never assumed.
    is_settled = False
    can_settle = False
    for _offset in range(offset_first, offset_last + 1, REPLICAS):
        t = tl.zeros([M, BLOCK_DV], tl.float32)
        new_total = total
        if is_settled:
            t, new_total, _top = _attend(
                vq, row_constant, top, sees_key, sight, wide, keys, log2_scale, dims, dot,
                True, DESCRIPTORS,
            )  # fmt: skip
            # Also false where a row saw nothing before: its exponentials are then infinite.
            is_settled = tl.max(new_total, 0) < LAGGING_LIMIT
        if not is_settled:
            t, new_total, new_top = _attend(
                vq, row_constant, top, sees_key, sight, wide, keys, log2_scale, dims, dot,
                False, DESCRIPTORS,
            )  # fmt: skip
            decay = tl.exp2(top - tl.where(new_top == float("-inf"), 0.0, new_top))
            acc *= decay[:, None]
            total *= decay
            top = new_top
            can_settle = (
                tl.max(tl.where(top == float("-inf"), 0.0, tl.abs(top)), 0) < SETTLING_LIMIT
            )
        is_settled = can_settle
        total += new_total
        if HAS_WIDE_BIAS:
            t += tl.cast(v_wide_bias, tl.float32) * new_total[:, None]
        v = load_narrow_values(narrow, key - narrow_first, sees_key, form, dims)
        acc += t * v.to(tl.float32)

        key -= REPLICAS
        sees_key = sees & (key >= narrow_lo) & (key < narrow_hi)
        vq, row_constant = virtual_queries(
            q, query_offs, mask, narrow, wide, key - narrow_first, sees_key, log2_scale, form,
            dims, dot,
        )  # fmt: skip

    if REPLICAS > 1:
        top = tl.reshape(top, [REPLICAS, BLOCK_Q])
        highest = tl.max(top, 0)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(top - base[None, :])
        total = tl.sum(tl.reshape(total, [REPLICAS, BLOCK_Q]) * weight, 0)
        acc = tl.sum(tl.reshape(acc, [REPLICAS, BLOCK_Q, BLOCK_DV]) * weight[:, :, None], 0)
        top = highest
        rows = query_rows(tile * BLOCK_Q + tl.arange(0, BLOCK_Q), seq, GROUP, GROUP, INDEX)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    i, head, mask = rows
    out_offs = head_offs(stride_o_b, stride_o_h, stride_o_n, batch, kv_head, rows, GROUP)
    store_rows(out, out_offs, acc, mask, VALUE_DIM)
    lse_offs = (bh * GROUP + head) * seq + i
    logarithm = tl.log2(tl.where(total > 0, total, 1.0))
    tl.store(lse + lse_offs, (top + logarithm) * LN_2, mask=mask)


def compute(problem: Problem, out: Tensor, lse: Tensor) -> None:
    """Write out [B, H, N, Dv] and lse [B, H, N]."""
    config = choose(problem.traits(), problem.device)
    problem = with_wide_parts(problem)
    sources = problem.described(config.block_n) if config.descriptors else problem.tensors
    launch_tiles(
        forward_kernel, ceil_div(out.shape[2] * problem.group, config.block_q),
        problem, sources, (out, lse), strides=out.stride()[:3], scales=(problem.log2_scale,),
        config=config,
    )  # fmt: skip
