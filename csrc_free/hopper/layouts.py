"""Where the elements of a tile stand, in registers and in shared memory; host functions."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def accumulator(columns, warps=4):
    """Return the layout of a product [64, columns] of one warpgroup, or of [128, columns] of two.

    Lane t of four has columns 2t and 2t + 1 of every eight, in two rows.
    """
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, columns, 16]
    )


@gluon.constexpr_function
def operand(columns, warps=4):
    """Return the layout of a left operand in registers, for a product of so many columns."""
    return gl.DotOperandLayout(0, accumulator(columns, warps), 2)


@gluon.constexpr_function
def rows_of(layout):
    """Return the layout of one number a row."""
    return gl.SliceLayout(1, layout)


@gluon.constexpr_function
def columns_of(layout):
    """Return the layout of one number a column."""
    return gl.SliceLayout(0, layout)


@gluon.constexpr_function
def plain(rank):
    """Return row-major shared memory."""
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank))[::-1])


@gluon.constexpr_function
def permuted_rows(rows, columns, element_bytes):
    """Return shared memory [rows, columns] whose rows accumulators and operands read.

    Columns are permuted, so that 16 consecutive bytes are what one lane needs: columns 2t and
    2t + 1 of two blocks of eight in float32, of four blocks in bfloat16. Read in plain order every
    load is of 4 bytes (bfloat16, G = 64: 595 TFLOP/s for 617; H100, 2026-11-25).
    """
    order = [1, 8, 2, 4, 16] if element_bytes == 4 else [1, 8, 16, 2, 4]
    order += [2**bit for bit in range(5, columns.bit_length() - 1)]
    bases = [[0, column] for column in order]
    return gl.SharedLinearLayout(bases + [[2**bit, 0] for bit in range(rows.bit_length() - 1)])


@gluon.constexpr_function
def loaded_rows(rows, columns):
    """Return the layout in which one warp loads rows, each of them whole."""
    return gl.BlockedLayout([rows, columns // 32], [1, 32], [1, 1], [1, 0])


@gluon.constexpr_function
def bytes_of(dtype):
    """Return how many bytes an element has."""
    return dtype.primitive_bitwidth // 8


@gluon.constexpr_function
def kept_dtype(dtype, has_bias):
    """Return the dtype in which narrow keys are kept: with a bias they need more bits."""
    return gl.float32 if has_bias else dtype
