"""Two warpgroups of the narrow kernel: dq, and what entries add to the narrow pair's gradients."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from csrc_free.device.forms import STRASSEN, TRILINEAR
from csrc_free.hopper.assembly import pack_as
from csrc_free.hopper.channels import arrive, wait_full
from csrc_free.hopper.entries import (
    add_to_part,
    entries_of_position,
    load_entries,
    load_newest,
    narrow_rows_of,
    of_narrow_key,
    of_query,
    place_of_tile,
    rows_of_entries,
    split_pairs,
    virtual_keys,
)
from csrc_free.hopper.half_range import K_BIAS, OF_LOGITS, V_BIAS, largest_p
from csrc_free.hopper.layouts import accumulator, operand, rows_of
from csrc_free.hopper.query_items import gradient_of_logits, seen_only, to_float32
from csrc_free.steps.parts_sum import slot_base

INFINITY = gl.constexpr(float("inf"))


@gluon.jit
def _row_sums(ds, LAYOUT: gl.constexpr):
    return gl.convert_layout(gl.sum(ds, 1), LAYOUT, assert_trivial=True)


@gluon.jit
def _attend(
    s, u, shift, row_delta, of_dp, vdo, v, log2_scale, key, lo, hi, full_lo, full_hi, is_huge,
    use_acc, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """Return dS [64, BLOCK_N] of a tile of wide keys and its logits s, and u, still in flight."""
    dp = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    dp = warpgroup_mma(vdo, v.permute((1, 0)), dp, use_acc=False, is_async=True)
    p = gl.exp2(s * log2_scale - shift[:, None])
    p = seen_only(
        p, key, lo, hi, full_lo, full_hi, is_huge, largest_p(v.dtype), BLOCK_N, LAYOUT
    )  # fmt: skip
    packed = gl.convert_layout(pack_as(p, v.dtype), OPERAND)
    u = warpgroup_mma(packed, v, u, use_acc=use_acc, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    return gradient_of_logits(p, dp, row_delta, of_dp, v.dtype == gl.float16), u


@gluon.jit
def _attend_tail(
    t, u, shift, row_delta, of_dp, vq, vdo, k, v, log2_scale, key, lo, hi, full_lo, full_hi,
    is_huge, TAIL: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """Return the sums of dS · k and P · v over the few keys of a tail, and dS; t and u are lost."""
    layout: gl.constexpr = accumulator(TAIL)
    rows: gl.constexpr = rows_of(layout)
    shift = gl.convert_layout(shift, rows, assert_trivial=True)
    row_delta = gl.convert_layout(row_delta, rows, assert_trivial=True)
    of_dp = gl.convert_layout(of_dp, rows, assert_trivial=True)
    lo = gl.convert_layout(lo, rows, assert_trivial=True)
    hi = gl.convert_layout(hi, rows, assert_trivial=True)
    nothing = gl.zeros([64, TAIL], gl.float32, layout)
    s = warpgroup_mma(vq, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
    dp = warpgroup_mma(vdo, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
    s, dp = warpgroup_mma_wait(0, deps=(s, dp))
    p = gl.exp2(s * log2_scale - shift[:, None])
    p = seen_only(p, key, lo, hi, full_lo, full_hi, is_huge, largest_p(v.dtype), TAIL, layout)
    ds = gradient_of_logits(p, dp, row_delta, of_dp, v.dtype == gl.float16)
    packed = gl.convert_layout(pack_as(ds, k.dtype), OPERAND)
    u = warpgroup_mma(
        gl.convert_layout(pack_as(p, v.dtype), OPERAND), v, u, use_acc=False, is_async=True
    )
    t = warpgroup_mma(packed, k, t, use_acc=False, is_async=True)
    t, u = warpgroup_mma_wait(0, deps=(t, u))
    return t, u, ds


@gluon.jit
def attend_narrow(
    r: gl.constexpr, k_raw, v_raw, vq_tiles, vdo_tiles, q_rows, do_rows, k_newest, v_newest,
    rows_full, k_empty, v_empty, k_ring, v_ring, full, empty,
    q, dout, k_rows, v_rows, delta, lse2, has_huge, factors, row_factors,
    dq, dk_parts, dv_parts, kv_bounds, q_start,
    sizes, q_strides, do_strides, k_strides, v_strides, dq_strides, part_sizes,
    items, chunks, steps, tiles, scale, log2_scale, k_bias, v_bias,
    FORM: gl.constexpr, GROUP: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    HAS_BIAS: gl.constexpr, PARTS_FOLLOW_QUERIES: gl.constexpr,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, KEYS: gl.constexpr,
    P: gl.constexpr, TILES_OF_POSITION: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
    TAIL: gl.constexpr,
):  # fmt: skip
    """Compute every second ENTRIES entries: their dq, and what they add to the item's part."""
    (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        q_start_default,
    ) = sizes  # fmt: skip
    slots, part_rows, part_shift = part_sizes
    dtype: gl.constexpr = k_ring.dtype
    IS_HALF: gl.constexpr = dtype == gl.float16
    ENTRIES: gl.constexpr = 64 // KEYS
    HEADS: gl.constexpr = entries_of_position(GROUP, ENTRIES)
    PAIRS: gl.constexpr = (ENTRIES + 1) // 2
    # The second entry of a pair stands one position on: it sees the same keys but the first, and
    # in its place the newest.
    IS_SHIFTED: gl.constexpr = ENTRIES > 1 and HEADS == 1
    of_logits: gl.constexpr = accumulator(BLOCK_N)
    of_keys: gl.constexpr = accumulator(BLOCK_D)
    of_operand: gl.constexpr = operand(BLOCK_D)
    of_rows: gl.constexpr = rows_of(of_logits)
    by_column: gl.constexpr = gl.BlockedLayout([32, 1], [1, 32], [1, 4], [1, 0])
    if IS_HALF:
        scale = 1.0  # the rows' factors have it
    vq = vq_tiles.index(r)
    vdo = vdo_tiles.index(r)
    q_row = q_rows.index(r)
    do_row = do_rows.index(r)
    k_last = k_newest.index(r)
    v_last = v_newest.index(r)
    sums = vq_tiles._reinterpret(
        gl.float32, [2, 32, BLOCK_D], gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    ).index(r)
    keys = gl.maximum(wide_rows, narrow_rows)
    wide_first = keys - wide_rows
    narrow_first = keys - narrow_rows
    no_logits = gl.zeros([64, BLOCK_N], gl.float32, of_logits)
    t = gl.zeros([64, BLOCK_D], gl.float32, of_keys)
    u = gl.zeros([64, BLOCK_DV], gl.float32, accumulator(BLOCK_DV))
    row = gl.arange(0, 64, layout=of_rows)
    if ENTRIES == 1:
        first_entry = r + row * 0
        entry_of_row = first_entry
        y = row
    else:
        among_32 = row // 16 * 8 + row % 8
        first_entry = r * ENTRIES + among_32 // KEYS * 2
        entry_of_row = first_entry + row // 8 % 2
        y = among_32 % KEYS
        if IS_SHIFTED:
            y = gl.where((y == 0) & (entry_of_row > first_entry), KEYS, y)
    n = 0
    passed = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first = item % chunks * steps
        bh = (item // chunks).to(gl.int64)
        is_huge = gl.load(has_huge + bh) != 0
        batch = item // chunks // kv_heads
        kv_head = item // chunks % kv_heads
        entry = first * (2 * ENTRIES) + r * ENTRIES
        start = q_start_default
        if HAS_Q_START:
            start = gl.load(q_start + batch)
        newest = start - narrow_left + KEYS - narrow_first  # of entry 0
        if IS_HALF:  # as `half_range.scaled_rows_kernel` left them
            log2_scale = gl.load(factors + bh * 8 + OF_LOGITS)
            if HAS_BIAS:
                k_bias = gl.load(factors + bh * 8 + K_BIAS)
                v_bias = gl.load(factors + bh * 8 + V_BIAS)
        next_q = load_entries(
            q, q_strides, batch, kv_head, entry, seq, GROUP, HEADS, ENTRIES, HEAD_DIM, BLOCK_D
        )
        next_do = load_entries(
            dout, do_strides, batch, kv_head, entry, seq, GROUP, HEADS, ENTRIES, VALUE_DIM, BLOCK_DV
        )
        if IS_SHIFTED:
            next_k = load_newest(
                k_rows, k_strides, batch, kv_head, newest + entry, narrow_rows,
                PAIRS, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            next_v = load_newest(
                v_rows, v_strides, batch, kv_head, newest + entry, narrow_rows,
                PAIRS, VALUE_DIM, BLOCK_DV,
            )  # fmt: skip
        for tile in range(first, gl.minimum(first + steps, tiles)):
            _, _, i0, p0, top, count, tails, _, _, full_lo, full_hi = place_of_tile(
                item, tile, chunks, tiles, sizes, q_start, kv_bounds,
                HAS_BOUNDS, HAS_Q_START, P, TILES_OF_POSITION, BLOCK_N, TAIL, 4,
            )  # fmt: skip
            entry = tile * (2 * ENTRIES) + r * ENTRIES
            q_row.store(next_q)
            do_row.store(next_do)
            next_q = load_entries(
                q, q_strides, batch, kv_head, entry + 2 * ENTRIES, seq,
                GROUP, HEADS, ENTRIES, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            next_do = load_entries(
                dout, do_strides, batch, kv_head, entry + 2 * ENTRIES, seq,
                GROUP, HEADS, ENTRIES, VALUE_DIM, BLOCK_DV,
            )  # fmt: skip
            if IS_SHIFTED:
                k_last.store(next_k)
                v_last.store(next_v)
                next_k = load_newest(
                    k_rows, k_strides, batch, kv_head, newest + entry + 2 * ENTRIES, narrow_rows,
                    PAIRS, HEAD_DIM, BLOCK_D,
                )  # fmt: skip
                next_v = load_newest(
                    v_rows, v_strides, batch, kv_head, newest + entry + 2 * ENTRIES, narrow_rows,
                    PAIRS, VALUE_DIM, BLOCK_DV,
                )  # fmt: skip
            total = gl.zeros([32, BLOCK_D], gl.float32, by_column)
            second_total = total
            if count > 0:
                i = i0 + entry_of_row // HEADS
                position = p0 + entry_of_row // HEADS
                lo = gl.maximum(position - wide_left, wide_first)
                hi = gl.minimum(position + wide_right + 1, keys)
                narrow_key = p0 + first_entry // HEADS - narrow_left + y
                narrow_lo = gl.maximum(position - narrow_left, narrow_first)
                narrow_hi = gl.minimum(position + narrow_right + 1, keys)
                if HAS_BOUNDS:
                    bound_ptrs = kv_bounds + batch.to(gl.int64) * seq * 2 + i * 2
                    low = gl.load(bound_ptrs, mask=i < seq, other=0)
                    high = gl.load(bound_ptrs + 1, mask=i < seq, other=0)
                    lo = gl.maximum(lo, low)
                    hi = gl.minimum(hi, high)
                    narrow_lo = gl.maximum(narrow_lo, low)
                    narrow_hi = gl.minimum(narrow_hi, high)
                mask = (narrow_key >= narrow_lo) & (narrow_key < narrow_hi) & (i < seq)
                head = entry_of_row % HEADS
                if TILES_OF_POSITION > 1:
                    head += tile % TILES_OF_POSITION * (2 * ENTRIES)
                if GROUP < HEADS:
                    mask = mask & (head < GROUP)
                offs = bh * seq * GROUP + i * GROUP + head
                shift = gl.load(lse2 + offs, mask=mask, other=INFINITY)
                row_delta = gl.load(delta + offs, mask=mask, other=0.0)
                of_dp = row_delta
                of_t = row_delta
                if IS_HALF:
                    of_dp = gl.load(row_factors + offs, mask=mask, other=0.0)
                    rows_of_all = (items // chunks).to(gl.int64) * seq * GROUP
                    of_t = gl.load(row_factors + rows_of_all + offs, mask=mask, other=0.0)
                buffer = 2 * r + (n & 1)
                wait_full(rows_full, r, n)
                made, constant = virtual_keys(
                    k_raw.index(buffer), k_last, q_row, mask, k_bias,
                    FORM, HAS_BIAS, KEYS, ENTRIES, IS_SHIFTED,
                )  # fmt: skip
                vq.store(made)
                made, _none = virtual_keys(
                    v_raw.index(r), v_last, do_row, mask, v_bias,
                    TRILINEAR, HAS_BIAS, KEYS, ENTRIES, IS_SHIFTED,
                )  # fmt: skip
                vdo.store(made)
                sigma = gl.zeros([64], gl.float32, of_rows)
                if FORM == STRASSEN:
                    shift -= gl.convert_layout(constant, of_rows, assert_trivial=True) * log2_scale
                fence_async_shared()
                arrive(v_empty, r)
                wait_full(full, (passed + tails) % SLOTS, (passed + tails) // SLOTS)
                s = warpgroup_mma(
                    vq, k_ring.index((passed + tails) % SLOTS).permute((1, 0)), no_logits,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                s = warpgroup_mma_wait(0, deps=(s,))
                if TAIL > 0:  # noqa: SIM102, the first is known at compile time
                    if tails > 0:
                        slot = passed % SLOTS
                        wait_full(full, slot, passed // SLOTS)
                        t, u, ds = _attend_tail(
                            t, u, shift, row_delta, of_dp, vq, vdo,
                            k_ring.index(slot).slice(0, TAIL), v_ring.index(slot).slice(0, TAIL),
                            log2_scale, top - (count - 1) * BLOCK_N - TAIL,
                            lo, hi, full_lo, full_hi, is_huge, TAIL, of_operand,
                        )  # fmt: skip
                        if FORM == STRASSEN:
                            sigma += _row_sums(ds, of_rows)
                        arrive(empty, slot)
                key = top - BLOCK_N
                for j in range(tails, count - 1):
                    slot = (passed + j) % SLOTS
                    ahead = (passed + j + 1) % SLOTS
                    ds, u = _attend(
                        s, u, shift, row_delta, of_dp, vdo, v_ring.index(slot), log2_scale, key,
                        lo, hi, full_lo, full_hi, is_huge, j > 0, BLOCK_N, of_logits, of_operand,
                    )  # fmt: skip
                    if FORM == STRASSEN:
                        sigma += _row_sums(ds, of_rows)
                    packed = gl.convert_layout(pack_as(ds, dtype), of_operand)
                    t = warpgroup_mma(packed, k_ring.index(slot), t, use_acc=j > 0, is_async=True)
                    wait_full(full, ahead, (passed + j + 1) // SLOTS)
                    s = warpgroup_mma(
                        vq, k_ring.index(ahead).permute((1, 0)), no_logits,
                        use_acc=False, is_async=True,
                    )  # fmt: skip
                    t, u = warpgroup_mma_wait(1, deps=(t, u))
                    mbarrier.arrive(empty.index(slot), count=1)
                    s = warpgroup_mma_wait(0, deps=(s,))
                    key -= BLOCK_N
                slot = (passed + count - 1) % SLOTS
                ds, u = _attend(
                    s, u, shift, row_delta, of_dp, vdo, v_ring.index(slot), log2_scale, key,
                    lo, hi, full_lo, full_hi, is_huge, count > 1, BLOCK_N, of_logits, of_operand,
                )  # fmt: skip
                if FORM == STRASSEN:
                    sigma += _row_sums(ds, of_rows)
                packed = gl.convert_layout(pack_as(ds, dtype), of_operand)
                t = warpgroup_mma(packed, k_ring.index(slot), t, use_acc=count > 1, is_async=True)
                t, u = warpgroup_mma_wait(0, deps=(t, u))
                mbarrier.arrive(empty.index(slot), count=1)
                passed += count
                if IS_HALF:
                    t *= gl.convert_layout(of_t, rows_of(of_keys), assert_trivial=True)[:, None]

                narrow = narrow_rows_of(
                    k_raw.index(buffer), k_last, t.to(dtype), KEYS, ENTRIES, IS_SHIFTED
                )
                narrow = to_float32(narrow)
                if HAS_BIAS:
                    narrow += k_bias
                sigma = gl.convert_layout(sigma, rows_of(of_keys), assert_trivial=True)
                to_query = of_query(t, sigma, narrow, FORM)
                if ENTRIES == 1:
                    pairs = gl.sum(gl.reshape(to_query, [4, 2, 8, BLOCK_D]), 1)
                    sums.store(gl.reshape(pairs, [32, BLOCK_D]))
                    total = sums.load(by_column)
                else:
                    first_rows, second_rows = split_pairs(to_query, ENTRIES)
                    sums.store(first_rows)
                    total = sums.load(by_column)
                    sums.store(second_rows)
                    second_total = sums.load(by_column)
                mbarrier.arrive(k_empty.index(buffer), count=1)

                base = p0 - narrow_left - narrow_first
                base -= slot_base(item % chunks, part_rows, HEADS, part_shift)
                if PARTS_FOLLOW_QUERIES:
                    begin = gl.minimum(gl.maximum(p0 - i0 - narrow_left, -seq), keys)
                    base -= begin - narrow_first
                heads = (items // chunks).to(gl.int64)
                part = (((item % chunks) * heads + bh) * 2 + r) * slots
                of_entry = to_float32(rows_of_entries(q_row, t.to(dtype), ENTRIES))
                add_to_part(
                    dk_parts + part * HEAD_DIM, base, slots,
                    of_narrow_key(t, sigma, of_entry, FORM) * scale,
                    r * ENTRIES, HEADS, HEAD_DIM, KEYS, ENTRIES, IS_SHIFTED,
                )  # fmt: skip
                of_entry = rows_of_entries(do_row, u.to(dtype), ENTRIES)
                add_to_part(
                    dv_parts + part * VALUE_DIM, base, slots, u * to_float32(of_entry),
                    r * ENTRIES, HEADS, VALUE_DIM, KEYS, ENTRIES, IS_SHIFTED,
                )  # fmt: skip
                n += 1
            ptrs = dq + batch.to(gl.int64) * dq_strides[0]
            _store_sums(
                ptrs, total * scale, entry, kv_head, seq, dq_strides, GROUP, HEADS, HEAD_DIM, PAIRS
            )
            if ENTRIES > 1:
                _store_sums(
                    ptrs, second_total * scale, entry + 1, kv_head, seq, dq_strides,
                    GROUP, HEADS, HEAD_DIM, PAIRS,
                )  # fmt: skip


@gluon.jit
def _store_sums(
    ptrs, x, entry, kv_head, seq, strides, GROUP: gl.constexpr, HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """Store sums of rows [32, columns], those of every second entry from `entry` on.

    In float32 they are added to what is there.
    """
    total = gl.sum(gl.reshape(x, [PAIRS, 32 // PAIRS, x.shape[1]]), 1)
    layout: gl.constexpr = total.type.layout
    entries = entry + 2 * gl.arange(0, PAIRS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, layout))
    offs = (kv_head * GROUP + entries % HEADS).to(gl.int64) * strides[1]
    offs += (entries // HEADS).to(gl.int64) * strides[2]
    mask = (entries // HEADS < seq) & (entries % HEADS < GROUP)
    ptrs += offs[:, None] + columns[None, :]
    mask = mask[:, None] & (columns < HEAD_DIM)[None, :]
    if ptrs.dtype.element_ty == gl.float32:
        total += gl.load(ptrs, mask=mask, other=0.0)
    gl.store(ptrs, total.to(ptrs.dtype.element_ty), mask=mask)
