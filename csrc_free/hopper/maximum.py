"""A row's maximum that lags, at any size of logits: P = exp2(factor · s - top).

The exponent is one fused multiply-add, so equal logits always weigh the same; but `top` is a
float32, and above 2^28 its steps are wider than what an exponential may grow. There the row's
factor is lowered by a power of two, until top is below 2^28 again. That weighs by too little what
float32 logits of that size cannot tell apart anyway: their own steps are 2^4 and more, so the
highest still outweighs the next by 2^16.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

UNSET = gl.constexpr(-3.4028234663852886e38)
# A row's highest exponential so far, when its maximum is set, is 2^-CENTRE: room to grow. float16,
# whose exponentials end at 2^-24, has less of it.
CENTRE = gl.constexpr(36.0)
HALF_CENTRE = gl.constexpr(0.0)
_HUGE = gl.constexpr(2.0**28)


@gluon.jit
def ratio_between(factor, lowered):
    """Return factor / lowered, a power of two, exactly 1 where they are equal."""
    return gl.where(factor == lowered, 1.0, factor / lowered)


@gluon.jit
def raised(s, top, factor, full_factor, CENTRE: gl.constexpr):
    """Return (top, factor, decay): maxima that hold for logits s [M, N] too.

    Decay is by how much to multiply what was summed before.
    """
    before = top * ratio_between(full_factor, factor)
    now = gl.maximum(before, gl.max(s * full_factor[:, None], 1) + CENTRE)
    size = gl.abs(now)
    exponent = size.to(gl.int32, bitcast=True) >> 23
    lowering = ((127 + 27 + 127 - exponent) << 23).to(gl.float32, bitcast=True)
    lowering = gl.where(size >= _HUGE, lowering, 1.0)
    new_factor = lowering * full_factor
    new_top = now * lowering
    decay = gl.exp2(gl.where(new_factor == factor, top - new_top, before - now))
    return new_top, new_factor, decay


@gluon.jit
def total_of_both(top, factor, total, other_top, other_factor, other_total, full_factor):
    """Return the weights of two sums of one row, over their common total, and its log2 sum.

    The logarithm is -inf, and both weights are finite, where nothing was summed.
    """
    own_size = top * ratio_between(full_factor, factor)
    other_size = other_top * ratio_between(full_factor, other_factor)
    is_own = own_size >= other_size
    highest = gl.maximum(top, other_top)
    is_same = factor == other_factor
    # Where the factors differ, the sizes are so far apart that one is all.
    weight = gl.where(is_same, gl.exp2(top - highest), gl.where(is_own, 1.0, 0.0))
    other_weight = gl.where(is_same, gl.exp2(other_top - highest), gl.where(is_own, 0.0, 1.0))
    both = total * weight + other_total * other_weight
    # Not `both > 0`: a NaN must stay one.
    divisor = gl.where(both == 0.0, 1.0, both)
    kept_top = gl.where(is_same, highest, gl.where(is_own, top, other_top))
    kept_factor = gl.where(is_own, factor, other_factor)
    logarithm = (kept_top + gl.log2(divisor)) * ratio_between(full_factor, kept_factor)
    logarithm = gl.where(both == 0.0, float("-inf"), logarithm)
    return weight / divisor, other_weight / divisor, logarithm
