"""The inner loop of the query side: what virtual queries receive from the wide window."""

import triton
import triton.language as tl

from csrc_free.device.descriptors import load_keys
from csrc_free.device.forms import STRASSEN, load_for_form, load_rows, virtual_query


@triton.jit
def virtual_rows(
    q, dout, k_narrow, v_narrow, query_offset, dout_offset, key_row, stride_kn_n, stride_vn_n,
    real, there, seen, row_lse2, row_delta, log2_scale, k_wide_bias, v_wide_bias,
    k_narrow_bias, v_narrow_bias,
    FORM: tl.constexpr, SIGN: tl.constexpr,
    HAS_WIDE_BIAS: tl.constexpr, HAS_NARROW_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Return virtual queries and virtual dout of one narrow key a row, and the rows' constants.

    key_row and there are [M], or [1] where all rows meet the same narrow key.
    P is exp2(log2_scale · vq · k - shift), and dS is P · (vdo · v + row_dp).
    """
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    query, query_prev = load_for_form(
        q, query_offset, 1, columns, real, 0.0, FORM, False, HEAD_DIM, BLOCK_D
    )
    k, k_prev = load_for_form(
        k_narrow, key_row, stride_kn_n, columns, there, k_narrow_bias,
        FORM, HAS_NARROW_BIAS, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    vq = virtual_query(query, query_prev, k, k_prev, columns, FORM, SIGN, HEAD_DIM)
    do = load_rows(dout, dout_offset, 1, value_columns, real, VALUE_DIM, BLOCK_DV)
    v = load_rows(v_narrow, key_row, stride_vn_n, value_columns, there, VALUE_DIM, BLOCK_DV)
    if HAS_NARROW_BIAS:
        v = v.to(tl.float32) + v_narrow_bias
    vdo = do * v
    shift = tl.where(seen, row_lse2, float("inf"))
    row_dp = -row_delta
    if FORM == STRASSEN:
        shift -= tl.sum(query.to(tl.float32) * k.to(tl.float32), 1) * log2_scale
    if HAS_WIDE_BIAS:
        shift -= tl.sum(vq.to(tl.float32), 1) * (k_wide_bias * log2_scale)
        row_dp += tl.sum(vdo.to(tl.float32), 1) * v_wide_bias
    return vq.to(DOT_DTYPE), vdo.to(DOT_DTYPE), shift, row_dp


@triton.jit
def attend_backward(
    vq, vdo, shift, row_dp, lo, hi, first, last, full_lo, full_hi, is_huge,
    k_wide, v_wide, batch, kv_head, stride_kw_n, stride_vw_n, wide_first, wide_rows,
    scale, log2_scale, k_wide_bias, v_wide_bias,
    NEEDS_DVQ: tl.constexpr, NEEDS_T: tl.constexpr, NEEDS_SUMS: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    TILE_STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Return dvq [M, BLOCK_D], t [M, BLOCK_DV] and sigma [M], with dS scaled in dvq and sigma.

    t = sum of P · v is what the narrow values' gradient needs; dq and the narrow keys' need dvq,
    and sigma, the row sum of dS. What is not asked for stays 0.
    """
    keys = tl.arange(0, BLOCK_N)
    dvq = tl.zeros([vq.shape[0], BLOCK_D], tl.float32)
    t = tl.zeros([vq.shape[0], BLOCK_DV], tl.float32)
    sigma = tl.zeros([vq.shape[0]], tl.float32)
    mass = tl.zeros([vq.shape[0]], tl.float32)
    for j in tl.range(first, last, BLOCK_N, num_stages=TILE_STAGES):
        row = j - wide_first
        k = load_keys(
            k_wide, batch, kv_head, row, wide_rows, stride_kw_n,
            HEAD_DIM, BLOCK_D, BLOCK_N, INDEX, DESCRIPTORS,
        ).to(DOT_DTYPE)  # fmt: skip
        s = tl.dot(vq, tl.trans(k), input_precision=PRECISION)
        v = load_keys(
            v_wide, batch, kv_head, row, wide_rows, stride_vw_n,
            VALUE_DIM, BLOCK_DV, BLOCK_N, INDEX, DESCRIPTORS,
        ).to(DOT_DTYPE)  # fmt: skip
        if NEEDS_DVQ:
            dp = tl.dot(vdo, tl.trans(v), input_precision=PRECISION)
        p = tl.exp2(s * log2_scale - shift[:, None])
        if (j < full_lo) | (j + BLOCK_N > full_hi) | is_huge:
            visible = (j + keys[None, :] >= lo[:, None]) & (j + keys[None, :] < hi[:, None])
            p = tl.where(visible, tl.minimum(p, 1.0), 0.0)
        if NEEDS_T:
            t = tl.dot(p.to(DOT_DTYPE), v, t, input_precision=PRECISION)
        if NEEDS_DVQ:
            ds = p * (dp + row_dp[:, None])
            dvq = tl.dot(ds.to(DOT_DTYPE), k, dvq, input_precision=PRECISION)
            if NEEDS_SUMS:
                sigma += tl.sum(ds, 1)
        if NEEDS_SUMS:
            mass += tl.sum(p, 1)
    if NEEDS_SUMS:
        dvq = (dvq + k_wide_bias * sigma[:, None]) * scale
        sigma *= scale
        t += v_wide_bias * mass[:, None]
    else:
        dvq *= scale
    return dvq, t, sigma
