"""The query side: virtual queries of a tile's rows, and what they receive from the wide window.

What goes together is a tuple, beside those of `device.tiles` and `device.pair`:

    queries (q, dout, query_offs, dout_offs, mask, lse2, delta): where the rows are read, and their
            statistics
    virtual (vq, vdo, shift, row_dp): virtual queries and virtual dout of one narrow key a row;
            P is exp2(log2_scale · vq · k - shift), and dS is P · (vdo · v + row_dp)
"""

import triton
import triton.language as tl

from csrc_free.device.forms import STRASSEN, load_for_form, load_rows, virtual_query
from csrc_free.device.pair import (
    biases_of,
    load_keys,
    load_keys_of_rows,
    load_values,
    load_values_of_rows,
)
from csrc_free.device.products import operand, product, transposed


@triton.jit
def row_constants(
    query, k, vq, vdo, shift, row_dp, wide, log2_scale,
    FORM: tl.constexpr, HAS_WIDE_BIAS: tl.constexpr,
):  # fmt: skip
    """Return (shift, row_dp) with a form's row constant and the wide pair's biases in them."""
    k_bias, v_bias = biases_of(wide)
    if FORM == STRASSEN:
        shift -= tl.sum(query.to(tl.float32) * k.to(tl.float32), 1) * log2_scale
    if HAS_WIDE_BIAS:
        shift -= tl.sum(vq.to(tl.float32), 1) * (k_bias * log2_scale)
        row_dp += tl.sum(vdo.to(tl.float32), 1) * v_bias
    return shift, row_dp


@triton.jit
def virtual_rows(
    queries, narrow, wide, key_row, key_mask, sees_key, log2_scale,
    FORM: tl.constexpr, SIGN: tl.constexpr,
    HAS_WIDE_BIAS: tl.constexpr, HAS_NARROW_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `virtual`; key_row and key_mask are [M], or [1] where all rows meet the same key."""
    q, dout, query_offs, dout_offs, mask, lse2, delta = queries
    columns = tl.arange(0, BLOCK_D)
    query, query_prev = load_for_form(q, query_offs, 1, columns, mask, 0.0, FORM, False, HEAD_DIM)
    k, k_prev = load_keys_of_rows(
        narrow, key_row, key_mask, FORM, HAS_NARROW_BIAS, HEAD_DIM, BLOCK_D
    )
    vq = virtual_query(query, query_prev, k, k_prev, columns, FORM, SIGN, HEAD_DIM)
    do = load_rows(dout, dout_offs, 1, tl.arange(0, BLOCK_DV), mask, VALUE_DIM)
    v = load_values_of_rows(narrow, key_row, key_mask, HAS_NARROW_BIAS, VALUE_DIM, BLOCK_DV)
    vdo = do * v
    shift, row_dp = row_constants(
        query, k, vq, vdo, tl.where(sees_key, lse2, float("inf")), -delta, wide, log2_scale,
        FORM, HAS_WIDE_BIAS,
    )  # fmt: skip
    vq = operand(vq, DOT_DTYPE, PRECISION)
    vdo = operand(vdo, DOT_DTYPE, PRECISION)
    return vq, vdo, shift, row_dp


@triton.jit
def attend_backward(
    virtual, sight, wide, keys, is_huge, scale, log2_scale,
    NEEDS_DVQ: tl.constexpr, NEEDS_T: tl.constexpr, NEEDS_SUMS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    TILE_STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Return dvq [M, BLOCK_D], t [M, BLOCK_DV] and sigma [M], with dS scaled in dvq and sigma.

    t = sum of P · v is what the narrow values' gradient needs; dq and the narrow keys' need dvq,
    and sigma, the row sum of dS. What is not asked for stays 0. `keys` counts a tile's wide keys.
    """
    vq, vdo, shift, row_dp = virtual
    lo, hi, first, last, full_lo, full_hi = sight
    k_bias, v_bias = biases_of(wide)
    BLOCK_N: tl.constexpr = keys.shape[0]
    M: tl.constexpr = shift.shape[0]
    dvq = tl.zeros([M, BLOCK_D], tl.float32)
    t = tl.zeros([M, BLOCK_DV], tl.float32)
    sigma = tl.zeros([M], tl.float32)
    mass = tl.zeros([M], tl.float32)
    for j in tl.range(first, last, BLOCK_N, num_stages=TILE_STAGES):
        k = load_keys(wide, j, keys, HEAD_DIM, BLOCK_D, DESCRIPTORS, DOT_DTYPE, PRECISION)
        s = product(vq, transposed(k, PRECISION), None, PRECISION)
        v = load_values(wide, j, keys, VALUE_DIM, BLOCK_DV, DESCRIPTORS, DOT_DTYPE, PRECISION)
        if NEEDS_DVQ:
            dp = product(vdo, transposed(v, PRECISION), None, PRECISION)
        p = tl.exp2(s * log2_scale - shift[:, None])
        if (j < full_lo) | (j + BLOCK_N > full_hi) | is_huge:
            visible = (j + keys[None, :] >= lo[:, None]) & (j + keys[None, :] < hi[:, None])
            p = tl.where(visible, tl.minimum(p, 1.0), 0.0)
        if NEEDS_T:
            t = product(operand(p, DOT_DTYPE, PRECISION), v, t, PRECISION)
        if NEEDS_DVQ:
            ds = p * (dp + row_dp[:, None])
            dvq = product(operand(ds, DOT_DTYPE, PRECISION), k, dvq, PRECISION)
            if NEEDS_SUMS:
                sigma += tl.sum(ds, 1)
        if NEEDS_SUMS:
            mass += tl.sum(p, 1)
    if NEEDS_SUMS:
        dvq = (dvq + k_bias * sigma[:, None]) * scale
        sigma *= scale
        t += v_bias * mass[:, None]
    else:
        dvq *= scale
    return dvq, t, sigma
