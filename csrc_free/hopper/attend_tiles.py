"""The two warpgroups of the forward for tiles of several positions, in one program.

Each takes every second offset of the narrow window: rows 0 to 63 are the tile's at one offset, rows
64 to 127 the same at the offset after it. As two programs they did the same work, but their code
did not stay in the instruction cache.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from csrc_free.device.forms import STRASSEN, TRILINEAR
from csrc_free.hopper.assembly import (
    is_any_above_here,
    opaque_zero,
    pack_bfloat16,
    pack_float16,
    parts_of_rows,
    product,
    warpgroup,
)
from csrc_free.hopper.attend import HALF_LIMIT, LIMIT, LN_2, scale_of
from csrc_free.hopper.bring_tiles import (
    CHUNKS,
    GROUPS,
    HAS_TAIL,
    HI,
    HIGH,
    INNER,
    LO,
    NEW_EDGE,
    NEWEST,
    NUMBERS,
    OLD_EDGE,
    OLDEST,
    OUTER,
    PASSES,
    ROWS,
    SPANS,
    WORD,
)
from csrc_free.hopper.channels import arrive, arrive_at_both, wait_full
from csrc_free.hopper.layouts import accumulator, columns_of, operand, rows_of
from csrc_free.hopper.maximum import CENTRE, HALF_CENTRE, UNSET, total_of_both
from csrc_free.hopper.tile_reach import place

# The state of a warpgroup, in one register. Bits that flip with every item, item that sees
# something, chunk, tail and group of tiles: what their barriers wait for.
ITEM = gl.constexpr(0)
QUERIES_OF_ITEM = gl.constexpr(1)
CHUNK_OF_OFFSETS = gl.constexpr(2)
END = gl.constexpr(3)
GROUP_OF_TILES = gl.constexpr(4)
FLIPS = gl.constexpr(31)
# Of the group of tiles: whether it is the last, whether a tail follows it, and, from one bit on,
# which of its tiles some row sees partly.
IS_LAST_GROUP = gl.constexpr(5)
IS_AT_TAIL = gl.constexpr(6)
PARTIAL = gl.constexpr(7)
OF_GROUP = gl.constexpr((1 << 17) - (1 << 5))
# Of the offset: whether it is the chunk's last, whether some row does not see its narrow key, and
# its number among the warpgroup's.
IS_LAST = gl.constexpr(17)
IS_HIDDEN = gl.constexpr(18)
THIS = gl.constexpr(19)
OF_OFFSET = gl.constexpr((1 << 27) - (1 << 17))
# Of the chunk: whether turns are left. Of the item: whether some row's maximum is huge.
IS_ON = gl.constexpr(27)
IS_HUGE = gl.constexpr(28)

# Beyond 2 to this power a maximum's steps are as wide as what an exponential may grow. A tile with
# such a row is always weighed anew, by exponents that are rounded before the maximum is subtracted:
# so equal logits weigh the same, and float32 logits of that size differ by 32 at least.
HUGE = gl.constexpr(28)


@gluon.jit
def _to_float32(x):
    """Return 16-bit numbers as float32; bfloat16 in one instruction each, where .to takes 1.7."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x],
            dtype=gl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    return x.to(gl.float32)


@gluon.jit
def _spread_rows(
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
def _twice(tile, BLOCK: gl.constexpr, LAYOUT: gl.constexpr, BY_SIDES: gl.constexpr):
    """Load the rows of a tile [64, BLOCK] for both warpgroups: [128, BLOCK]."""
    x = gl.expand_dims(tile.load(gl.SliceLayout(0, BY_SIDES)), 0)
    x, _like = gl.broadcast(x, gl.zeros([2, ROWS, BLOCK], tile.dtype, BY_SIDES))
    return gl.convert_layout(gl.reshape(x, [2 * ROWS, BLOCK]), LAYOUT, assert_trivial=True)


@gluon.jit
def _virtual_queries(
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
    else:
        wide_q = _to_float32(q)
        if HAS_SCALE:
            wide_q *= scale
        wide_k = _to_float32(k)
        if HAS_NARROW_BIAS:
            wide_k += k_bias
        if FORM == STRASSEN:
            constant = gl.convert_layout(gl.sum(wide_q * wide_k, 1), ROWS_LAYOUT)
            vq = wide_q + (wide_k * scale if HAS_SCALE else wide_k)
        else:
            vq = wide_q * wide_k
        if HAS_WIDE_BIAS:
            constant += gl.convert_layout(gl.sum(vq, 1), ROWS_LAYOUT) * k_wide_bias
        vq = pack_float16(vq) if HAS_SCALE else pack_bfloat16(vq)
    return vq, constant


@gluon.jit
def _planned(plans, place):
    """Return one number of a plan, as a scalar."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    return gl.sum(plans.index(place).load(layout), 0)


@gluon.jit
def _byte(word, SHIFT: gl.constexpr):
    return (word >> SHIFT) & 255


@gluon.jit
def _bit(number, SHIFT: gl.constexpr):
    return (number & (1 << SHIFT)) != 0


@gluon.jit
def _this(state):
    """Return the number of the offset at hand among the warpgroup's."""
    return (state >> THIS) & 31


@gluon.jit
def _of_offset(word, this):
    """Return the bits of offset number `this` of each warpgroup."""
    is_hidden = (2 * this < _byte(word, INNER)) | (2 * this + 1 >= _byte(word, OUTER))
    bits = (this == _byte(word, PASSES) - 1).to(gl.int32) << IS_LAST
    return bits | is_hidden.to(gl.int32) << IS_HIDDEN | this << THIS


@gluon.jit
def _of_group(plans, plan, word, row, left, TILES: gl.constexpr, BLOCK_N: gl.constexpr):
    """Return the bits of a group of tiles, the first of which ends at `row`; `left` are left.

    Bit TILES of the partial ones is of the first tile of the next group.
    """
    number = (_planned(plans, plan + HIGH) - row) // BLOCK_N
    new_edge = _planned(plans, plan + NEW_EDGE)
    old_edge = _planned(plans, plan + OLD_EDGE)
    bits = (left == 1).to(gl.int32) << IS_LAST_GROUP
    bits |= ((left == 1) & (_byte(word, HAS_TAIL) != 0)).to(gl.int32) << IS_AT_TAIL
    for n in gl.static_range(TILES + 1):
        is_partial = (number + n < new_edge) | (number + n >= old_edge)
        bits |= is_partial.to(gl.int32) << PARTIAL + n
    return bits


@gluon.jit
def _hidden(
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
def _is_high(grown, parts, IS_HALF: gl.constexpr, which):
    """Tell a warpgroup whether a tile's exponentials grew too large, be it together."""
    if IS_HALF:  # P itself must fit; the sums have room
        return is_any_above_here(parts, HALF_LIMIT, which)
    return is_any_above_here(grown, LIMIT, which)


@gluon.jit
def _weights(s, constant, top, factor, HAS_CONSTANT: gl.constexpr):
    """Return P = exp2(factor · (s + constant) - top), and its row sums in parts."""
    shift = top
    if HAS_CONSTANT:
        shift -= constant * factor
    p = gl.exp2(s * factor[:, None] - shift[:, None])
    return p, parts_of_rows(p)


@gluon.jit
def _packed(p, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
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
def _weigh_anew(
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
def _attend_anew(
    vq, k_tile, row, offset, spans, span, constant, top, factor,
    which, HAS_CONSTANT: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Multiply by a tile of keys, and weigh it anew; nothing is in flight.

    Returns what `_weigh_anew` does, after the new constant.
    """
    N: gl.constexpr = k_tile.shape[1]
    blank = gl.zeros([2 * ROWS, N], gl.float32, LAYOUT)
    s = warpgroup_mma(vq, k_tile, blank, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    s, constant = _hidden(s, constant, row, offset, spans, span, factor, HAS_CONSTANT, LAYOUT)
    p, parts, top, decay, is_huge = _weigh_anew(
        s, constant, top, factor, which, HAS_CONSTANT, vq.dtype == gl.float16
    )
    return constant, p, parts, top, decay, is_huge


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
def _attend_tail(
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
    s, constant = _hidden(s, constant, row, offset, spans, span, own_factor, HAS_CONSTANT, ENDS)
    p_end, parts = _weights(s, constant, own_top, own_factor, HAS_CONSTANT)
    parts = gl.convert_layout(parts, PARTS)
    grown = sums + parts
    is_bad = _is_high(grown, parts, IS_HALF, which) | (state & (1 << IS_HUGE))
    if is_bad != 0:
        p_end, new_parts, new_top, decay, is_huge = _weigh_anew(
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
    p_end = _packed(p_end, vq.dtype, WEIGHTS)
    t = warpgroup_mma(p_end, v_tail, t, use_acc=True, is_async=True)
    t = warpgroup_mma_wait(0, deps=(t,))
    return t, acc, grown, mass, p, top, state


@gluon.jit
def _attend_chunk(
    which, acc, sums, top, state, chunks,
    q_tile, k_tiles, v_tiles, k_tail, v_tail, units, plans, spans,
    q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty,
    rows_empty, values_full, scale, factor, biases,
    FORM: gl.constexpr, HAS_WIDE_BIAS: gl.constexpr, HAS_NARROW_BIAS: gl.constexpr,
    P: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, TAIL: gl.constexpr, CHUNK: gl.constexpr,
    NARROW_ROWS: gl.constexpr, V_UNIT: gl.constexpr, K_ROW: gl.constexpr, V_ROW: gl.constexpr,
    K_BY_HEADS: gl.constexpr, V_BY_HEADS: gl.constexpr, Q_BY_SIDES: gl.constexpr,
):  # fmt: skip
    """Attend to all wide keys of an item at the offsets of a chunk: `which`, and every second.

    `chunks` of the item are left, this one among them. In a turn, that is a group of tiles at an
    offset, P is multiplied by a tile of values while the next logits are made, those of the next
    offset's first tile behind the last tile of this one. Nothing is in flight between turns.
    """
    S: gl.constexpr = accumulator(BLOCK_N, 8)
    T: gl.constexpr = accumulator(BLOCK_DV, 8)
    QUERIES: gl.constexpr = operand(BLOCK_N, 8)
    WEIGHTS: gl.constexpr = operand(BLOCK_DV, 8)
    PARTS: gl.constexpr = sums.type.layout
    DTYPE: gl.constexpr = q_tile.dtype
    HAS_CONSTANT: gl.constexpr = FORM == STRASSEN or HAS_WIDE_BIAS
    IS_HALF: gl.constexpr = gl.float16 == DTYPE
    K_START: gl.constexpr = CHUNK - 1
    V_START: gl.constexpr = K_START + V_UNIT
    k_wide_bias, v_wide_bias, k_bias, v_bias = biases
    blank = gl.zeros([2 * ROWS, BLOCK_N], gl.float32, S)
    nothing = gl.zeros([2 * ROWS, BLOCK_DV], gl.float32, T)
    side = (state >> CHUNK_OF_OFFSETS) & 1
    word = _planned(plans, NUMBERS * side + WORD)
    left = _planned(plans, NUMBERS * side + GROUPS)
    row = _planned(plans, NUMBERS * side + HIGH)  # the one after the group's newest tile
    state |= _of_group(plans, NUMBERS * side, word, row, left, TILES, BLOCK_N)
    state |= _of_offset(word, 0) | (1 << IS_ON)
    k = _spread_rows(
        units, K_START - which, P, DTYPE, BLOCK_D, NARROW_ROWS, QUERIES, K_BY_HEADS, K_ROW
    )
    vq, constant = _virtual_queries(
        _twice(q_tile.index(0), BLOCK_D, QUERIES, Q_BY_SIDES), k, scale, k_bias, k_wide_bias,
        FORM, HAS_WIDE_BIAS, HAS_NARROW_BIAS, rows_of(S),
    )  # fmt: skip
    if _bit(state, IS_LAST) & _bit(state, IS_LAST_GROUP):
        arrive(rows_empty, 0)
        if chunks == 1:
            arrive(q_empty, 0)
    wait_full(k_full, 0, state >> GROUP_OF_TILES)
    constant, weight, parts, top, decay, is_huge = _attend_anew(
        vq, k_tiles.index(0).permute((1, 0)), row - BLOCK_N, 0, spans, SPANS * side,
        constant, top, factor, which, HAS_CONSTANT, S,
    )  # fmt: skip
    p = _packed(weight, DTYPE, WEIGHTS)
    state |= is_huge << IS_HUGE
    if _bit(state, IS_LAST):
        arrive(k_empty, 0)
    acc *= gl.convert_layout(decay, rows_of(T))[:, None]
    sums *= gl.convert_layout(decay, rows_of(PARTS))[:, None]
    sums += parts
    mass = parts  # of the offset at hand, which v_wide_bias multiplies
    while _bit(state, IS_ON):
        z = opaque_zero()
        is_first = (state & (31 << THIS)) == 0
        is_last = _bit(state, IS_LAST)
        t = nothing
        for n in gl.static_range(TILES - 1):
            if is_first:
                wait_full(k_full, z + n + 1, state >> GROUP_OF_TILES)
                wait_full(v_full, z + n, state >> GROUP_OF_TILES)
            k_tile = k_tiles.index(z + n + 1).permute((1, 0))
            s = warpgroup_mma(vq, k_tile, blank, use_acc=False, is_async=True)
            t = warpgroup_mma(p, v_tiles.index(z + n), t, use_acc=n > 0, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            # Elsewhere than at a group's ends a partly seen tile is weighed anew.
            partly = state & ((1 << IS_HIDDEN) | (1 << PARTIAL + n + 1))
            if n == TILES - 2:  # noqa: SIM102 (one is of compile time, one of run time)
                if partly != 0:
                    s, constant = _hidden(
                        s, constant, row - (n + 2) * BLOCK_N, 2 * _this(state),
                        spans, SPANS * ((state >> CHUNK_OF_OFFSETS) & 1), factor, HAS_CONSTANT, S,
                    )  # fmt: skip
            weight, parts = _weights(s, constant, top, factor, HAS_CONSTANT)
            # Before the wait for t: ptxas else sinks the exponentials behind it.
            grown = sums + parts
            is_bad = _is_high(grown, parts, IS_HALF, which)
            is_bad |= state & (1 << IS_HUGE)
            if n < TILES - 2:
                is_bad |= partly
            t = warpgroup_mma_wait(0, deps=(t,))
            if is_bad != 0:
                k_tile = k_tiles.index(z + n + 1).permute((1, 0))
                constant, weight, parts, top, decay, is_huge = _attend_anew(
                    vq, k_tile, row - (n + 2) * BLOCK_N, 2 * _this(state),
                    spans, SPANS * ((state >> CHUNK_OF_OFFSETS) & 1),
                    constant, top, factor, which, HAS_CONSTANT, S,
                )  # fmt: skip
                state |= is_huge << IS_HUGE
                decay_t = gl.convert_layout(decay, rows_of(T))[:, None]
                t *= decay_t
                acc *= decay_t
                decay_s = gl.convert_layout(decay, rows_of(PARTS))[:, None]
                grown = sums * decay_s + parts
                if HAS_WIDE_BIAS:
                    mass *= decay_s
            if is_last:
                arrive_at_both(v_empty, z + n, k_empty, z + n + 1)
            p = _packed(weight, DTYPE, WEIGHTS)
            sums = grown
            if HAS_WIDE_BIAS:
                mass += parts

        if TAIL > 0:  # noqa: SIM102 (one is of compile time, one of run time)
            if _bit(state, IS_AT_TAIL):
                if is_first:
                    wait_full(tail_full, 0, state >> END)
                t, acc, sums, mass, p, top, state = _attend_tail(
                    which, t, acc, sums, mass, p, top, factor, state, vq, constant,
                    k_tail, v_tail, row - TILES * BLOCK_N - TAIL, 2 * _this(state),
                    spans, SPANS * ((state >> CHUNK_OF_OFFSETS) & 1),
                    HAS_CONSTANT, HAS_WIDE_BIAS, TAIL, S, T,
                )  # fmt: skip
                if is_last:
                    arrive(tail_empty, 0)

        # The last turn has no next: its logits are of stale tiles, for nobody.
        is_more = ~(is_last & _bit(state, IS_LAST_GROUP))
        next_this = gl.where(is_last, 0, _this(state) + 1)
        # Read anew, so that neither its bytes nor addresses stay in registers.
        next_word = _planned(plans, NUMBERS * ((state >> CHUNK_OF_OFFSETS) & 1) + WORD)
        nil = next_word >> 31  # 0, but the assembler does not know
        bits = _of_offset(next_word, next_this)
        k = _spread_rows(
            units, K_START - which + z - 2 * next_this,
            P, DTYPE, BLOCK_D, NARROW_ROWS, QUERIES, K_BY_HEADS, K_ROW,
        )  # fmt: skip
        vq, constant = _virtual_queries(
            _twice(q_tile.index(nil), BLOCK_D, QUERIES, Q_BY_SIDES), k, scale, k_bias,
            k_wide_bias, FORM, HAS_WIDE_BIAS, HAS_NARROW_BIAS, rows_of(S),
        )  # fmt: skip
        if _bit(bits, IS_LAST) & (left == gl.where(is_last, 2, 1)):
            arrive(rows_empty, 0)
            if chunks == 1:
                arrive(q_empty, 0)
        if is_last & is_more:
            wait_full(k_full, z, (state >> GROUP_OF_TILES) + 1)
        if is_first:
            wait_full(v_full, z + TILES - 1, state >> GROUP_OF_TILES)
        k_tile = k_tiles.index(z).permute((1, 0))
        s = warpgroup_mma(vq, k_tile, blank, use_acc=False, is_async=True)
        t = warpgroup_mma(
            p, v_tiles.index(z + TILES - 1), t, use_acc=TILES > 1 or TAIL > 0, is_async=True
        )
        s = warpgroup_mma_wait(1, deps=(s,))
        edge = gl.where(is_last, 1 << PARTIAL + TILES, 1 << PARTIAL)
        if (state & edge) | (bits & (1 << IS_HIDDEN)) != 0:
            s, constant = _hidden(
                s, constant, row - gl.where(is_last, (TILES + 1) * BLOCK_N, BLOCK_N),
                2 * next_this, spans, SPANS * ((state >> CHUNK_OF_OFFSETS) & 1),
                factor, HAS_CONSTANT, S,
            )  # fmt: skip
        weight, parts = _weights(s, constant, top, factor, HAS_CONSTANT)
        parts = gl.where(is_more, parts, 0.0)
        grown = sums + parts
        is_bad = _is_high(grown, parts, IS_HALF, which) | (state & (1 << IS_HUGE))
        if is_first:
            wait_full(values_full, 0, state >> CHUNK_OF_OFFSETS)
        t = warpgroup_mma_wait(0, deps=(t,))
        if is_last:
            arrive(v_empty, z + TILES - 1)
        # Loaded before the wait, it would take the registers of p.
        v = _to_float32(
            _spread_rows(
                units, V_START - which + z - 2 * _this(state),
                P, DTYPE, BLOCK_DV, NARROW_ROWS, T, V_BY_HEADS, V_ROW,
            )
        )  # fmt: skip
        if HAS_NARROW_BIAS:
            v += v_bias
        if HAS_WIDE_BIAS:
            total = gl.convert_layout(gl.sum(mass, 1), rows_of(T))
            t += (v_wide_bias * total)[:, None]
        acc += t * v
        if (is_bad != 0) & is_more:
            k_tile = k_tiles.index(z).permute((1, 0))
            constant, weight, parts, top, decay, is_huge = _attend_anew(
                vq, k_tile, row - gl.where(is_last, (TILES + 1) * BLOCK_N, BLOCK_N),
                2 * next_this, spans, SPANS * ((state >> CHUNK_OF_OFFSETS) & 1),
                constant, top, factor, which, HAS_CONSTANT, S,
            )  # fmt: skip
            state |= is_huge << IS_HUGE
            acc *= gl.convert_layout(decay, rows_of(T))[:, None]
            decay_s = gl.convert_layout(decay, rows_of(PARTS))[:, None]
            grown = sums * decay_s + parts
        p = _packed(weight, DTYPE, WEIGHTS)
        sums = grown
        if HAS_WIDE_BIAS:
            mass = parts
        if _bit(bits, IS_LAST) & is_more:
            arrive(k_empty, z)
        if is_last:
            row -= TILES * BLOCK_N
            left -= 1
            plan = NUMBERS * ((state >> CHUNK_OF_OFFSETS) & 1)
            group = _of_group(plans, plan, next_word, row, left, TILES, BLOCK_N)
            state = (state & ~OF_GROUP) ^ (1 << GROUP_OF_TILES) | group
            state &= gl.where(left > 0, -1, ~(1 << IS_ON))
        state = (state & ~OF_OFFSET) | bits
    state ^= _byte(word, HAS_TAIL) << END
    return acc, sums, top, state & (FLIPS | (1 << IS_HUGE))


@gluon.jit
def _half_of(x, HALF: gl.constexpr):
    """Return the first or the second half of the columns of a product."""
    x = gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, x.type.layout))
    which = gl.arange(0, 2, layout=layout)
    return gl.sum(gl.where((which == HALF)[None, :, None], x, 0.0), 1)


@gluon.jit
def attend_tiles(
    q_tile, k_tiles, v_tiles, k_tail, v_tail, units, plans, spans,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty,
    rows_full, rows_empty, values_full, values_empty,
    hand_out, hand_sums, out, lse, grid, strides, log2_scale, biases,
    FORM: gl.constexpr, HAS_WIDE_BIAS: gl.constexpr, HAS_NARROW_BIAS: gl.constexpr,
    P: gl.constexpr, VALUE_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, TAIL: gl.constexpr, CHUNK: gl.constexpr,
    NARROW_ROWS: gl.constexpr, V_UNIT: gl.constexpr, K_ROW: gl.constexpr, V_ROW: gl.constexpr,
    K_BY_HEADS: gl.constexpr, V_BY_HEADS: gl.constexpr, Q_BY_SIDES: gl.constexpr,
):  # fmt: skip
    """Take every offset of every chunk of every item, in turns of two.

    Of an odd number the last one's next is hidden from all rows.
    """
    HEADS: gl.constexpr = ROWS // P
    HALF: gl.constexpr = BLOCK_DV // 2
    which = warpgroup()
    items, _tiles, kv_heads, group, seq = grid
    S: gl.constexpr = accumulator(BLOCK_N, 8)
    T: gl.constexpr = accumulator(BLOCK_DV, 8)
    state = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        blank = gl.zeros([2 * ROWS, BLOCK_N], gl.float32, S)
        acc = gl.zeros([2 * ROWS, BLOCK_DV], gl.float32, T)
        sums = parts_of_rows(blank)
        top = gl.full([2 * ROWS], UNSET, gl.float32, rows_of(S))
        factor = gl.full([2 * ROWS], 0.0, gl.float32, rows_of(S)) + log2_scale
        scale = 1.0
        wait_full(rows_full, 0, state >> CHUNK_OF_OFFSETS)
        plan = NUMBERS * ((state >> CHUNK_OF_OFFSETS) & 1)
        chunks = _planned(plans, plan + CHUNKS)
        if _planned(plans, plan + GROUPS) > 0:
            wait_full(q_full, 0, state >> QUERIES_OF_ITEM)
            state ^= 1 << QUERIES_OF_ITEM
        if q_tile.dtype == gl.float16:
            scale = scale_of(
                _twice(q_tile.index(0), BLOCK_D, operand(BLOCK_N, 8), Q_BY_SIDES), FORM
            )
            factor /= gl.convert_layout(gl.max(scale, 1), rows_of(S))
        while chunks > 0:
            wait_full(rows_full, 0, state >> CHUNK_OF_OFFSETS)
            plan = NUMBERS * ((state >> CHUNK_OF_OFFSETS) & 1)
            if _planned(plans, plan + GROUPS) > 0:
                acc, sums, top, state = _attend_chunk(
                    which, acc, sums, top, state, chunks,
                    q_tile, k_tiles, v_tiles, k_tail, v_tail, units, plans, spans,
                    q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty,
                    rows_empty, values_full, scale, factor, biases,
                    FORM, HAS_WIDE_BIAS, HAS_NARROW_BIAS, P, BLOCK_D, BLOCK_DV, BLOCK_N, TILES,
                    TAIL, CHUNK, NARROW_ROWS, V_UNIT, K_ROW, V_ROW, K_BY_HEADS, V_BY_HEADS,
                    Q_BY_SIDES,
                )  # fmt: skip
            else:
                arrive(rows_empty, 0)
                wait_full(values_full, 0, state >> CHUNK_OF_OFFSETS)
            arrive(values_empty, 0)
            state ^= 1 << CHUNK_OF_OFFSETS
            chunks -= 1

        F: gl.constexpr = gl.BlockedLayout([1, 4], [128 // HALF, HALF // 4], [8, 1], [1, 0])
        hand_sums.index(0).store(gl.convert_layout(top, rows_of(T)))
        hand_sums.index(1).store(gl.convert_layout(gl.sum(sums, 1), rows_of(T)))
        hand_sums.index(2).store(gl.convert_layout(factor, rows_of(T)))
        first_top = hand_sums.index(0).slice(0, ROWS, 0).load(rows_of(F))
        second_top = hand_sums.index(0).slice(ROWS, ROWS, 0).load(rows_of(F))
        first_sums = hand_sums.index(1).slice(0, ROWS, 0).load(rows_of(F))
        second_sums = hand_sums.index(1).slice(ROWS, ROWS, 0).load(rows_of(F))
        same_factor = hand_sums.index(2).slice(0, ROWS, 0).load(rows_of(F))
        first_weight, second_weight, logarithm = total_of_both(
            first_top, same_factor, first_sums, second_top, same_factor, second_sums, same_factor
        )
        batch, kv_head, i = place(item, grid, P)
        o_stride_b, o_stride_h, o_stride_n = strides
        rows = gl.arange(0, ROWS, layout=rows_of(F))
        query = i + rows // HEADS
        head = kv_head * group + rows % HEADS
        is_real = (query < seq) & (rows % HEADS < group)
        heads = kv_heads * group
        to = lse + (batch.to(gl.int64) * heads + head) * seq + query
        gl.store(to, logarithm * LN_2, mask=is_real)
        to = out + batch.to(gl.int64) * o_stride_b
        to += (head.to(gl.int64) * o_stride_h + query.to(gl.int64) * o_stride_n)[:, None]
        for half in gl.static_range(2):
            hand_out.store(_half_of(acc, half))
            columns = half * HALF + gl.arange(0, HALF, layout=columns_of(F))
            both = hand_out.slice(0, ROWS, 0).load(F) * first_weight[:, None]
            both += hand_out.slice(ROWS, ROWS, 0).load(F) * second_weight[:, None]
            mask = is_real[:, None] & (columns < VALUE_DIM)[None, :]
            gl.store(to + columns[None, :], both.to(out.dtype.element_ty), mask=mask)
        state = (state & FLIPS) ^ (1 << ITEM)
