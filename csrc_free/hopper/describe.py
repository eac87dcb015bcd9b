"""Tensors as the copy engine (TMA) is told of them."""

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_ELEMENTS = {
    torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32,
}  # fmt: skip


def describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """Describe a tensor for blocks that lie as matrix products read them; all outside reads as 0.

    Where its last dimension is shorter than the block's, the columns beyond are 0 too.
    """
    layout = matrix(tensor.dtype, block)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)


@functools.cache
def _layout(dtype: torch.dtype, block: tuple[int, ...]) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _ELEMENTS[dtype])


def matrix(dtype: torch.dtype, block: list[int]) -> gl.NVMMASharedLayout:
    """Return the layout of a block in shared memory that matrix products read."""
    return _layout(dtype, tuple(block))


def given_or(tensor: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    """Return a tensor of int32 and 1; or, where there is none, one that is not read, and 0."""
    return (stand_in.view(torch.int32), 0) if tensor is None else (tensor, 1)
