"""The two warps that bring the narrow kernel its wide tiles and narrow rows, by TMA."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from csrc_free.hopper.channels import wait_empty
from csrc_free.hopper.entries import entries_of_position, place_of_tile


@gluon.jit
def bring_wide_tiles(
    k_wide, v_wide, k_ring, v_ring, full, empty, kv_bounds, q_start, sizes,
    items, chunks, steps, tiles, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    P: gl.constexpr, TILES_OF_POSITION: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
    TAIL: gl.constexpr,
):  # fmt: skip
    """Bring the wide tiles of every step, the newest first."""
    passed = 0
    wide_first = gl.maximum(sizes[2], sizes[3]) - sizes[2]
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first = item % chunks * steps
        for tile in range(first, gl.minimum(first + steps, tiles)):
            batch, kv_head, _, _, top, count, tails, _, _, _, _ = place_of_tile(
                item, tile, chunks, tiles, sizes, q_start, kv_bounds,
                HAS_BOUNDS, HAS_Q_START, P, TILES_OF_POSITION, BLOCK_N, TAIL, 1,
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
                coords = [batch, kv_head, row, 0]
                tma.async_copy_global_to_shared(
                    k_wide, coords, full.index(slot), k_ring.index(slot)
                )
                tma.async_copy_global_to_shared(
                    v_wide, coords, full.index(slot), v_ring.index(slot)
                )
                passed += 1


@gluon.jit
def bring_narrow_rows(
    k_narrow, v_narrow, k_blocks, v_blocks, rows_full, k_empty, v_empty,
    kv_bounds, q_start, sizes, items, chunks, steps, tiles,
    GROUP: gl.constexpr, HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, ENTRIES: gl.constexpr,
    P: gl.constexpr, TILES_OF_POSITION: gl.constexpr, BLOCK_N: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Bring each warpgroup the narrow keys and values of its pairs of entries, one step ahead."""
    n = 0
    narrow_first = gl.maximum(sizes[2], sizes[3]) - sizes[3]
    K_HALVES: gl.constexpr = BLOCK_D // 64
    V_HALVES: gl.constexpr = BLOCK_DV // 64
    PAIRS: gl.constexpr = (ENTRIES + 1) // 2
    HEADS: gl.constexpr = entries_of_position(GROUP, ENTRIES)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        first = item % chunks * steps
        for tile in range(first, gl.minimum(first + steps, tiles)):
            batch, kv_head, _, p0, _, count, _, _, _, _, _ = place_of_tile(
                item, tile, chunks, tiles, sizes, q_start, kv_bounds,
                HAS_BOUNDS, HAS_Q_START, P, TILES_OF_POSITION, BLOCK_N, TAIL, 1,
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
