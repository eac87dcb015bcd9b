"""The state of a warpgroup of the forward, in one register, and what a plan says of it."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from csrc_free.hopper.bring_tiles import HAS_TAIL, HIGH, INNER, NEW_EDGE, OLD_EDGE, OUTER, PASSES

# The state of a warpgroup, in one register. Bits that flip with every item, item that sees
# something, chunk, tail and group of tiles: what their barriers wait for.
ITEM = gl.constexpr(0)
QUERIES_OF_ITEM = gl.constexpr(1)
CHUNK_OF_OFFSETS = gl.constexpr(2)
END = gl.constexpr(3)
GROUP_OF_TILES = gl.constexpr(4)
FLIPS = gl.constexpr(31)
# Of the group of tiles: whether it is the last, whether a tail follows it, and, from one bit on,
# which of its tiles some row sees partly.
IS_LAST_GROUP = gl.constexpr(5)
IS_AT_TAIL = gl.constexpr(6)
PARTIAL = gl.constexpr(7)
OF_GROUP = gl.constexpr((1 << 17) - (1 << 5))
# Of the offset: whether it is the chunk's last, whether some row does not see its narrow key, and
# its number among the warpgroup's.
IS_LAST = gl.constexpr(17)
IS_HIDDEN = gl.constexpr(18)
THIS = gl.constexpr(19)
OF_OFFSET = gl.constexpr((1 << 27) - (1 << 17))
# Of the chunk: whether turns are left. Of the item: whether some row's maximum is huge.
IS_ON = gl.constexpr(27)
IS_HUGE = gl.constexpr(28)


@gluon.jit
def planned(plans, place):
    """Return one number of a plan, as a scalar."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    return gl.sum(plans.index(place).load(layout), 0)


@gluon.jit
def byte_of(word, SHIFT: gl.constexpr):
    return (word >> SHIFT) & 255


@gluon.jit
def is_set(number, SHIFT: gl.constexpr):
    return (number & (1 << SHIFT)) != 0


@gluon.jit
def this_offset(state):
    """Return the number of the offset at hand among the warpgroup's."""
    return (state >> THIS) & 31


@gluon.jit
def bits_of_offset(word, this):
    """Return the bits of offset number `this` of each warpgroup."""
    is_hidden = (2 * this < byte_of(word, INNER)) | (2 * this + 1 >= byte_of(word, OUTER))
    bits = (this == byte_of(word, PASSES) - 1).to(gl.int32) << IS_LAST
    return bits | is_hidden.to(gl.int32) << IS_HIDDEN | this << THIS


@gluon.jit
def bits_of_group(plans, plan, word, row, left, TILES: gl.constexpr, BLOCK_N: gl.constexpr):
    """Return the bits of a group of tiles, the first of which ends at `row`; `left` are left.

    Bit TILES of the partial ones is of the first tile of the next group.
    """
    number = (planned(plans, plan + HIGH) - row) // BLOCK_N
    new_edge = planned(plans, plan + NEW_EDGE)
    old_edge = planned(plans, plan + OLD_EDGE)
    bits = (left == 1).to(gl.int32) << IS_LAST_GROUP
    bits |= ((left == 1) & (byte_of(word, HAS_TAIL) != 0)).to(gl.int32) << IS_AT_TAIL
    for n in gl.static_range(TILES + 1):
        is_partial = (number + n < new_edge) | (number + n >= old_edge)
        bits |= is_partial.to(gl.int32) << PARTIAL + n
    return bits
