"""dq's two warpgroups, which run one program, each for every second offset of the narrow window.

Rows 0 to 63 of their tensors are an item's at one offset, rows 64 to 127 the same at the one after
it. As two programs they did the same work from code of their own, and waited for instructions.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from csrc_free.device.forms import DETERMINANT, STRASSEN, TRILINEAR
from csrc_free.hopper.assembly import opaque_zero, pack_as, warpgroup
from csrc_free.hopper.channels import arrive, wait_full
from csrc_free.hopper.half_range import K_BIAS, OF_LOGITS, V_BIAS, largest_p
from csrc_free.hopper.layouts import accumulator, operand, rows_of
from csrc_free.hopper.query_items import gradient_of_logits, place, seen_only, spread, to_float32
from csrc_free.hopper.threes import plus_cross, rounded_cross

INFINITY = gl.constexpr(float("inf"))
_ROWS = gl.constexpr(128)  # 64 of an item, at either of two offsets


@gluon.jit
def _twice(tile, LAYOUT: gl.constexpr, COLUMNS: gl.constexpr):
    """Load rows [64, COLUMNS] for both warpgroups: [128, COLUMNS]."""
    like = gl.zeros([_ROWS, COLUMNS], tile.dtype, LAYOUT)
    x = gl.reshape(like, [2, _ROWS // 2, COLUMNS])
    found = gl.expand_dims(tile.load(gl.SliceLayout(0, x.type.layout)), 0)
    found, _ = gl.broadcast(found, x)
    return gl.convert_layout(gl.reshape(found, like.shape), LAYOUT, assert_trivial=True)


@gluon.jit
def _virtual(
    x, rows, bias, FORM: gl.constexpr, HAS_BIAS: gl.constexpr, P: gl.constexpr,
    COLUMNS: gl.constexpr,
):  # fmt: skip
    """Return virtual rows, made of x and the narrow row of each position and offset."""
    y = spread(rows, x, 2 * P, COLUMNS)
    dtype: gl.constexpr = x.dtype
    if HAS_BIAS:
        y = to_float32(y) + bias
        x = to_float32(x)
    if FORM == DETERMINANT:
        return rounded_cross(y, x)
    made = x + y if FORM == STRASSEN else x * y
    if HAS_BIAS:
        made = pack_as(made, dtype)
    return made


@gluon.jit
def _row_sum(x, LAYOUT: gl.constexpr):
    return gl.convert_layout(gl.sum(x, 1), LAYOUT, assert_trivial=True)


@gluon.jit
def _make_virtual(
    vq, vdo, q_buffer, do_buffer, k, v, log2_scale, biases,
    FORM: gl.constexpr, HAS_WIDE_BIAS: gl.constexpr, HAS_BIAS: gl.constexpr,
    P: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, OF_ROWS: gl.constexpr,
):  # fmt: skip
    """Write the virtual rows q̃ and dÕ as operands of the products to come.

    Returns what else stands in their logits, in log2 units, and in their dP: a number for each row.
    """
    k_wide_bias, v_wide_bias, k_bias, v_bias = biases
    query = _twice(q_buffer, accumulator(BLOCK_D, 8), BLOCK_D)
    virtual_query = _virtual(query, k, k_bias, FORM, HAS_BIAS, P, BLOCK_D)
    vq.store(virtual_query)
    do = _twice(do_buffer, accumulator(BLOCK_DV, 8), BLOCK_DV)
    virtual_do = _virtual(do, v, v_bias, TRILINEAR, HAS_BIAS, P, BLOCK_DV)
    vdo.store(virtual_do)
    fence_async_shared()
    logit = gl.zeros([_ROWS], gl.float32, OF_ROWS)
    dp = gl.zeros([_ROWS], gl.float32, OF_ROWS)
    if FORM == STRASSEN:
        key = to_float32(spread(k, query, 2 * P, BLOCK_D))
        if HAS_BIAS:
            key += k_bias
        logit += _row_sum(to_float32(query) * key, OF_ROWS) * log2_scale
    if HAS_WIDE_BIAS:
        logit += _row_sum(to_float32(virtual_query), OF_ROWS) * (k_wide_bias * log2_scale)
        dp += _row_sum(to_float32(virtual_do), OF_ROWS) * v_wide_bias
    return logit, dp


@gluon.jit
def _attend(
    s, shift, row_delta, of_dp, vdo, v, log2_scale, key, lo, hi, full_lo, full_hi, is_huge,
    BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return dS [128, BLOCK_N] of a tile of wide keys and its logits s."""
    dp = gl.zeros([_ROWS, BLOCK_N], gl.float32, LAYOUT)
    dp = warpgroup_mma(vdo, v.permute((1, 0)), dp, use_acc=False, is_async=True)
    p = gl.exp2(s * log2_scale - shift[:, None])
    p = seen_only(
        p, key, lo, hi, full_lo, full_hi, is_huge, largest_p(v.dtype), BLOCK_N, LAYOUT
    )  # fmt: skip
    dp = warpgroup_mma_wait(0, deps=(dp,))
    return gradient_of_logits(p, dp, row_delta, of_dp, v.dtype == gl.float16)


@gluon.jit
def _attend_tail(
    dvq, shift, row_delta, of_dp, vq, vdo, k, v, log2_scale, key, lo, hi, full_lo, full_hi, is_huge,
    TAIL: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """Return the sums of dS · k and of dS over the few keys of a tail; dvq is only overwritten."""
    layout: gl.constexpr = accumulator(TAIL, 8)
    rows: gl.constexpr = rows_of(layout)
    shift = gl.convert_layout(shift, rows, assert_trivial=True)
    row_delta = gl.convert_layout(row_delta, rows, assert_trivial=True)
    of_dp = gl.convert_layout(of_dp, rows, assert_trivial=True)
    lo = gl.convert_layout(lo, rows, assert_trivial=True)
    hi = gl.convert_layout(hi, rows, assert_trivial=True)
    nothing = gl.zeros([_ROWS, TAIL], gl.float32, layout)
    s = warpgroup_mma(vq, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
    dp = warpgroup_mma(vdo, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
    s, dp = warpgroup_mma_wait(0, deps=(s, dp))
    p = gl.exp2(s * log2_scale - shift[:, None])
    p = seen_only(p, key, lo, hi, full_lo, full_hi, is_huge, largest_p(v.dtype), TAIL, layout)
    ds = gradient_of_logits(p, dp, row_delta, of_dp, k.dtype == gl.float16)
    packed = gl.convert_layout(pack_as(ds, k.dtype), OPERAND)
    dvq = warpgroup_mma(packed, k, dvq, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=(dvq,)), ds


@gluon.jit
def _halves(x):
    """Return the left and the right columns of a sum."""
    return gl.split(gl.permute(gl.reshape(x, [_ROWS, 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def attend_query(
    q_buffer, do_buffer, q_full, q_empty, k_ring, v_ring, full, empty,
    k_rows, v_rows, rows_full, rows_empty, vq, vdo,
    delta, lse2, has_huge, factors, row_factors, dq, kv_bounds, q_start,
    sizes, dq_strides, items, tiles, scale, log2_scale, biases,
    FORM: gl.constexpr, GROUP: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    HAS_WIDE_BIAS: gl.constexpr, HAS_BIAS: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    P: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Sum dq over the offsets of each item, two in a turn, and store it."""
    (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        _,
    ) = sizes  # fmt: skip
    HEADS: gl.constexpr = 64 // P
    NEEDS_SUMS: gl.constexpr = HAS_WIDE_BIAS or FORM == STRASSEN
    dtype: gl.constexpr = q_buffer.dtype
    of_logits: gl.constexpr = accumulator(BLOCK_N, 8)
    of_sums: gl.constexpr = accumulator(BLOCK_D, 8)
    of_operand: gl.constexpr = operand(BLOCK_D, 8)
    of_rows: gl.constexpr = rows_of(of_logits)
    plain_half: gl.constexpr = gl.SwizzledSharedLayout(2, 1, 16, [1, 0])
    # Where the virtual rows were, once an item is done.
    left = vq._reinterpret(gl.float32, [_ROWS, BLOCK_D // 2], plain_half)
    right = vdo._reinterpret(gl.float32, [_ROWS, BLOCK_D // 2], plain_half)
    which = warpgroup()  # the offset of a turn that is this warpgroup's: Triton takes it for one
    keys = gl.maximum(wide_rows, narrow_rows)
    wide_first = keys - wide_rows
    narrow_first = keys - narrow_rows
    no_logits = gl.zeros([_ROWS, BLOCK_N], gl.float32, of_logits)
    dvq = gl.zeros([_ROWS, BLOCK_D], gl.float32, of_sums)
    n = 0
    group = 0
    turns = 0
    for w in range(gl.program_id(0), items, gl.num_programs(0)):
        (
            batch, kv_head, i0, p0, top, count, tails, offset_first, offsets, full_lo, full_hi,
        ) = place(
            w, tiles, sizes, q_start, kv_bounds,
            HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, TAIL, 8,
        )  # fmt: skip
        acc = gl.zeros([_ROWS, BLOCK_D], gl.float32, of_sums)
        pairs = (offsets + 1) // 2
        groups = (count + SLOTS - 1) // SLOTS
        if count > 0:
            bh = batch.to(gl.int64) * kv_heads + kv_head
            x = gl.arange(0, _ROWS, layout=of_rows) % 64
            i = i0 + x // HEADS
            mask = (i < seq) & (x % HEADS < GROUP)
            offs = bh * seq * GROUP + i * GROUP + x % HEADS
            row_lse2 = gl.load(lse2 + offs, mask=mask, other=INFINITY)
            row_delta = gl.load(delta + offs, mask=mask, other=0.0)
            of_dp = row_delta
            if dtype == gl.float16:  # as `half_range.scaled_rows_kernel` left them
                of_dp = gl.load(row_factors + offs, mask=mask, other=0.0)
                log2_scale = gl.load(factors + bh * 8 + OF_LOGITS)
                if HAS_BIAS:
                    k_bias = gl.load(factors + bh * 8 + K_BIAS)
                    biases = biases[0], biases[1], k_bias, gl.load(factors + bh * 8 + V_BIAS)
            is_huge = gl.load(has_huge + bh) != 0
            position = p0 + x // HEADS
            lo = gl.maximum(position - wide_left, wide_first)
            hi = gl.minimum(position + wide_right + 1, keys)
            # Offsets are those at which a row sees a key, but for where the keys begin and end.
            narrow_lo = narrow_first
            narrow_hi = keys
            if HAS_BOUNDS:
                bound_ptrs = kv_bounds + batch.to(gl.int64) * seq * 2 + i * 2
                low = gl.load(bound_ptrs, mask=mask, other=0)
                high = gl.load(bound_ptrs + 1, mask=mask, other=0)
                lo = gl.maximum(lo, low)
                hi = gl.minimum(hi, high)
                narrow_lo = gl.maximum(gl.maximum(position - narrow_left, narrow_first), low)
                narrow_hi = gl.minimum(gl.minimum(position + narrow_right + 1, keys), high)
            wait_full(q_full, 0, n)
            wait_full(rows_full, turns & 1, turns >> 1)
            logit, dp = _make_virtual(
                vq, vdo, q_buffer, do_buffer,
                k_rows.index(turns & 1), v_rows.index(turns & 1),
                log2_scale, biases, FORM, HAS_WIDE_BIAS, HAS_BIAS, P, BLOCK_D, BLOCK_DV, of_rows,
            )  # fmt: skip
            # A group of one tile after another group would wait for a slot that it still holds.
            groups_left = groups
            size = (count + groups_left - 1) // groups_left
            unused = SLOTS - size
            wait_full(full, unused + tails, group)
            s = warpgroup_mma(
                vq, k_ring.index(unused + tails).permute((1, 0)), no_logits,
                use_acc=False, is_async=True,
            )  # fmt: skip
            s = warpgroup_mma_wait(0, deps=(s,))
            last = groups * pairs - 1
            it = 0
            before = 0
            for g in range(last + 1):
                # Made anew each turn, so that descriptors of the ring are not kept in registers.
                zero = opaque_zero()
                is_last = it == pairs - 1
                it2 = gl.where(is_last, 0, it + 1)
                before2 = before
                size2 = size
                if is_last:
                    before2 += size
                    groups_left -= 1
                    size2 = (count - before2 + groups_left - 1) // gl.maximum(groups_left, 1)
                offset = 2 * it + which
                key = p0 - offset_first - offset + x // HEADS
                is_seen = (key >= narrow_lo) & (key < narrow_hi) & (offset < offsets)
                shift = gl.where(is_seen, row_lse2, INFINITY)
                row_dp = row_delta
                if NEEDS_SUMS:
                    shift -= logit
                    row_dp -= dp
                    sigma = gl.zeros([_ROWS], gl.float32, of_rows)
                unused = SLOTS - size
                skip = unused
                if TAIL > 0:  # noqa: SIM102, the first is known at compile time
                    if (before == 0) & (tails > 0):
                        if it == 0:
                            wait_full(full, unused, group)
                        dvq, ds = _attend_tail(
                            dvq, shift, row_dp, of_dp, vq, vdo,
                            k_ring.index(unused).slice(0, TAIL),
                            v_ring.index(unused).slice(0, TAIL),
                            log2_scale, top - (count - 1) * BLOCK_N - TAIL,
                            lo, hi, full_lo, full_hi, is_huge, TAIL, of_operand,
                        )  # fmt: skip
                        if NEEDS_SUMS:
                            sigma += _row_sum(ds, of_rows)
                        if is_last:
                            arrive(empty, unused)
                        skip += 1
                if is_last & (unused > 0):
                    for slot in range(unused):
                        wait_full(full, slot, group)
                        arrive(empty, slot)
                # The key of the tile in slot 0, were there one.
                tile_key = top - (before - unused + 1 - tails) * BLOCK_N
                for slot in gl.static_range(SLOTS - 1):
                    if slot >= skip:
                        ds = _attend(
                            s, shift, row_dp, of_dp, vdo, v_ring.index(zero + slot), log2_scale,
                            tile_key - slot * BLOCK_N, lo, hi, full_lo, full_hi, is_huge,
                            BLOCK_N, of_logits,
                        )  # fmt: skip
                        if NEEDS_SUMS:
                            sigma += _row_sum(ds, of_rows)
                        packed = gl.convert_layout(pack_as(ds, dtype), of_operand)
                        if it == 0:
                            wait_full(full, zero + slot + 1, group)
                        dvq = warpgroup_mma(
                            packed, k_ring.index(zero + slot), dvq,
                            use_acc=slot > unused, is_async=True,
                        )  # fmt: skip
                        s = warpgroup_mma(
                            vq, k_ring.index(zero + slot + 1).permute((1, 0)), no_logits,
                            use_acc=False, is_async=True,
                        )  # fmt: skip
                        dvq = warpgroup_mma_wait(1, deps=(dvq,))
                        if is_last:
                            arrive(empty, zero + slot)
                        s = warpgroup_mma_wait(0, deps=(s,))
                END: gl.constexpr = SLOTS - 1
                ds = _attend(
                    s, shift, row_dp, of_dp, vdo, v_ring.index(zero + END), log2_scale,
                    tile_key - END * BLOCK_N, lo, hi, full_lo, full_hi, is_huge,
                    BLOCK_N, of_logits,
                )  # fmt: skip
                if NEEDS_SUMS:
                    sigma += _row_sum(ds, of_rows)
                packed = gl.convert_layout(pack_as(ds, dtype), of_operand)
                dvq = warpgroup_mma(
                    packed, k_ring.index(zero + END), dvq, use_acc=unused < END, is_async=True
                )
                # The next virtual rows, while the product runs. Those of the last turn are made of
                # whatever is there, and never used.
                buffer = turns & 1
                next_buffer = (turns + 1) & 1
                if g < last:
                    wait_full(rows_full, next_buffer, (turns + 1) >> 1)
                logit, dp = _make_virtual(
                    vq, vdo, q_buffer, do_buffer,
                    k_rows.index(next_buffer), v_rows.index(next_buffer),
                    log2_scale, biases, FORM, HAS_WIDE_BIAS, HAS_BIAS,
                    P, BLOCK_D, BLOCK_DV, of_rows,
                )  # fmt: skip
                if g == gl.maximum(last - 1, 0):
                    arrive(q_empty, 0)
                ahead = gl.minimum(SLOTS - size2 + gl.where(before2 == 0, tails, 0), END)
                if is_last & (g < last):
                    wait_full(full, ahead, group + 1)
                s = warpgroup_mma(
                    vq, k_ring.index(ahead).permute((1, 0)), no_logits,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                dvq = warpgroup_mma_wait(1, deps=(dvq,))
                if is_last:
                    arrive(empty, zero + END)
                k = spread(k_rows.index(buffer), acc.to(dtype), 2 * P, BLOCK_D)
                if HAS_BIAS:
                    k = to_float32(k) + biases[2]
                elif FORM != DETERMINANT:  # whose product takes it as it is
                    k = to_float32(k)
                if NEEDS_SUMS:
                    total = gl.convert_layout(sigma, rows_of(of_sums), assert_trivial=True)
                    if FORM == STRASSEN:
                        acc += dvq + total[:, None] * (k + biases[0])
                    elif FORM == DETERMINANT:
                        acc = plus_cross(acc, dvq + (biases[0] * total)[:, None], k)
                    else:
                        acc += (dvq + (biases[0] * total)[:, None]) * k
                elif FORM == DETERMINANT:
                    acc = plus_cross(acc, dvq, k)
                else:
                    acc += dvq * k
                arrive(rows_empty, buffer)
                s = warpgroup_mma_wait(0, deps=(s,))
                group += is_last.to(gl.int32)
                it = it2
                before = before2
                size = size2
                turns += 1
            n += 1
        acc_left, acc_right = _halves(acc)
        left.store(acc_left)
        right.store(acc_right)
        ptrs = dq + batch.to(gl.int64) * dq_strides[0]
        of_dq = row_factors
        if dtype == gl.float16:
            of_dq += (items // tiles + batch * kv_heads + kv_head).to(gl.int64) * seq * GROUP
        _store_half(
            ptrs, left, scale, of_dq, 0, i0, kv_head, seq, dq_strides, GROUP, HEADS, HEAD_DIM
        )
        _store_half(
            ptrs, right, scale, of_dq, BLOCK_D // 2, i0, kv_head, seq, dq_strides,
            GROUP, HEADS, HEAD_DIM,
        )  # fmt: skip


@gluon.jit
def _store_half(
    ptrs, sums, scale, of_dq, first_column, i0, kv_head, seq, strides,
    GROUP: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Store columns of the rows that an item has, the sums of both warpgroups."""
    COLUMNS: gl.constexpr = sums.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // COLUMNS, COLUMNS // 4], [8, 1], [1, 0])
    x = sums.slice(0, 64).load(layout) + sums.slice(64, 64).load(layout)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = first_column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    i = i0 + row // HEADS
    head = kv_head * GROUP + row % HEADS
    mask = (i < seq) & (row % HEADS < GROUP)
    if ptrs.dtype.element_ty == gl.float16:
        x *= gl.load(of_dq + i * GROUP + row % HEADS, mask=mask, other=0.0)[:, None]
    else:
        x *= scale
    offs = head.to(gl.int64) * strides[1] + i.to(gl.int64) * strides[2]
    gl.store(
        ptrs + offs[:, None] + column[None, :], x.to(ptrs.dtype.element_ty),
        mask=mask[:, None] & (column < HEAD_DIM)[None, :],
    )  # fmt: skip
