"""The sum of the partial gradients of the narrow pair, in a fixed order."""

from dataclasses import dataclass

import triton
import triton.language as tl

from csrc_free.device.tiles import window_of
from csrc_free.traits import Device, Traits


@dataclass(frozen=True)
class Config:
    """A row a program, which one warp sums."""

    num_warps: int = 1
    num_stages: int = 3

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return 0: a warp adds what it has loaded."""
        return 0


@triton.jit
def slot_base(part, part_rows, PER_POSITION: tl.constexpr, shift):
    """Return the narrow row of a part's first slot: its first position, shifted."""
    return part * part_rows // PER_POSITION + shift


@triton.jit(
    do_not_specialize=[
        "rows", "parts", "slots", "part_rows", "part_shift",
        "narrow_left", "seq", "keys", "q_start_default",
    ]
)  # fmt: skip
def sum_parts_kernel(
    dk_parts, dv_parts, dk, dv, factors, q_start,
    kv_heads, rows, parts, slots, part_rows, part_shift, narrow_left, seq, keys, q_start_default,
    stride_dk_b, stride_dk_h, stride_dk_n, stride_dv_b, stride_dv_h, stride_dv_n,
    COPIES: tl.constexpr, PER_POSITION: tl.constexpr, PARTS_MOVE: tl.constexpr,
    PARTS_FOLLOW_QUERIES: tl.constexpr, HAS_Q_START: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program owns one narrow row of one key-value head.

    Parts are [parts, B, Hkv, COPIES, slots, D] in float32; slot s of a part holds the narrow row
    slot_base(part) + s. Where parts do not move, slot s is row s in each of them; where they follow
    the queries, it counts from the narrow window of the first query. factors are two for each
    key-value head, or None.
    """
    row = tl.program_id(0) % rows
    bh = (tl.program_id(0) // rows).to(tl.int64)
    heads = tl.num_programs(0) // rows
    batch = bh // kv_heads
    kv_head = bh % kv_heads
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    dk_sum = tl.zeros([BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_DV], tl.float32)
    first = 0
    last = parts - 1
    if PARTS_MOVE:
        if PARTS_FOLLOW_QUERIES:
            start = q_start_default
            if HAS_Q_START:
                start = tl.load(q_start + batch)
            narrow_begin, _narrow_end = window_of(start, narrow_left, 0, seq, keys)
            part_shift += narrow_begin - (keys - rows)
        first = tl.cdiv(tl.maximum(row - part_shift - slots + 1, 0) * PER_POSITION, part_rows)
        reached = (row - part_shift + 1) * PER_POSITION - 1
        last = tl.minimum(tl.where(reached < 0, -1, reached // part_rows), last)
    for part in range(first, last + 1):
        slot = row
        if PARTS_MOVE:
            slot -= slot_base(part, part_rows, PER_POSITION, part_shift)
        for copy in tl.static_range(COPIES):
            offs = ((part * heads + bh) * COPIES + copy) * slots + slot
            dk_sum += tl.load(
                dk_parts + offs * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0
            )
            dv_sum += tl.load(
                dv_parts + offs * VALUE_DIM + value_columns, mask=value_columns < VALUE_DIM,
                other=0.0,
            )  # fmt: skip
    if factors is not None:
        dk_sum *= tl.load(factors + 2 * bh)
        dv_sum *= tl.load(factors + 2 * bh + 1)
    dk_offs = batch * stride_dk_b + kv_head * stride_dk_h + row.to(tl.int64) * stride_dk_n
    tl.store(dk + dk_offs + columns, dk_sum, mask=columns < HEAD_DIM)
    dv_offs = batch * stride_dv_b + kv_head * stride_dv_h + row.to(tl.int64) * stride_dv_n
    tl.store(dv + dv_offs + value_columns, dv_sum, mask=value_columns < VALUE_DIM)
