"""A pair of keys and values of one key-value head, as a kernel hands it on: a tuple.

    pair (k, v, stride_k_n, stride_v_n, k_bias, v_bias, batch, kv_head, first, row_count)

k and v point to the head's first rows, or are descriptors of [B, Hkv, rows, D] and [B, Hkv, rows,
Dv]; `first` is the key position of row 0.
"""

import triton
import triton.language as tl

from csrc_free.device.descriptors import load_described
from csrc_free.device.forms import load_for_form, load_rows


@triton.jit
def pair_of(
    k, v, k_strides, v_strides, biases, batch, kv_head, first, row_count,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Return `pair`, of tensors whose strides are those of batch, heads and rows."""
    stride_k_b, stride_k_h, stride_k_n = k_strides
    stride_v_b, stride_v_h, stride_v_n = v_strides
    k_bias, v_bias = biases
    if not DESCRIPTORS:
        k += batch * stride_k_b + kv_head * stride_k_h
        v += batch * stride_v_b + kv_head * stride_v_h
    k_bias = tl.cast(k_bias, tl.float32)
    v_bias = tl.cast(v_bias, tl.float32)
    return k, v, stride_k_n, stride_v_n, k_bias, v_bias, batch, kv_head, first, row_count


@triton.jit
def load_keys(
    pair, j, keys, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Load a tile [keys, BLOCK_D] of the keys from position j on, as an operand; 0 past the last.

    `keys` counts 0, 1, .. in the type of indices.
    """
    k, _v, stride, _stride_v, _k_bias, _v_bias, batch, kv_head, first, row_count = pair
    return _load_operand(
        k,
        stride,
        batch,
        kv_head,
        j - first,
        row_count,
        keys,
        HEAD_DIM,
        BLOCK_D,
        DESCRIPTORS,
        DTYPE,
        PRECISION,
    )


@triton.jit
def load_values(
    pair, j, keys, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, DESCRIPTORS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Load a tile [keys, BLOCK_DV] of the values, as `load_keys` does."""
    _k, v, _stride_k, stride, _k_bias, _v_bias, batch, kv_head, first, row_count = pair
    return _load_operand(
        v,
        stride,
        batch,
        kv_head,
        j - first,
        row_count,
        keys,
        VALUE_DIM,
        BLOCK_DV,
        DESCRIPTORS,
        DTYPE,
        PRECISION,
    )


@triton.jit
def _load_operand(
    source, stride, batch, kv_head, row, row_count, keys,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Load a tile from `row` on; in parts, each from its own row_count rows of the tensor."""
    if PRECISION == "bf16x6":
        end = row_count - row
        first = _load_tile(
            source, stride, batch, kv_head, row, end, keys, HEAD_DIM, BLOCK_D, DESCRIPTORS
        )
        second = _load_tile(
            source, stride, batch, kv_head, row + row_count, end, keys, HEAD_DIM, BLOCK_D,
            DESCRIPTORS,
        )  # fmt: skip
        third = _load_tile(
            source, stride, batch, kv_head, row + 2 * row_count, end, keys, HEAD_DIM, BLOCK_D,
            DESCRIPTORS,
        )  # fmt: skip
        x = (first, second, third)
    else:
        x = _load_tile(
            source, stride, batch, kv_head, row, row_count - row, keys, HEAD_DIM, BLOCK_D,
            DESCRIPTORS,
        ).to(DTYPE)  # fmt: skip
    return x


@triton.jit
def _load_tile(
    source, stride, batch, kv_head, row, left, keys,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Load a tile of which `left` rows are there; a descriptor sees to that where all is."""
    if DESCRIPTORS:
        x = load_described(source, batch, kv_head, row, 0, keys.shape[0], BLOCK_D)
        if x.dtype == tl.float16:
            x = x.to(tl.float32)
    else:
        x = load_rows(
            source + row.to(tl.int64) * stride, keys, stride, tl.arange(0, BLOCK_D),
            keys < left, HEAD_DIM,
        )  # fmt: skip
    return x


@triton.jit
def load_keys_of_rows(
    pair, key_row, key_mask,
    FORM: tl.constexpr, HAS_BIAS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Load a key for each row of a tile, with its bias, as `load_for_form` gives it.

    key_row and key_mask are [M], or [1] where all rows meet the same key.
    """
    k, _v, stride, _stride_v, bias, _v_bias, _batch, _kv_head, _first, _row_count = pair
    return load_for_form(
        k, key_row, stride, tl.arange(0, BLOCK_D), key_mask, bias, FORM, HAS_BIAS, HEAD_DIM
    )


@triton.jit
def load_values_of_rows(
    pair, key_row, key_mask,
    HAS_BIAS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Load a value for each row of a tile, with its bias, as `load_keys_of_rows` does."""
    _k, v, _stride_k, stride, _k_bias, bias, _batch, _kv_head, _first, _row_count = pair
    x = load_rows(v, key_row, stride, tl.arange(0, BLOCK_DV), key_mask, VALUE_DIM)
    if HAS_BIAS:
        x = x.to(tl.float32) + bias
    return x


@triton.jit
def biases_of(pair):
    """Return (k_bias, v_bias)."""
    _k, _v, _stride_k, _stride_v, k_bias, v_bias, _batch, _kv_head, _first, _row_count = pair
    return k_bias, v_bias
