"""The two warpgroups of the key side: the sums of dS · q and P · dout, and what they add up to."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from csrc_free.device.forms import DETERMINANT, STRASSEN
from csrc_free.hopper.assembly import opaque_zero, parts_of_rows
from csrc_free.hopper.channels import arrive, wait_empty, wait_full
from csrc_free.hopper.half_range import K_BIAS, OF_DK_WIDE, OF_DP, OF_DV_WIDE, OF_LOGITS, V_BIAS
from csrc_free.hopper.key_items import (
    item_of,
    known,
    narrow_key,
    places,
    rows_of_turn,
    span_of,
    turns_of,
)
from csrc_free.hopper.key_plan import KEYS, ROWS
from csrc_free.hopper.threes import cross, plus_cross, rounded_cross
from csrc_free.hopper.weigh_keys import weigh

_KEYS = gl.constexpr(KEYS)
_ROWS = gl.constexpr(ROWS)
_NONE = gl.constexpr(-(2**30))  # before every query


@gluon.jit
def _wait_for_rows(
    rows_full, step, other_begin, other_end, state, r: gl.constexpr, STAGES: gl.constexpr
):
    """Wait for the tile of a step, which also the other warpgroup needs in [begin, end).

    Each slot has a barrier for tiles of warpgroup 0, of 1 and of both, so that nobody waits for
    what it does not need. Bits of the state flip with every use of one; returns the new state.
    """
    is_of_both = (step >= other_begin) & (step < other_end)
    bar = step % STAGES + gl.where(is_of_both, 2 * STAGES, r * STAGES)
    wait_full(rows_full, bar, state >> bar)
    return state ^ (1 << bar)


@gluon.jit
def _load_rows(
    k, v, k_head, v_head, row, rows, stride_k, stride_v, columns, value_columns,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr, INDEX: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    """Load NARROW rows of a head's narrow keys and values, from `row` on.

    One that is not there is never used.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0])
    row += gl.arange(0, NARROW, layout=gl.SliceLayout(1, layout))
    row = gl.minimum(gl.maximum(row, 0), rows - 1).to(INDEX)
    k_at = k_head + row * stride_k
    v_at = v_head + row * stride_v
    return (
        gl.load(k + k_at[:, None] + columns[None, :], mask=columns[None, :] < HEAD_DIM, other=0.0),
        gl.load(
            v + v_at[:, None] + value_columns[None, :], mask=value_columns[None, :] < VALUE_DIM,
            other=0.0,
        ),
    )  # fmt: skip


@gluon.jit
def _wait_for_turn(barrier, r: gl.constexpr, turn):
    """Wait until the other warpgroup has added: 0 adds before 1, in every turn."""
    if r == 0:
        wait_empty(barrier, 1, turn)
    else:
        wait_full(barrier, 0, turn)


@gluon.constexpr_function
def _from_lane(bit):
    return f"shfl.sync.bfly.b32 $0, $1, {bit}, 31, 0xffffffff;"


@gluon.jit
def _halved(x, ROW_BIT: gl.constexpr, LANE_BIT: gl.constexpr):
    """Add the rows that differ in a bit, which two lanes have: each keeps half the columns.

    A row without the bit is then of the left half, one with it of the right half.
    """
    columns: gl.constexpr = x.shape[1] // 2
    left, right = gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, columns]), (0, 2, 1)))
    row = gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, left.type.layout))
    is_right = ((row & ROW_BIT) != 0)[:, None]
    kept = gl.where(is_right, right, left)
    given = gl.where(is_right, left, right)
    return kept + gl.inline_asm_elementwise(
        _from_lane(LANE_BIT), "=f,f", [given], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _sum_over_keys(x, buffer, LAYOUT: gl.constexpr, NARROW: gl.constexpr):
    """Sum [64, D] over the wide keys of each narrow one: [NARROW, D].

    Two rows are in a thread, 16 in a warp, and the warps meet in shared memory.

    Lanes exchange halves of their columns, so that each ends with the sums of an eighth. That
    order makes the columns of the eight rows of a warp those of one row.
    """
    columns: gl.constexpr = x.shape[1]
    pairs = gl.sum(gl.reshape(x, [4, 2, 8, columns]), 1)
    sums = _halved(_halved(_halved(gl.reshape(pairs, [32, columns]), 4, 16), 2, 8), 1, 4)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    buffer._reinterpret(gl.float32, [32, columns // 8], plain).store(sums)
    of_warps = buffer._reinterpret(gl.float32, [4, columns], plain).load(LAYOUT)
    return _sums_of_warps(of_warps, NARROW)


@gluon.jit
def _sums_of_warps(x, NARROW: gl.constexpr):
    """Add the sums of the warps [4, D] that have one narrow key: [NARROW, D]."""
    return gl.sum(gl.reshape(x, [NARROW, 4 // NARROW, x.shape[1]]), 1)


@gluon.jit
def _in_part(
    part, slot, m, narrow_first, narrow_end,
    NARROW: gl.constexpr, DIMS: gl.constexpr, BLOCK: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return where the sums of narrow keys from m on stand in their part, and which are there."""
    sums = _sums_of_warps(gl.zeros([4, BLOCK], gl.float32, LAYOUT), NARROW)
    layout: gl.constexpr = sums.type.layout
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))[None, :]
    rows = m + gl.arange(0, NARROW, layout=gl.SliceLayout(1, layout))[:, None]
    mask = (rows >= narrow_first) & (rows < narrow_end) & (columns < DIMS)
    return part + (slot + rows) * DIMS + columns, mask


@gluon.jit
def _of_virtual(rows, bias, HAS_BIAS: gl.constexpr, LAYOUT: gl.constexpr, WIDE: gl.constexpr):
    """Load rows of WIDE wide keys, or of the narrow keys, for each virtual key: [64, D].

    Of a single narrow key its one row: [1, D].
    """
    if WIDE == _KEYS:
        found = rows.load(LAYOUT)
    else:
        COLUMNS: gl.constexpr = rows.shape[1]
        AXIS: gl.constexpr = 0 if rows.shape[0] == WIDE else 1
        like = gl.zeros([_KEYS, COLUMNS], rows.dtype, LAYOUT)
        x = gl.reshape(like, [_KEYS // WIDE, WIDE, COLUMNS])
        found = gl.expand_dims(rows.load(gl.SliceLayout(AXIS, x.type.layout)), AXIS)
        found, _ = gl.broadcast(found, x)
        found = gl.convert_layout(gl.reshape(found, like.shape), LAYOUT, assert_trivial=True)
    return _biased(found, bias, HAS_BIAS)


@gluon.jit
def _biased(tile, bias, HAS_BIAS: gl.constexpr):
    if HAS_BIAS:
        tile = tile.to(gl.float32) + bias
    return tile


@gluon.jit
def _of_narrow_key(x, sigma, wide, FORM: gl.constexpr):
    """Return what each wide key adds to the gradient of the narrow one."""
    if FORM == DETERMINANT:
        return cross(x, wide)
    wide = wide.to(gl.float32)
    return x + sigma[:, None] * wide if FORM == STRASSEN else x * wide


@gluon.jit
def _plus_of_wide_keys(total, x, sigma, narrow, FORM: gl.constexpr):
    """Return the sums of the wide keys' gradients plus what the narrow key adds."""
    if FORM == DETERMINANT:
        narrow, _like = gl.broadcast(narrow, x)
        return plus_cross(total, narrow, x)
    narrow = narrow.to(gl.float32)
    return total + (x + sigma[:, None] * narrow if FORM == STRASSEN else x * narrow)


@gluon.jit
def sum_keys(
    r: gl.constexpr,
    k_narrow, v_narrow, has_huge, dk_wide, dv_wide, dk_parts, dv_parts, kv_bounds, spans, q_start,
    factors, q_tiles, dout_tiles, delta_tiles, lse2_tiles, k_tile, v_tile, vk, vv, k_row, v_row,
    dk_sums, dv_sums, rows_full, rows_empty, keys_full, keys_empty, dk_turn, dv_turn,
    sizes, items, heads, splits, tiles, tiles_of_a_part, slots, part_rows, part_shift, strides,
    scale, log2_scale,
    k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
    FORM: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, STAGES: gl.constexpr,
    HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr, HAS_BIAS: gl.constexpr,
    DO_ACCUMULATE: gl.constexpr, IS_CAUSAL: gl.constexpr, IS_SQUARE: gl.constexpr,
    INDEX: gl.constexpr, APART: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Warpgroup r of two: of every turn's narrow keys it takes those of number r."""
    NARROW: gl.constexpr = _KEYS // WIDE
    (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        q_start_default,
    ) = known(sizes, IS_CAUSAL, IS_SQUARE)  # fmt: skip
    (
        stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
        stride_dk_b, stride_dk_h, stride_dk_n, stride_dv_b, stride_dv_h, stride_dv_n,
    ) = strides  # fmt: skip
    of_logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _ROWS, 16])
    of_x: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    of_y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    a_of_x: gl.constexpr = gl.DotOperandLayout(0, of_x, 2)
    a_of_y: gl.constexpr = gl.DotOperandLayout(0, of_y, 2)
    by_rows: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    one_row: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0])
    by_columns: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [1, 4], [1, 0])
    in_partials: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    positions: gl.constexpr = _ROWS // HEADS
    IS_HALF: gl.constexpr = vk.dtype == gl.float16
    IS_PLAIN: gl.constexpr = IS_CAUSAL and IS_SQUARE

    columns = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, one_row))
    value_columns = gl.arange(0, BLOCK_DV, layout=gl.SliceLayout(0, one_row))
    dk_partials = vk._reinterpret(gl.float32, [_KEYS // 2, BLOCK_D], in_partials)
    dv_partials = vv._reinterpret(gl.float32, [_KEYS // 2, BLOCK_DV], in_partials)
    no_logits = gl.zeros([_KEYS, _ROWS], gl.float32, of_logits)
    keys = gl.maximum(wide_rows, narrow_rows)
    narrow_row_0 = keys - narrow_rows

    if r == 0:
        dk_sums.store(gl.zeros([_KEYS, BLOCK_D], gl.float32, by_rows))
    else:
        dv_sums.store(gl.zeros([_KEYS, BLOCK_DV], gl.float32, by_rows))
    step = 0
    tiles_done = 0
    turns_done = 0
    state = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        bh, batch, kv_head, part, split, start = item_of(
            item, heads, splits, kv_heads, q_start, q_start_default, HAS_Q_START
        )
        is_huge = gl.load(has_huge + bh) != 0
        of_dp = 1.0
        of_dk = scale
        of_dv = 1.0
        if IS_HALF:  # as `half_range.scaled_rows_kernel` left them
            log2_scale = gl.load(factors + bh * 8 + OF_LOGITS)
            of_dp = gl.load(factors + bh * 8 + OF_DP)
            of_dk = gl.load(factors + bh * 8 + OF_DK_WIDE)
            of_dv = gl.load(factors + bh * 8 + OF_DV_WIDE)
            if HAS_BIAS:
                k_narrow_bias = gl.load(factors + bh * 8 + K_BIAS)
                v_narrow_bias = gl.load(factors + bh * 8 + V_BIAS)
        k_head = batch.to(INDEX) * stride_kn_b + kv_head.to(INDEX) * stride_kn_h
        v_head = batch.to(INDEX) * stride_vn_b + kv_head.to(INDEX) * stride_vn_h
        split_offset = split.to(gl.int64) * heads * wide_rows
        slot = (part * heads + bh) * slots - narrow_row_0 - (part * part_rows + part_shift)
        for tile in range(
            part * tiles_of_a_part, gl.minimum((part + 1) * tiles_of_a_part, tiles)
        ):  # fmt: skip
            key_first, query_first, query_end, narrow_first, narrow_end, lo, hi = span_of(
                tile, batch, tiles, start, spans, seq, wide_rows, narrow_rows,
                wide_left, wide_right, narrow_left, narrow_right, HAS_BOUNDS, WIDE,
            )  # fmt: skip
            base, turns = turns_of(narrow_first, narrow_end, APART, NARROW)
            place, own_turns = places(base, turns, split, splits, NARROW)
            m = narrow_key(place, base, APART, NARROW) + APART * r
            k_next, v_next = _load_rows(
                k_narrow, v_narrow, k_head, v_head, m - narrow_row_0, narrow_rows,
                stride_kn_n, stride_vn_n, columns, value_columns,
                HEAD_DIM, VALUE_DIM, INDEX, NARROW,
            )  # fmt: skip
            wait_full(keys_full, 0, tiles_done)
            for _turn in range(own_turns):
                if not HAS_BOUNDS:
                    # Made anew from the tile: kept, these numbers are spilled, and come back from
                    # the L2 cache, since next to no L1 is left beside the shared memory.
                    key_first, query_first, query_end, narrow_first, narrow_end, lo, hi = span_of(
                        tile + opaque_zero(), batch, tiles, start, spans, seq, wide_rows,
                        narrow_rows, wide_left, wide_right, narrow_left, narrow_right, HAS_BOUNDS,
                        WIDE,
                    )  # fmt: skip
                    base, turns = turns_of(narrow_first, narrow_end, APART, NARROW)
                m = narrow_key(place, base, APART, NARROW)
                # The tiles of rows that see this warpgroup's key, among those of the turn.
                first, count, begin_0, end_0, begin_1, end_1 = rows_of_turn(
                    m, narrow_first, narrow_end, query_first, query_end, start,
                    narrow_left, narrow_right, APART, positions, NARROW,
                )  # fmt: skip
                next_step = step + count
                own_step = step + (begin_0 if r == 0 else begin_1)
                own_step_end = step + (end_0 if r == 0 else end_1)
                other_begin = step + (begin_1 if r == 0 else begin_0)
                other_end = step + (end_1 if r == 0 else end_0)
                m += APART * r
                see_first = m - narrow_right - start
                see_last = m + narrow_left - start
                shift = first - step * positions  # of a tile's first query from its step's

                place += 1
                place = gl.where(place == turns, 0, place)
                k_row.store(k_next)
                v_row.store(v_next)
                later_m = narrow_key(place, base, APART, NARROW) + APART * r
                if DO_ACCUMULATE:  # what earlier tiles of this part left there
                    k_ptrs, k_mask = _in_part(
                        dk_parts, slot, m, narrow_first, narrow_end,
                        NARROW, HEAD_DIM, BLOCK_D, by_columns,
                    )  # fmt: skip
                    dk_before = gl.load(k_ptrs, mask=k_mask, other=0.0)
                    v_ptrs, v_mask = _in_part(
                        dv_parts, slot, m, narrow_first, narrow_end,
                        NARROW, VALUE_DIM, BLOCK_DV, by_columns,
                    )  # fmt: skip
                    dv_before = gl.load(v_ptrs, mask=v_mask, other=0.0)
                if own_step_end > own_step:
                    of_made: gl.constexpr = of_x if FORM == DETERMINANT else by_rows
                    wide = _of_virtual(k_tile, k_wide_bias, HAS_BIAS, of_made, WIDE)
                    narrow = _of_virtual(k_row, k_narrow_bias, HAS_BIAS, of_made, WIDE)
                    if FORM == DETERMINANT:
                        narrow, _like = gl.broadcast(narrow, wide)
                        made = rounded_cross(wide, narrow)
                    else:
                        made = wide + narrow if FORM == STRASSEN else wide * narrow
                    vk.store(made.to(vk.dtype))
                    vv.store(
                        (
                            _of_virtual(v_tile, v_wide_bias, HAS_BIAS, by_rows, WIDE)
                            * _of_virtual(v_row, v_narrow_bias, HAS_BIAS, by_rows, WIDE)
                        ).to(vv.dtype)
                    )
                    fence_async_shared()
                    # Tiles of rows from `begin` to `last` see all of these keys.
                    begin = gl.maximum(
                        key_first + WIDE - 1 - wide_right - start, see_first + (NARROW - 1)
                    )
                    last = gl.minimum(key_first + wide_left - start, see_last) - positions + 1
                    is_whole = (key_first + WIDE <= hi) & (is_huge == 0)
                    if NARROW > 1:
                        is_whole = is_whole & (m >= narrow_first) & (m + NARROW <= narrow_end)
                    if HAS_BOUNDS:  # what `lo` and `hi` say is said of these queries alone
                        last = gl.minimum(last, query_end - positions)
                        is_whole = is_whole & (key_first >= lo) & (m >= lo) & (m + NARROW <= hi)
                    of_keys = gl.zeros([_KEYS], gl.float32, gl.SliceLayout(1, of_logits))
                    sigma = of_keys
                    if FORM == STRASSEN:
                        last = gl.minimum(last, seq - positions)
                        wide = _of_virtual(k_tile, k_wide_bias, HAS_BIAS, of_x, WIDE)
                        wide = wide.to(gl.float32)
                        narrow = _of_virtual(k_row, k_narrow_bias, HAS_BIAS, of_x, WIDE)
                        narrow = narrow.to(gl.float32)
                        of_keys = gl.convert_layout(
                            gl.sum(wide * narrow, 1) * log2_scale, of_keys.type.layout,
                            assert_trivial=True,
                        )  # fmt: skip
                        sigma = parts_of_rows(no_logits)
                    whole = begin, gl.where(is_whole, last, _NONE)
                    window = (
                        key_first,
                        keys,
                        start,
                        wide_left,
                        wide_right,
                        narrow_left,
                        narrow_right,
                        narrow_first,
                        narrow_end,
                    )
                    x = gl.zeros([_KEYS, BLOCK_D], gl.float32, of_x)
                    y = gl.zeros([_KEYS, BLOCK_DV], gl.float32, of_y)
                    now = own_step % STAGES
                    state = _wait_for_rows(
                        rows_full, own_step, other_begin, other_end, state, r, STAGES
                    )
                    s = warpgroup_mma(
                        vk, q_tiles.index(now).permute((1, 0)), no_logits,
                        use_acc=False, is_async=True,
                    )  # fmt: skip
                    s = warpgroup_mma_wait(0, deps=(s,))
                    # The last tile stands after the loop: nothing in flight may cross a loop's
                    # edge, or ptxas waits for every product.
                    for row_step in range(own_step + 1, own_step_end):
                        ds, y, sigma = weigh(
                            s, y, sigma, of_keys, vv, dout_tiles.index(now), delta_tiles.index(now),
                            lse2_tiles.index(now), (row_step - 1) * positions + shift, whole, m,
                            window, batch, seq, kv_bounds, log2_scale, of_dp,
                            FORM, HEADS, HAS_BOUNDS, IS_PLAIN, of_logits, a_of_y, WIDE,
                        )  # fmt: skip
                        later = row_step % STAGES
                        state = _wait_for_rows(
                            rows_full, row_step, other_begin, other_end, state, r, STAGES
                        )
                        x = warpgroup_mma(
                            gl.convert_layout(ds, a_of_x), q_tiles.index(now), x, is_async=True
                        )
                        s = warpgroup_mma(
                            vk, q_tiles.index(later).permute((1, 0)), no_logits,
                            use_acc=False, is_async=True,
                        )  # fmt: skip
                        x, y = warpgroup_mma_wait(1, deps=(x, y))
                        mbarrier.arrive(rows_empty.index(now), count=1)
                        s = warpgroup_mma_wait(0, deps=(s,))
                        now = later
                    ds, y, sigma = weigh(
                        s, y, sigma, of_keys, vv, dout_tiles.index(now), delta_tiles.index(now),
                        lse2_tiles.index(now), (own_step_end - 1) * positions + shift, whole, m,
                        window, batch, seq, kv_bounds, log2_scale, of_dp,
                        FORM, HEADS, HAS_BOUNDS, IS_PLAIN, of_logits, a_of_y, WIDE,
                    )  # fmt: skip
                    x = warpgroup_mma(
                        gl.convert_layout(ds, a_of_x), q_tiles.index(now), x, is_async=True
                    )
                    # Only now: kept through the loop, they would be spilled.
                    k_next, v_next = _load_rows(
                        k_narrow, v_narrow, k_head, v_head, later_m - narrow_row_0, narrow_rows,
                        stride_kn_n, stride_vn_n, columns, value_columns,
                        HEAD_DIM, VALUE_DIM, INDEX, NARROW,
                    )  # fmt: skip
                    y = warpgroup_mma_wait(1, deps=(y,))
                    dv_row = _sum_over_keys(
                        y * _of_virtual(v_tile, v_wide_bias, HAS_BIAS, of_y, WIDE).to(gl.float32),
                        dv_partials, by_columns, NARROW,
                    )  # fmt: skip
                    x = warpgroup_mma_wait(0, deps=(x,))
                    arrive(rows_empty, now)
                    if FORM == STRASSEN:
                        sigma = gl.convert_layout(
                            gl.sum(sigma, 1), gl.SliceLayout(1, of_x), assert_trivial=True
                        )
                    dk_row = _sum_over_keys(
                        _of_narrow_key(
                            x, sigma, _of_virtual(k_tile, k_wide_bias, HAS_BIAS, of_x, WIDE), FORM
                        ),
                        dk_partials, by_columns, NARROW,
                    )  # fmt: skip
                    if not IS_HALF:  # else the sum of the parts sees to it
                        dk_row *= scale
                    if DO_ACCUMULATE:
                        dv_row += dv_before
                        dk_row += dk_before
                    v_ptrs, v_mask = _in_part(
                        dv_parts, slot, m, narrow_first, narrow_end,
                        NARROW, VALUE_DIM, BLOCK_DV, by_columns,
                    )  # fmt: skip
                    gl.store(v_ptrs, dv_row, mask=v_mask)
                    k_ptrs, k_mask = _in_part(
                        dk_parts, slot, m, narrow_first, narrow_end,
                        NARROW, HEAD_DIM, BLOCK_D, by_columns,
                    )  # fmt: skip
                    gl.store(k_ptrs, dk_row, mask=k_mask)
                    # The sums of the wide pair: warpgroup 0 before 1, in every turn.
                    narrow = _of_virtual(v_row, v_narrow_bias, HAS_BIAS, of_y, WIDE).to(gl.float32)
                    _wait_for_turn(dv_turn, r, turns_done)
                    dv_sums.store(dv_sums.load(of_y) + y * narrow)
                    arrive(dv_turn, r)
                    narrow = _of_virtual(k_row, k_narrow_bias, HAS_BIAS, of_x, WIDE)
                    _wait_for_turn(dk_turn, r, turns_done)
                    dk_sums.store(_plus_of_wide_keys(dk_sums.load(of_x), x, sigma, narrow, FORM))
                    arrive(dk_turn, r)
                else:
                    k_next, v_next = _load_rows(
                        k_narrow, v_narrow, k_head, v_head, later_m - narrow_row_0, narrow_rows,
                        stride_kn_n, stride_vn_n, columns, value_columns,
                        HEAD_DIM, VALUE_DIM, INDEX, NARROW,
                    )  # fmt: skip
                    _wait_for_turn(dv_turn, r, turns_done)
                    arrive(dv_turn, r)
                    _wait_for_turn(dk_turn, r, turns_done)
                    arrive(dk_turn, r)
                turns_done += 1
                step = next_step
            _wait_for_turn(dv_turn, r, turns_done)
            if r == 0:
                _hand_over(
                    dv_sums, dv_wide + split_offset * VALUE_DIM, batch, kv_head, tile, wide_rows,
                    stride_dv_b, stride_dv_h, stride_dv_n, of_dv,
                    VALUE_DIM, BLOCK_DV, WIDE, by_rows,
                )  # fmt: skip
            arrive(dv_turn, r)
            _wait_for_turn(dk_turn, r, turns_done)
            if r == 1:
                _hand_over(
                    dk_sums, dk_wide + split_offset * HEAD_DIM, batch, kv_head, tile, wide_rows,
                    stride_dk_b, stride_dk_h, stride_dk_n, of_dk,
                    HEAD_DIM, BLOCK_D, WIDE, by_rows,
                )  # fmt: skip
            arrive(dk_turn, r)
            turns_done += 1
            arrive(keys_empty, 0)
            tiles_done += 1


@gluon.jit
def _hand_over(
    sums, grad, batch, kv_head, tile, rows, stride_b, stride_h, stride_n, scale,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, WIDE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Write a tile's sums to its gradient, over all its narrow keys, and begin anew."""
    total = gl.sum(gl.reshape(sums.load(LAYOUT), [_KEYS // WIDE, WIDE, BLOCK_D]), 0)
    row = tile * WIDE + gl.arange(0, WIDE, layout=gl.SliceLayout(1, total.type.layout))
    column = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, total.type.layout))
    grad += batch.to(gl.int64) * stride_b + kv_head.to(gl.int64) * stride_h
    gl.store(
        grad + (row.to(gl.int64) * stride_n)[:, None] + column[None, :],
        (total * scale).to(grad.dtype.element_ty),
        mask=(row < rows)[:, None] & (column < HEAD_DIM)[None, :],
    )  # fmt: skip
    sums.store(gl.zeros([_KEYS, BLOCK_D], gl.float32, LAYOUT))
