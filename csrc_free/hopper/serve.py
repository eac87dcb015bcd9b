"""Which problems the Hopper forward serves, how it is configured, and its launch."""

import dataclasses

import torch
from torch import Tensor

from csrc_free.device.descriptors import can_describe
from csrc_free.launch import Device, Traits
from csrc_free.problem import Problem

_ROWS = 64  # of a tile: one warpgroup's matrix product
_DIM = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is tiled and compiled."""

    positions: int  # P: positions of a tile
    group: int  # G: heads of a tile
    block_n: int = 64
    tiles: int = 4  # wide tiles that stay in shared memory through all offsets
    max_registers: int = 168  # of a thread on average; ptxas then gives the consumers 240

    def __post_init__(self) -> None:
        if self.positions * self.group != _ROWS:
            raise ValueError(
                f"a tile has {_ROWS} rows, got {self.positions} positions of {self.group} heads"
            )


def choose(traits: Traits) -> Config:
    """Choose the tile of a group size that `why_not` lets through."""
    return Config(_ROWS // traits.group, traits.group)


def why_not(problem: Problem, device: Device) -> str | None:
    """Return the first reason for which the kernel does not serve a problem, or None."""
    dims = (problem.q.shape[3], problem.v_wide.shape[3])
    group = problem.group
    if device != Device("cuda", 90):
        return f"it is written for sm_90, and this is {device.backend} {device.capability}"
    if any(t.dtype != torch.bfloat16 for t in problem.tensors):
        return f"it takes bfloat16, and q is {problem.q.dtype}"
    if problem.form != "trilinear":
        return f"it takes the form trilinear, and this is {problem.form}"
    if dims != (_DIM, _DIM):
        return f"it takes D = Dv = {_DIM}, and these are {dims[0]} and {dims[1]}"
    if group > _ROWS or group & (group - 1):
        return f"it takes groups of a power of two up to {_ROWS}, and this is {group}"
    if problem.kv_bounds is not None or problem.q_start is not None:
        return "it takes neither kv_bounds nor q_start"
    if problem.is_exchanged and (problem.k2_bias != 0.0 or problem.v2_bias != 0.0):
        return "it takes biases of the narrow pair only, and k2 and v2 are the wide one"
    if not all(map(can_describe, (problem.q, problem.k_wide, problem.v_wide))):
        return "q and the wide pair need an address and strides of a multiple of 16 bytes"
    return None


def launch(problem: Problem, config: Config, out: Tensor, lse: Tensor) -> None:
    """Write out [B, H, N, Dv] and lse [B, H, N]."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from csrc_free.hopper.forward import forward_kernel

    def describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)

    q, wide = problem.q, (problem.k_wide, problem.v_wide)
    batch, heads, seq, _ = q.shape
    kv_heads = heads // config.group
    grouped = q.unflatten(1, (kv_heads, config.group))
    tiles = -(-seq // config.positions)
    items = tiles * batch * kv_heads
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    key_block = [1, 1, config.block_n, _DIM]
    _, _, k_bias, v_bias = problem.biases()
    forward_kernel[(min(processors, items),)](
        describe(grouped, [1, 1, config.group, config.positions, _DIM]),
        *(describe(t, key_block) for t in wide),
        problem.k_narrow, problem.v_narrow, out, lse,
        items, tiles, kv_heads, seq, problem.keys, wide[0].shape[2], problem.k_narrow.shape[2],
        *problem.wide_reach, *problem.narrow_reach, problem.keys - seq,
        *problem.k_narrow.stride()[:3], *problem.v_narrow.stride()[:3], *out.stride()[:3],
        problem.log2_scale, k_bias, v_bias, HAS_BIAS=k_bias != 0.0 or v_bias != 0.0,
        P=config.positions, G=config.group, D=_DIM, BLOCK_N=config.block_n, TILES=config.tiles,
        Q_ROWS=gl.NVMMASharedLayout.get_default_for([_ROWS, _DIM], gl.bfloat16),
        num_warps=4, maxnreg=config.max_registers,
    )  # fmt: skip
