"""The query side: virtual queries of a tile's rows, and what they receive from the wide window.

What goes together is a tuple, beside those of `device.tiles` and `device.pair`:

    queries (q, query_offs, dout, dout_offs, mask): where a tile's rows of q and dout are read
    stats   (lse2, delta) of each row
    virtual (vq, vdo, shift, row_dp): virtual queries and virtual dout of one narrow key a row;
            P is exp2(log2_scale · vq · k - shift), and dS is P · (vdo · v + row_dp)
"""

import triton
import triton.language as tl

from csrc_free.device.forms import STRASSEN, load_for_form, load_rows, virtual_query
from csrc_free.device.pair import (
    biases_of,
    load_keys,
    load_narrow_keys,
    load_narrow_values,
    load_values,
)
from csrc_free.device.products import operand, product, rounded_operand, transposed
from csrc_free.device.tiles import rows_in


@triton.jit
def queries_of(q_heads, dout_heads, rows):
    """Return `queries`."""
    _i, _head, mask = rows
    q, query_offs = rows_in(q_heads, rows)
    dout, dout_offs = rows_in(dout_heads, rows)
    return q, query_offs, dout, dout_offs, mask


@triton.jit
def load_queries(queries, form: tl.constexpr, dims: tl.constexpr):
    """Load rows [M, BLOCK_D] of q, as `load_for_form` gives them."""
    q, offs, _dout, _dout_offs, mask = queries
    FORM: tl.constexpr = form[0]
    HEAD_DIM: tl.constexpr = dims[0]
    BLOCK_D: tl.constexpr = dims[2]
    return load_for_form(q, offs, 1, tl.arange(0, BLOCK_D), mask, 0.0, FORM, False, HEAD_DIM)


@triton.jit
def load_dout(queries, dims: tl.constexpr):
    """Load rows [M, BLOCK_DV] of dout."""
    _q, _query_offs, dout, offs, mask = queries
    VALUE_DIM: tl.constexpr = dims[1]
    BLOCK_DV: tl.constexpr = dims[3]
    return load_rows(dout, offs, 1, tl.arange(0, BLOCK_DV), mask, VALUE_DIM)


@triton.jit
def load_stats(lse2, delta, offs, mask):
    """Return `stats`, from lse2 and delta [B, Hkv, N, G]."""
    row_lse2 = tl.load(lse2 + offs, mask=mask, other=float("inf"))
    row_delta = tl.load(delta + offs, mask=mask, other=0.0)
    return row_lse2, row_delta


@triton.jit
def row_constant(query, k, vq, wide, log2_scale, form: tl.constexpr):
    """Return what a form and the wide keys' bias add to all logits of a row, in log2 units."""
    FORM: tl.constexpr = form[0]
    HAS_WIDE_BIAS: tl.constexpr = form[2]
    k_bias, _v_bias = biases_of(wide)
    # An addition to zeros stays in the program, and costs registers: hence `else`.
    if FORM == STRASSEN:
        constant = tl.sum(query.to(tl.float32) * k.to(tl.float32), 1) * log2_scale
        if HAS_WIDE_BIAS:
            constant += tl.sum(vq.to(tl.float32), 1) * (k_bias * log2_scale)
    elif HAS_WIDE_BIAS:
        constant = tl.sum(vq.to(tl.float32), 1) * (k_bias * log2_scale)
    else:
        constant = tl.zeros([vq.shape[0]], tl.float32)
    return constant


@triton.jit
def row_dp_of(vdo, delta, wide, form: tl.constexpr):
    """Return what is added to all dP of a row: -delta, and what the wide values' bias adds."""
    HAS_WIDE_BIAS: tl.constexpr = form[2]
    _k_bias, v_bias = biases_of(wide)
    row_dp = -delta
    if HAS_WIDE_BIAS:
        row_dp += tl.sum(vdo.to(tl.float32), 1) * v_bias
    return row_dp


@triton.jit
def virtual_queries(
    q, offs, mask, narrow, wide, key_row, key_mask, log2_scale,
    form: tl.constexpr, dims: tl.constexpr, dot: tl.constexpr,
):  # fmt: skip
    """Return virtual queries [M, BLOCK_D] of one narrow key a row, and their row constants [M].

    key_row and key_mask are [M], or [1] where all rows meet the same key.
    """
    FORM: tl.constexpr = form[0]
    SIGN: tl.constexpr = form[1]
    HEAD_DIM: tl.constexpr = dims[0]
    BLOCK_D: tl.constexpr = dims[2]
    columns = tl.arange(0, BLOCK_D)
    query, query_prev = load_for_form(q, offs, 1, columns, mask, 0.0, FORM, False, HEAD_DIM)
    k, k_prev = load_narrow_keys(narrow, key_row, key_mask, form, dims)
    vq = virtual_query(query, query_prev, k, k_prev, columns, FORM, SIGN, HEAD_DIM)
    constant = row_constant(query, k, vq, wide, log2_scale, form)
    return rounded_operand(vq, dot[0], dot[1]), constant


@triton.jit
def virtual_rows(
    queries, stats, narrow, wide, key_row, key_mask, sees_key, log2_scale,
    form: tl.constexpr, dims: tl.constexpr, dot: tl.constexpr,
):  # fmt: skip
    """Return `virtual`, of narrow keys as `virtual_queries` takes them."""
    lse2, delta = stats
    q, query_offs, _dout, _dout_offs, mask = queries
    vq, constant = virtual_queries(
        q, query_offs, mask, narrow, wide, key_row, key_mask, log2_scale, form, dims, dot
    )
    do = load_dout(queries, dims)
    vdo = do * load_narrow_values(narrow, key_row, key_mask, form, dims)
    shift = tl.where(sees_key, lse2, float("inf")) - constant
    row_dp = row_dp_of(vdo, delta, wide, form)
    vdo = rounded_operand(vdo, dot[0], dot[1])
    return vq, vdo, shift, row_dp


@triton.jit
def attend_backward(
    virtual, sight, wide, keys, is_huge, scale, log2_scale,
    form: tl.constexpr, dims: tl.constexpr, dot: tl.constexpr,
    NEEDS_DVQ: tl.constexpr, NEEDS_T: tl.constexpr,
    TILE_STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Return dvq [M, BLOCK_D], t [M, BLOCK_DV] and sigma [M], with dS scaled in dvq and sigma.

    t = sum of P · v is what the narrow values' gradient needs; dq and the narrow keys' need dvq,
    and sigma, the row sum of dS. What is not asked for stays 0. `keys` counts a tile's wide keys.
    """
    vq, vdo, shift, row_dp = virtual
    lo, hi, first, last, full_lo, full_hi = sight
    k_bias, v_bias = biases_of(wide)
    FORM: tl.constexpr = form[0]
    HAS_WIDE_BIAS: tl.constexpr = form[2]
    NEEDS_SUMS: tl.constexpr = (FORM == STRASSEN) | HAS_WIDE_BIAS
    BLOCK_D: tl.constexpr = dims[2]
    BLOCK_DV: tl.constexpr = dims[3]
    DOT_DTYPE: tl.constexpr = dot[0]
    PRECISION: tl.constexpr = dot[1]
    BLOCK_N: tl.constexpr = keys.shape[0]
    M: tl.constexpr = shift.shape[0]
    dvq = tl.zeros([M, BLOCK_D], tl.float32)
    t = tl.zeros([M, BLOCK_DV], tl.float32)
    sigma = tl.zeros([M], tl.float32)
    mass = tl.zeros([M], tl.float32)
    for j in tl.range(first, last, BLOCK_N, num_stages=TILE_STAGES):
        k = load_keys(wide, j, keys, dims, dot, DESCRIPTORS)
        s = product(vq, transposed(k, PRECISION), None, PRECISION)
        v = load_values(wide, j, keys, dims, dot, DESCRIPTORS)
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
