"""float16 in the backward: powers of two that keep every operand of a product within its range.

A product of two float16 numbers may be past 65504, or below what float16 can hold; so may P and
dS. Operands are therefore multiplied by powers of two, which change no bit of theirs and are
divided out of float32 sums:

    narrow keys and values  so that none of their products with the other factor reaches 2^15; and
                            their biases, which are added in float32
    P                       by 2^15
    dS                      by the power of two that keeps P · (dP - delta) below 2^15: one for all
                            rows of a key-value head where rows are summed, else one for each

The largest numbers are taken over a key-value head, of finite numbers alone. The bound of dS is
|dout| · max |v_wide| · max of v_narrow + |delta|, of Euclidean lengths.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_free.device.forms import load_rows, store_rows
from csrc_free.device.pair import load_pair, pairs_of
from csrc_free.device.tiles import head_offs, place, query_rows, sizes_of
from csrc_free.launch import launch
from csrc_free.problem import Problem, block
from csrc_free.rounding import ceil_div
from csrc_free.steps.delta import Statistics
from csrc_free.traits import Device, Traits

# What P is multiplied by: 2^P_EXPONENT.
P_EXPONENT = tl.constexpr(15)
OF_P = tl.constexpr(2.0**-15)
_ROWS = 64
# Places of `Ranges.largest`: the largest number of each tensor, lengths, and the bound of dS.
_K_WIDE = tl.constexpr(0)
_V_WIDE = tl.constexpr(1)
_LENGTH = tl.constexpr(2)
_K_NARROW = tl.constexpr(3)
_V_NARROW = tl.constexpr(4)
_Q = tl.constexpr(5)
_DOUT = tl.constexpr(6)
_BOUND = tl.constexpr(7)
_COUNT = tl.constexpr(8)
# Places of `Scaled.factors`: what logits, dP and sums are multiplied by, and the scaled biases.
OF_LOGITS = tl.constexpr(0)
OF_DP = tl.constexpr(1)
OF_DK_WIDE = tl.constexpr(2)
OF_DV_WIDE = tl.constexpr(3)
OF_DK_NARROW = tl.constexpr(4)
OF_DV_NARROW = tl.constexpr(5)
K_BIAS = tl.constexpr(6)
V_BIAS = tl.constexpr(7)


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_Q rows; they compute so little that every device takes the same."""

    block_q: int = _ROWS
    num_warps: int = 4
    num_stages: int = 2

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound: one value of each row for every warp, in three sums."""
        return 3 * 4 * self.block_q * self.num_warps


class Ranges(NamedTuple):
    """How large the numbers of each key-value head are."""

    largest: Tensor  # int32 [B, Hkv, 8]: the bits of float32 numbers
    bound: Tensor  # float32 [B, Hkv, N, G]: of dP - delta


class Scaled(NamedTuple):
    """What a kernel takes in place of its own, with powers of two in it, and those."""

    problem: Problem  # its narrow pair multiplied, but for the biases, which are in `factors`
    delta: Tensor  # float32 [B, Hkv, N, G]
    lse2: Tensor  # the same
    factors: Tensor  # float32 [B, Hkv, 8]
    # float32 [2, B, Hkv, N, G], of dP and of sums of dS · k; none where all rows have one power
    row_factors: Tensor

    @property
    def of_parts(self) -> Tensor:
        """Return what the narrow pair's sums are multiplied by [B, Hkv, 2]."""
        return self.factors[..., OF_DK_NARROW.value : OF_DV_NARROW.value + 1].contiguous()


@triton.constexpr_function
def largest_p(dtype):
    """Return the largest P of a kernel whose operands have a dtype."""
    return 2.0**P_EXPONENT.value if dtype == tl.float16 else 1.0


@triton.jit
def _finite(x):
    size = tl.abs(x.to(tl.float32))
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def _exponent(x):
    """Return e with x < 2^e, for x >= 0; from -60 to 100, whatever x is."""
    return tl.minimum(tl.maximum((x.to(tl.int32, bitcast=True) >> 23) - 126, -60), 100)


@triton.jit
def _power(exponent):
    """Return 2^exponent, for -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _raise_to(largest, place: tl.constexpr, x):
    """Make a place the maximum of itself and x: the order of programs does not matter."""
    tl.atomic_max(largest + place, x.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit(do_not_specialize=["wide_rows", "narrow_rows"])
def largest_of_keys_kernel(
    k_wide, v_wide, k_narrow, v_narrow, largest, kv_heads, wide_rows, narrow_rows, k_bias, v_bias,
    stride_kw_b, stride_kw_h, stride_kw_n, stride_vw_b, stride_vw_h, stride_vw_n,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program looks at BLOCK_Q rows of both pairs of one key-value head."""
    dims: tl.constexpr = (HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV)
    tiles = tl.cdiv(tl.maximum(wide_rows, narrow_rows), BLOCK_Q)
    tile, bh, batch, kv_head = place(tiles, kv_heads, False, False)
    row = (tile * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    wide, narrow = pairs_of(
        (k_wide, stride_kw_b, stride_kw_h, stride_kw_n, 0.0),
        (v_wide, stride_vw_b, stride_vw_h, stride_vw_n, 0.0),
        (k_narrow, stride_kn_b, stride_kn_h, stride_kn_n, k_bias),
        (v_narrow, stride_vn_b, stride_vn_h, stride_vn_n, v_bias),
        batch, kv_head, sizes_of(0, wide_rows, narrow_rows), False,
    )  # fmt: skip
    largest += bh * _COUNT
    k, v = load_pair(wide, row, row < wide_rows, dims)
    v = _finite(v)
    _raise_to(largest, _K_WIDE, tl.max(tl.max(_finite(k), 1), 0))
    _raise_to(largest, _V_WIDE, tl.max(tl.max(v, 1), 0))
    _raise_to(largest, _LENGTH, tl.sqrt(tl.max(tl.sum(v * v, 1), 0)))
    k, v = load_pair(narrow, row, row < narrow_rows, dims)
    k_size = tl.maximum(_finite(k), _finite(k + k_bias))
    v_size = tl.maximum(_finite(v), _finite(v + v_bias))
    _raise_to(largest, _K_NARROW, tl.max(tl.max(k_size, 1), 0))
    _raise_to(largest, _V_NARROW, tl.max(tl.max(v_size, 1), 0))


@triton.jit
def _place_of_rows(seq, kv_heads, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Return (bh, batch, kv_head, rows, offs) of the program's rows; offs in [B, Hkv, N, G]."""
    tile, bh, batch, kv_head = place(tl.cdiv(seq * GROUP, BLOCK_Q), kv_heads, False, False)
    flat = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    rows = query_rows(flat, seq, GROUP, GROUP, tl.int64)
    return bh, batch, kv_head, rows, bh * seq * GROUP + flat


@triton.jit(do_not_specialize=["seq"])
def largest_of_rows_kernel(
    q, dout, delta, largest, bound, kv_heads, seq,
    stride_q_b, stride_q_h, stride_q_n, stride_do_b, stride_do_h, stride_do_n,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program looks at BLOCK_Q rows (position, head); `largest` has those of the keys."""
    bh, batch, kv_head, rows, offs = _place_of_rows(seq, kv_heads, GROUP, BLOCK_Q)
    _i, _head, mask = rows
    q_offs = head_offs(stride_q_b, stride_q_h, stride_q_n, batch, kv_head, rows, GROUP)
    query = load_rows(q, q_offs, 1, tl.arange(0, BLOCK_D), mask, HEAD_DIM)
    do_offs = head_offs(stride_do_b, stride_do_h, stride_do_n, batch, kv_head, rows, GROUP)
    do = load_rows(dout, do_offs, 1, tl.arange(0, BLOCK_DV), mask, VALUE_DIM)
    largest += bh * _COUNT
    length = tl.load(largest + _LENGTH).to(tl.float32, bitcast=True)
    v = tl.load(largest + _V_NARROW).to(tl.float32, bitcast=True)
    do = _finite(do)
    row_delta = _finite(tl.load(delta + offs, mask=mask, other=0.0))
    row_bound = tl.sqrt(tl.sum(do * do, 1)) * length * v + row_delta
    tl.store(bound + offs, row_bound, mask=mask)
    _raise_to(largest, _Q, tl.max(tl.max(_finite(query), 1), 0))
    _raise_to(largest, _DOUT, tl.max(tl.max(do, 1), 0))
    _raise_to(largest, _BOUND, tl.max(row_bound, 0))


@triton.jit
def _exponents(largest, IS_OF_KEYS: tl.constexpr):
    """Return the exponents of the powers that narrow keys and narrow values are multiplied by."""
    other_k = tl.load(largest + (_K_WIDE if IS_OF_KEYS else _Q)).to(tl.float32, bitcast=True)
    other_v = tl.load(largest + (_V_WIDE if IS_OF_KEYS else _DOUT)).to(tl.float32, bitcast=True)
    k = tl.load(largest + _K_NARROW).to(tl.float32, bitcast=True)
    v = tl.load(largest + _V_NARROW).to(tl.float32, bitcast=True)
    return (
        tl.minimum(15 - _exponent(other_k), 15) - _exponent(k),
        tl.minimum(15 - _exponent(other_v), 15) - _exponent(v),
    )


@triton.jit(do_not_specialize=["rows"])
def scaled_narrow_kernel(
    k, v, largest, scaled_k, scaled_v, kv_heads, rows,
    stride_k_b, stride_k_h, stride_k_n, stride_v_b, stride_v_h, stride_v_n,
    IS_OF_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program multiplies BLOCK_Q narrow keys and values; the copies are contiguous."""
    tile, bh, batch, kv_head = place(tl.cdiv(rows, BLOCK_Q), kv_heads, False, False)
    row = (tile * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    mask = row < rows
    k_exponent, v_exponent = _exponents(largest + bh * _COUNT, IS_OF_KEYS)
    k += batch * stride_k_b + kv_head * stride_k_h
    x = load_rows(k, row, stride_k_n, tl.arange(0, BLOCK_D), mask, HEAD_DIM)
    x = (x * _power(k_exponent)).to(tl.float16)
    store_rows(scaled_k, (bh * rows + row) * HEAD_DIM, x, mask, HEAD_DIM)
    v += batch * stride_v_b + kv_head * stride_v_h
    x = load_rows(v, row, stride_v_n, tl.arange(0, BLOCK_DV), mask, VALUE_DIM)
    x = (x * _power(v_exponent)).to(tl.float16)
    store_rows(scaled_v, (bh * rows + row) * VALUE_DIM, x, mask, VALUE_DIM)


@triton.jit(do_not_specialize=["seq", "row_count"])
def scaled_rows_kernel(
    delta, lse2, largest, bound, scaled_delta, scaled_lse2, factors, row_factors,
    kv_heads, seq, row_count, scale, log2_scale, k_bias, v_bias,
    IS_OF_KEYS: tl.constexpr, IS_BY_ROW: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program multiplies the statistics of BLOCK_Q rows (position, head).

    By row, dP and sums of dS · k have factors of their own in each row: times the latter a sum is
    what dq is made of with scaled narrow keys, and the narrow keys' own gradient without them.
    """
    bh, _batch, _kv_head, rows, offs = _place_of_rows(seq, kv_heads, GROUP, BLOCK_Q)
    _i, _head, mask = rows
    largest += bh * _COUNT
    factors += bh * _COUNT
    k_exponent, v_exponent = _exponents(largest, IS_OF_KEYS)
    row_delta = tl.load(delta + offs, mask=mask, other=0.0)
    if IS_BY_ROW:
        row_bound = tl.load(bound + offs, mask=mask, other=0.0)
    else:
        row_bound = tl.load(largest + _BOUND).to(tl.float32, bitcast=True)
    of_ds = -1 - _exponent(row_bound)  # one less, for what rounding adds to the bound
    of_dp = _power(of_ds) * _power(-v_exponent)
    of_sums = scale * (_power(-of_ds) * OF_P)
    tl.store(factors + OF_LOGITS, log2_scale * _power(-k_exponent))
    tl.store(factors + OF_DV_NARROW, OF_P)
    tl.store(factors + K_BIAS, k_bias * _power(k_exponent))
    tl.store(factors + V_BIAS, v_bias * _power(v_exponent))
    if IS_BY_ROW:
        tl.store(row_factors + offs, of_dp, mask=mask)
        tl.store(row_factors + row_count + offs, of_sums * _power(-k_exponent), mask=mask)
        tl.store(factors + OF_DK_NARROW, _power(k_exponent))
    else:
        tl.store(factors + OF_DP, of_dp)
        tl.store(factors + OF_DK_WIDE, of_sums * _power(-k_exponent))
        tl.store(factors + OF_DV_WIDE, _power(-v_exponent) * OF_P)
        tl.store(factors + OF_DK_NARROW, of_sums)
    tl.store(scaled_delta + offs, row_delta * _power(of_ds), mask=mask)
    row_lse2 = tl.load(lse2 + offs, mask=mask, other=float("inf"))
    tl.store(scaled_lse2 + offs, row_lse2 - P_EXPONENT, mask=mask)


def ranges_of(problem: Problem, statistics: Statistics) -> Ranges:
    """Look at every number of a problem once."""
    batch, kv_heads, wide_rows, head_dim = problem.k_wide.shape
    value_dim, narrow_rows = problem.v_wide.shape[3], problem.k_narrow.shape[2]
    dout, delta = statistics.dout, statistics.delta
    seq, config = problem.q.shape[2], Config()
    largest = torch.zeros(batch, kv_heads, 8, dtype=torch.int32, device=delta.device)
    bound = torch.empty_like(delta)
    sizes = {
        "HEAD_DIM": head_dim, "VALUE_DIM": value_dim,
        "BLOCK_D": block(head_dim), "BLOCK_DV": block(value_dim),
    }  # fmt: skip
    _, *keys = problem.tensors
    launch(
        largest_of_keys_kernel,
        ceil_div(max(wide_rows, narrow_rows), config.block_q) * batch * kv_heads,
        *keys, largest, kv_heads, wide_rows, narrow_rows, *problem.biases()[2:],
        *(stride for t in keys for stride in t.stride()[:3]), **sizes, config=config,
    )  # fmt: skip
    launch(
        largest_of_rows_kernel,
        ceil_div(seq * problem.group, config.block_q) * batch * kv_heads,
        problem.q, dout, delta, largest, bound, kv_heads, seq,
        *problem.q.stride()[:3], *dout.stride()[:3], GROUP=problem.group, **sizes, config=config,
    )  # fmt: skip
    return Ranges(largest, bound)


def scaled(
    problem: Problem, statistics: Statistics, ranges: Ranges, *, is_of_keys: bool, is_by_row: bool
) -> Scaled:
    """Multiply what a kernel takes by its powers of two.

    Those of the narrow pair are for its products with the wide pair (of keys), or with q and dout.
    """
    batch, kv_heads, rows, head_dim = problem.k_narrow.shape
    value_dim, seq, config = problem.v_narrow.shape[3], problem.q.shape[2], Config()
    delta, lse2, largest, bound = (
        t.contiguous() for t in (statistics.delta, statistics.lse2, *ranges)
    )
    k, v = problem.k_narrow, problem.v_narrow
    scaled_k, scaled_v = k.new_empty(k.shape), v.new_empty(v.shape)
    found = Scaled(
        dataclasses.replace(problem, k_narrow=scaled_k, v_narrow=scaled_v),
        torch.empty_like(delta),
        torch.empty_like(lse2),
        delta.new_empty(batch, kv_heads, 8),
        delta.new_empty(2, *(delta.shape if is_by_row else (0,))),
    )
    launch(
        scaled_narrow_kernel, ceil_div(rows, config.block_q) * batch * kv_heads,
        k, v, largest, scaled_k, scaled_v, kv_heads, rows,
        *k.stride()[:3], *v.stride()[:3], IS_OF_KEYS=is_of_keys,
        HEAD_DIM=head_dim, VALUE_DIM=value_dim,
        BLOCK_D=block(head_dim), BLOCK_DV=block(value_dim), config=config,
    )  # fmt: skip
    launch(
        scaled_rows_kernel,
        ceil_div(seq * problem.group, config.block_q) * batch * kv_heads,
        delta, lse2, largest, bound, found.delta, found.lse2, found.factors, found.row_factors,
        kv_heads, seq, delta.numel(), problem.scale, problem.log2_scale, *problem.biases()[2:],
        IS_OF_KEYS=is_of_keys, IS_BY_ROW=is_by_row, GROUP=problem.group, config=config,
    )  # fmt: skip
    return found
