"""Entries (position, head) and their narrow keys: rows of a tile, and of a part of the gradients.

The 64 rows of a warpgroup are ENTRIES entries times KEYS narrow keys. Two entries are a pair: the
rows of one key are two rows of the same thread.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from csrc_free.device.forms import DETERMINANT, STRASSEN
from csrc_free.hopper.assembly import of_rows, pack_as, thread_barrier
from csrc_free.hopper.layouts import accumulator, rows_of
from csrc_free.hopper.query_items import place, spread, to_float32
from csrc_free.hopper.threes import cross, rounded_cross


@gluon.constexpr_function
def entries_of_position(group, entries):
    """Return the entries of a position, of which those past the group's heads are nobody's.

    A tile has 2 * entries: several positions, or some heads of one.
    """
    power = 1 << (group - 1).bit_length()
    return power if power <= 2 * entries else -(-group // (2 * entries)) * 2 * entries


@gluon.constexpr_function
def positions_of_tile(group, entries):
    """Return how many positions a tile has, each with all its heads, or 1."""
    return max(2 * entries // entries_of_position(group, entries), 1)


@gluon.constexpr_function
def tiles_of_position(group, entries):
    """Return how many tiles a position has."""
    return max(entries_of_position(group, entries) // (2 * entries), 1)


@gluon.jit
def place_of_tile(
    item, tile, chunks, tiles, sizes, q_start, kv_bounds,
    HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr, P: gl.constexpr,
    TILES_OF_POSITION: gl.constexpr, BLOCK_N: gl.constexpr, TAIL: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Return what `place` says of a tile; tiles are counted from the first query on."""
    places = tiles // TILES_OF_POSITION
    return place(
        item // chunks * places + places - 1 - tile // TILES_OF_POSITION, places, sizes, q_start,
        kv_bounds, HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, TAIL, WARPS,
    )  # fmt: skip


@gluon.constexpr_function
def _loaded(rows, columns):
    """Return the layout in which a warpgroup loads a few rows from memory."""
    across = max(4 // rows, 1)
    return gl.BlockedLayout([1, 2], [1, 32], [4 // across, across], [1, 0])


@gluon.jit
def load_entries(
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
    offs = batch.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1]
    offs += i.to(gl.int64) * strides[2]
    mask = (i < seq) & (entries % HEADS < GROUP)
    return gl.load(
        pointer + (offs * 8)[:, None] + columns[None, :],
        mask=mask[:, None] & (columns < DIMS)[None, :], other=0.0,
    )  # fmt: skip


@gluon.jit
def load_newest(
    pointer, strides, batch, kv_head, row, rows,
    PAIRS: gl.constexpr, DIMS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Load narrow rows row, row + 2, ...: those that a pair's second entry sees, not its first."""
    layout: gl.constexpr = _loaded(PAIRS, COLUMNS)
    row += 2 * gl.arange(0, PAIRS, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    offs = batch.to(gl.int64) * strides[0] + kv_head.to(gl.int64) * strides[1]
    offs += row.to(gl.int64) * strides[2]
    return gl.load(
        pointer + (offs * 8)[:, None] + columns[None, :],
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
def rows_of_entries(rows, like, ENTRIES: gl.constexpr):
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
def narrow_rows_of(
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
def virtual_keys(
    raw, newest, rows, mask, bias, FORM: gl.constexpr, HAS_BIAS: gl.constexpr,
    KEYS: gl.constexpr, ENTRIES: gl.constexpr, IS_SHIFTED: gl.constexpr,
):  # fmt: skip
    """Return what a form makes of narrow rows [64, columns] and the rows of their entries.

    0 where not seen; and what else stands in its logits, a number for each row.
    """
    COLUMNS: gl.constexpr = raw.shape[1]
    like = gl.zeros([64, COLUMNS], raw.dtype, accumulator(COLUMNS))
    x = narrow_rows_of(raw, newest, like, KEYS, ENTRIES, IS_SHIFTED)
    y = rows_of_entries(rows, like, ENTRIES)
    constant = 0.0
    if HAS_BIAS or FORM == STRASSEN:
        x = to_float32(x) + bias
        y = to_float32(y)
        if FORM == STRASSEN:
            constant = gl.sum(x * y, 1)
            made = pack_as(x + y, raw.dtype)
        else:
            made = pack_as(cross(x, y) if FORM == DETERMINANT else x * y, raw.dtype)
    else:
        made = rounded_cross(x, y) if FORM == DETERMINANT else x * y
    mask = gl.convert_layout(mask, rows_of(accumulator(COLUMNS)), assert_trivial=True)
    return of_rows(mask, made, gl.zeros_like(made)), constant


@gluon.jit
def of_query(t, sigma, narrow, FORM: gl.constexpr):
    """Return what each row adds to dq: t are its sums of dS · k over wide keys, sigma of dS."""
    if FORM == DETERMINANT:
        return cross(t, narrow)
    return t + sigma[:, None] * narrow if FORM == STRASSEN else t * narrow


@gluon.jit
def of_narrow_key(t, sigma, query, FORM: gl.constexpr):
    """Return what each row adds to the gradient of its narrow key."""
    if FORM == DETERMINANT:
        return cross(query, t)
    return t + sigma[:, None] * query if FORM == STRASSEN else t * query


@gluon.jit
def split_pairs(x, ENTRIES: gl.constexpr):
    """Return the rows of the first and of the second entry of each pair, [32, columns] each."""
    COLUMNS: gl.constexpr = x.shape[1]
    first, second = gl.split(gl.permute(_by_pairs(x, ENTRIES), (0, 1, 3, 4, 2)))
    return gl.reshape(first, [32, COLUMNS]), gl.reshape(second, [32, COLUMNS])


@gluon.jit
def add_to_part(
    part, base, slots, value, first_entry: gl.constexpr, HEADS: gl.constexpr, DIMS: gl.constexpr,
    KEYS: gl.constexpr, ENTRIES: gl.constexpr, IS_SHIFTED: gl.constexpr,
):  # fmt: skip
    """Add the rows of a step to a part, of which `base` is the slot of position 0's first key.

    What the entries of a pair add to one key is added first; one pair comes after another.
    """
    if ENTRIES == 1:
        _add_rows(part, base + first_entry // HEADS, slots, value, 0, 64, DIMS, KEYS)
    else:
        first, second = split_pairs(value, ENTRIES)
        layout: gl.constexpr = first.type.layout
        y = gl.arange(0, 32, layout=rows_of(layout)) % KEYS
        both = first + second
        if IS_SHIFTED:
            both = gl.where((y == 0)[:, None], first, both)
        for g in gl.static_range(ENTRIES // 2):
            slot = base + (first_entry + 2 * g) // HEADS
            _add_rows(part, slot, slots, both, g * KEYS, KEYS, DIMS, KEYS)
            if IS_SHIFTED:
                _add_rows(part, slot + KEYS, slots, second, g * KEYS, 1, DIMS, KEYS)
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
    ptrs = part + (slot * DIMS)[:, None] + column[None, :]
    if (value.shape[0] == count) and (value.shape[1] == DIMS):
        gl.atomic_add(ptrs, value, sem="relaxed")
    else:
        mask = (row >= first) & (row < first + count)
        gl.atomic_add(ptrs, value, mask=mask[:, None] & (column < DIMS)[None, :], sem="relaxed")
