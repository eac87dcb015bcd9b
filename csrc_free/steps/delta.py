"""The row statistics of the backward: delta = sum(dout · out) - dlse, and lse in log2 units.

Both are written as [B, Hkv, N, G], the order in which the rows of a tile follow one another.
"""

import triton
import triton.language as tl

from csrc_free.device.forms import load_rows

LOG2_E = tl.constexpr(1.4426950408889634)
# From here on a step of lse2 is more than 1, and P = exp2(s - lse2) may be any power of two.
HUGE = tl.constexpr(2.0**24)


@triton.jit(do_not_specialize=["seq"])
def delta_kernel(
    dout, out, lse, dlse, delta, lse2, has_huge,
    kv_heads, seq,
    stride_do_b, stride_do_h, stride_do_n, stride_o_b, stride_o_h, stride_o_n,
    GROUP: tl.constexpr, HAS_DLSE: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_Q rows (position, head) of one key-value head.

    lse and dlse are contiguous [B, H, N]. Where a row saw nothing, lse2 is +inf: every
    exponential taken against it is 0. A huge lse2 is lowered by some steps, so that its own
    rounding takes no exponential of a largest logit below 1 (that of a logit whose terms cancel
    may); then has_huge [B, Hkv], which comes zeroed, says that the kernels must cap them at 1.
    """
    tiles = tl.cdiv(seq * GROUP, BLOCK_Q)
    batch = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    flat = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i = (flat // GROUP).to(tl.int64)
    head = kv_head * GROUP + flat % GROUP
    real = i < seq
    columns = tl.arange(0, BLOCK_DV)

    o = load_rows(
        out, batch * stride_o_b + head * stride_o_h + i * stride_o_n, 1, columns, real,
        VALUE_DIM, BLOCK_DV,
    )  # fmt: skip
    do = load_rows(
        dout, batch * stride_do_b + head * stride_do_h + i * stride_do_n, 1, columns, real,
        VALUE_DIM, BLOCK_DV,
    )  # fmt: skip
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row = (batch * kv_heads * GROUP + head) * seq + i
    if HAS_DLSE:
        row_delta -= tl.load(dlse + row, mask=real, other=0.0)
    row_lse = tl.load(lse + row, mask=real, other=0.0)
    row_lse2 = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
    size = tl.abs(row_lse2)
    is_huge = (size > HUGE) & (size < float("inf")) & real
    row_lse2 = tl.where(is_huge, row_lse2 - size * 2.0**-21, row_lse2)
    if tl.max(is_huge.to(tl.int32), 0) > 0:
        tl.store(has_huge + batch * kv_heads + kv_head, 1)
    where = (batch * kv_heads + kv_head) * seq * GROUP + flat
    tl.store(delta + where, row_delta, mask=real)
    tl.store(lse2 + where, row_lse2, mask=real)
