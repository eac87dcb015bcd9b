"""Rings of shared memory between warps: a slot is full when its bytes are there, empty when read.

Of one ring the full and the empty barriers are told apart by name; pass `turn` of a slot's use is
how often the slot was used before. A producer waits for the pass before its own to be empty, and at
turn 0 for none.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from csrc_free.hopper.assembly import thread_barrier


@gluon.jit
def barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """Return SLOTS barriers, each of which completes with ARRIVALS arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(made.index(slot), count=ARRIVALS)
    return made


@gluon.jit
def wait_full(full, slot, turn):
    """Wait until a slot's bytes of this turn are there."""
    mbarrier.wait(full.index(slot), turn & 1)


@gluon.jit
def wait_empty(empty, slot, turn):
    """Wait until all readers are done with the turn before this one."""
    mbarrier.wait(empty.index(slot), (turn & 1) ^ 1)


@gluon.jit
def arrive(barrier, slot):
    """Say that this warpgroup or warp is done with a slot.

    The barrier of threads right behind keeps Triton from placing one where the branches of an
    enclosing `if` join, which every pass would meet (1.04 of cuDNN for 1.01; H100, 2026-11-25).
    """
    mbarrier.arrive(barrier.index(slot), count=1)
    thread_barrier()


@gluon.jit
def arrive_at_both(barrier, slot, other, other_slot):
    """Say that this warpgroup or warp is done with a slot of each of two rings."""
    mbarrier.arrive(barrier.index(slot), count=1)
    mbarrier.arrive(other.index(other_slot), count=1)
    thread_barrier()
