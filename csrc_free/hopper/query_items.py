"""What the kernels of the query side share: items and what their rows see, rows made virtual.

An item is P consecutive positions of one key-value head. Its rows meet the wide keys in tiles that
count down from the last key that any of them sees.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from csrc_free.device.descriptors import are_rows_aligned
from csrc_free.hopper.assembly import opaque_zero
from csrc_free.rounding import ceil_div

FAR = gl.constexpr(2**31 - 1)
UNIT = 8  # numbers of two bytes in 16


@gluon.jit
def place(
    w, tiles, sizes, q_start, kv_bounds,
    HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr, P: gl.constexpr, BLOCK_N: gl.constexpr,
    TAIL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Return where item w stands, and the scalar ranges of what its rows see.

    (batch, kv_head, first query, its position, end of the wide keys, wide tiles, tails, first
    offset, offsets, first wide key that all rows see, end of those). Tiles count down from the end,
    but a tail, the last TAIL keys or less, comes before them as tile 0. All partitions of the
    program compute the same.
    """
    (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        q_start_default,
    ) = sizes  # fmt: skip
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
        mask = i < seq
        p = start + i
        bound_ptrs = kv_bounds + (batch.to(gl.int64) * seq + i) * 2
        low = gl.load(bound_ptrs, mask=mask, other=0)
        high = gl.load(bound_ptrs + 1, mask=mask, other=0)
        lo = gl.maximum(gl.maximum(p - wide_left, wide_first), low)
        hi = gl.minimum(gl.minimum(p + wide_right + 1, keys), high)
        narrow_lo = gl.maximum(gl.maximum(p - narrow_left, narrow_first), low)
        narrow_hi = gl.minimum(gl.minimum(p + narrow_right + 1, keys), high)
        sees = mask & (lo < hi) & (narrow_lo < narrow_hi)
        bottom = gl.min(gl.where(sees, lo, FAR), 0)
        top = gl.max(gl.where(sees, hi, -FAR), 0)
        full_lo = gl.max(gl.where(sees, lo, -FAR), 0)
        # Where a row sees nothing, every tile is masked.
        full_hi = gl.min(gl.where(mask, gl.where(sees, hi, -FAR), FAR), 0)
        offset_first = gl.min(gl.where(sees, p - narrow_hi + 1, FAR), 0)
        offset_last = gl.max(gl.where(sees, p - narrow_lo, -FAR), 0)
    else:
        bottom = gl.maximum(p0 - wide_left, wide_first)
        top = gl.minimum(p1 + wide_right + 1, keys)
        full_lo = gl.maximum(p1 - wide_left, wide_first)
        full_hi = gl.minimum(p0 + wide_right + 1, keys)
        offset_first = gl.maximum(-narrow_right, p0 - keys + 1)
        offset_last = gl.minimum(narrow_left, p1 - narrow_first)
    offsets = gl.where(bottom < top, gl.maximum(offset_last - offset_first + 1, 0), 0)
    count = gl.where(offsets > 0, (top - bottom + BLOCK_N - 1) // BLOCK_N, 0)
    tails = 0
    if TAIL > 0:
        tails = ((count > 1) & (top - bottom - (count - 1) * BLOCK_N <= TAIL)).to(gl.int32)
    return batch, kv_head, i0, p0, top, count, tails, offset_first, offsets, full_lo, full_hi


@gluon.jit
def to_float32(x):
    if x.dtype == gl.float16:
        y = x.to(gl.float32)
    else:
        y = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=gl.float32,
            is_pure=True, pack=2,
        )  # fmt: skip
    return y


@gluon.jit
def spread(rows, like, P: gl.constexpr, COLUMNS: gl.constexpr):
    """Load the narrow row of each position and repeat it for its heads, in the layout of `like`."""
    x = gl.reshape(like, [P, like.shape[0] // P, COLUMNS])
    found = gl.expand_dims(rows.load(gl.SliceLayout(1, x.type.layout)), 1)
    found, _ = gl.broadcast(found, x)
    return gl.convert_layout(gl.reshape(found, like.shape), like.type.layout, assert_trivial=True)


@gluon.jit
def seen_only(
    p, key, lo, hi, full_lo, full_hi, is_huge, LARGEST: gl.constexpr, N: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Return P of the N keys from `key` on: 0 beyond each row's [lo, hi); if huge, capped.

    Each of the three is rare. What is opaque keeps it behind its branch: LLVM would select, for
    every tile, between P and what the branch makes of it.
    """
    column = gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT))
    if key < full_lo:
        from_column = lo - key + opaque_zero()
        p = gl.where(column[None, :] >= from_column[:, None], p, 0.0)
    if key + N > full_hi:
        to_column = hi - key + opaque_zero()
        p = gl.where(column[None, :] < to_column[:, None], p, 0.0)
    if is_huge:
        p = gl.minimum(p, LARGEST + opaque_zero().to(gl.float32))
    return p


@gluon.jit
def gradient_of_logits(p, dp, row_delta, of_dp, IS_HALF: gl.constexpr):
    """Return dS, for float16 multiplied by a power of two in each row, which is in row_delta."""
    if IS_HALF:
        dp *= of_dp[:, None]
    return p * (dp - row_delta[:, None])


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor whose rows begin at multiples of 16 bytes: itself, or a copy."""
    if are_rows_aligned(tensor):
        return tensor
    *rows, columns = tensor.shape
    space = tensor.new_empty(*rows, ceil_div(columns, UNIT) * UNIT)
    return space[..., :columns].copy_(tensor)
