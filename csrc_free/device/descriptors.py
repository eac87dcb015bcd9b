"""Tiles read through a tensor descriptor: one instruction of Hopper's copy engine (TMA) for a tile.

Where the strides do not allow it, tiles are read by pointers: a mask and an address for every row,
which cost instructions and registers.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_free import tracing

_ALIGNMENT = 16  # bytes, of the first element and of every stride but the last


def can_describe(tensor: Tensor) -> bool:
    """Tell whether the copy engine can read a tensor [.., .., .., D] whose last stride is 1."""
    tracer = tracing.tracer()
    if tracer is None:
        return tensor.numel() > 0 and are_rows_aligned(tensor) and min(tensor.stride()[:3]) > 0
    return (
        tracer.can_describe(tensor.shape[3] * tensor.element_size())
        and tracing.holds(tensor.numel() > 0)
        and are_rows_aligned(tensor)
        and all(tracing.holds(s > 0) for s in tensor.stride()[:3])
    )


def are_rows_aligned(tensor: Tensor) -> bool:
    """Tell whether every row of a tensor [.., .., .., D] begins at a multiple of 16 bytes."""
    size = tensor.element_size()
    first, second, third, _ = tensor.stride()
    if tracing.tracer() is None:
        return (tensor.data_ptr() | first * size | second * size | third * size) % _ALIGNMENT == 0
    # Traced, a tensor has no address, and its memory begins at a multiple of 16 bytes.
    starts = tensor.storage_offset(), first, second, third
    return all(tracing.holds(start * size % _ALIGNMENT == 0) for start in starts)


def describe(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe a tensor [.., .., .., D] for tiles [rows, columns]; all outside it reads as 0."""
    block_shape = [1, 1, rows, columns]
    tracer = tracing.tracer()
    if tracer is not None:
        return tracer.describe(tensor, block_shape)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block_shape)


@triton.jit
def load_described(
    source, first, second, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Load a tile [ROWS, COLUMNS] of the matrix source[first, second], from (row, column) on."""
    x = source.load([
        tl.cast(first, tl.int32), tl.cast(second, tl.int32), tl.cast(row, tl.int32),
        tl.cast(column, tl.int32),
    ])  # fmt: skip
    return tl.reshape(x, [ROWS, COLUMNS])
