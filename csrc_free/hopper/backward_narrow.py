"""dq and the narrow pair's gradients on Hopper, for small groups, in four products.

The 64 rows of a warpgroup's products are ENTRIES (position, head) entries times KEYS narrow keys,
which hold the whole narrow window: so the wide window passes once, and each row is one virtual
query. With T = sum of dS · k and U = sum of P · v over the wide keys, dq is the sum of T ∘ k2 over
an entry's rows, and T ∘ q and U ∘ dout are added to the rows of a part of the narrow gradients.

Two entries are a pair: the rows of one key are two rows of the same thread, which adds them before
they leave it. A part is of consecutive positions, belongs to one program, and has a copy for each
of its two warpgroups: so the order of every sum is fixed, though the additions are atomic ones.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from csrc_free.device.descriptors import can_describe
from csrc_free.hopper.assembly import of_rows, pack_bfloat16, thread_barrier
from csrc_free.hopper.channels import arrive, barriers, wait_empty, wait_full
from csrc_free.hopper.describe import describe
from csrc_free.hopper.key_plan import memory_for_parts, shares
from csrc_free.hopper.layouts import accumulator, operand, permuted_rows, rows_of
from csrc_free.hopper.query_items import UNIT, aligned, place, seen_only, spread, to_float32
from csrc_free.launch import launch
from csrc_free.problem import NOT_SPECIALIZED, Problem, block
from csrc_free.steps.delta import Statistics
from csrc_free.steps.parts import Parts, parts_of_queries
from csrc_free.steps.parts_sum import slot_base
from csrc_free.traits import Device, Traits

ROWS = 64
MOST_KEYS = ROWS  # of a narrow window
INFINITY = gl.constexpr(float("inf"))
_RESERVE = 1024  # bytes: barriers
_COPIES = (
    2  # of a part: its warpgroups took 5.6 ms for 5.0 adding by turns (G = 1; H200, 2026-11-29)
)
# One compiled kernel serves all sizes and strides.
_NUMBERS = (
    *NOT_SPECIALIZED, "items", "chunks", "steps", "tiles", "kv_heads",
    "stride_q_b", "stride_q_h", "stride_q_n", "stride_do_b", "stride_do_h", "stride_do_n",
    "stride_kn_b", "stride_kn_h", "stride_kn_n", "stride_vn_b", "stride_vn_h", "stride_vn_n",
    "stride_dq_b", "stride_dq_h", "stride_dq_n",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Tiles of BLOCK_N wide keys in a ring of SLOTS; a row tile holds KEYS narrow keys an entry."""

    keys: int
    block_n: int
    slots: int
    tail: int  # a last tile with no more keys than this is computed alone; 0: there is none
    num_warps: int = 4
    maxnreg: int = 168  # of 384 threads; a consumer has 240, the producer 24

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        columns = traits.block_d + traits.block_dv
        narrow = 2 * max(ROWS // 2, self.keys) * (4 * traits.block_d + 2 * traits.block_dv)
        made = 2 * 2 * ROWS * columns
        ring = 2 * columns * self.block_n * self.slots
        return narrow + made + ring + 3 * 2 * columns * (ROWS // self.keys) + _RESERVE


def choose(traits: Traits, device: Device, narrow_window: int) -> Config | None:
    """Choose the tiles for a narrow window of so many keys; None: the kernel does not serve."""
    if not _serves(traits, device):
        return None
    for keys in (16, 32, MOST_KEYS):
        # The entries of both warpgroups are whole positions.
        if narrow_window <= keys and 2 * (ROWS // keys) % triton.next_power_of_2(traits.group) == 0:
            block_n = 64 if traits.block_d == 128 else 128
            found = (Config(keys, block_n, slots, 16) for slots in (4, 3, 2))
            fits = (c for c in found if c.shared_bytes(traits, device) <= device.shared_limit)
            return next(fits, None)
    return None


def _serves(traits: Traits, device: Device) -> bool:
    return (
        device.backend == "cuda"
        and device.arch == 90
        and traits.dtype == torch.bfloat16
        and traits.form == "trilinear"
        and traits.block_d == traits.block_dv
        and traits.block_d in (64, 128)
        and traits.is_describable
        and 1 <= traits.group <= 4
    )


@gluon.jit
def _fetch_tiles(
    k_wide, v_wide, k_ring, v_ring, full, empty, kv_bounds, q_start, sizes,
    items, chunks, steps, tiles, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    P: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Bring the wide tiles of every step, the newest first."""
    passed = 0
    wide_first = gl.maximum(sizes[2], sizes[3]) - sizes[2]
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first = item % chunks * steps
        for tile in range(first, gl.minimum(first + steps, tiles)):
            batch, kv_head, _, _, top, count, tails, _, _, _, _ = place(
                item // chunks * tiles + tiles - 1 - tile, tiles, sizes, q_start, kv_bounds,
                HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, TAIL, 1,
            )  # fmt: skip
            for t in range(count):
                slot = passed % SLOTS
                row = top - wide_first - (t + 1 - tails) * BLOCK_N
                if t < tails:
                    row = top - wide_first - (count - 1) * BLOCK_N - TAIL
                wait_empty(empty, slot, passed // SLOTS)
                mbarrier.expect(
                    full.index(slot), k_wide.block_type.nbytes + v_wide.block_type.nbytes
                )
                at = [batch, kv_head, row, 0]
                tma.async_copy_global_to_shared(k_wide, at, full.index(slot), k_ring.index(slot))
                tma.async_copy_global_to_shared(v_wide, at, full.index(slot), v_ring.index(slot))
                passed += 1


@gluon.jit
def _fetch_rows(
    k_narrow, v_narrow, k_blocks, v_blocks, rows_full, k_empty, v_empty,
    kv_bounds, q_start, sizes, items, chunks, steps, tiles,
    GROUP: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, ENTRIES: gl.constexpr,
    P: gl.constexpr, BLOCK_N: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Bring each warpgroup the narrow keys and values of its pairs of entries, one step ahead."""
    n = 0
    narrow_first = gl.maximum(sizes[2], sizes[3]) - sizes[3]
    K_HALVES: gl.constexpr = BLOCK_D // 64
    V_HALVES: gl.constexpr = BLOCK_DV // 64
    PAIRS: gl.constexpr = (ENTRIES + 1) // 2
    HEADS: gl.constexpr = _power_of_two(GROUP)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first = item % chunks * steps
        for tile in range(first, gl.minimum(first + steps, tiles)):
            batch, kv_head, _, p0, _, count, _, _, _, _, _ = place(
                item // chunks * tiles + tiles - 1 - tile, tiles, sizes, q_start, kv_bounds,
                HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, TAIL, 1,
            )  # fmt: skip
            if count > 0:
                for r in gl.static_range(2):
                    buffer = 2 * r + (n & 1)
                    bar = rows_full.index(r)
                    wait_empty(k_empty, buffer, n >> 1)
                    wait_empty(v_empty, r, n)
                    mbarrier.expect(
                        bar,
                        PAIRS * K_HALVES * k_narrow.block_type.nbytes
                        + PAIRS * V_HALVES * v_narrow.block_type.nbytes,
                    )
                    for g in gl.static_range(PAIRS):
                        key = p0 + (r * ENTRIES + 2 * g) // HEADS - sizes[6]
                        for half in gl.static_range(K_HALVES):
                            tma.async_copy_global_to_shared(
                                k_narrow, [batch, kv_head, key - narrow_first, 64 * half], bar,
                                k_blocks.index((buffer * K_HALVES + half) * PAIRS + g),
                            )  # fmt: skip
                        for half in gl.static_range(V_HALVES):
                            tma.async_copy_global_to_shared(
                                v_narrow, [batch, kv_head, key - narrow_first, 64 * half], bar,
                                v_blocks.index((r * V_HALVES + half) * PAIRS + g),
                            )  # fmt: skip
                n += 1


@gluon.constexpr_function
def _power_of_two(group):
    """Return the entries of a position: a group's heads, and of three heads a fourth for nobody."""
    return 1 << (group - 1).bit_length()


@gluon.constexpr_function
def _loaded(rows, columns):
    """Return the layout in which a warpgroup loads a few rows from memory."""
    across = max(4 // rows, 1)
    return gl.BlockedLayout([1, 2], [1, 32], [4 // across, across], [1, 0])


@gluon.jit
def _load_entries(
    pointer, strides, batch, kv_head, entry, seq,
    GROUP: gl.constexpr, HEADS: gl.constexpr, ENTRIES: gl.constexpr, DIMS: gl.constexpr,
    COLUMNS: gl.constexpr,
):  # fmt: skip
    """Load the rows of q or dout from entry `entry` of a key-value head on.

    Strides are in units of 8 elements: so the compiler knows that pairs of elements are aligned.
    """
    layout: gl.constexpr = _loaded(ENTRIES, COLUMNS)
    entries = entry + gl.arange(0, ENTRIES, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    i = entries // HEADS
    head = kv_head * GROUP + entries % HEADS
    at = batch.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1]
    at += i.to(gl.int64) * strides[2]
    is_real = (i < seq) & (entries % HEADS < GROUP)
    return gl.load(
        pointer + (at * 8)[:, None] + columns[None, :],
        mask=is_real[:, None] & (columns < DIMS)[None, :], other=0.0,
    )  # fmt: skip


@gluon.jit
def _load_newest(
    pointer, strides, batch, kv_head, row, rows,
    PAIRS: gl.constexpr, DIMS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Load narrow rows row, row + 2, ...: those that a pair's second entry sees, not its first."""
    layout: gl.constexpr = _loaded(PAIRS, COLUMNS)
    row += 2 * gl.arange(0, PAIRS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    at = batch.to(gl.int64) * strides[0] + kv_head.to(gl.int64) * strides[1]
    at += row.to(gl.int64) * strides[2]
    return gl.load(
        pointer + (at * 8)[:, None] + columns[None, :],
        mask=((row >= 0) & (row < rows))[:, None] & (columns < DIMS)[None, :], other=0.0,
    )  # fmt: skip


@gluon.jit
def _by_pairs(x, ENTRIES: gl.constexpr):
    """Return rows [64, columns] as [pairs, eights of a pair's keys, 2 entries, 8 keys, columns].

    The two entries of a pair are two rows of the same thread.
    """
    PAIRS: gl.constexpr = ENTRIES // 2
    return gl.reshape(x, [PAIRS, 4 // PAIRS, 2, 8, x.shape[1]])


@gluon.jit
def _rows_of_entries(rows, like, ENTRIES: gl.constexpr):
    """Load the row of each entry and repeat it for its keys, in the layout of `like`."""
    COLUMNS: gl.constexpr = like.shape[1]
    if ENTRIES == 1:
        found = spread(rows, like, 1, COLUMNS)
    else:
        x = _by_pairs(like, ENTRIES)
        layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, x.type.layout))
        pairs = gl.zeros([ENTRIES // 2, 2, COLUMNS], like.dtype, layout)
        flat = gl.reshape(pairs, [ENTRIES, COLUMNS])
        found = gl.reshape(rows.load(flat.type.layout), [ENTRIES // 2, 2, COLUMNS])
        found = gl.convert_layout(found, layout, assert_trivial=True)
        found = _flat(gl.expand_dims(gl.expand_dims(found, 1), 3), x, like)
    return found


@gluon.jit
def _flat(found, by_pairs, like):
    """Repeat `found` for all that it is the same of, and return it in the layout of `like`."""
    found, _ = gl.broadcast(found, by_pairs)
    return gl.convert_layout(gl.reshape(found, like.shape), like.type.layout, assert_trivial=True)


@gluon.jit
def _narrow_rows(
    raw, newest, like, KEYS: gl.constexpr, ENTRIES: gl.constexpr, IS_SHIFTED: gl.constexpr
):  # fmt: skip
    """Return the narrow row of each row, in the layout of `like`."""
    COLUMNS: gl.constexpr = like.shape[1]
    if ENTRIES == 1:
        found = raw.load(like.type.layout)
    else:
        x = _by_pairs(like, ENTRIES)
        PAIRS: gl.constexpr = ENTRIES // 2
        layout: gl.constexpr = gl.SliceLayout(2, x.type.layout)
        keys = gl.zeros([PAIRS, 4 // PAIRS, 8, COLUMNS], like.dtype, layout)
        flat = gl.reshape(keys, [32, COLUMNS])
        keys = gl.reshape(raw.load(flat.type.layout), [PAIRS, 4 // PAIRS, 8, COLUMNS])
        keys = gl.convert_layout(keys, layout, assert_trivial=True)
        found = _flat(gl.expand_dims(keys, 2), x, like)
    if IS_SHIFTED:
        x = _by_pairs(like, ENTRIES)
        of_pair: gl.constexpr = gl.SliceLayout(
            1, gl.SliceLayout(2, gl.SliceLayout(3, x.type.layout))
        )
        last = gl.expand_dims(gl.expand_dims(newest.load(of_pair), 1), 2)
        last = _flat(gl.expand_dims(last, 3), x, like)
        row = gl.arange(0, 64, layout=rows_of(like.type.layout))
        is_last = (row % 16 == 8) & (row // 2 % KEYS < 8)
        found = of_rows(is_last, last, found)
    return found


@gluon.jit
def _virtual(
    raw, newest, rows, seen, bias, HAS_BIAS: gl.constexpr, KEYS: gl.constexpr,
    ENTRIES: gl.constexpr, IS_SHIFTED: gl.constexpr,
):  # fmt: skip
    """Return narrow rows [64, columns] times the row of their entry; 0 where not seen."""
    COLUMNS: gl.constexpr = raw.shape[1]
    like = gl.zeros([64, COLUMNS], gl.bfloat16, accumulator(COLUMNS))
    x = _narrow_rows(raw, newest, like, KEYS, ENTRIES, IS_SHIFTED)
    y = _rows_of_entries(rows, like, ENTRIES)
    made = pack_bfloat16((to_float32(x) + bias) * to_float32(y)) if HAS_BIAS else x * y
    seen = gl.convert_layout(seen, rows_of(accumulator(COLUMNS)), assert_trivial=True)
    return of_rows(seen, made, gl.zeros_like(made))


@gluon.jit
def _split_pairs(x, ENTRIES: gl.constexpr):
    """Return the rows of the first and of the second entry of each pair, [32, columns] each."""
    COLUMNS: gl.constexpr = x.shape[1]
    first, second = gl.split(gl.permute(_by_pairs(x, ENTRIES), (0, 1, 3, 4, 2)))
    return gl.reshape(first, [32, COLUMNS]), gl.reshape(second, [32, COLUMNS])


@gluon.jit
def _add_to_part(
    part, base, slots, value, first_entry: gl.constexpr, HEADS: gl.constexpr, DIMS: gl.constexpr,
    KEYS: gl.constexpr, ENTRIES: gl.constexpr, IS_SHIFTED: gl.constexpr,
):  # fmt: skip
    """Add the rows of a step to a part, of which `base` is the slot of position 0's first key.

    What the entries of a pair add to one key is added first; one pair comes after another.
    """
    if ENTRIES == 1:
        _add_rows(part, base + first_entry // HEADS, slots, value, 0, 64, DIMS, KEYS)
    else:
        first, second = _split_pairs(value, ENTRIES)
        layout: gl.constexpr = first.type.layout
        y = gl.arange(0, 32, layout=rows_of(layout)) % KEYS
        both = first + second
        if IS_SHIFTED:
            both = gl.where((y == 0)[:, None], first, both)
        for g in gl.static_range(ENTRIES // 2):
            to = base + (first_entry + 2 * g) // HEADS
            _add_rows(part, to, slots, both, g * KEYS, KEYS, DIMS, KEYS)
            if IS_SHIFTED:
                _add_rows(part, to + KEYS, slots, second, g * KEYS, 1, DIMS, KEYS)
            if ENTRIES > 2:
                thread_barrier()


@gluon.jit
def _add_rows(
    part, slot, slots, value, first: gl.constexpr, count: gl.constexpr, DIMS: gl.constexpr,
    KEYS: gl.constexpr,
):  # fmt: skip
    """Add `count` rows from `first` on to as many slots, of which there are `slots`.

    Rows of other slots are of keys that their entries do not see: they add zero, wherever they do,
    and a mask would be a branch around every addition.
    """
    layout: gl.constexpr = value.type.layout
    row = gl.arange(0, value.shape[0], layout=rows_of(layout))
    column = gl.arange(0, value.shape[1], layout=gl.SliceLayout(0, layout))
    slot = gl.minimum(gl.maximum(slot + row - first, 0), slots - 1)
    to = part + (slot * DIMS)[:, None] + column[None, :]
    if (value.shape[0] == count) and (value.shape[1] == DIMS):
        gl.atomic_add(to, value, sem="relaxed")
    else:
        is_there = (row >= first) & (row < first + count)
        gl.atomic_add(to, value, mask=is_there[:, None] & (column < DIMS)[None, :], sem="relaxed")


@gluon.jit
def _attend(
    s, u, shift, row_delta, vdo, v, log2_scale, key, lo, hi, full_lo, full_hi, is_huge, use_acc,
    BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """Return dS [64, BLOCK_N] of a tile of wide keys and its logits s, and u, still in flight."""
    dp = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    dp = warpgroup_mma(vdo, v.permute((1, 0)), dp, use_acc=False, is_async=True)
    p = gl.exp2(s * log2_scale - shift[:, None])
    p = seen_only(p, key, lo, hi, full_lo, full_hi, is_huge, BLOCK_N, LAYOUT)
    packed = gl.convert_layout(pack_bfloat16(p), OPERAND)
    u = warpgroup_mma(packed, v, u, use_acc=use_acc, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    return p * (dp - row_delta[:, None]), u


@gluon.jit
def _attend_tail(
    t, u, shift, row_delta, vq, vdo, k, v, log2_scale, key, lo, hi, full_lo, full_hi, is_huge,
    TAIL: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """Return the sums of dS · k and P · v over the few keys of a tail; t and u are overwritten."""
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
    ds = gl.convert_layout(pack_bfloat16(p * (dp - row_delta[:, None])), OPERAND)
    u = warpgroup_mma(
        gl.convert_layout(pack_bfloat16(p), OPERAND), v, u, use_acc=False, is_async=True
    )
    t = warpgroup_mma(ds, k, t, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=(t, u))


@gluon.jit
def _consume(
    r: gl.constexpr, k_raw, v_raw, vq_tiles, vdo_tiles, q_rows, do_rows, k_newest, v_newest,
    rows_full, k_empty, v_empty, k_ring, v_ring, full, empty,
    q, dout, k_rows, v_rows, delta, lse2, has_huge, dq, dk_parts, dv_parts, kv_bounds, q_start,
    sizes, q_strides, do_strides, k_strides, v_strides, dq_strides, part_sizes,
    items, chunks, steps, tiles, scale, log2_scale, k_bias, v_bias,
    GROUP: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    HAS_BIAS: gl.constexpr, PARTS_FOLLOW_QUERIES: gl.constexpr,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, KEYS: gl.constexpr,
    P: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Compute every second ENTRIES entries: their dq, and what they add to the item's part."""
    (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        q_start_default,
    ) = sizes  # fmt: skip
    slots, part_rows, part_shift = part_sizes
    HEADS: gl.constexpr = _power_of_two(GROUP)
    ENTRIES: gl.constexpr = 64 // KEYS
    PAIRS: gl.constexpr = (ENTRIES + 1) // 2
    # The second entry of a pair stands one position on: it sees the same keys but the first, and
    # in its place the newest.
    IS_SHIFTED: gl.constexpr = ENTRIES > 1 and HEADS == 1
    of_logits: gl.constexpr = accumulator(BLOCK_N)
    of_keys: gl.constexpr = accumulator(BLOCK_D)
    of_operand: gl.constexpr = operand(BLOCK_D)
    of_rows: gl.constexpr = rows_of(of_logits)
    by_column: gl.constexpr = gl.BlockedLayout([32, 1], [1, 32], [1, 4], [1, 0])
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
        next_q = _load_entries(
            q, q_strides, batch, kv_head, entry, seq, GROUP, HEADS, ENTRIES, HEAD_DIM, BLOCK_D
        )
        next_do = _load_entries(
            dout, do_strides, batch, kv_head, entry, seq, GROUP, HEADS, ENTRIES, VALUE_DIM, BLOCK_DV
        )
        if IS_SHIFTED:
            next_k = _load_newest(
                k_rows, k_strides, batch, kv_head, newest + entry, narrow_rows,
                PAIRS, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            next_v = _load_newest(
                v_rows, v_strides, batch, kv_head, newest + entry, narrow_rows,
                PAIRS, VALUE_DIM, BLOCK_DV,
            )  # fmt: skip
        for tile in range(first, gl.minimum(first + steps, tiles)):
            _, _, i0, p0, top, count, tails, _, _, full_lo, full_hi = place(
                item // chunks * tiles + tiles - 1 - tile, tiles, sizes, q_start, kv_bounds,
                HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, TAIL, 4,
            )  # fmt: skip
            entry = tile * (2 * ENTRIES) + r * ENTRIES
            q_row.store(next_q)
            do_row.store(next_do)
            next_q = _load_entries(
                q, q_strides, batch, kv_head, entry + 2 * ENTRIES, seq,
                GROUP, HEADS, ENTRIES, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            next_do = _load_entries(
                dout, do_strides, batch, kv_head, entry + 2 * ENTRIES, seq,
                GROUP, HEADS, ENTRIES, VALUE_DIM, BLOCK_DV,
            )  # fmt: skip
            if IS_SHIFTED:
                k_last.store(next_k)
                v_last.store(next_v)
                next_k = _load_newest(
                    k_rows, k_strides, batch, kv_head, newest + entry + 2 * ENTRIES, narrow_rows,
                    PAIRS, HEAD_DIM, BLOCK_D,
                )  # fmt: skip
                next_v = _load_newest(
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
                    at = kv_bounds + batch.to(gl.int64) * seq * 2 + i * 2
                    low = gl.load(at, mask=i < seq, other=0)
                    high = gl.load(at + 1, mask=i < seq, other=0)
                    lo = gl.maximum(lo, low)
                    hi = gl.minimum(hi, high)
                    narrow_lo = gl.maximum(narrow_lo, low)
                    narrow_hi = gl.minimum(narrow_hi, high)
                seen = (narrow_key >= narrow_lo) & (narrow_key < narrow_hi) & (i < seq)
                if GROUP < HEADS:
                    seen = seen & (entry_of_row % HEADS < GROUP)
                at = bh * seq * GROUP + i * GROUP + entry_of_row % HEADS
                shift = gl.load(lse2 + at, mask=seen, other=INFINITY)
                row_delta = gl.load(delta + at, mask=seen, other=0.0)
                buffer = 2 * r + (n & 1)
                wait_full(rows_full, r, n)
                vq.store(
                    _virtual(
                        k_raw.index(buffer), k_last, q_row, seen, k_bias,
                        HAS_BIAS, KEYS, ENTRIES, IS_SHIFTED,
                    )
                )  # fmt: skip
                vdo.store(
                    _virtual(
                        v_raw.index(r), v_last, do_row, seen, v_bias,
                        HAS_BIAS, KEYS, ENTRIES, IS_SHIFTED,
                    )
                )  # fmt: skip
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
                        t, u = _attend_tail(
                            t, u, shift, row_delta, vq, vdo,
                            k_ring.index(slot).slice(0, TAIL), v_ring.index(slot).slice(0, TAIL),
                            log2_scale, top - (count - 1) * BLOCK_N - TAIL,
                            lo, hi, full_lo, full_hi, is_huge, TAIL, of_operand,
                        )  # fmt: skip
                        arrive(empty, slot)
                key = top - BLOCK_N
                for j in range(tails, count - 1):
                    slot = (passed + j) % SLOTS
                    ahead = (passed + j + 1) % SLOTS
                    ds, u = _attend(
                        s, u, shift, row_delta, vdo, v_ring.index(slot), log2_scale, key,
                        lo, hi, full_lo, full_hi, is_huge, j > 0, BLOCK_N, of_logits, of_operand,
                    )  # fmt: skip
                    packed = gl.convert_layout(pack_bfloat16(ds), of_operand)
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
                    s, u, shift, row_delta, vdo, v_ring.index(slot), log2_scale, key,
                    lo, hi, full_lo, full_hi, is_huge, count > 1, BLOCK_N, of_logits, of_operand,
                )  # fmt: skip
                packed = gl.convert_layout(pack_bfloat16(ds), of_operand)
                t = warpgroup_mma(packed, k_ring.index(slot), t, use_acc=count > 1, is_async=True)
                t, u = warpgroup_mma_wait(0, deps=(t, u))
                mbarrier.arrive(empty.index(slot), count=1)
                passed += count

                narrow = _narrow_rows(
                    k_raw.index(buffer), k_last, t.to(gl.bfloat16), KEYS, ENTRIES, IS_SHIFTED
                )
                narrow = to_float32(narrow)
                if HAS_BIAS:
                    narrow += k_bias
                if ENTRIES == 1:
                    pairs = gl.sum(gl.reshape(t * narrow, [4, 2, 8, BLOCK_D]), 1)
                    sums.store(gl.reshape(pairs, [32, BLOCK_D]))
                    total = sums.load(by_column)
                else:
                    one, other = _split_pairs(t * narrow, ENTRIES)
                    sums.store(one)
                    total = sums.load(by_column)
                    sums.store(other)
                    second_total = sums.load(by_column)
                mbarrier.arrive(k_empty.index(buffer), count=1)

                base = p0 - narrow_left - narrow_first
                base -= slot_base(item % chunks, part_rows, HEADS, part_shift)
                if PARTS_FOLLOW_QUERIES:
                    begin = gl.minimum(gl.maximum(p0 - i0 - narrow_left, -seq), keys)
                    base -= begin - narrow_first
                heads = (items // chunks).to(gl.int64)
                part = (((item % chunks) * heads + bh) * 2 + r) * slots
                of_entry = _rows_of_entries(q_row, t.to(gl.bfloat16), ENTRIES)
                _add_to_part(
                    dk_parts + part * HEAD_DIM, base, slots, t * to_float32(of_entry) * scale,
                    r * ENTRIES, HEADS, HEAD_DIM, KEYS, ENTRIES, IS_SHIFTED,
                )  # fmt: skip
                of_entry = _rows_of_entries(do_row, u.to(gl.bfloat16), ENTRIES)
                _add_to_part(
                    dv_parts + part * VALUE_DIM, base, slots, u * to_float32(of_entry),
                    r * ENTRIES, HEADS, VALUE_DIM, KEYS, ENTRIES, IS_SHIFTED,
                )  # fmt: skip
                n += 1
            to = dq + batch.to(gl.int64) * dq_strides[0]
            _store_sums(
                to, total * scale, entry, kv_head, seq, dq_strides, GROUP, HEADS, HEAD_DIM, PAIRS
            )
            if ENTRIES > 1:
                _store_sums(
                    to, second_total * scale, entry + 1, kv_head, seq, dq_strides,
                    GROUP, HEADS, HEAD_DIM, PAIRS,
                )  # fmt: skip


@gluon.jit
def _store_sums(
    to, x, entry, kv_head, seq, strides, GROUP: gl.constexpr, HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    """Store sums of rows [32, columns], those of every second entry from `entry` on."""
    total = gl.sum(gl.reshape(x, [PAIRS, 32 // PAIRS, x.shape[1]]), 1)
    layout: gl.constexpr = total.type.layout
    entries = entry + 2 * gl.arange(0, PAIRS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, layout))
    at = (kv_head * GROUP + entries % HEADS).to(gl.int64) * strides[1]
    at += (entries // HEADS).to(gl.int64) * strides[2]
    is_real = (entries // HEADS < seq) & (entries % HEADS < GROUP)
    gl.store(
        to + at[:, None] + columns[None, :], total.to(gl.bfloat16),
        mask=is_real[:, None] & (columns < HEAD_DIM)[None, :],
    )  # fmt: skip


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_backward_narrow_kernel(
    q, k_wide, v_wide, k_narrow, v_narrow, k_rows, v_rows, dout, delta, lse2, has_huge,
    dq, dk_parts, dv_parts, kv_bounds, q_start, items, chunks, steps, tiles,
    kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
    q_start_default, slots, part_rows, part_shift,
    stride_q_b, stride_q_h, stride_q_n, stride_do_b, stride_do_h, stride_do_n,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_dq_b, stride_dq_h, stride_dq_n, scale, log2_scale, k_narrow_bias, v_narrow_bias,
    GROUP: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    HAS_NARROW_BIAS: gl.constexpr, PARTS_FOLLOW_QUERIES: gl.constexpr,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    KEYS: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """One program owns every num_programs-th item: `steps` tiles of P positions, and their part.

    k_wide and v_wide are descriptors of [B, Hkv, M, D] in blocks of BLOCK_N keys, k_narrow and
    v_narrow in blocks of KEYS keys and 64 columns, of which k_rows and v_rows are the memory. delta
    and lse2 are contiguous [B, Hkv, N, G]. Strides but those of dq are in units of 8 elements.
    Parts come zeroed, with a copy for each warpgroup; no other program writes to them.
    """
    ENTRIES: gl.constexpr = 64 // KEYS
    HEADS: gl.constexpr = _power_of_two(GROUP)
    P: gl.constexpr = 2 * ENTRIES // HEADS
    PAIRS: gl.constexpr = (ENTRIES + 1) // 2
    of_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], gl.bfloat16)
    of_value_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_DV], gl.bfloat16)
    of_keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], gl.bfloat16)
    of_values: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_DV], gl.bfloat16)
    k_blocks = gl.allocate_shared_memory(
        gl.bfloat16, [4 * (BLOCK_D // 64) * PAIRS, 1, 1, KEYS, 64], k_narrow.layout
    )
    v_blocks = gl.allocate_shared_memory(
        gl.bfloat16, [2 * (BLOCK_DV // 64) * PAIRS, 1, 1, KEYS, 64], v_narrow.layout
    )
    k_raw = k_blocks._reinterpret(gl.bfloat16, [4, PAIRS * KEYS, BLOCK_D], of_rows)
    v_raw = v_blocks._reinterpret(gl.bfloat16, [2, PAIRS * KEYS, BLOCK_DV], of_value_rows)
    vdo = gl.allocate_shared_memory(gl.bfloat16, [2, 64, BLOCK_DV], of_value_rows)
    vq = gl.allocate_shared_memory(gl.bfloat16, [2, 64, BLOCK_D], of_rows)
    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, 1, 1, BLOCK_N, BLOCK_D], k_wide.layout)
    v_tiles = gl.allocate_shared_memory(
        gl.bfloat16, [SLOTS, 1, 1, BLOCK_N, BLOCK_DV], v_wide.layout
    )
    k_ring = k_tiles._reinterpret(gl.bfloat16, [SLOTS, BLOCK_N, BLOCK_D], of_keys)
    v_ring = v_tiles._reinterpret(gl.bfloat16, [SLOTS, BLOCK_N, BLOCK_DV], of_values)
    q_rows = gl.allocate_shared_memory(
        gl.bfloat16, [2, ENTRIES, BLOCK_D], permuted_rows(ENTRIES, BLOCK_D, 2)
    )
    do_rows = gl.allocate_shared_memory(
        gl.bfloat16, [2, ENTRIES, BLOCK_DV], permuted_rows(ENTRIES, BLOCK_DV, 2)
    )
    k_newest = gl.allocate_shared_memory(
        gl.bfloat16, [2, PAIRS, BLOCK_D], permuted_rows(PAIRS, BLOCK_D, 2)
    )
    v_newest = gl.allocate_shared_memory(
        gl.bfloat16, [2, PAIRS, BLOCK_DV], permuted_rows(PAIRS, BLOCK_DV, 2)
    )
    full = barriers(SLOTS, 1)
    empty = barriers(SLOTS, 2)
    rows_full = barriers(2, 1)
    k_empty = barriers(4, 1)
    v_empty = barriers(2, 1)
    fence_async_shared()
    sizes = (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        q_start_default,
    )  # fmt: skip
    q_strides = (stride_q_b, stride_q_h, stride_q_n)
    do_strides = (stride_do_b, stride_do_h, stride_do_n)
    k_strides = (stride_kn_b, stride_kn_h, stride_kn_n)
    v_strides = (stride_vn_b, stride_vn_h, stride_vn_n)
    dq_strides = (stride_dq_b, stride_dq_h, stride_dq_n)
    part_sizes = (slots, part_rows, part_shift)
    gl.warp_specialize(
        [
            (_consume, (
                0, k_raw, v_raw, vq, vdo, q_rows, do_rows, k_newest, v_newest,
                rows_full, k_empty, v_empty, k_ring, v_ring, full, empty,
                q, dout, k_rows, v_rows, delta, lse2, has_huge, dq, dk_parts, dv_parts,
                kv_bounds, q_start, sizes, q_strides, do_strides, k_strides, v_strides, dq_strides,
                part_sizes, items, chunks, steps, tiles,
                scale, log2_scale, k_narrow_bias, v_narrow_bias,
                GROUP, HAS_BOUNDS, HAS_Q_START, HAS_NARROW_BIAS, PARTS_FOLLOW_QUERIES,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, KEYS, P, BLOCK_N, SLOTS, TAIL,
            )),
            (_consume, (
                1, k_raw, v_raw, vq, vdo, q_rows, do_rows, k_newest, v_newest,
                rows_full, k_empty, v_empty, k_ring, v_ring, full, empty,
                q, dout, k_rows, v_rows, delta, lse2, has_huge, dq, dk_parts, dv_parts,
                kv_bounds, q_start, sizes, q_strides, do_strides, k_strides, v_strides, dq_strides,
                part_sizes, items, chunks, steps, tiles,
                scale, log2_scale, k_narrow_bias, v_narrow_bias,
                GROUP, HAS_BOUNDS, HAS_Q_START, HAS_NARROW_BIAS, PARTS_FOLLOW_QUERIES,
                HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, KEYS, P, BLOCK_N, SLOTS, TAIL,
            )),
            (_fetch_tiles, (
                k_wide, v_wide, k_tiles, v_tiles, full, empty, kv_bounds, q_start, sizes,
                items, chunks, steps, tiles, HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, SLOTS, TAIL,
            )),
            (_fetch_rows, (
                k_narrow, v_narrow, k_blocks, v_blocks, rows_full, k_empty, v_empty,
                kv_bounds, q_start, sizes, items, chunks, steps, tiles,
                GROUP, HAS_BOUNDS, HAS_Q_START, BLOCK_D, BLOCK_DV, ENTRIES, P, BLOCK_N, TAIL,
            )),
        ],
        [4, 1, 1], [240, 24, 24],
    )  # fmt: skip


def backward_narrow(problem: Problem, statistics: Statistics, dq: Tensor, config: Config) -> Parts:
    """Write dq [B, H, N, D], and return the parts of the narrow pair's gradients to be summed."""
    dout, delta, lse2, has_huge = statistics
    batch, _, seq, _ = problem.q.shape
    constants = problem.constants(dout, dq)
    block_d, block_dv = block(problem.q.shape[3]), block(dout.shape[3])
    kv_heads, *sizes = problem.sizes()
    heads, entries = triton.next_power_of_2(problem.group), ROWS // config.keys
    processors = problem.device.multiprocessors
    tiles = triton.cdiv(seq * heads, 2 * entries)
    steps, chunks = _division(tiles, batch * kv_heads, processors)
    parts = parts_of_queries(problem, heads, steps * 2 * entries, copies=_COPIES)
    assert parts is not None, "whoever chose this kernel asked `share_of`"
    items = batch * kv_heads * chunks
    q, dout = aligned(problem.q), aligned(dout)
    narrow = [_describable(t) for t in (problem.k_narrow, problem.v_narrow)]
    names = (
        "GROUP", "HAS_BOUNDS", "HAS_Q_START", "HAS_NARROW_BIAS", "HEAD_DIM", "VALUE_DIM",
        "BLOCK_D", "BLOCK_DV",
    )  # fmt: skip
    launch(
        hopper_backward_narrow_kernel, min(items, processors),
        q,
        describe(problem.k_wide, [1, 1, config.block_n, block_d]),
        describe(problem.v_wide, [1, 1, config.block_n, block_dv]),
        *(describe(t, [1, 1, config.keys, 64]) for t in narrow), *narrow,
        dout, delta, lse2, has_huge, dq, parts.dk, parts.dv, problem.kv_bounds, problem.q_start,
        items, chunks, steps, tiles, kv_heads, *sizes, *parts.numbers,
        *(stride // UNIT for t in (q, dout, *narrow) for stride in t.stride()[:3]),
        *dq.stride()[:3],
        problem.scale, problem.log2_scale, *problem.biases()[2:],
        **{name: constants[name] for name in names},
        PARTS_FOLLOW_QUERIES=parts.do_follow_queries,
        config=config,
    )  # fmt: skip
    return parts


def share_of(problem: Problem, config: Config) -> tuple[int, int] | None:
    """Return how many (batch rows, key-value heads) have their parts in memory at once.

    None: the parts of a single head would take more than they may.
    """
    batch, kv_heads, narrow_rows, head_dim = problem.k_narrow.shape
    entries, seq = ROWS // config.keys, problem.q.shape[2]
    per_position = triton.next_power_of_2(problem.group)
    tiles = triton.cdiv(seq * per_position, 2 * entries)
    row_bytes = 4 * _COPIES * (head_dim + problem.v_narrow.shape[3])
    limit = memory_for_parts(problem)
    for some_batch, some_heads in shares(batch, kv_heads):
        heads = some_batch * some_heads
        steps, chunks = _division(tiles, heads, problem.device.multiprocessors)
        span = steps * 2 * entries // per_position + 1 + sum(problem.narrow_reach)
        if heads * chunks * min(span, narrow_rows) * row_bytes <= limit:
            return some_batch, some_heads
    return None


def _division(tiles: int, heads: int, processors: int) -> tuple[int, int]:
    """Return how many tiles are an item, and how many items a head has.

    Large items make small parts, and small ones spread the work evenly.
    """
    for steps in (128, 64, 32, 16, 8):
        chunks = triton.cdiv(tiles, steps)
        if 2 * heads * chunks >= 7 * processors:
            return steps, chunks
    return steps, chunks


def _describable(tensor: Tensor) -> Tensor:
    """Return a tensor that the copy engine can read: itself, or a copy."""
    if can_describe(tensor):
        return tensor
    *rows, columns = tensor.shape
    space = tensor.new_empty(*rows, triton.cdiv(columns, UNIT) * UNIT)
    return space[..., :columns].copy_(tensor)
