"""dq on Hopper: three products a virtual row (S, dP and dS · k), warp specialised.

A tile of 64 rows is P positions x HEADS heads of one key-value head, P = 64 / HEADS. Two consumer
warpgroups share a ring of wide tiles and divide the narrow offsets by parity; a producer warp
fills the ring. Wide tiles are outside, in groups that the ring holds, and offsets inside: a tile
stays for all offsets, and dq̃ is summed over a group before it is multiplied by the narrow keys.
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

from csrc_free.device.descriptors import are_rows_aligned, can_describe
from csrc_free.hopper.assembly import pack_bfloat16
from csrc_free.hopper.channels import arrive, barriers, wait_empty, wait_full
from csrc_free.hopper.describe import describe
from csrc_free.hopper.layouts import accumulator, operand, permuted_rows, rows_of
from csrc_free.launch import OPTIONS
from csrc_free.problem import NOT_SPECIALIZED, Problem
from csrc_free.steps.delta import Statistics
from csrc_free.traits import Device, Traits

ROWS = gl.constexpr(64)
INFINITY = gl.constexpr(float("inf"))
FAR = gl.constexpr(2**31 - 1)
_RESERVE = 1024  # bytes: barriers
MULTIPROCESSORS = 132
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
    num_warps: int = 4
    maxnreg: int = 168  # of 384 threads; a consumer has 240, the producer 24

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        columns = traits.block_d + traits.block_dv
        rows = 2 * columns * 64 * (1 + 2)  # q and dout, and what each warpgroup makes of them
        ring = 2 * columns * self.block_n * self.slots
        narrow = 2 * (64 // self.heads) * (4 * traits.block_d + 2 * traits.block_dv)
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
        and traits.form == "trilinear"
        and traits.block_d == traits.block_dv
        and traits.block_d in (64, 128)
        and traits.is_describable
        and 3 <= traits.group <= 64
    )


def _configs(traits: Traits) -> Iterator[Config]:
    heads = triton.next_power_of_2(traits.group)
    block_n = 64 if traits.block_d == 128 else 128
    for slots in (4, 3, 2):
        yield Config(heads, block_n, slots)


@gluon.jit
def _place(
    w, tiles, kv_heads, seq, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, q_start, q_start_default, kv_bounds,
    HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr, P: gl.constexpr, BLOCK_N: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Return where item w stands, and the scalar ranges of what its rows see.

    (batch, kv_head, first query, its position, end of the wide keys, wide tiles, first offset,
    offsets, first wide key that all rows see, end of those): tiles count down from the end. All
    partitions of the program compute the same.
    """
    bh = w // tiles
    batch = bh // kv_heads
    kv_head = bh % kv_heads
    # Under a causal window the first queries see little: they come last, and fill the gaps.
    i0 = (tiles - 1 - w % tiles) * P
    start = q_start_default
    if HAS_Q_START:
        start = gl.load(q_start + batch)
    p0 = start + i0
    p1 = start + gl.minimum(i0 + P, seq) - 1
    keys = gl.maximum(wide_rows, narrow_rows)
    wide_first = keys - wide_rows
    narrow_first = keys - narrow_rows
    if HAS_BOUNDS:
        layout: gl.constexpr = gl.SliceLayout(
            1, gl.BlockedLayout([(P + 31) // 32, 1], [32, 1], [1, WARPS], [1, 0])
        )
        i = i0 + gl.arange(0, P, layout=layout)
        real = i < seq
        p = start + i
        at = kv_bounds + (batch.to(gl.int64) * seq + i) * 2
        low = gl.load(at, mask=real, other=0)
        high = gl.load(at + 1, mask=real, other=0)
        lo = gl.maximum(gl.maximum(p - wide_left, wide_first), low)
        hi = gl.minimum(gl.minimum(p + wide_right + 1, keys), high)
        narrow_lo = gl.maximum(gl.maximum(p - narrow_left, narrow_first), low)
        narrow_hi = gl.minimum(gl.minimum(p + narrow_right + 1, keys), high)
        sees = real & (lo < hi) & (narrow_lo < narrow_hi)
        bottom = gl.min(gl.where(sees, lo, FAR), 0)
        top = gl.max(gl.where(sees, hi, -FAR), 0)
        full_lo = gl.max(gl.where(sees, lo, -FAR), 0)
        # A row that sees nothing has every tile masked.
        full_hi = gl.min(gl.where(sees | (i >= seq), gl.where(real, hi, FAR), -FAR), 0)
        offset_first = gl.min(gl.where(sees, p - narrow_hi + 1, FAR), 0)
        offset_last = gl.max(gl.where(sees, p - narrow_lo, -FAR), 0)
        count = gl.where(bottom < top, (top - bottom + BLOCK_N - 1) // BLOCK_N, 0)
    else:
        bottom = gl.maximum(p0 - wide_left, wide_first)
        top = gl.minimum(p1 + wide_right + 1, keys)
        full_lo = gl.maximum(p1 - wide_left, wide_first)
        full_hi = gl.minimum(p0 + wide_right + 1, keys)
        offset_first = gl.maximum(-narrow_right, p0 - keys + 1)
        offset_last = gl.minimum(narrow_left, p1 - narrow_first)
        count = gl.where(bottom < top, (top - bottom + BLOCK_N - 1) // BLOCK_N, 0)
    offsets = gl.where(bottom < top, gl.maximum(offset_last - offset_first + 1, 0), 0)
    count = gl.where(offsets > 0, count, 0)
    return batch, kv_head, i0, p0, top, count, offset_first, offsets, full_lo, full_hi


@gluon.jit
def _produce(
    q, dout, k_wide, v_wide, q_buffer, do_buffer, q_full, q_empty, k_ring, v_ring, full, empty,
    kv_bounds, q_start, items, tiles, kv_heads, seq, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, q_start_default,
    GROUP: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    P: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Bring each item's rows of q and dout, and its wide tiles, the newest first."""
    n = 0
    passed = 0
    wide_first = gl.maximum(wide_rows, narrow_rows) - wide_rows
    for w in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, i0, _, top, count, _, _, _, _ = _place(
            w, tiles, kv_heads, seq, wide_rows, narrow_rows,
            wide_left, wide_right, narrow_left, narrow_right, q_start, q_start_default, kv_bounds,
            HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, 1,
        )  # fmt: skip
        if count > 0:
            wait_empty(q_empty, 0, n)
            mbarrier.expect(q_full.index(0), q.block_type.nbytes + dout.block_type.nbytes)
            at = [batch, i0, kv_head * GROUP, 0]
            tma.async_copy_global_to_shared(q, at, q_full.index(0), q_buffer)
            tma.async_copy_global_to_shared(dout, at, q_full.index(0), do_buffer)
            row = top - wide_first
            for t in range(count):
                slot = (passed + t) % SLOTS
                row -= BLOCK_N
                wait_empty(empty, slot, (passed + t) // SLOTS)
                mbarrier.expect(
                    full.index(slot), k_wide.block_type.nbytes + v_wide.block_type.nbytes
                )
                at = [batch, kv_head, row, 0]
                tma.async_copy_global_to_shared(k_wide, at, full.index(slot), k_ring.index(slot))
                tma.async_copy_global_to_shared(v_wide, at, full.index(slot), v_ring.index(slot))
            passed += count
            n += 1


@gluon.jit
def _to_float32(x):
    return gl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=gl.float32,
        is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _copy_narrow(
    to, pointer, stride_8, key_row, low, high, dims,
    P: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Begin to copy narrow rows key_row .. key_row + P to shared memory.

    Rows outside [low, high) come as zeros.
    """
    across: gl.constexpr = 4 if P == 1 else (2 if P == 2 else 1)
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4 // across, across], [1, 0])
    rows = key_row + gl.arange(0, P, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    seen = ((rows >= low) & (rows < high))[:, None] & (columns < dims)[None, :]
    at = pointer + (rows.to(gl.int64) * stride_8 * 8)[:, None] + columns[None, :]
    async_copy.async_copy_global_to_shared(to, at, mask=seen)


@gluon.jit
def _spread(rows, like, P: gl.constexpr, COLUMNS: gl.constexpr):
    """Load the narrow row of each position and repeat it for its heads, in the layout of `like`."""
    x = gl.reshape(like, [P, 64 // P, COLUMNS])
    found = gl.expand_dims(rows.load(gl.SliceLayout(1, x.type.layout)), 1)
    found, _ = gl.broadcast(found, x)
    return gl.convert_layout(gl.reshape(found, [64, COLUMNS]), like.type.layout, assert_trivial=True)


@gluon.jit
def _times(x, rows, bias, HAS_BIAS: gl.constexpr, P: gl.constexpr, COLUMNS: gl.constexpr):
    """Return x [64, COLUMNS] in bfloat16 times the narrow row of each position."""
    y = _spread(rows, x, P, COLUMNS)
    if HAS_BIAS:
        return pack_bfloat16(_to_float32(x) * (_to_float32(y) + bias))
    return x * y


@gluon.jit
def _probabilities(
    s, shift, log2_scale, key, lo, hi, partial, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """Return P = exp2(log2_scale · s - shift); where a tile is partial, 0 beyond [lo, hi)."""
    p = gl.exp2(s * log2_scale - shift[:, None])
    if partial:
        j = key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        seen = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
        p = gl.where(seen, gl.minimum(p, 1.0), 0.0)
    return p


@gluon.jit
def _attend(
    s, shift, row_dp, vdo, v, log2_scale, key, lo, hi, full_lo, full_hi, is_huge,
    BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """Return dS [64, BLOCK_N] in bfloat16, of a tile of wide keys and its logits s."""
    dp = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    dp = warpgroup_mma(vdo, v.permute((1, 0)), dp, use_acc=False, is_async=True)
    partial = (key < full_lo) | (key + BLOCK_N > full_hi) | is_huge
    p = _probabilities(s, shift, log2_scale, key, lo, hi, partial, BLOCK_N, LAYOUT)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    return gl.convert_layout(pack_bfloat16(p * (dp - row_dp[:, None])), OPERAND)


@gluon.jit
def _consume(
    r: gl.constexpr, q_buffer, do_buffer, q_full, q_empty, k_ring, v_ring, full, empty,
    vq, vdo, k_rows, v_rows, handover, handed, taken,
    k_narrow, v_narrow, delta, lse2, has_huge, dq, kv_bounds, q_start,
    items, tiles, kv_heads, seq, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, q_start_default,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_dq_b, stride_dq_h, stride_dq_n, scale, log2_scale, k_narrow_bias, v_narrow_bias,
    GROUP: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    HAS_NARROW_BIAS: gl.constexpr, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    P: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Sum dq over every second offset of each item; warpgroup 0 adds both sums, and stores."""
    HEADS: gl.constexpr = 64 // P
    of_logits: gl.constexpr = accumulator(BLOCK_N)
    of_sums: gl.constexpr = accumulator(BLOCK_D)
    of_operand: gl.constexpr = operand(BLOCK_D)
    of_rows: gl.constexpr = rows_of(of_logits)
    keys = gl.maximum(wide_rows, narrow_rows)
    wide_first = keys - wide_rows
    narrow_first = keys - narrow_rows
    no_logits = gl.zeros([64, BLOCK_N], gl.float32, of_logits)
    dvq = gl.zeros([64, BLOCK_D], gl.float32, of_sums)
    n = 0
    passed = 0
    turns = 0
    for w in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, kv_head, i0, p0, top, count, offset_first, offsets, full_lo, full_hi = _place(
            w, tiles, kv_heads, seq, wide_rows, narrow_rows,
            wide_left, wide_right, narrow_left, narrow_right, q_start, q_start_default, kv_bounds,
            HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, 4,
        )  # fmt: skip
        bh = batch.to(gl.int64) * kv_heads + kv_head
        acc = gl.zeros([64, BLOCK_D], gl.float32, of_sums)
        mine = (offsets + 1 - r) // 2
        if (count > 0) & (mine == 0):  # a single offset, which is the other warpgroup's
            for t in range(count):
                slot = (passed + t) % SLOTS
                wait_full(full, slot, (passed + t) // SLOTS)
                arrive(empty, slot)
            arrive(q_empty, 0)
        if (count > 0) & (mine > 0):
            k_head = k_narrow + (batch.to(gl.int64) * stride_kn_b + kv_head.to(gl.int64) * stride_kn_h) * 8
            v_head = v_narrow + (batch.to(gl.int64) * stride_vn_b + kv_head.to(gl.int64) * stride_vn_h) * 8
            x = gl.arange(0, 64, layout=of_rows)
            i = i0 + x // HEADS
            real = (i < seq) & (x % HEADS < GROUP)
            at = (bh * seq + i) * GROUP + x % HEADS
            row_lse2 = gl.load(lse2 + at, mask=real, other=INFINITY)
            row_delta = gl.load(delta + at, mask=real, other=0.0)
            is_huge = gl.load(has_huge + bh) != 0
            position = p0 + x // HEADS
            lo = gl.maximum(position - wide_left, wide_first)
            hi = gl.minimum(position + wide_right + 1, keys)
            narrow_lo = gl.maximum(position - narrow_left, narrow_first)
            narrow_hi = gl.minimum(position + narrow_right + 1, keys)
            if HAS_BOUNDS:
                at = kv_bounds + (batch.to(gl.int64) * seq + i) * 2
                low = gl.load(at, mask=real, other=0)
                high = gl.load(at + 1, mask=real, other=0)
                lo = gl.maximum(lo, low)
                hi = gl.minimum(hi, high)
                narrow_lo = gl.maximum(narrow_lo, low)
                narrow_hi = gl.minimum(narrow_hi, high)
            first_key = p0 - offset_first - r
            _copy_narrow(k_rows.index(2 * r + (turns & 1)), k_head, stride_kn_n, first_key - narrow_first, 0, narrow_rows, HEAD_DIM, P, BLOCK_D)
            _copy_narrow(v_rows.index(r), v_head, stride_vn_n, first_key - narrow_first, 0, narrow_rows, VALUE_DIM, P, BLOCK_DV)
            async_copy.commit_group()
            wait_full(q_full, 0, n)
            async_copy.wait_group(0)
            vq.store(_times(q_buffer.load(of_sums), k_rows.index(2 * r + (turns & 1)), k_narrow_bias, HAS_NARROW_BIAS, P, BLOCK_D))
            vdo.store(_times(do_buffer.load(of_sums), v_rows.index(r), v_narrow_bias, HAS_NARROW_BIAS, P, BLOCK_DV))
            fence_async_shared()
            wait_full(full, passed % SLOTS, passed // SLOTS)
            s = warpgroup_mma(vq, k_ring.index(passed % SLOTS).permute((1, 0)), no_logits, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            groups = (count + SLOTS - 1) // SLOTS
            last = groups * mine - 1
            it = 0
            before = 0
            for g in range(last + 1):
                here = gl.minimum(SLOTS, count - before)
                is_last = it == mine - 1
                it2 = gl.where(g == last, it, gl.where(is_last, 0, it + 1))
                before2 = gl.where((g < last) & is_last, before + SLOTS, before)
                key = p0 - offset_first - r - 2 * it
                key2 = p0 - offset_first - r - 2 * it2
                _copy_narrow(k_rows.index(2 * r + ((turns + 1) & 1)), k_head, stride_kn_n, key2 - narrow_first, 0, narrow_rows, HEAD_DIM, P, BLOCK_D)
                _copy_narrow(v_rows.index(r), v_head, stride_vn_n, key2 - narrow_first, 0, narrow_rows, VALUE_DIM, P, BLOCK_DV)
                async_copy.commit_group()
                shift = row_lse2
                if P > 1:
                    of_row = key + x // HEADS
                    shift = gl.where((of_row >= narrow_lo) & (of_row < narrow_hi), row_lse2, INFINITY)
                tile_key = top - (before + 1) * BLOCK_N
                for t in range(here - 1):
                    at_tile = passed + before + t
                    slot = at_tile % SLOTS
                    slot2 = (at_tile + 1) % SLOTS
                    ds = _attend(
                        s, shift, row_delta, vdo, v_ring.index(slot), log2_scale, tile_key,
                        lo, hi, full_lo, full_hi, is_huge, BLOCK_N, of_logits, of_operand,
                    )  # fmt: skip
                    if it == 0:
                        wait_full(full, slot2, (at_tile + 1) // SLOTS)
                    dvq = warpgroup_mma(ds, k_ring.index(slot), dvq, use_acc=t > 0, is_async=True)
                    s = warpgroup_mma(vq, k_ring.index(slot2).permute((1, 0)), no_logits, use_acc=False, is_async=True)
                    dvq = warpgroup_mma_wait(1, deps=(dvq,))
                    if is_last:
                        arrive(empty, slot)
                    s = warpgroup_mma_wait(0, deps=(s,))
                    tile_key -= BLOCK_N
                at_tile = passed + before + here - 1
                slot = at_tile % SLOTS
                ds = _attend(
                    s, shift, row_delta, vdo, v_ring.index(slot), log2_scale, tile_key,
                    lo, hi, full_lo, full_hi, is_huge, BLOCK_N, of_logits, of_operand,
                )  # fmt: skip
                dvq = warpgroup_mma(ds, k_ring.index(slot), dvq, use_acc=here > 1, is_async=True)
                # The next virtual rows, while the product runs. The last turn's are never used: by
                # then the producer may have replaced q and dout.
                async_copy.wait_group(0)
                vq.store(_times(q_buffer.load(of_sums), k_rows.index(2 * r + ((turns + 1) & 1)), k_narrow_bias, HAS_NARROW_BIAS, P, BLOCK_D))
                vdo.store(_times(do_buffer.load(of_sums), v_rows.index(r), v_narrow_bias, HAS_NARROW_BIAS, P, BLOCK_DV))
                fence_async_shared()
                if g == gl.maximum(last - 1, 0):
                    arrive(q_empty, 0)
                slot2 = (passed + before2) % SLOTS
                if it2 == 0:
                    wait_full(full, slot2, (passed + before2) // SLOTS)
                s = warpgroup_mma(vq, k_ring.index(slot2).permute((1, 0)), no_logits, use_acc=False, is_async=True)
                dvq = warpgroup_mma_wait(1, deps=(dvq,))
                if is_last:
                    arrive(empty, slot)
                k = _to_float32(_spread(k_rows.index(2 * r + (turns & 1)), q_buffer.load(of_sums), P, BLOCK_D))
                if HAS_NARROW_BIAS:
                    k += k_narrow_bias
                acc += dvq * k
                s = warpgroup_mma_wait(0, deps=(s,))
                it = it2
                before = before2
                turns += 1
        if count > 0:
            passed += count
            n += 1
        m = (w - gl.program_id(0)) // gl.num_programs(0)
        if r == 1:
            handover.store(acc)
            arrive(handed, 0)
            wait_full(taken, 0, m)
        else:
            wait_full(handed, 0, m)
            acc = ((acc + handover.load(of_sums)) * scale).to(gl.bfloat16)
            arrive(taken, 0)
            x = gl.arange(0, 64, layout=gl.SliceLayout(1, of_sums))
            columns = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, of_sums))
            i = i0 + x // HEADS
            head = kv_head * GROUP + x % HEADS
            real = (i < seq) & (x % HEADS < GROUP)
            to = dq + batch.to(gl.int64) * stride_dq_b
            to += (head.to(gl.int64) * stride_dq_h + i.to(gl.int64) * stride_dq_n)[:, None] + columns[None, :]
            gl.store(to, acc, mask=real[:, None] & (columns < HEAD_DIM)[None, :])


@gluon.jit(do_not_specialize=_NUMBERS)
def backward_query_kernel(
    q, k_wide, v_wide, k_narrow, v_narrow, dout, delta, lse2, has_huge, dq, kv_bounds, q_start,
    items, tiles, kv_heads, seq, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, q_start_default,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_dq_b, stride_dq_h, stride_dq_n, scale, log2_scale, k_narrow_bias, v_narrow_bias,
    GROUP: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    HAS_NARROW_BIAS: gl.constexpr, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    HEADS: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
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
    virtual = gl.allocate_shared_memory(gl.bfloat16, [4, 64, BLOCK_D], of_rows)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, 1, 1, BLOCK_N, BLOCK_D], k_wide.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, 1, 1, BLOCK_N, BLOCK_DV], v_wide.layout)
    k_ring = k_tiles._reinterpret(gl.bfloat16, [SLOTS, BLOCK_N, BLOCK_D], of_keys)
    v_ring = v_tiles._reinterpret(gl.bfloat16, [SLOTS, BLOCK_N, BLOCK_DV], of_values)
    k_rows = gl.allocate_shared_memory(gl.bfloat16, [4, P, BLOCK_D], permuted_rows(P, BLOCK_D, 2))
    v_rows = gl.allocate_shared_memory(gl.bfloat16, [2, P, BLOCK_DV], permuted_rows(P, BLOCK_DV, 2))
    full = barriers(SLOTS, 1)
    empty = barriers(SLOTS, 2)
    q_full = barriers(1, 1)
    q_empty = barriers(1, 2)
    handed = barriers(1, 1)
    taken = barriers(1, 1)
    fence_async_shared()
    # Where warpgroup 1 kept its virtual rows.
    handover = virtual._reinterpret(
        gl.float32, [2, 64, BLOCK_D], gl.SwizzledSharedLayout(2, 1, 16, [1, 0])
    ).index(1)
    gl.warp_specialize(
        [
            (_consume, (
                0, q_buffer, do_buffer, q_full, q_empty, k_ring, v_ring, full, empty,
                virtual.index(0), virtual.index(1), k_rows, v_rows, handover, handed, taken,
                k_narrow, v_narrow, delta, lse2, has_huge, dq, kv_bounds, q_start,
                items, tiles, kv_heads, seq, wide_rows, narrow_rows,
                wide_left, wide_right, narrow_left, narrow_right, q_start_default,
                stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
                stride_dq_b, stride_dq_h, stride_dq_n, scale, log2_scale,
                k_narrow_bias, v_narrow_bias,
                GROUP, HAS_BOUNDS, HAS_Q_START, HAS_NARROW_BIAS, HEAD_DIM, VALUE_DIM,
                BLOCK_D, BLOCK_DV, P, BLOCK_N, SLOTS,
            )),
            (_consume, (
                1, q_buffer, do_buffer, q_full, q_empty, k_ring, v_ring, full, empty,
                virtual.index(2), virtual.index(3), k_rows, v_rows, handover, handed, taken,
                k_narrow, v_narrow, delta, lse2, has_huge, dq, kv_bounds, q_start,
                items, tiles, kv_heads, seq, wide_rows, narrow_rows,
                wide_left, wide_right, narrow_left, narrow_right, q_start_default,
                stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
                stride_dq_b, stride_dq_h, stride_dq_n, scale, log2_scale,
                k_narrow_bias, v_narrow_bias,
                GROUP, HAS_BOUNDS, HAS_Q_START, HAS_NARROW_BIAS, HEAD_DIM, VALUE_DIM,
                BLOCK_D, BLOCK_DV, P, BLOCK_N, SLOTS,
            )),
            (_produce, (
                q, dout, k_wide, v_wide, q_tile, do_tile, q_full, q_empty, k_tiles, v_tiles, full, empty,
                kv_bounds, q_start, items, tiles, kv_heads, seq, wide_rows, narrow_rows,
                wide_left, wide_right, narrow_left, narrow_right, q_start_default,
                GROUP, HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, SLOTS,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


def backward_query(problem: Problem, statistics: Statistics, dq: Tensor, config: Config | None = None) -> None:
    """Write dq [B, H, N, D]; `choose` must have found a config for the problem."""
    dout, delta, lse2, has_huge = statistics
    if not can_describe(dout):
        dout = dout.contiguous()
    if config is None:
        config = choose(problem.traits(dout), problem.device)
    assert config is not None
    batch, _, seq, _ = problem.q.shape
    constants = problem.constants(dout, dq)
    block_d, block_dv = constants["BLOCK_D"], constants["BLOCK_DV"]
    positions = 64 // config.heads
    tiles = triton.cdiv(seq, positions)
    kv_heads, *sizes = problem.sizes()
    items = tiles * batch * kv_heads
    names = (
        "GROUP", "HAS_BOUNDS", "HAS_Q_START", "HAS_NARROW_BIAS", "HEAD_DIM", "VALUE_DIM",
        "BLOCK_D", "BLOCK_DV",
    )  # fmt: skip
    kn, vn = problem.k_narrow.stride(), problem.v_narrow.stride()
    backward_query_kernel[(min(items, MULTIPROCESSORS),)](
        describe(problem.q.transpose(1, 2), [1, positions, config.heads, block_d]),
        describe(problem.k_wide, [1, 1, config.block_n, block_d]),
        describe(problem.v_wide, [1, 1, config.block_n, block_dv]),
        problem.k_narrow, problem.v_narrow,
        describe(dout.transpose(1, 2), [1, positions, config.heads, block_dv]),
        delta, lse2, has_huge, dq, problem.kv_bounds, problem.q_start,
        items, tiles, kv_heads, *sizes,
        *(s // 8 for s in (*kn[:3], *vn[:3])), *dq.stride()[:3],
        problem.scale, problem.log2_scale, *problem.biases()[2:],
        **{name: constants[name] for name in names},
        HEADS=config.heads, BLOCK_N=config.block_n, SLOTS=config.slots,
        num_warps=config.num_warps, maxnreg=config.maxnreg, **OPTIONS,
    )  # fmt: skip
