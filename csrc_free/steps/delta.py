"""The row statistics of the backward: delta = sum(dout · out) - dlse, and lse in log2 units.

Both are written as [B, Hkv, N, G], the order in which the rows of a tile follow one another.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_free.device.forms import load_rows
from csrc_free.launch import launch
from csrc_free.problem import Problem, block
from csrc_free.rounding import ceil_div
from csrc_free.traits import Device, Traits

LOG2_E = tl.constexpr(1.4426950408889634)
# From here on a step of lse2 is more than 1, and P = exp2(s - lse2) may be any power of two.
HUGE = tl.constexpr(2.0**24)
# From here on P may be far above 1 in kernels that round a logit's vectors in another order than
# the forward did: k1∘k2 for q∘k2, each to 8 bits.
LARGE = tl.constexpr(2.0**10)


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_Q rows; it computes so little that every device takes the same."""

    block_q: int = 32
    num_warps: int = 4
    num_stages: int = 3

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound: one value of each row for every warp, in two sums."""
        return 2 * 4 * self.block_q * self.num_warps


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
    may). has_huge [B, Hkv], which comes zeroed, says of large ones that the kernels must cap
    exponentials at 1.
    """
    tiles = tl.cdiv(seq * GROUP, BLOCK_Q)
    batch = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    flat = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i = (flat // GROUP).to(tl.int64)
    head = kv_head * GROUP + flat % GROUP
    mask = i < seq
    columns = tl.arange(0, BLOCK_DV)

    o = load_rows(
        out, batch * stride_o_b + head * stride_o_h + i * stride_o_n, 1, columns, mask,
        VALUE_DIM,
    )  # fmt: skip
    do = load_rows(
        dout, batch * stride_do_b + head * stride_do_h + i * stride_do_n, 1, columns, mask,
        VALUE_DIM,
    )  # fmt: skip
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row = (batch * kv_heads * GROUP + head) * seq + i
    if HAS_DLSE:
        row_delta -= tl.load(dlse + row, mask=mask, other=0.0)
    row_lse = tl.load(lse + row, mask=mask, other=0.0)
    row_lse2 = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
    size = tl.abs(row_lse2)
    is_large = (size > LARGE) & (size < float("inf")) & mask
    row_lse2 = tl.where(is_large & (size > HUGE), row_lse2 - size * 2.0**-21, row_lse2)
    if tl.max(is_large.to(tl.int32), 0) > 0:
        tl.store(has_huge + batch * kv_heads + kv_head, 1)
    offs = (batch * kv_heads + kv_head) * seq * GROUP + flat
    tl.store(delta + offs, row_delta, mask=mask)
    tl.store(lse2 + offs, row_lse2, mask=mask)


class Statistics(NamedTuple):
    """What the kernels of the backward read beside the inputs, in the order they take it."""

    dout: Tensor  # [B, H, N, Dv]
    delta: Tensor  # float32 [B, Hkv, N, G]
    lse2: Tensor  # float32 [B, Hkv, N, G]
    has_huge: Tensor  # int32 [B, Hkv]


def statistics_of(
    problem: Problem, dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> Statistics:
    """Compute the row statistics, for a dout that is zero where there is none."""
    dout = torch.zeros_like(out) if dout is None else dout
    dout, out = (t if t.stride(3) == 1 else t.contiguous() for t in (dout, out))
    batch, heads, seq, value_dim = dout.shape
    kv_heads = heads // problem.group
    delta = torch.empty(
        batch, kv_heads, seq, problem.group, dtype=torch.float32, device=dout.device
    )
    lse2 = torch.empty_like(delta)
    has_huge = torch.zeros(batch, kv_heads, dtype=torch.int32, device=dout.device)
    config = Config()
    launch(
        delta_kernel, ceil_div(seq * problem.group, config.block_q) * batch * kv_heads,
        dout, out, lse.contiguous(), None if dlse is None else dlse.contiguous(),
        delta, lse2, has_huge,
        kv_heads, seq, *dout.stride()[:3], *out.stride()[:3],
        GROUP=problem.group, HAS_DLSE=dlse is not None,
        VALUE_DIM=value_dim, BLOCK_DV=block(value_dim), config=config,
    )  # fmt: skip
    return Statistics(dout, delta, lse2, has_huge)
