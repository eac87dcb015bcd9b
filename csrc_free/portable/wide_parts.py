"""The wide pair in three parts of bfloat16, as `device.products` multiplies float32.

Kernels that meet the wide pair again with every narrow key read the parts, made once; those that
own a tile of it make them where it is loaded.
"""

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_free.device.forms import load_rows
from csrc_free.device.products import operand
from csrc_free.launch import launch
from csrc_free.problem import Problem, block
from csrc_free.traits import Device, Traits

_ALIGNMENT = 8  # bfloat16 numbers in 16 bytes


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_N rows."""

    block_n: int = 32
    num_warps: int = 4
    num_stages: int = 1

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return 0: every thread keeps to itself."""
        return 0


@triton.jit(do_not_specialize=["rows"])
def parts_kernel(
    x, parts, kv_heads, rows, stride_b, stride_h, stride_n, part_stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program writes the parts of BLOCK_N rows of one key-value head."""
    tiles = tl.cdiv(rows, BLOCK_N)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    head = x + bh // kv_heads * stride_b + bh % kv_heads * stride_h
    first, second, third = operand(
        load_rows(head, row, stride_n, columns, row < rows, HEAD_DIM), tl.float32, "bf16x6"
    )
    mask = (row < rows)[:, None] & (columns < HEAD_DIM)[None, :]
    to = parts + (bh * 3 * rows + row)[:, None] * part_stride_n + columns[None, :]
    step = rows.to(tl.int64) * part_stride_n
    tl.store(to, first, mask=mask)
    tl.store(to + step, second, mask=mask)
    tl.store(to + 2 * step, third, mask=mask)


def with_wide_parts(problem: Problem) -> Problem:
    """Return a problem whose wide pair is read in parts, where its products are of parts."""
    if problem.precision != "bf16x6" or problem.wide_parts is not None:
        return problem
    wide = (_parts_of(problem.k_wide), _parts_of(problem.v_wide))
    return dataclasses.replace(problem, wide_parts=wide)


def _parts_of(x: Tensor) -> Tensor:
    """Return the parts of x [B, Hkv, rows, D]: bfloat16 [B, Hkv, 3 · rows, D], in aligned rows."""
    batch, kv_heads, rows, dim = x.shape
    config = Config()
    stride = triton.cdiv(dim, _ALIGNMENT) * _ALIGNMENT
    parts = torch.empty(batch, kv_heads, 3 * rows, stride, dtype=torch.bfloat16, device=x.device)
    launch(
        parts_kernel, triton.cdiv(rows, config.block_n) * batch * kv_heads,
        x, parts, kv_heads, rows, *x.stride()[:3], stride,
        HEAD_DIM=dim, BLOCK_D=block(dim), config=config,
    )  # fmt: skip
    return parts[..., :dim]
