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
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from csrc_free.hopper.attend_query import attend_query
from csrc_free.hopper.bring_query import bring_rows, bring_tiles
from csrc_free.hopper.channels import barriers
from csrc_free.hopper.describe import describe
from csrc_free.hopper.half_range import Scaled
from csrc_free.hopper.layouts import permuted_rows
from csrc_free.hopper.query_items import UNIT, aligned
from csrc_free.launch import launch
from csrc_free.problem import NOT_SPECIALIZED, Problem, block
from csrc_free.rounding import ceil_div, next_power_of_2
from csrc_free.steps.delta import Statistics
from csrc_free.traits import Device, Traits

ROWS = 64
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
    num_warps: int = 8
    maxnreg: int = 168  # on average: 240 for the two warpgroups, 24 for the warps that bring

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
        and traits.dtype in (torch.bfloat16, torch.float16)
        and traits.block_d == traits.block_dv
        and traits.block_d in (64, 128)
        and traits.is_describable
        and 3 <= traits.group <= 64
    )


def _configs(traits: Traits) -> Iterator[Config]:
    heads = next_power_of_2(traits.group)
    block_n = 64 if traits.block_d == 128 else 128
    # With several positions to a tile, their windows end in a few keys more than whole tiles.
    tail = 16 if heads < 64 else 0
    for slots in (4, 3):
        yield Config(heads, block_n, slots, tail)


@gluon.jit(do_not_specialize=_NUMBERS)
def hopper_backward_query_kernel(
    q, k_wide, v_wide, k_narrow, v_narrow, dout, delta, lse2, has_huge, factors, row_factors,
    dq, kv_bounds, q_start,
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
    dtype: gl.constexpr = q.dtype
    P: gl.constexpr = 64 // HEADS
    of_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_D], dtype)
    of_value_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_DV], dtype)
    of_keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_D], dtype)
    of_values: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_DV], dtype)
    q_tile = gl.allocate_shared_memory(dtype, [1, P, HEADS, BLOCK_D], q.layout)
    do_tile = gl.allocate_shared_memory(dtype, [1, P, HEADS, BLOCK_DV], dout.layout)
    q_buffer = q_tile._reinterpret(dtype, [64, BLOCK_D], of_rows)
    do_buffer = do_tile._reinterpret(dtype, [64, BLOCK_DV], of_value_rows)
    vq = gl.allocate_shared_memory(dtype, [128, BLOCK_D], of_rows)
    vdo = gl.allocate_shared_memory(dtype, [128, BLOCK_DV], of_value_rows)
    k_tiles = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_N, BLOCK_D], k_wide.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, BLOCK_N, BLOCK_DV], v_wide.layout)
    k_ring = k_tiles._reinterpret(dtype, [SLOTS, BLOCK_N, BLOCK_D], of_keys)
    v_ring = v_tiles._reinterpret(dtype, [SLOTS, BLOCK_N, BLOCK_DV], of_values)
    k_rows = gl.allocate_shared_memory(dtype, [4, P, BLOCK_D], permuted_rows(P, BLOCK_D, 2))
    v_rows = gl.allocate_shared_memory(dtype, [4, P, BLOCK_DV], permuted_rows(P, BLOCK_DV, 2))
    k_pairs = k_rows._reinterpret(dtype, [2, 2 * P, BLOCK_D], permuted_rows(2 * P, BLOCK_D, 2))
    v_pairs = v_rows._reinterpret(dtype, [2, 2 * P, BLOCK_DV], permuted_rows(2 * P, BLOCK_DV, 2))
    full = barriers(SLOTS, 1)
    empty = barriers(SLOTS, 1)
    rows_full = barriers(2, 1)
    rows_empty = barriers(2, 1)
    q_full = barriers(1, 1)
    q_empty = barriers(1, 1)
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
            (attend_query, (
                q_buffer, do_buffer, q_full, q_empty, k_ring, v_ring, full, empty,
                k_pairs, v_pairs, rows_full, rows_empty, vq, vdo,
                delta, lse2, has_huge, factors, row_factors, dq, kv_bounds, q_start,
                sizes, dq_strides, items, tiles, scale, log2_scale, biases,
                FORM, GROUP, HAS_BOUNDS, HAS_Q_START, HAS_WIDE_BIAS, HAS_NARROW_BIAS, HEAD_DIM,
                BLOCK_D, BLOCK_DV, P, BLOCK_N, SLOTS, TAIL,
            )),
            (bring_tiles, (
                q, dout, k_wide, v_wide, q_tile, do_tile, q_full, q_empty,
                k_tiles, v_tiles, full, empty, kv_bounds, q_start, sizes, items, tiles,
                GROUP, HAS_BOUNDS, HAS_Q_START, P, BLOCK_N, SLOTS, TAIL,
            )),
            (bring_rows, (
                k_rows, v_rows, rows_full, rows_empty, k_narrow, v_narrow,
                kv_bounds, q_start, sizes, narrow_strides, items, tiles,
                HAS_BOUNDS, HAS_Q_START, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
                P, BLOCK_N, SLOTS, TAIL,
            )),
        ],
        [1, 1], [24, 24],
    )  # fmt: skip


def backward_query(
    problem: Problem, statistics: Statistics, dq: Tensor, config: Config,
    scaled: Scaled | None = None,
) -> None:  # fmt: skip
    """Write dq [B, H, N, D] with what `choose` found for the problem."""
    dout, delta, lse2, has_huge = statistics
    factors = row_factors = None
    if scaled is not None:
        problem, delta, lse2, factors, row_factors = scaled
    batch, _, seq, _ = problem.q.shape
    constants = problem.constants(dout, dq)
    block_d, block_dv = block(problem.q.shape[3]), block(dout.shape[3])
    positions = ROWS // config.heads
    tiles = ceil_div(seq, positions)
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
        delta, lse2, has_huge, factors, row_factors, dq, problem.kv_bounds, problem.q_start,
        items, tiles, kv_heads, *sizes,
        *(stride // UNIT for t in narrow for stride in t.stride()[:3]), *dq.stride()[:3],
        problem.scale, problem.log2_scale, *problem.biases(),
        **{name: constants[name] for name in names},
        config=config,
    )  # fmt: skip
