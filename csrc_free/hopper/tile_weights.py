"""What logits weigh: hidden where nobody sees them, under a maximum that lags, as an operand."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from csrc_free.hopper.assembly import is_any_above_here, parts_of_rows, product
from csrc_free.hopper.attend import HALF_LIMIT, LIMIT
from csrc_free.hopper.bring_tiles import HI, LO, NEWEST, OLDEST, ROWS
from csrc_free.hopper.layouts import columns_of, rows_of
from csrc_free.hopper.maximum import CENTRE, HALF_CENTRE, UNSET

# Beyond 2 to this power a maximum's steps are as wide as what an exponential may grow. A tile with
# such a row is always weighed anew, by exponents that are rounded before the maximum is subtracted:
# so equal logits weigh the same, and float32 logits of that size differ by 32 at least.
HUGE = gl.constexpr(28)


@gluon.jit
def hidden(
    s, constant, row, offset, spans, span, factor,
    HAS_CONSTANT: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Hide what rows do not see of logits [64, N] of the wide rows from `row` on, at an offset."""
    N: gl.constexpr = s.shape[1]
    lo = spans.index(span + LO).load(rows_of(LAYOUT))
    hi = spans.index(span + HI).load(rows_of(LAYOUT))
    newest = spans.index(span + NEWEST).load(rows_of(LAYOUT))
    oldest = spans.index(span + OLDEST).load(rows_of(LAYOUT))
    sees_offset = (newest <= offset) & (offset <= oldest)
    # One comparison for both ends: a key before the first is a large unsigned number.
    size = gl.where(sees_offset, hi - lo, 0).to(gl.uint32, bitcast=True)
    key = gl.arange(0, N, layout=columns_of(LAYOUT))
    is_seen = (key[None, :] - (lo - row)[:, None]).to(gl.uint32, bitcast=True) < size[:, None]
    nothing = gl.where(factor < 0, float("inf"), float("-inf"))
    s = gl.where(is_seen, s, nothing[:, None])
    if HAS_CONSTANT:
        constant = gl.where(sees_offset, constant, 0.0)
    return s, constant


@gluon.jit
def is_high(grown, parts, IS_HALF: gl.constexpr, which):
    """Tell a warpgroup whether a tile's exponentials grew too large, be it together."""
    if IS_HALF:  # P itself must fit; the sums have room
        return is_any_above_here(parts, HALF_LIMIT, which)
    return is_any_above_here(grown, LIMIT, which)


@gluon.jit
def weights_of(s, constant, top, factor, HAS_CONSTANT: gl.constexpr):
    """Return P = exp2(factor · (s + constant) - top), and its row sums in parts."""
    shift = top
    if HAS_CONSTANT:
        shift -= constant * factor
    p = gl.exp2(s * factor[:, None] - shift[:, None])
    return p, parts_of_rows(p)


@gluon.jit
def packed(p, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Return weights as an operand of a product, rounded here and not before.

    The product before may still read its own: rounded while it runs, these would need registers of
    their own, or be moved once more.
    """
    if gl.float16 == DTYPE:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=gl.float16, is_pure=False, pack=2
        )
    else:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=gl.bfloat16, is_pure=False, pack=2
        )
    return gl.convert_layout(packed, LAYOUT)


@gluon.jit
def weigh_anew(
    s, constant, top, factor,
    which, HAS_CONSTANT: gl.constexpr, IS_HALF: gl.constexpr,
):  # fmt: skip
    """Weigh logits under maxima that hold for them too.

    Returns P, its row sums in parts, the new top, the decay of what was summed, and whether some
    maximum is huge. The maximum of a row of no visible key stays.
    """
    centre: gl.constexpr = HALF_CENTRE if IS_HALF else CENTRE
    if HAS_CONSTANT:
        s += constant[:, None]
    rounded = product(s, factor[:, None])
    new_top = gl.maximum(top, gl.max(rounded, 1) + centre)
    size = gl.where(new_top == UNSET, 0.0, gl.abs(new_top))
    # Within a fused multiply-add a huge logit would miss its own maximum by more than 2^126.
    fused = s * factor[:, None] - new_top[:, None]
    exponent = gl.where((size > 2.0**HUGE)[:, None], rounded - new_top[:, None], fused)
    # Not `minimum`: a NaN must stay one.
    p = gl.exp2(gl.where(exponent > 0.0, 0.0, exponent))
    decay = gl.exp2(top - new_top)
    is_huge = is_any_above_here(size, HUGE, which)
    return p, parts_of_rows(p), new_top, decay, is_huge


@gluon.jit
def attend_anew(
    vq, k_tile, row, offset, spans, span, constant, top, factor,
    which, HAS_CONSTANT: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Multiply by a tile of keys, and weigh it anew; nothing is in flight.

    Returns what `weigh_anew` does, after the new constant.
    """
    N: gl.constexpr = k_tile.shape[1]
    blank = gl.zeros([2 * ROWS, N], gl.float32, LAYOUT)
    s = warpgroup_mma(vq, k_tile, blank, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    s, constant = hidden(s, constant, row, offset, spans, span, factor, HAS_CONSTANT, LAYOUT)
    p, parts, top, decay, is_huge = weigh_anew(
        s, constant, top, factor, which, HAS_CONSTANT, vq.dtype == gl.float16
    )
    return constant, p, parts, top, decay, is_huge
