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
from csrc_free.rounding import ceil_div
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


@triton.jit
def _write_parts(
    x, parts, bh, kv_heads, rows, row, stride_b, stride_h, stride_n, part_stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the parts of rows of x [B, Hkv, rows, D]: one after the other of all its rows."""
    columns = tl.arange(0, BLOCK_D)
    head = x + bh // kv_heads * stride_b + bh % kv_heads * stride_h
    first, second, third = operand(
        load_rows(head, row, stride_n, columns, row < rows, HEAD_DIM), tl.float32, "bf16x6"
    )
    mask = (row < rows)[:, None] & (columns < HEAD_DIM)[None, :]
    ptrs = parts + (bh * 3 * rows + row)[:, None] * part_stride_n + columns[None, :]
    step = tl.cast(rows, tl.int64) * part_stride_n
    tl.store(ptrs, first, mask=mask)
    tl.store(ptrs + step, second, mask=mask)
    tl.store(ptrs + 2 * step, third, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def parts_kernel(
    k, v, k_parts, v_parts, kv_heads, rows,
    stride_k_b, stride_k_h, stride_k_n, stride_v_b, stride_v_h, stride_v_n,
    part_stride_k, part_stride_v,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program writes the parts of BLOCK_N keys and values of one key-value head."""
    tiles = tl.cdiv(rows, BLOCK_N)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    _write_parts(
        k, k_parts, bh, kv_heads, rows, row, stride_k_b, stride_k_h, stride_k_n, part_stride_k,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    _write_parts(
        v, v_parts, bh, kv_heads, rows, row, stride_v_b, stride_v_h, stride_v_n, part_stride_v,
        VALUE_DIM, BLOCK_DV,
    )  # fmt: skip


def with_wide_parts(problem: Problem) -> Problem:
    """Return a problem whose wide pair is read in parts, where its products are of parts."""
    if problem.precision != "bf16x6" or problem.wide_parts is not None:
        return problem
    k, v = problem.k_wide, problem.v_wide
    batch, kv_heads, rows, head_dim = k.shape
    value_dim, config = v.shape[3], Config()
    parts = _space_for(k), _space_for(v)
    launch(
        parts_kernel, ceil_div(rows, config.block_n) * batch * kv_heads,
        k, v, *parts, kv_heads, rows, *k.stride()[:3], *v.stride()[:3],
        *(t.stride(2) for t in parts), HEAD_DIM=head_dim, VALUE_DIM=value_dim,
        BLOCK_D=block(head_dim), BLOCK_DV=block(value_dim), config=config,
    )  # fmt: skip
    return dataclasses.replace(problem, wide_parts=parts)


def _space_for(x: Tensor) -> Tensor:
    """Return room for the parts of x [B, Hkv, rows, D]: [B, Hkv, 3 · rows, D], in aligned rows."""
    batch, kv_heads, rows, dim = x.shape
    columns = ceil_div(dim, _ALIGNMENT) * _ALIGNMENT
    space = torch.empty(batch, kv_heads, 3 * rows, columns, dtype=torch.bfloat16, device=x.device)
    return space.narrow(-1, 0, dim)
