"""The forward for Hopper: bfloat16, trilinear, D = Dv = 128, groups of a power of two up to 64.

A tile is 64 rows, P positions of G heads (row = head * P + position). One warp brings tiles of the
wide pair by TMA; two warpgroups share the rows and take every second offset each. A group of TILES
wide tiles stays in shared memory through all offsets. The maximum lags: T of one group and offset
starts from zero, so where a row's exponentials grew too large it is computed anew, and nothing
that overflowed reaches the output.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from csrc_free.hopper.reach import item_place, tile_reach

# P·v stays below 2^16 times |v|: float32 holds it for any |v| below 2^110.
LAGGING_LIMIT = gl.constexpr(2.0**16)
# Triton 3.7 renamed it.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _bring(
    q, k_wide, v_wide, q_tile, k_tiles, v_tiles, q_full, q_empty, full, empty,
    items, tiles, kv_heads, seq, keys, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, start,
    P: gl.constexpr, BLOCK_N: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Bring the queries of every item, then its wide tiles, the newest first."""
    turn = 0
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, i = item_place(item, tiles, kv_heads, seq, P)
        low, high, _first, _last = tile_reach(
            start + i, keys, wide_rows, narrow_rows,
            wide_left, wide_right, narrow_left, narrow_right, P,
        )  # fmt: skip
        mbarrier.wait(q_empty, (count & 1) ^ 1)
        mbarrier.expect(q_full, q.block_type.nbytes)
        tma.async_copy_global_to_shared(q, [batch, kv_head, 0, i, 0], q_full, q_tile)
        groups = gl.cdiv(high - low, TILES * BLOCK_N)
        for g in range(groups):
            for t in gl.static_range(TILES):
                row = high - (g * TILES + t + 1) * BLOCK_N
                mbarrier.wait(empty.index(t), (turn & 1) ^ 1)
                mbarrier.expect(full.index(t), k_wide.block_type.nbytes + v_wide.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    k_wide, [batch, kv_head, row, 0], full.index(t), k_tiles.index(t)
                )
                tma.async_copy_global_to_shared(
                    v_wide, [batch, kv_head, row, 0], full.index(t), v_tiles.index(t)
                )
            turn += 1
        count += 1  # noqa: SIM113 (a kernel has no enumerate)


@gluon.jit
def _opaque_zero():
    """Return 0, such that nothing computed from it can be hoisted out of a loop into registers."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _narrow_rows(
    source, key, seen, stride_n, bias, HAS_BIAS: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """Load each row's narrow key or value, in float32; 0 where it sees none."""
    rows = gl.convert_layout(gl.where(seen, key, 0), gl.SliceLayout(1, LAYOUT)).to(gl.int64)
    real = gl.convert_layout(seen, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    mask = real[:, None] & (columns >= 0)[None, :]
    x = gl.load(source + rows[:, None] * stride_n + columns[None, :], mask=mask, other=0.0)
    x = x.to(gl.float32)
    if HAS_BIAS:
        x += bias
    return x


@gluon.jit
def _weights(
    s, shift, row, lo, hi, log2_scale,
    IS_MASKED: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """Return P as an operand, and its row sums in four parts, which need no other thread."""
    p = s * log2_scale - shift[:, None]
    if IS_MASKED:
        j = row + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        visible = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
        p = gl.where(visible, p, float("-inf"))
    p = gl.exp2(p)
    parts = gl.sum(gl.sum(gl.reshape(p, [64, BLOCK_N // 8, 4, 2]), 3), 1)
    return gl.convert_layout(p.to(gl.bfloat16), DOT), parts


@gluon.jit
def _attend(
    vq, k_tiles, v_tiles, slot, shift, row, lo, hi, log2_scale,
    IS_MASKED: gl.constexpr, BLOCK_N: gl.constexpr, TILES: gl.constexpr, D: gl.constexpr,
    S_LAYOUT: gl.constexpr, T_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Attend to a group of tiles with a given shift: T [64, D], and the row sums in parts."""
    DOT: gl.constexpr = gl.DotOperandLayout(0, T_LAYOUT, 2)
    zero = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    t = gl.zeros([64, D], gl.float32, T_LAYOUT)
    s = warpgroup_mma(
        vq, k_tiles.index(slot + 0).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    s = warpgroup_mma_wait(0, deps=(s,))
    p, total = _weights(s, shift, row, lo, hi, log2_scale, IS_MASKED, BLOCK_N, S_LAYOUT, DOT)
    for n in gl.static_range(1, TILES):
        s = warpgroup_mma(
            vq, k_tiles.index(slot + n).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        t = warpgroup_mma(p, v_tiles.index(slot + n - 1), t, use_acc=n > 1, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        p_next, parts = _weights(
            s, shift, row - n * BLOCK_N, lo, hi, log2_scale, IS_MASKED, BLOCK_N, S_LAYOUT, DOT
        )
        total += parts
        t = warpgroup_mma_wait(0, deps=(t,))
        p = p_next
    t = warpgroup_mma(p, v_tiles.index(slot + TILES - 1), t, use_acc=TILES > 1, is_async=True)
    t = warpgroup_mma_wait(0, deps=(t,))
    return t, total


@gluon.jit
def _highest(
    vq, k_tiles, slot, row, lo, hi, log2_scale,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return each row's highest logit of a group of tiles, in log2 units; -inf where none."""
    highest = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, LAYOUT))
    zero = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    for n in gl.static_range(TILES):
        s = warpgroup_mma(
            vq, k_tiles.index(slot + n).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(0, deps=(s,))
        j = row - n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        visible = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
        s = gl.where(visible, s * log2_scale, float("-inf"))
        highest = gl.maximum(highest, gl.max(s, 1))
    return highest


@gluon.jit
def _consume(
    SIDE: gl.constexpr, q_tile, k_tiles, v_tiles, q_full, q_empty, full, empty,
    handed, taken, hand_out, hand_sums,
    k_narrow, v_narrow, out, lse,
    items, tiles, kv_heads, seq, keys, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, start,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_o_b, stride_o_h, stride_o_n,
    log2_scale, k_narrow_bias, v_narrow_bias, HAS_BIAS: gl.constexpr,
    P: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Take every second offset, from SIDE on; side 1 hands its sums over, side 0 merges, stores."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    T_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    VQ: gl.constexpr = gl.DotOperandLayout(0, S_LAYOUT, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    T_ROWS: gl.constexpr = gl.SliceLayout(1, T_LAYOUT)
    turn = 0
    count = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, i = item_place(item, tiles, kv_heads, seq, P)
        low, high, first, last = tile_reach(
            start + i, keys, wide_rows, narrow_rows,
            wide_left, wide_right, narrow_left, narrow_right, P,
        )  # fmt: skip
        position = start + i + gl.arange(0, 64, layout=S_ROWS) % P
        wide_first = keys - wide_rows
        lo = gl.maximum(position - wide_left - wide_first, 0)
        hi = gl.minimum(position + wide_right + 1 - wide_first, wide_rows)
        narrow_first = keys - narrow_rows
        end = start + i + P - 1
        full_lo = gl.maximum(end - wide_left - wide_first, 0)
        full_hi = gl.minimum(start + i + wide_right + 1 - wide_first, wide_rows)
        k_head = k_narrow + batch.to(gl.int64) * stride_kn_b + kv_head.to(gl.int64) * stride_kn_h
        v_head = v_narrow + batch.to(gl.int64) * stride_vn_b + kv_head.to(gl.int64) * stride_vn_h

        top = gl.full([64], float("-inf"), gl.float32, S_ROWS)
        acc = gl.zeros([64, D], gl.float32, T_LAYOUT)
        blank = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
        sums = gl.sum(gl.sum(gl.reshape(blank, [64, BLOCK_N // 8, 4, 2]), 3), 1)
        PARTS: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
        mbarrier.wait(q_full, count & 1)
        groups = gl.cdiv(high - low, TILES * BLOCK_N)
        for g in range(groups):
            row = high - (g * TILES + 1) * BLOCK_N
            for t in gl.static_range(TILES):
                mbarrier.wait(full.index(t), turn & 1)
            is_inside = (row - (TILES - 1) * BLOCK_N >= full_lo) & (row + BLOCK_N <= full_hi)
            for offset in range(first + SIDE, last + 1, 2):
                slot = _opaque_zero()
                key = position - offset - narrow_first + slot
                seen = (
                    (key >= 0) & (key < narrow_rows)
                    & (offset <= narrow_left) & (offset >= 0 - narrow_right)
                )  # fmt: skip
                does_all = (start + i - offset - narrow_first >= 0) & (
                    end - offset - narrow_first < narrow_rows
                )
                k2 = _narrow_rows(k_head, key, seen, stride_kn_n, k_narrow_bias, HAS_BIAS, D, VQ)
                vq = (q_tile.load(VQ).to(gl.float32) * k2).to(gl.bfloat16)
                upper = gl.where(seen, hi, lo)
                if is_inside & does_all:
                    product, parts = _attend(
                        vq, k_tiles, v_tiles, slot, top, row - slot, lo, upper, log2_scale,
                        False, BLOCK_N, TILES, D, S_LAYOUT, T_LAYOUT,
                    )  # fmt: skip
                else:
                    product, parts = _attend(
                        vq, k_tiles, v_tiles, slot, top, row - slot, lo, upper, log2_scale,
                        True, BLOCK_N, TILES, D, S_LAYOUT, T_LAYOUT,
                    )  # fmt: skip
                # A comparison that a NaN fails too.
                is_high = gl.where(parts < LAGGING_LIMIT, 0, 1)
                if gl.max(gl.max(is_high, 1), 0) != 0:
                    new_top = gl.maximum(
                        top,
                        _highest(
                            vq,
                            k_tiles,
                            slot,
                            row - slot,
                            lo,
                            upper,
                            log2_scale,
                            BLOCK_N,
                            TILES,
                            S_LAYOUT,
                        ),
                    )
                    base = gl.where(new_top == float("-inf"), 0.0, new_top)
                    decay = gl.exp2(top - base)
                    product, parts = _attend(
                        vq, k_tiles, v_tiles, slot, base, row - slot, lo, upper, log2_scale,
                        True, BLOCK_N, TILES, D, S_LAYOUT, T_LAYOUT,
                    )  # fmt: skip
                    acc *= gl.convert_layout(decay, T_ROWS)[:, None]
                    sums *= gl.convert_layout(decay, PARTS)[:, None]
                    top = new_top
                sums += parts
                v2 = _narrow_rows(
                    v_head, key, seen, stride_vn_n, v_narrow_bias, HAS_BIAS, D, T_LAYOUT
                )
                acc += product * v2
            for t in gl.static_range(TILES):
                mbarrier.arrive(empty.index(t), count=1)
            turn += 1
        mbarrier.arrive(q_empty, count=1)

        top_o = gl.convert_layout(top, T_ROWS)
        sums_o = gl.convert_layout(gl.sum(sums, 1), T_ROWS)
        if SIDE == 1:
            mbarrier.wait(taken, (count & 1) ^ 1)
            hand_out.store(acc)
            hand_sums.index(0).store(top_o)
            hand_sums.index(1).store(sums_o)
            barrier()
            mbarrier.arrive(handed, count=1)
        else:
            mbarrier.wait(handed, count & 1)
            other_top = hand_sums.index(0).load(T_ROWS)
            other_sums = hand_sums.index(1).load(T_ROWS)
            other = hand_out.load(T_LAYOUT)
            barrier()
            mbarrier.arrive(taken, count=1)
            highest = gl.maximum(top_o, other_top)
            base = gl.where(highest == float("-inf"), 0.0, highest)
            own_weight = gl.exp2(top_o - base)
            other_weight = gl.exp2(other_top - base)
            total = sums_o * own_weight + other_sums * other_weight
            # Not `total > 0`: a NaN must stay one.
            divisor = gl.where(total == 0.0, 1.0, total)
            result = acc * (own_weight / divisor)[:, None]
            result += other * (other_weight / divisor)[:, None]
            rows = gl.arange(0, 64, layout=T_ROWS)
            columns = gl.arange(0, D, layout=gl.SliceLayout(0, T_LAYOUT))
            head = (kv_head * G + rows // P).to(gl.int64)
            query = i + rows % P
            real = query < seq
            place = batch.to(gl.int64) * stride_o_b + head * stride_o_h
            place += query.to(gl.int64) * stride_o_n
            gl.store(
                out + place[:, None] + columns[None, :], result.to(gl.bfloat16),
                mask=real[:, None] & (columns >= 0)[None, :],
            )  # fmt: skip
            gl.store(
                lse + (batch.to(gl.int64) * kv_heads * G + head) * seq + query,
                (highest + gl.log2(divisor)) * LN_2, mask=real,
            )  # fmt: skip
        count += 1  # noqa: SIM113 (a kernel has no enumerate)


@gluon.jit(do_not_specialize=(
    "items", "tiles", "seq", "keys", "wide_rows", "narrow_rows",
    "wide_left", "wide_right", "narrow_left", "narrow_right", "start",
))  # fmt: skip
def forward_kernel(
    q, k_wide, v_wide, k_narrow, v_narrow, out, lse,
    items, tiles, kv_heads, seq, keys, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, start,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_o_b, stride_o_h, stride_o_n,
    log2_scale, k_narrow_bias, v_narrow_bias, HAS_BIAS: gl.constexpr,
    P: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, Q_ROWS: gl.constexpr,
):  # fmt: skip
    """One program owns every num_programs-th tile of P positions of one key-value head.

    q, k_wide and v_wide are descriptors; it writes only the rows of its tiles.
    """
    q_tile = gl.allocate_shared_memory(gl.bfloat16, [1, 1, G, P, D], q.layout)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [TILES, 1, 1, BLOCK_N, D], k_wide.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [TILES, 1, 1, BLOCK_N, D], v_wide.layout)
    q_matrix = q_tile._reinterpret(gl.bfloat16, [64, D], Q_ROWS)
    k_matrices = k_tiles._reinterpret(gl.bfloat16, [TILES, BLOCK_N, D], Q_ROWS)
    v_matrices = v_tiles._reinterpret(gl.bfloat16, [TILES, BLOCK_N, D], Q_ROWS)
    hand_out = gl.allocate_shared_memory(
        gl.float32, [64, D], gl.SwizzledSharedLayout(2, 1, 16, [1, 0])
    )
    hand_sums = gl.allocate_shared_memory(
        gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [TILES, 1], mbarrier.MBarrierLayout())
    singles = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for t in gl.static_range(TILES):
        mbarrier.init(full.index(t), count=1)
        mbarrier.init(empty.index(t), count=2)
    q_full = singles.index(0)
    q_empty = singles.index(1)
    handed = singles.index(2)
    taken = singles.index(3)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    mbarrier.init(handed, count=1)
    mbarrier.init(taken, count=1)
    fence_async_shared()
    gl.warp_specialize([
        (_consume, (
            0, q_matrix, k_matrices, v_matrices, q_full, q_empty, full, empty,
            handed, taken, hand_out, hand_sums, k_narrow, v_narrow, out, lse,
            items, tiles, kv_heads, seq, keys, wide_rows, narrow_rows,
            wide_left, wide_right, narrow_left, narrow_right, start,
            stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
            stride_o_b, stride_o_h, stride_o_n,
            log2_scale, k_narrow_bias, v_narrow_bias, HAS_BIAS, P, G, D, BLOCK_N, TILES,
        )),
        (_consume, (
            1, q_matrix, k_matrices, v_matrices, q_full, q_empty, full, empty,
            handed, taken, hand_out, hand_sums, k_narrow, v_narrow, out, lse,
            items, tiles, kv_heads, seq, keys, wide_rows, narrow_rows,
            wide_left, wide_right, narrow_left, narrow_right, start,
            stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
            stride_o_b, stride_o_h, stride_o_n,
            log2_scale, k_narrow_bias, v_narrow_bias, HAS_BIAS, P, G, D, BLOCK_N, TILES,
        )),
        (_bring, (
            q, k_wide, v_wide, q_tile, k_tiles, v_tiles, q_full, q_empty, full, empty,
            items, tiles, kv_heads, seq, keys, wide_rows, narrow_rows,
            wide_left, wide_right, narrow_left, narrow_right, start, P, BLOCK_N, TILES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
