"""A pair of keys and values of one key-value head, as a kernel hands it on: a tuple.

    matrix (source, stride_b, stride_h, stride_n, bias): a tensor [B, Hkv, rows, ..] as launched
    pair   (k, v, stride_k_n, stride_v_n, k_bias, v_bias, batch, kv_head, first, row_count)

k and v point to the head's first rows, or are descriptors of [B, Hkv, rows, D] and [B, Hkv, rows,
Dv]; `first` is the key position of row 0. A problem's constants go together too, as constants:

    form   (FORM, SIGN, HAS_WIDE_BIAS, HAS_NARROW_BIAS)
    dims   (HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV): columns of keys and values, and of their tiles
    dot    (DOT_DTYPE, PRECISION): how matrix products round, as `device.products` takes it

Triton makes a number of every constant that is assigned without saying `tl.constexpr`, or returned:
so a kernel makes these itself, and who takes one names each field that it uses.
"""

import triton
import triton.language as tl

from csrc_free.device.descriptors import load_described
from csrc_free.device.forms import load_for_form, load_rows


@triton.jit
def pairs_of(
    k_wide, v_wide, k_narrow, v_narrow, batch, kv_head, sizes, DESCRIPTORS: tl.constexpr
):  # fmt: skip
    """Return the wide `pair` and the narrow one, each of two matrices.

    With DESCRIPTORS, the wide pair's are descriptors.
    """
    _seq, _keys, wide_rows, narrow_rows, wide_first, narrow_first = sizes
    wide = pair_of(k_wide, v_wide, batch, kv_head, wide_first, wide_rows, DESCRIPTORS)
    narrow = pair_of(k_narrow, v_narrow, batch, kv_head, narrow_first, narrow_rows, False)
    return wide, narrow


@triton.jit
def pair_of(k, v, batch, kv_head, first, row_count, DESCRIPTORS: tl.constexpr):
    """Return `pair` of two matrices."""
    k, stride_k_b, stride_k_h, stride_k_n, k_bias = k
    v, stride_v_b, stride_v_h, stride_v_n, v_bias = v
    if not DESCRIPTORS:
        k += batch * stride_k_b + kv_head * stride_k_h
        v += batch * stride_v_b + kv_head * stride_v_h
    k_bias = tl.cast(k_bias, tl.float32)
    v_bias = tl.cast(v_bias, tl.float32)
    return k, v, stride_k_n, stride_v_n, k_bias, v_bias, batch, kv_head, first, row_count


@triton.jit
def load_keys(
    pair, j, keys, dims: tl.constexpr, dot: tl.constexpr, DESCRIPTORS: tl.constexpr
):  # fmt: skip
    """Load a tile [keys, BLOCK_D] of the keys from position j on, as an operand; 0 past the last.

    `keys` counts 0, 1, .. in the type of indices.
    """
    k, _v, stride, _stride_v, _k_bias, _v_bias, batch, kv_head, first, row_count = pair
    HEAD_DIM: tl.constexpr = dims[0]
    BLOCK_D: tl.constexpr = dims[2]
    return _load_operand(
        k, stride, batch, kv_head, j - first, row_count, keys, dot, HEAD_DIM, BLOCK_D, DESCRIPTORS
    )


@triton.jit
def load_values(
    pair, j, keys, dims: tl.constexpr, dot: tl.constexpr, DESCRIPTORS: tl.constexpr
):  # fmt: skip
    """Load a tile [keys, BLOCK_DV] of the values, as `load_keys` does."""
    _k, v, _stride_k, stride, _k_bias, _v_bias, batch, kv_head, first, row_count = pair
    VALUE_DIM: tl.constexpr = dims[1]
    BLOCK_DV: tl.constexpr = dims[3]
    return _load_operand(
        v, stride, batch, kv_head, j - first, row_count, keys, dot, VALUE_DIM, BLOCK_DV, DESCRIPTORS
    )


@triton.jit
def _load_operand(
    source, stride, batch, kv_head, row, row_count, keys, dot: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Load a tile from `row` on; in parts, each from its own row_count rows of the tensor."""
    DOT_DTYPE: tl.constexpr = dot[0]
    PRECISION: tl.constexpr = dot[1]
    # Each said in the way that spills less: up to 96 bytes in the forward (sm_90, D 256).
    if PRECISION == "bf16x6":
        mask = keys < row_count - row
        first = _load_tile(
            source, stride, batch, kv_head, row, mask, keys, HEAD_DIM, BLOCK_D, DESCRIPTORS
        )
        second = _load_tile(
            source, stride, batch, kv_head, row + row_count, mask, keys, HEAD_DIM, BLOCK_D,
            DESCRIPTORS,
        )  # fmt: skip
        third = _load_tile(
            source, stride, batch, kv_head, row + 2 * row_count, mask, keys, HEAD_DIM, BLOCK_D,
            DESCRIPTORS,
        )  # fmt: skip
        x = (first, second, third)
    else:
        mask = row + keys < row_count
        x = _load_tile(
            source, stride, batch, kv_head, row, mask, keys, HEAD_DIM, BLOCK_D, DESCRIPTORS
        ).to(DOT_DTYPE)
    return x


@triton.jit
def _load_tile(
    source, stride, batch, kv_head, row, mask, keys,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Load a tile from `row` on; a descriptor knows by itself which of its rows there are."""
    if DESCRIPTORS:
        x = load_described(source, batch, kv_head, row, 0, keys.shape[0], BLOCK_D)
        if x.dtype == tl.float16:
            x = x.to(tl.float32)
    else:
        x = load_rows(
            source + row.to(tl.int64) * stride, keys, stride, tl.arange(0, BLOCK_D),
            mask, HEAD_DIM,
        )  # fmt: skip
    return x


@triton.jit
def load_pair(pair, row, mask, dims: tl.constexpr):
    """Load rows [M, BLOCK_D] of the keys and [M, BLOCK_DV] of the values, without biases."""
    k, v, stride_k, stride_v, _k_bias, _v_bias, _batch, _kv_head, _first, _row_count = pair
    HEAD_DIM: tl.constexpr = dims[0]
    VALUE_DIM: tl.constexpr = dims[1]
    BLOCK_D: tl.constexpr = dims[2]
    BLOCK_DV: tl.constexpr = dims[3]
    keys = load_rows(k, row, stride_k, tl.arange(0, BLOCK_D), mask, HEAD_DIM)
    values = load_rows(v, row, stride_v, tl.arange(0, BLOCK_DV), mask, VALUE_DIM)
    return keys, values


@triton.jit
def load_narrow_keys(pair, key_row, key_mask, form: tl.constexpr, dims: tl.constexpr):
    """Load a narrow key for each row of a tile, with its bias, as `load_for_form` gives it.

    key_row and key_mask are [M], or [1] where all rows meet the same key.
    """
    k, _v, stride, _stride_v, bias, _v_bias, _batch, _kv_head, _first, _row_count = pair
    FORM: tl.constexpr = form[0]
    HAS_NARROW_BIAS: tl.constexpr = form[3]
    HEAD_DIM: tl.constexpr = dims[0]
    BLOCK_D: tl.constexpr = dims[2]
    return load_for_form(
        k, key_row, stride, tl.arange(0, BLOCK_D), key_mask, bias, FORM, HAS_NARROW_BIAS, HEAD_DIM
    )


@triton.jit
def load_narrow_values(pair, key_row, key_mask, form: tl.constexpr, dims: tl.constexpr):
    """Load a narrow value for each row of a tile, with its bias, as `load_narrow_keys` does."""
    _k, v, _stride_k, stride, _k_bias, bias, _batch, _kv_head, _first, _row_count = pair
    HAS_NARROW_BIAS: tl.constexpr = form[3]
    VALUE_DIM: tl.constexpr = dims[1]
    BLOCK_DV: tl.constexpr = dims[3]
    x = load_rows(v, key_row, stride, tl.arange(0, BLOCK_DV), key_mask, VALUE_DIM)
    if HAS_NARROW_BIAS:
        x = x.to(tl.float32) + bias
    return x


@triton.jit
def biases_of(pair):
    """Return (k_bias, v_bias)."""
    _k, _v, _stride_k, _stride_v, k_bias, v_bias, _batch, _kv_head, _first, _row_count = pair
    return k_bias, v_bias
