"""Matrix products of the portable kernels: operands, and how they are rounded.

PRECISION is "ieee" or "tf32" as `tl.dot` takes it, None for bfloat16, or "bf16x6": then an operand
is a tuple, a float32 number in three parts of bfloat16, whose sum it is to the last bit. Six of the
nine products of parts are multiplied; the three that are left out are below 2^-23 of the whole.

Triton's own "bf16x6" and "tf32x3" round the first part to nearest, which takes numbers within 2^-9
of the largest (2^-12 for TF32) to infinity; and they split an operand wherever it is multiplied.
"""

import triton
import triton.language as tl


@triton.jit
def operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Return x as `product` takes it."""
    if PRECISION == "bf16x6":
        # Cut off, not rounded: so the first part of a finite number is finite.
        first = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        rest = x - first
        second = rest.to(tl.bfloat16)
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
        y = (first.to(tl.bfloat16), second, third)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def rounded_operand(x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Return x as `product` takes it, in TF32 rounded to nearest.

    The tensor core cuts off, and q∘k2 cut off makes every score smaller.
    """
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        # A NaN whose bits are all ones would become 0.
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return operand(x, DTYPE, PRECISION)


@triton.jit
def transposed(x, PRECISION: tl.constexpr):
    """Return an operand's transpose."""
    if PRECISION == "bf16x6":
        first, second, third = x
        y = (tl.trans(first), tl.trans(second), tl.trans(third))
    else:
        y = tl.trans(x)
    return y


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a · b; acc may be None."""
    if PRECISION == "bf16x6":
        a_first, a_second, a_third = a
        b_first, b_second, b_third = b
        small = tl.dot(a_third, b_first)
        small = tl.dot(a_first, b_third, small)
        small = tl.dot(a_second, b_second, small)
        small = tl.dot(a_second, b_first, small)
        small = tl.dot(a_first, b_second, small)
        # What is left of infinity is no number.
        small = tl.where(small == small, small, 0.0)
        if acc is not None:
            small += acc
        y = tl.dot(a_first, b_first, small)
    else:
        y = tl.dot(a, b, acc, input_precision=PRECISION)
    return y
