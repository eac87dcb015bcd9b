"""Queries and narrow rows as the warpgroups of the forward read them, and virtual queries."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from csrc_free.device.forms import DETERMINANT, STRASSEN, TRILINEAR
from csrc_free.hopper.assembly import pack_bfloat16, pack_float16
from csrc_free.hopper.bring_tiles import ROWS
from csrc_free.hopper.threes import cross, rounded_cross


@gluon.jit
def to_float32(x):
    """Return 16-bit numbers as float32; bfloat16 in one instruction each, where .to takes 1.7."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x],
            dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return x.to(gl.float32)


@gluon.jit
def spread_rows(
    units, unit, P: gl.constexpr, DTYPE: gl.constexpr, BLOCK: gl.constexpr,
    NARROW_ROWS: gl.constexpr, LAYOUT: gl.constexpr, BY_HEADS: gl.constexpr,
    ROW_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Load P narrow rows, from a unit on, each for all rows of its position in the tile.

    The unit may differ between the two warpgroups, which take it for the same.
    """
    rows = units.index(unit)._reinterpret(DTYPE, [NARROW_ROWS, BLOCK], ROW_LAYOUT).slice(0, P, 0)
    x = rows.load(gl.SliceLayout(0, gl.SliceLayout(2, BY_HEADS)))
    x = gl.expand_dims(gl.expand_dims(x, 0), 2)
    x, _like = gl.broadcast(x, gl.zeros([2, P, ROWS // P, BLOCK], DTYPE, BY_HEADS))
    return gl.convert_layout(gl.reshape(x, [2 * ROWS, BLOCK]), LAYOUT, assert_trivial=True)


@gluon.jit
def twice(tile, BLOCK: gl.constexpr, LAYOUT: gl.constexpr, BY_SIDES: gl.constexpr):
    """Load the rows of a tile [64, BLOCK] for both warpgroups: [128, BLOCK]."""
    x = gl.expand_dims(tile.load(gl.SliceLayout(0, BY_SIDES)), 0)
    x, _like = gl.broadcast(x, gl.zeros([2, ROWS, BLOCK], tile.dtype, BY_SIDES))
    return gl.convert_layout(gl.reshape(x, [2 * ROWS, BLOCK]), LAYOUT, assert_trivial=True)


@gluon.jit
def virtual_queries(
    q, k, scale, k_bias, k_wide_bias,
    FORM: gl.constexpr, HAS_WIDE_BIAS: gl.constexpr, HAS_NARROW_BIAS: gl.constexpr,
    ROWS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return the virtual queries [128, BLOCK_D] of rows and their narrow keys, and row constants.

    These are 0 where nothing is added, else one number a row, in the unit of the products with vq.
    `scale` multiplies both in float16.
    """
    HAS_SCALE: gl.constexpr = q.dtype == gl.float16
    constant = 0.0
    if FORM == TRILINEAR and not HAS_NARROW_BIAS and not HAS_WIDE_BIAS:
        if HAS_SCALE:
            q *= scale.to(gl.float16)
        vq = q * k
    elif FORM == DETERMINANT and not HAS_SCALE and not HAS_NARROW_BIAS and not HAS_WIDE_BIAS:
        vq = rounded_cross(k, q)
    else:
        wide_q = to_float32(q)
        if HAS_SCALE:
            wide_q *= scale
        wide_k = to_float32(k)
        if HAS_NARROW_BIAS:
            wide_k += k_bias
        if FORM == STRASSEN:
            constant = gl.convert_layout(gl.sum(wide_q * wide_k, 1), ROWS_LAYOUT)
            vq = wide_q + (wide_k * scale if HAS_SCALE else wide_k)
        elif FORM == DETERMINANT:
            vq = cross(wide_k, wide_q)
        else:
            vq = wide_q * wide_k
        if HAS_WIDE_BIAS:
            constant += gl.convert_layout(gl.sum(vq, 1), ROWS_LAYOUT) * k_wide_bias
        vq = pack_float16(vq) if HAS_SCALE else pack_bfloat16(vq)
    return vq, constant
