"""P and dS of a tile of wide keys and rows, on the key side."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from csrc_free.device.forms import STRASSEN
from csrc_free.hopper.assembly import pack_as, parts_of_rows
from csrc_free.hopper.half_range import largest_p
from csrc_free.hopper.key_plan import KEYS, ROWS

_KEYS = gl.constexpr(KEYS)
_ROWS = gl.constexpr(ROWS)


@gluon.jit
def _probabilities(
    s, of_keys, lse2_tile, i, whole, m, window, batch, seq, kv_bounds, log2_scale,
    FORM: gl.constexpr, HEADS: gl.constexpr, HAS_BOUNDS: gl.constexpr, IS_PLAIN: gl.constexpr,
    LARGEST: gl.constexpr, LAYOUT: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Return P of a tile [keys, rows] whose first query is i.

    `of_keys` is what stands in a key's logits besides, in log2 units. Tiles from `first` to `last`
    need no mask, and no cap at LARGEST. In a plain problem, causal and square, a key that a window
    reaches is there. Rows past the last query are zero in q and dout, and add nothing, whatever
    their P is, so long as it is finite.
    """
    first, last = whole
    shift = lse2_tile.load(LAYOUT)
    if FORM == STRASSEN:
        shift -= of_keys[:, None]
    p = gl.exp2(s * log2_scale - shift)
    if (i < first) | (i > last):
        (
            key_first, keys, start, wide_left, wide_right, narrow_left, narrow_right,
            narrow_first, narrow_end,
        ) = window  # fmt: skip
        lowest = start - wide_left - key_first
        highest = start + wide_right - key_first
        key = gl.arange(0, _KEYS, layout=gl.SliceLayout(1, LAYOUT))
        number = key // WIDE  # of its narrow key: m is number 0
        key = key % WIDE
        if HEADS == _ROWS:
            row = i
        else:
            key = key[:, None]
            number = number[:, None]
            row = i + (gl.arange(0, _ROWS, layout=gl.SliceLayout(0, LAYOUT)) // HEADS)[None, :]
        offset = key - row
        see_first = m - narrow_right - start
        see_last = m + narrow_left - start
        visible = (offset >= lowest) & (offset <= highest)
        if not IS_PLAIN:
            visible = visible & (key < keys - key_first)
        # Said of keys, not of rows: as scalars these cost uniform registers and spills.
        of_narrow = key - number
        visible = visible & (offset <= of_narrow - see_first) & (offset >= of_narrow - see_last)
        if (WIDE < _KEYS) and not IS_PLAIN:
            visible = visible & (number >= narrow_first - m) & (number < narrow_end - m)
        if HAS_BOUNDS:
            bound_ptrs = kv_bounds + (batch.to(gl.int64) * seq + gl.minimum(row, seq - 1)) * 2
            lo = gl.maximum(gl.load(bound_ptrs), 0)
            hi = gl.maximum(gl.load(bound_ptrs + 1), 0)
            visible = visible & (key >= lo - key_first) & (key < hi - key_first)
            visible = visible & (number >= lo - m) & (number < hi - m)
        if FORM == STRASSEN:
            visible = visible & (row < seq)
        if HEADS == _ROWS:
            visible = visible[:, None]
        p = gl.where(visible, gl.minimum(p, LARGEST), 0.0)
    return p


@gluon.jit
def weigh(
    s, y, sigma, of_keys, vv, dout_tile, delta_tile, lse2_tile, i, whole, m, window, batch, seq,
    kv_bounds, log2_scale, of_dp, FORM: gl.constexpr, HEADS: gl.constexpr,
    HAS_BOUNDS: gl.constexpr, IS_PLAIN: gl.constexpr, LAYOUT: gl.constexpr, A_OF_Y: gl.constexpr,
    WIDE: gl.constexpr,
):  # fmt: skip
    """Return dS of a tile [keys, rows] as an operand, y with its product under way, and sigma.

    sigma [keys, 4] are the sums of dS over rows, in parts.
    """
    dtype: gl.constexpr = dout_tile.dtype
    IS_HALF: gl.constexpr = dtype == gl.float16
    dp = warpgroup_mma(
        vv, dout_tile.permute((1, 0)), gl.zeros([_KEYS, _ROWS], gl.float32, LAYOUT),
        use_acc=False, is_async=True,
    )  # fmt: skip
    p = _probabilities(
        s, of_keys, lse2_tile, i, whole, m, window, batch, seq, kv_bounds, log2_scale,
        FORM, HEADS, HAS_BOUNDS, IS_PLAIN, largest_p(dtype), LAYOUT, WIDE,
    )  # fmt: skip
    y = warpgroup_mma(gl.convert_layout(pack_as(p, dtype), A_OF_Y), dout_tile, y, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    if IS_HALF:
        dp *= of_dp
    ds = p * (dp - delta_tile.load(LAYOUT))
    if FORM == STRASSEN:
        sigma += parts_of_rows(ds)
    return pack_as(ds, dtype), y, sigma
