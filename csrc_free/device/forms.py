"""The forms on the device: virtual queries q̃(q, k), their row constants and their gradients.

With k the narrow key, form = q̃(q, k) · wide + b(q, k). Columns of the determinant come in threes;
`next` and `prev` are a column's neighbours in its three, cyclically, and its last head_dim mod 3
columns are trilinear. SIGN is -1 where the two pairs have exchanged roles: determinant[q, k1, k2]
is then determinant[q, k2, k1'] with k1' negated in the threes.
"""

import triton
import triton.language as tl

TRILINEAR = tl.constexpr(0)
DETERMINANT = tl.constexpr(1)
STRASSEN = tl.constexpr(2)
CODES = {
    "trilinear": TRILINEAR.value, "determinant": DETERMINANT.value, "strassen": STRASSEN.value,
}  # fmt: skip


@triton.jit
def load_rows(pointer, rows, stride, columns, row_mask, HEAD_DIM: tl.constexpr):
    """Load rows [M, columns] of a matrix [rows, head_dim]; 0 where masked or beyond head_dim.

    float16 comes back as float32: a product of two of its numbers may be past its range.
    """
    mask = row_mask[:, None]
    if columns.shape[0] != HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    offs = rows[:, None] * stride + columns[None, :]
    x = tl.load(pointer + offs, mask=mask, other=0.0)
    if x.dtype == tl.float16:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(pointer, offs, x, row_mask, HEAD_DIM: tl.constexpr):
    """Store rows x [M, columns] at their offsets, but those masked and columns beyond head_dim."""
    columns = tl.arange(0, x.shape[1])
    mask = row_mask[:, None]
    if x.shape[1] != HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    tl.store(pointer + offs[:, None] + columns[None, :], x, mask=mask)


@triton.jit
def next_columns(columns, HEAD_DIM: tl.constexpr):
    """Return each column's successor in its three; a trilinear column is its own."""
    return tl.where(columns < HEAD_DIM // 3 * 3, columns // 3 * 3 + (columns + 1) % 3, columns)


@triton.jit
def prev_columns(columns, HEAD_DIM: tl.constexpr):
    """Return each column's predecessor in its three; a trilinear column is its own."""
    return tl.where(columns < HEAD_DIM // 3 * 3, columns // 3 * 3 + (columns + 2) % 3, columns)


@triton.jit
def load_for_form(
    pointer, rows, stride, columns, row_mask, bias,
    FORM: tl.constexpr, HAS_BIAS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Load rows as a form's products need them: (x, x), or (x[next], x[prev]) for determinants."""
    if FORM == DETERMINANT:
        ahead = next_columns(columns, HEAD_DIM)
        behind = prev_columns(columns, HEAD_DIM)
        x = load_rows(pointer, rows, stride, ahead, row_mask, HEAD_DIM).to(tl.float32)
        x_prev = load_rows(pointer, rows, stride, behind, row_mask, HEAD_DIM).to(tl.float32)
        if HAS_BIAS:
            x += bias
            x_prev += bias
    else:
        x = load_rows(pointer, rows, stride, columns, row_mask, HEAD_DIM)
        if HAS_BIAS:
            x = x.to(tl.float32) + bias
        x_prev = x
    return x, x_prev


@triton.jit
def turn(x, columns, HEAD_DIM: tl.constexpr):
    """Return (x[next], x[prev]) of a tile [M, BLOCK_D] that is already in registers."""
    ahead = tl.broadcast_to(next_columns(columns, HEAD_DIM)[None, :], x.shape)
    behind = tl.broadcast_to(prev_columns(columns, HEAD_DIM)[None, :], x.shape)
    return tl.gather(x, ahead, 1), tl.gather(x, behind, 1)


@triton.jit
def cross(x, x_prev, y, y_prev, columns, SIGN: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return SIGN · (x × y) in the threes and x ∘ y in the trilinear columns; x is x[next]."""
    turned = SIGN * (x * y_prev - x_prev * y)
    return tl.where((columns < HEAD_DIM // 3 * 3)[None, :], turned, x * y)


@triton.jit
def virtual_query(
    q, q_prev, k, k_prev, columns,
    FORM: tl.constexpr, SIGN: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Return q̃ [M, BLOCK_D]."""
    if FORM == DETERMINANT:
        return cross(k, k_prev, q, q_prev, columns, SIGN, HEAD_DIM)
    if FORM == STRASSEN:
        return q + k
    return q * k


@triton.jit
def query_gradient(
    dvq, sigma, k, k_prev, columns,
    FORM: tl.constexpr, SIGN: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Return dq [M, BLOCK_D] given dvq = dq̃ and sigma, the row sums [M] of dS."""
    if FORM == DETERMINANT:
        dvq_next, dvq_prev = turn(dvq, columns, HEAD_DIM)
        return cross(dvq_next, dvq_prev, k, k_prev, columns, SIGN, HEAD_DIM)
    if FORM == STRASSEN:
        return dvq + sigma[:, None] * k
    return dvq * k


@triton.jit
def key_gradient(
    dvq, sigma, q, q_prev, columns,
    FORM: tl.constexpr, SIGN: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Return the narrow key's gradient [M, BLOCK_D] before its sum over queries."""
    if FORM == DETERMINANT:
        dvq_next, dvq_prev = turn(dvq, columns, HEAD_DIM)
        return cross(q, q_prev, dvq_next, dvq_prev, columns, SIGN, HEAD_DIM)
    if FORM == STRASSEN:
        return dvq + sigma[:, None] * q
    return dvq * q
