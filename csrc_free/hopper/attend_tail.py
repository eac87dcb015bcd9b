"""The forward at the keys beyond the last group of wide tiles."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from csrc_free.hopper.bring_tiles import ROWS
from csrc_free.hopper.layouts import accumulator, rows_of
from csrc_free.hopper.tile_state import IS_HUGE
from csrc_free.hopper.tile_weights import hidden, is_high, packed, weigh_anew, weights_of


@gluon.jit
def _lowered(p, decay):
    """Return weights times a number a row, packed as they were: unpacked they would be copied."""
    if p.dtype == gl.float16:
        lowered = gl.inline_asm_elementwise(
            "{ .reg .b16 a, b; .reg .f32 x, y; mov.b32 {a, b}, $1; cvt.f32.f16 x, a; "
            "cvt.f32.f16 y, b; mul.f32 x, x, $2; mul.f32 y, y, $3; cvt.rn.f16x2.f32 $0, y, x; }",
            "=r,r,r,r", [p, decay[:, None]], dtype=gl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        lowered = gl.inline_asm_elementwise(
            "{ .reg .b32 u, w; .reg .f32 x, y; shl.b32 u, $1, 16; and.b32 w, $1, 0xffff0000; "
            "mov.b32 x, u; mov.b32 y, w; mul.f32 x, x, $2; mul.f32 y, y, $3; "
            "cvt.rn.bf16x2.f32 $0, y, x; }",
            "=r,r,r,r", [p, decay[:, None]], dtype=gl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    return lowered


@gluon.jit
def attend_tail(
    which, t, acc, sums, mass, p, top, factor, state, vq, constant,
    k_tail, v_tail, row, offset, spans, span,
    HAS_CONSTANT: gl.constexpr, HAS_WIDE_BIAS: gl.constexpr,
    TAIL: gl.constexpr, S: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """Attend to the keys beyond the last group of tiles, while P of its last tile waits."""
    ENDS: gl.constexpr = accumulator(TAIL, 8)
    PARTS: gl.constexpr = sums.type.layout
    WEIGHTS: gl.constexpr = p.type.layout
    IS_HALF: gl.constexpr = vq.dtype == gl.float16
    own_top = gl.convert_layout(top, rows_of(ENDS))
    own_factor = gl.convert_layout(factor, rows_of(ENDS))
    if HAS_CONSTANT:
        constant = gl.convert_layout(constant, rows_of(ENDS))
    s = warpgroup_mma(
        vq, k_tail.permute((1, 0)), gl.zeros([2 * ROWS, TAIL], gl.float32, ENDS),
        use_acc=False, is_async=True,
    )  # fmt: skip
    s = warpgroup_mma_wait(0, deps=(s,))
    s, constant = hidden(s, constant, row, offset, spans, span, own_factor, HAS_CONSTANT, ENDS)
    p_end, parts = weights_of(s, constant, own_top, own_factor, HAS_CONSTANT)
    parts = gl.convert_layout(parts, PARTS)
    grown = sums + parts
    is_bad = is_high(grown, parts, IS_HALF, which) | (state & (1 << IS_HUGE))
    if is_bad != 0:
        p_end, new_parts, new_top, decay, is_huge = weigh_anew(
            s, constant, own_top, own_factor, which, HAS_CONSTANT, IS_HALF
        )
        parts = gl.convert_layout(new_parts, PARTS)
        top = gl.convert_layout(new_top, rows_of(S))
        decay_t = gl.convert_layout(decay, rows_of(T))[:, None]
        t *= decay_t
        acc *= decay_t
        decay_s = gl.convert_layout(decay, rows_of(PARTS))[:, None]
        grown = sums * decay_s + parts
        if HAS_WIDE_BIAS:
            mass *= decay_s
        p = _lowered(p, gl.convert_layout(decay, rows_of(WEIGHTS)))
        state |= is_huge << IS_HUGE
    if HAS_WIDE_BIAS:
        mass += parts
    p_end = packed(p_end, vq.dtype, WEIGHTS)
    t = warpgroup_mma(p_end, v_tail, t, use_acc=True, is_async=True)
    t = warpgroup_mma_wait(0, deps=(t,))
    return t, acc, grown, mass, p, top, state
