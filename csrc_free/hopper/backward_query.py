"""dq on Hopper: three products a virtual row (S, dP and dS · k), warp specialised.

A tile of 64 rows is P positions x HEADS heads of one key-value head, P = 64 / HEADS. Two consumer
warpgroups share a ring of wide tiles and divide the narrow offsets by parity; one warp fills the
ring, another brings the narrow rows. Wide tiles are outside, in groups that the ring holds, and
offsets inside: a tile stays for all offsets, and dq̃ is summed over a group before it is multiplied
by the narrow keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from csrc_free.device.forms import STRASSEN, TRILINEAR
from csrc_free.hopper.assembly import opaque_zero, pack_bfloat16
from csrc_free.hopper.channels import arrive, barriers, wait_empty, wait_full
from csrc_free.hopper.describe import describe
from csrc_free.hopper.layouts import accumulator, operand, permuted_rows, rows_of
from csrc_free.hopper.query_items import UNIT, aligned, place, seen_only, spread, to_float32
from csrc_free.launch import launch
from csrc_free.problem import NOT_SPECIALIZED, Problem, block
from csrc_free.steps.delta import Statistics
from csrc_free.traits import Device, Traits

ROWS = 64
INFINITY = gl.constexpr(float("inf"))
_RESERVE = 1024  # bytes: barriers
# One compiled kernel serves all sizes and strides.
_NUMBERS = (
    *NOT_SPECIALIZED, "items", "tiles", "kv_heads",
    "stride_kn_b", "stride_kn_h", "stride_kn_n", "stride_vn_b", "stride_vn_h", "stride_vn_n",
    "stride_dq_b", "stride_dq_h", "stride_dq_n",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_N wide keys, of which a ring holds SLOTS while all offsets pass."""

    heads: int  # rows of a position: the group, or the power of two above it
    block_n: int
    slots: int
    tail: int  # a last tile with no more keys than this is computed alone; 0: there is none
    num_warps: int = 4
    maxnreg: int = 168  # of 384 threads; a consumer has 240, the producer 24

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        columns = traits.block_d + traits.block_dv
        rows = 2 * columns * 64 * (1 + 2)  # q and dout, and what each warpgroup makes of them
        ring = 2 * columns * self.block_n * self.slots
        narrow = 2 * (64 // self.heads) * 4 * columns
        return rows + ring + narrow + _RESERVE


def choose(traits: Traits, device: Device) -> Config | None:
    """Choose the tiles; None where the kernel does not serve."""
    if not _serves(traits, device):
        return None
    found = (c for c in _configs(traits) if c.shared_bytes(traits, device) <= device.shared_limit)
    return next(found, None)


def _serves(traits: Traits, device: Device) -> bool:
    return (
        device.backend == "cuda"
        and device.arch == 90
        and traits.dtype == torch.bfloat16
        and traits.form in ("trilinear", "strassen")
        and traits.block_d == traits.block_dv
        and traits.block_d in (64, 128)
        and traits.is_describable
        and 3 <= traits.group <= 64
    )


def _configs(traits: Traits) -> Iterator[Config]:
    heads = triton.next_power_of_2(traits.group)
    block_n = 64 if traits.block_d == 128 else 128
    # With several positions to a tile, their windows end in a few keys more than whole tiles.
    tail = 16 if heads < 64 else 0
    for slots in (4, 3):
        yield Config(heads, block_n, slots, tail)


@gluon.jit
def _fetch_tiles(
    q, dout, k_wide, v_wide, q_tile, do_tile, q_full, q_empty, k_ring, v_ring, full, empty,
    kv_bounds, q_start, sizes, items, tiles,
    GROUP: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    P: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Bring each item's rows of q and dout, and its wide tiles, the newest first.

    Groups are as even as they can be, and their tiles end in the last slot. Slots before them take
    their turn with no bytes.
    """
    n = 0
    turn = 0
    wide_first = gl.maximum(sizes[2], sizes[3]) - sizes[2]
    for w in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, i0, _, top, count, tails, _, _, _, _ = place(
            w, tiles, sizes, q_start, kv_bounds,
            HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, TAIL, 1,
        )  # fmt: skip
        if count > 0:
            wait_empty(q_empty, 0, n)
            mbarrier.expect(q_full.index(0), q.block_type.nbytes + dout.block_type.nbytes)
            at = [batch, i0, kv_head * GROUP, 0]
            tma.async_copy_global_to_shared(q, at, q_full.index(0), q_tile)
            tma.async_copy_global_to_shared(dout, at, q_full.index(0), do_tile)
            n += 1
        before = 0
        for left in range((count + SLOTS - 1) // SLOTS, 0, -1):
            size = (count - before + left - 1) // left
            unused = SLOTS - size
            for slot in range(SLOTS):
                t = before + slot - unused
                row = top - wide_first - (t + 1 - tails) * BLOCK_N
                if t < tails:
                    row = top - wide_first - (count - 1) * BLOCK_N - TAIL
                wait_empty(empty, slot, turn)
                if slot < unused:
                    mbarrier.arrive(full.index(slot), count=1)
                else:
                    mbarrier.expect(
                        full.index(slot), k_wide.block_type.nbytes + v_wide.block_type.nbytes
                    )
                    at = [batch, kv_head, row, 0]
                    tma.async_copy_global_to_shared(
                        k_wide, at, full.index(slot), k_ring.index(slot)
                    )
                    tma.async_copy_global_to_shared(
                        v_wide, at, full.index(slot), v_ring.index(slot)
                    )
            before += size
            turn += 1


@gluon.jit
def _copy_rows(
    to, pointer, stride_8, key, narrow_first, narrow_rows, bounds, i0, seq, DIMS: gl.constexpr,
    HAS_BOUNDS: gl.constexpr, P: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Begin to copy the narrow rows of keys key .. key + P to shared memory, one for each query.

    Rows that there are not, or that the bounds of their query hide, come as zeros. `bounds` are
    those of query 0.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [1, 1], [1, 0])
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    AT_ONCE: gl.constexpr = 2 if P > 1 else 1
    for x0 in gl.static_range(0, P, AT_ONCE):
        x = x0 + gl.arange(0, AT_ONCE, layout=gl.SliceLayout(1, layout))
        rows = key - narrow_first + x
        seen = (rows >= 0) & (rows < narrow_rows)
        if HAS_BOUNDS:
            low = gl.load(bounds + (i0 + x) * 2, mask=i0 + x < seq, other=0)
            high = gl.load(bounds + (i0 + x) * 2 + 1, mask=i0 + x < seq, other=0)
            seen = seen & (key + x >= low) & (key + x < high)
        seen = seen[:, None] & (columns < DIMS)[None, :]
        at = pointer + (rows.to(gl.int64) * stride_8 * 8)[:, None] + columns[None, :]
        async_copy.async_copy_global_to_shared(to.slice(x0, AT_ONCE), at, mask=seen)


@gluon.jit
def _fetch_rows(
    k_rows, v_rows, rows_full, rows_empty, k_narrow, v_narrow,
    kv_bounds, q_start, sizes, narrow_strides, items, tiles,
    HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    P: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Bring each warpgroup the narrow rows of its turns, in two buffers by turns.

    Group by group, so that neither waits for rows behind those of the other's next group.
    """
    seq = sizes[1]
    narrow_rows = sizes[3]
    narrow_first = gl.maximum(sizes[2], sizes[3]) - sizes[3]
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n = narrow_strides
    turns_0 = 0
    turns_1 = 0
    for w in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, i0, p0, _, count, _, offset_first, offsets, _, _ = place(
            w, tiles, sizes, q_start, kv_bounds,
            HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, TAIL, 1,
        )  # fmt: skip
        b = batch.to(gl.int64)
        h = kv_head.to(gl.int64)
        k_head = k_narrow + (b * stride_kn_b + h * stride_kn_h) * 8
        v_head = v_narrow + (b * stride_vn_b + h * stride_vn_h) * 8
        bounds = kv_bounds
        if HAS_BOUNDS:
            bounds += b * seq * 2
        for _ in range(0, count, SLOTS):
            for offset in range(offsets):
                side = offset & 1
                turn = gl.where(side == 0, turns_0, turns_1)
                to = 2 * side + (turn & 1)
                key = p0 - offset_first - offset
                wait_empty(rows_empty, to, turn >> 1)
                _copy_rows(
                    k_rows.index(to), k_head, stride_kn_n, key, narrow_first, narrow_rows,
                    bounds, i0, seq, HEAD_DIM, HAS_BOUNDS, P, BLOCK_D,
                )  # fmt: skip
                _copy_rows(
                    v_rows.index(to), v_head, stride_vn_n, key, narrow_first, narrow_rows,
                    bounds, i0, seq, VALUE_DIM, HAS_BOUNDS, P, BLOCK_DV,
                )  # fmt: skip
                async_copy.mbarrier_arrive(rows_full.index(to))
                mbarrier.arrive(rows_full.index(to), count=1)
                turns_0 += 1 - side
                turns_1 += side


@gluon.jit
def _virtual(
    x, rows, bias, FORM: gl.constexpr, HAS_BIAS: gl.constexpr, P: gl.constexpr,
    COLUMNS: gl.constexpr,
):  # fmt: skip
    """Return virtual rows [64, COLUMNS] in bfloat16, made of x and the position's narrow row."""
    y = spread(rows, x, P, COLUMNS)
    if HAS_BIAS:
        y = to_float32(y) + bias
        x = to_float32(x)
    made = x + y if FORM == STRASSEN else x * y
    if HAS_BIAS:
        made = pack_bfloat16(made)
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
    query = q_buffer.load(accumulator(BLOCK_D))
    virtual_query = _virtual(query, k, k_bias, FORM, HAS_BIAS, P, BLOCK_D)
    vq.store(virtual_query)
    do = do_buffer.load(accumulator(BLOCK_DV))
    virtual_do = _virtual(do, v, v_bias, TRILINEAR, HAS_BIAS, P, BLOCK_DV)
    vdo.store(virtual_do)
    fence_async_shared()
    logit = gl.zeros([64], gl.float32, OF_ROWS)
    dp = gl.zeros([64], gl.float32, OF_ROWS)
    if FORM == STRASSEN:
        key = to_float32(spread(k, query, P, BLOCK_D))
        if HAS_BIAS:
            key += k_bias
        logit += _row_sum(to_float32(query) * key, OF_ROWS) * log2_scale
    if HAS_WIDE_BIAS:
        logit += _row_sum(to_float32(virtual_query), OF_ROWS) * (k_wide_bias * log2_scale)
        dp += _row_sum(to_float32(virtual_do), OF_ROWS) * v_wide_bias
    return logit, dp


@gluon.jit
def _attend(
    s, shift, row_delta, vdo, v, log2_scale, key, lo, hi, full_lo, full_hi, is_huge,
    BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return dS [64, BLOCK_N] of a tile of wide keys and its logits s."""
    dp = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    dp = warpgroup_mma(vdo, v.permute((1, 0)), dp, use_acc=False, is_async=True)
    p = gl.exp2(s * log2_scale - shift[:, None])
    p = seen_only(p, key, lo, hi, full_lo, full_hi, is_huge, BLOCK_N, LAYOUT)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    return p * (dp - row_delta[:, None])


@gluon.jit
def _attend_tail(
    dvq, shift, row_delta, vq, vdo, k, v, log2_scale, key, lo, hi, full_lo, full_hi, is_huge,
    TAIL: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """Return the sums of dS · k and of dS over the few keys of a tail; dvq is only overwritten."""
    layout: gl.constexpr = accumulator(TAIL)
    rows: gl.constexpr = rows_of(layout)
    shift = gl.convert_layout(shift, rows, assert_trivial=True)
    row_delta = gl.convert_layout(row_delta, rows, assert_trivial=True)
    lo = gl.convert_layout(lo, rows, assert_trivial=True)
    hi = gl.convert_layout(hi, rows, assert_trivial=True)
    nothing = gl.zeros([64, TAIL], gl.float32, layout)
    s = warpgroup_mma(vq, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
    dp = warpgroup_mma(vdo, v.permute((1, 0)), nothing, use_acc=False, is_async=True)
    s, dp = warpgroup_mma_wait(0, deps=(s, dp))
    p = gl.exp2(s * log2_scale - shift[:, None])
    p = seen_only(p, key, lo, hi, full_lo, full_hi, is_huge, TAIL, layout)
    ds = p * (dp - row_delta[:, None])
    packed = gl.convert_layout(pack_bfloat16(ds), OPERAND)
    dvq = warpgroup_mma(packed, k, dvq, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=(dvq,)), ds


@gluon.jit
def _halves(x):
    """Return the left and the right columns of a sum."""
    return gl.split(gl.permute(gl.reshape(x, [64, 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def _consume(
    r: gl.constexpr, q_buffer, do_buffer, q_full, q_empty, k_ring, v_ring, full, empty,
    k_rows, v_rows, rows_full, rows_empty, vq_tiles, vdo_tiles, handed, taken,
    delta, lse2, has_huge, dq, kv_bounds, q_start,
    sizes, dq_strides, items, tiles, scale, log2_scale, biases,
    FORM: gl.constexpr, GROUP: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    HAS_WIDE_BIAS: gl.constexpr, HAS_BIAS: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    P: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Sum dq over every second offset of each item; warpgroup 0 adds both sums, and stores."""
    (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        _,
    ) = sizes  # fmt: skip
    HEADS: gl.constexpr = 64 // P
    NEEDS_SUMS: gl.constexpr = HAS_WIDE_BIAS or FORM == STRASSEN
    of_logits: gl.constexpr = accumulator(BLOCK_N)
    of_sums: gl.constexpr = accumulator(BLOCK_D)
    of_operand: gl.constexpr = operand(BLOCK_D)
    of_rows: gl.constexpr = rows_of(of_logits)
    plain_half: gl.constexpr = gl.SwizzledSharedLayout(2, 1, 16, [1, 0])
    vq = vq_tiles.index(r)
    vdo = vdo_tiles.index(r)
    # Where warpgroup 1 keeps its virtual rows.
    left = vq_tiles._reinterpret(gl.float32, [2, 64, BLOCK_D // 2], plain_half).index(1)
    right = vdo_tiles._reinterpret(gl.float32, [2, 64, BLOCK_D // 2], plain_half).index(1)
    keys = gl.maximum(wide_rows, narrow_rows)
    wide_first = keys - wide_rows
    narrow_first = keys - narrow_rows
    no_logits = gl.zeros([64, BLOCK_N], gl.float32, of_logits)
    dvq = gl.zeros([64, BLOCK_D], gl.float32, of_sums)
    n = 0
    group = 0
    turns = 0
    for w in range(gl.program_id(0), items, gl.num_programs(0)):
        (
            batch, kv_head, i0, p0, top, count, tails, offset_first, offsets, full_lo, full_hi,
        ) = place(
            w, tiles, sizes, q_start, kv_bounds,
            HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, TAIL, 4,
        )  # fmt: skip
        acc = gl.zeros([64, BLOCK_D], gl.float32, of_sums)
        mine = (offsets + 1 - r) // 2
        groups = (count + SLOTS - 1) // SLOTS
        if (count > 0) & (mine == 0):  # a single offset, which is the other warpgroup's
            for g in range(groups):
                for slot in range(SLOTS):
                    wait_full(full, slot, group + g)
                    arrive(empty, slot)
            arrive(q_empty, 0)
        if (count > 0) & (mine > 0):
            bh = batch.to(gl.int64) * kv_heads + kv_head
            x = gl.arange(0, 64, layout=of_rows)
            i = i0 + x // HEADS
            real = (i < seq) & (x % HEADS < GROUP)
            at = bh * seq * GROUP + i * GROUP + x % HEADS
            row_lse2 = gl.load(lse2 + at, mask=real, other=INFINITY)
            row_delta = gl.load(delta + at, mask=real, other=0.0)
            is_huge = gl.load(has_huge + bh) != 0
            position = p0 + x // HEADS
            lo = gl.maximum(position - wide_left, wide_first)
            hi = gl.minimum(position + wide_right + 1, keys)
            # Offsets are those at which a row sees a key, but for where the keys begin and end.
            narrow_lo = narrow_first
            narrow_hi = keys
            if HAS_BOUNDS:
                at = kv_bounds + batch.to(gl.int64) * seq * 2 + i * 2
                low = gl.load(at, mask=real, other=0)
                high = gl.load(at + 1, mask=real, other=0)
                lo = gl.maximum(lo, low)
                hi = gl.minimum(hi, high)
                narrow_lo = gl.maximum(gl.maximum(position - narrow_left, narrow_first), low)
                narrow_hi = gl.minimum(gl.minimum(position + narrow_right + 1, keys), high)
            wait_full(q_full, 0, n)
            wait_full(rows_full, 2 * r + (turns & 1), turns >> 1)
            logit, dp = _make_virtual(
                vq, vdo, q_buffer, do_buffer,
                k_rows.index(2 * r + (turns & 1)), v_rows.index(2 * r + (turns & 1)),
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
            last = groups * mine - 1
            it = 0
            before = 0
            for g in range(last + 1):
                # Made anew each turn, so that descriptors of the ring are not kept in registers.
                zero = opaque_zero()
                is_last = it == mine - 1
                it2 = gl.where(is_last, 0, it + 1)
                before2 = before
                size2 = size
                if is_last:
                    before2 += size
                    groups_left -= 1
                    size2 = (count - before2 + groups_left - 1) // gl.maximum(groups_left, 1)
                shift = row_lse2
                if P > 1:
                    key = p0 - offset_first - r - 2 * it + x // HEADS
                    shift = gl.where((key >= narrow_lo) & (key < narrow_hi), row_lse2, INFINITY)
                row_dp = row_delta
                if NEEDS_SUMS:
                    shift -= logit
                    row_dp -= dp
                    sigma = gl.zeros([64], gl.float32, of_rows)
                unused = SLOTS - size
                skip = unused
                if TAIL > 0:  # noqa: SIM102, the first is known at compile time
                    if (before == 0) & (tails > 0):
                        if it == 0:
                            wait_full(full, unused, group)
                        dvq, ds = _attend_tail(
                            dvq, shift, row_dp, vq, vdo,
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
                            s, shift, row_dp, vdo, v_ring.index(zero + slot), log2_scale,
                            tile_key - slot * BLOCK_N, lo, hi, full_lo, full_hi, is_huge,
                            BLOCK_N, of_logits,
                        )  # fmt: skip
                        if NEEDS_SUMS:
                            sigma += _row_sum(ds, of_rows)
                        packed = gl.convert_layout(pack_bfloat16(ds), of_operand)
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
                    s, shift, row_dp, vdo, v_ring.index(zero + END), log2_scale,
                    tile_key - END * BLOCK_N, lo, hi, full_lo, full_hi, is_huge,
                    BLOCK_N, of_logits,
                )  # fmt: skip
                if NEEDS_SUMS:
                    sigma += _row_sum(ds, of_rows)
                packed = gl.convert_layout(pack_bfloat16(ds), of_operand)
                dvq = warpgroup_mma(
                    packed, k_ring.index(zero + END), dvq, use_acc=unused < END, is_async=True
                )
                # The next virtual rows, while the product runs. Those of the last turn are made of
                # whatever is there, and never used.
                here = 2 * r + (turns & 1)
                there = 2 * r + ((turns + 1) & 1)
                if g < last:
                    wait_full(rows_full, there, (turns + 1) >> 1)
                logit, dp = _make_virtual(
                    vq, vdo, q_buffer, do_buffer, k_rows.index(there), v_rows.index(there),
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
                k = to_float32(spread(k_rows.index(here), acc.to(gl.bfloat16), P, BLOCK_D))
                if HAS_BIAS:
                    k += biases[2]
                if NEEDS_SUMS:
                    total = gl.convert_layout(sigma, rows_of(of_sums), assert_trivial=True)
                    if FORM == STRASSEN:
                        acc += dvq + total[:, None] * (k + biases[0])
                    else:
                        acc += (dvq + (biases[0] * total)[:, None]) * k
                else:
                    acc += dvq * k
                arrive(rows_empty, here)
                s = warpgroup_mma_wait(0, deps=(s,))
                group += is_last.to(gl.int32)
                it = it2
                before = before2
                size = size2
                turns += 1
        if (count > 0) & (mine == 0):
            group += groups
        if count > 0:
            n += 1
        m = (w - gl.program_id(0)) // gl.num_programs(0)
        acc_left, acc_right = _halves(acc)
        if r == 1:
            left.store(acc_left)
            right.store(acc_right)
            arrive(handed, 0)
            wait_full(taken, 0, m)
        else:
            wait_full(handed, 0, m)
            acc_left += left.load(acc_left.type.layout)
            acc_right += right.load(acc_right.type.layout)
            arrive(taken, 0)
            to = dq + batch.to(gl.int64) * dq_strides[0]
            _store_half(
                to, acc_left * scale, 0, i0, kv_head, seq, dq_strides, GROUP, HEADS, HEAD_DIM
            )
            _store_half(
                to, acc_right * scale, BLOCK_D // 2, i0, kv_head, seq, dq_strides,
                GROUP, HEADS, HEAD_DIM,
            )  # fmt: skip


@gluon.jit
def _store_half(
    to, x, first_column, i0, kv_head, seq, strides,
    GROUP: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Store columns of the rows of an item that are real."""
    layout: gl.constexpr = x.type.layout
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = first_column + gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, layout))
    i = i0 + row // HEADS
    head = kv_head * GROUP + row % HEADS
    real = (i < seq) & (row % HEADS < GROUP)
    at = head.to(gl.int64) * strides[1] + i.to(gl.int64) * strides[2]
    gl.store(
        to + at[:, None] + column[None, :], x.to(gl.bfloat16),
        mask=real[:, None] & (column < HEAD_DIM)[None, :],
    )  # fmt: skip


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_backward_query_kernel(
    q, k_wide, v_wide, k_narrow, v_narrow, dout, delta, lse2, has_huge, dq, kv_bounds, q_start,
    items, tiles, kv_heads, seq, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, q_start_default,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_dq_b, stride_dq_h, stride_dq_n,
    scale, log2_scale, k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
    FORM: gl.constexpr, GROUP: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    HAS_WIDE_BIAS: gl.constexpr, HAS_NARROW_BIAS: gl.constexpr,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    HEADS: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """One program owns every num_programs-th item: dq of P positions of one key-value head.

    q and dout are descriptors of [B, N, H, D] in blocks of P positions x HEADS heads, k_wide and
    v_wide of [B, Hkv, M, D] in blocks of BLOCK_N keys. The strides of k_narrow and v_narrow are in
    units of 8 elements. delta and lse2 are contiguous [B, Hkv, N, G].
    """
    P: gl.constexpr = 64 // HEADS
    of_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], gl.bfloat16)
    of_value_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_DV], gl.bfloat16)
    of_keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], gl.bfloat16)
    of_values: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_DV], gl.bfloat16)
    q_tile = gl.allocate_shared_memory(gl.bfloat16, [1, P, HEADS, BLOCK_D], q.layout)
    do_tile = gl.allocate_shared_memory(gl.bfloat16, [1, P, HEADS, BLOCK_DV], dout.layout)
    q_buffer = q_tile._reinterpret(gl.bfloat16, [64, BLOCK_D], of_rows)
    do_buffer = do_tile._reinterpret(gl.bfloat16, [64, BLOCK_DV], of_value_rows)
    vq = gl.allocate_shared_memory(gl.bfloat16, [2, 64, BLOCK_D], of_rows)
    vdo = gl.allocate_shared_memory(gl.bfloat16, [2, 64, BLOCK_DV], of_value_rows)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, 1, 1, BLOCK_N, BLOCK_D], k_wide.layout)
    v_tiles = gl.allocate_shared_memory(
        gl.bfloat16, [SLOTS, 1, 1, BLOCK_N, BLOCK_DV], v_wide.layout
    )
    k_ring = k_tiles._reinterpret(gl.bfloat16, [SLOTS, BLOCK_N, BLOCK_D], of_keys)
    v_ring = v_tiles._reinterpret(gl.bfloat16, [SLOTS, BLOCK_N, BLOCK_DV], of_values)
    k_rows = gl.allocate_shared_memory(gl.bfloat16, [4, P, BLOCK_D], permuted_rows(P, BLOCK_D, 2))
    v_rows = gl.allocate_shared_memory(gl.bfloat16, [4, P, BLOCK_DV], permuted_rows(P, BLOCK_DV, 2))
    full = barriers(SLOTS, 1)
    empty = barriers(SLOTS, 2)
    rows_full = barriers(4, 1)
    rows_empty = barriers(4, 1)
    q_full = barriers(1, 1)
    q_empty = barriers(1, 2)
    handed = barriers(1, 1)
    taken = barriers(1, 1)
    fence_async_shared()
    sizes = (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        q_start_default,
    )  # fmt: skip
    narrow_strides = (
        stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    )  # fmt: skip
    biases = (k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias)
    dq_strides = (stride_dq_b, stride_dq_h, stride_dq_n)
    gl.warp_specialize(
        [
            (_consume, (
                0, q_buffer, do_buffer, q_full, q_empty, k_ring, v_ring, full, empty,
                k_rows, v_rows, rows_full, rows_empty, vq, vdo, handed, taken,
                delta, lse2, has_huge, dq, kv_bounds, q_start,
                sizes, dq_strides, items, tiles, scale, log2_scale, biases,
                FORM, GROUP, HAS_BOUNDS, HAS_Q_START, HAS_WIDE_BIAS, HAS_NARROW_BIAS, HEAD_DIM,
                BLOCK_D, BLOCK_DV, P, BLOCK_N, SLOTS, TAIL,
            )),
            (_consume, (
                1, q_buffer, do_buffer, q_full, q_empty, k_ring, v_ring, full, empty,
                k_rows, v_rows, rows_full, rows_empty, vq, vdo, handed, taken,
                delta, lse2, has_huge, dq, kv_bounds, q_start,
                sizes, dq_strides, items, tiles, scale, log2_scale, biases,
                FORM, GROUP, HAS_BOUNDS, HAS_Q_START, HAS_WIDE_BIAS, HAS_NARROW_BIAS, HEAD_DIM,
                BLOCK_D, BLOCK_DV, P, BLOCK_N, SLOTS, TAIL,
            )),
            (_fetch_tiles, (
                q, dout, k_wide, v_wide, q_tile, do_tile, q_full, q_empty,
                k_tiles, v_tiles, full, empty, kv_bounds, q_start, sizes, items, tiles,
                GROUP, HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, SLOTS, TAIL,
            )),
            (_fetch_rows, (
                k_rows, v_rows, rows_full, rows_empty, k_narrow, v_narrow,
                kv_bounds, q_start, sizes, narrow_strides, items, tiles,
                HAS_BOUNDS, HAS_Q_START, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
                P, BLOCK_N, SLOTS, TAIL,
            )),
        ],
        [4, 1, 1], [240, 24, 24],
    )  # fmt: skip


def backward_query(problem: Problem, statistics: Statistics, dq: Tensor, config: Config) -> None:
    """Write dq [B, H, N, D] with what `choose` found for the problem."""
    dout, delta, lse2, has_huge = statistics
    batch, _, seq, _ = problem.q.shape
    constants = problem.constants(dout, dq)
    block_d, block_dv = block(problem.q.shape[3]), block(dout.shape[3])
    positions = ROWS // config.heads
    tiles = triton.cdiv(seq, positions)
    kv_heads, *sizes = problem.sizes()
    items = tiles * batch * kv_heads
    narrow = [aligned(t) for t in (problem.k_narrow, problem.v_narrow)]
    names = (
        "FORM", "GROUP", "HAS_BOUNDS", "HAS_Q_START", "HAS_WIDE_BIAS", "HAS_NARROW_BIAS",
        "HEAD_DIM", "VALUE_DIM", "BLOCK_D", "BLOCK_DV",
    )  # fmt: skip
    launch(
        hopper_backward_query_kernel, min(items, problem.device.multiprocessors),
        describe(problem.q.transpose(1, 2), [1, positions, config.heads, block_d]),
        describe(problem.k_wide, [1, 1, config.block_n, block_d]),
        describe(problem.v_wide, [1, 1, config.block_n, block_dv]),
        *narrow,
        describe(dout.transpose(1, 2), [1, positions, config.heads, block_dv]),
        delta, lse2, has_huge, dq, problem.kv_bounds, problem.q_start,
        items, tiles, kv_heads, *sizes,
        *(stride // UNIT for t in narrow for stride in t.stride()[:3]), *dq.stride()[:3],
        problem.scale, problem.log2_scale, *problem.biases(),
        **{name: constants[name] for name in names},
        config=config,
    )  # fmt: skip
