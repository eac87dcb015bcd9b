"""What Gluon cannot say: a few instructions in PTX."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Triton 3.7 renamed it.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # pyright: ignore[reportAttributeAccessIssue]

# Named barriers 0 to 7 are Triton's, for its warp-specialised partitions.
_FIRST_BARRIER = gl.constexpr(10)


@gluon.jit
def pack_bfloat16(x):
    """Round float32 to bfloat16 in pairs, at once.

    Left to itself LLVM carries the float32 numbers through the loop and rounds where they are used:
    16 registers more, and 591 TFLOP/s for 638 (G = 64; H100, 2026-11-25).
    """
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def pack_float16(x):
    """Round float32 to float16 in pairs, at once."""
    return gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def pack_clipped(x):
    """Round float32 to float16 in pairs, at once; what is past 65504 becomes that."""
    return gl.inline_asm_elementwise(
        "cvt.rn.satfinite.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True,
        pack=2,
    )  # fmt: skip


@gluon.jit
def pack_as(x, dtype: gl.constexpr):
    """Round float32 to bfloat16, or to float16's finite numbers."""
    return pack_clipped(x) if dtype == gl.float16 else pack_bfloat16(x)


@gluon.jit
def product(x, y):
    """Return x · y, rounded: never part of a fused multiply-add."""
    return gl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def opaque_zero():
    """Return 0, made anew in every pass of a loop.

    What is computed from it cannot be hoisted: with a constant index of the ring, LLVM keeps every
    descriptor of a product in registers (564 bytes of spills for 8).
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def declare_flags():
    """Declare the predicates of `is_any_above`, once in a kernel, before its warps part."""
    gl.inline_asm_elementwise(
        ".reg .pred simplex_flag0; .reg .pred simplex_flag1; mov.b32 $0, 0;", "=r", [],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _test(exponent, side):
    limit = f"0f{127 + exponent << 23:08X}"  # 2**exponent in float32
    return (
        "{ .reg .f32 top; max.f32 top, $2, $3; "
        f"setp.gt.f32 simplex_flag{side}, top, {limit}; "
        "mov.b32 $0, 0; mov.b32 $1, 0; }"
    )


@gluon.constexpr_function
def _agree(side):
    return (
        "{ .reg .pred any; "
        f"bar.red.or.pred any, {_FIRST_BARRIER.value + side}, 128, simplex_flag{side}; "
        "selp.b32 $0, 1, 0, any; }"
    )


@gluon.jit
def is_any_above(parts, EXPONENT: gl.constexpr, SIDE: gl.constexpr):
    """Tell all 128 threads of warpgroup SIDE (0 or 1) whether a part is above 2^EXPONENT.

    Each thread holds two parts. One barrier with a reduction, and no shared memory: the number
    leaves the tensor as a predicate of the whole function, since Gluon has no cheap way from a
    tensor to a scalar. A NaN is not above.
    """
    gl.inline_asm_elementwise(
        _test(EXPONENT, SIDE), "=r,=r,r,r", [parts], dtype=gl.int32, is_pure=False, pack=2
    )
    return gl.inline_asm_elementwise(_agree(SIDE), "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def warpgroup():
    """Return which warpgroup of the first partition of warps a thread belongs to."""
    return gl.inline_asm_elementwise(
        "{ .reg .u32 t; mov.u32 t, %tid.x; shr.u32 $0, t, 7; }", "=r", [], dtype=gl.int32,
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def is_any_above_here(parts, EXPONENT: gl.constexpr, side):
    """Do what `is_any_above` does where two warpgroups run one program: `side` says which it is."""
    gl.inline_asm_elementwise(
        _test(EXPONENT, 0), "=r,=r,r,r", [parts], dtype=gl.int32, is_pure=False, pack=2
    )
    return gl.inline_asm_elementwise(
        "{ .reg .pred any; bar.red.or.pred any, $1, 128, simplex_flag0; selp.b32 $0, 1, 0, any; }",
        "=r,r", [_FIRST_BARRIER + side], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def parts_of_rows(p):
    """Return the row sums of p [M, N] in parts [M, 4]: none needs another thread."""
    N: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(gl.reshape(p, [p.shape[0], N // 8, 4, 2]), 3), 1)


@gluon.jit
def of_rows(is_taken, x, other):
    """Return x [rows, columns], of 16 bits each, or `other` in rows that are not taken.

    On pairs at once: `where` takes them apart, selects each number and puts them together.
    """
    mask = gl.where(is_taken, -1, 0).to(gl.int16)[:, None]
    mask, _ = gl.broadcast(mask, x)
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xca;", "=r,r,r,r", [mask, x, other], dtype=x.dtype,
        is_pure=True, pack=2,
    )  # fmt: skip
