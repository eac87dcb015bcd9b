"""All four key-value gradients on Hopper, in four matrix products.

For a narrow key m and a tile of wide keys j, with X = sum of dS · q and Y = sum of P · dout over
the queries that see m:

    dk_wide += scale · k_m ∘ X      dk_m = scale · sum over j of k_j ∘ X[j]
    dv_wide += v_m ∘ Y              dv_m = sum over j of v_j ∘ Y[j]

so the inner loop is that of plain flash attention, with virtual keys k_j ∘ k_m: those of 64 wide
keys at one narrow key or, since fewer queries see all of so many, of 32 at two or 16 at four. That
is the trilinear form. For strassen the virtual keys are k_j + k_m, a logit has k_j · k_m besides,
and with σ[j] = sum of dS

    dk_wide += scale · (X + σ k_m)  dk_m = scale · sum over j of (X[j] + σ[j] k_j)

For determinants, whose columns `ordered` moved, they are k_j × k_m in the threes, and

    dk_wide += scale · k_m × X      dk_m = scale · sum over j of X[j] × k_j
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from csrc_free.device.forms import CODES
from csrc_free.hopper.bring_keys import bring_keys
from csrc_free.hopper.channels import barriers
from csrc_free.hopper.describe import describe
from csrc_free.hopper.half_range import Scaled
from csrc_free.hopper.key_items import apart_of
from csrc_free.hopper.key_plan import KEYS, ROWS, Plan
from csrc_free.hopper.splits import add_splits, sums_of_splits
from csrc_free.hopper.sum_keys import sum_keys
from csrc_free.launch import launch
from csrc_free.problem import Problem, block
from csrc_free.rounding import ceil_div, next_power_of_2
from csrc_free.steps.delta import Statistics
from csrc_free.steps.parts import Parts
from csrc_free.traits import Device, Traits

_KEYS = gl.constexpr(KEYS)
_ROWS = gl.constexpr(ROWS)
_RESERVE = 1000  # bytes: barriers, and what the warps are told

# Sizes that change from call to call: one compiled kernel serves them all.
NOT_SPECIALIZED = (
    "kv_heads", "seq", "wide_rows", "narrow_rows",
    "wide_left", "wide_right", "narrow_left", "narrow_right", "q_start_default",
    "items", "heads", "splits", "tiles", "tiles_of_a_part", "slots", "part_rows", "part_shift",
)  # fmt: skip


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def hopper_backward_keys_kernel(
    q, dout, delta, lse2, k_wide, v_wide,
    k_narrow, v_narrow, has_huge, dk_wide, dv_wide, dk_parts, dv_parts, kv_bounds, spans, q_start,
    factors,
    kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
    q_start_default, items, heads, splits, tiles, tiles_of_a_part, slots, part_rows, part_shift,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_dk_b, stride_dk_h, stride_dk_n, stride_dv_b, stride_dv_h, stride_dv_n,
    scale, log2_scale, k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
    FORM: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, STAGES: gl.constexpr,
    HAS_BOUNDS: gl.constexpr, HAS_Q_START: gl.constexpr, HAS_BIAS: gl.constexpr,
    DO_ACCUMULATE: gl.constexpr, IS_CAUSAL: gl.constexpr, IS_SQUARE: gl.constexpr,
    INDEX: gl.constexpr, LAG: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """A persistent program takes items: some tiles of WIDE keys, or one and some of its turns.

    For each tile it loops over turns of narrow keys, 64 / WIDE for either of two warpgroups, and
    inside over tiles of 64 rows, (64 / HEADS positions) x HEADS heads, which a third brings. The
    wide pair's sums stay in shared memory for the whole tile.

    q and dout are descriptors of [B, Hkv, N, G, D], delta and lse2 of [B * Hkv, N * G], the wide
    pair of [B, Hkv, rows, D]. Parts are zeroed float32 [parts, B, Hkv, slots, D].
    """
    NARROW: gl.constexpr = _KEYS // WIDE
    APART: gl.constexpr = apart_of(LAG, _ROWS // HEADS, NARROW)
    dtype: gl.constexpr = q.dtype
    rows_of_k: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    float32_rows: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, _ROWS, BLOCK_D], rows_of_k)
    dout_tiles = gl.allocate_shared_memory(dtype, [STAGES, _ROWS, BLOCK_DV], rows_of_k)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, _ROWS], delta.layout)
    lse2_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 1, _ROWS], lse2.layout)
    k_tile = gl.allocate_shared_memory(dtype, [WIDE, BLOCK_D], rows_of_k)
    v_tile = gl.allocate_shared_memory(dtype, [WIDE, BLOCK_DV], rows_of_k)
    vk = gl.allocate_shared_memory(dtype, [2, _KEYS, BLOCK_D], rows_of_k)
    vv = gl.allocate_shared_memory(dtype, [2, _KEYS, BLOCK_DV], rows_of_k)
    dk_sums = gl.allocate_shared_memory(gl.float32, [_KEYS, BLOCK_D], float32_rows)
    dv_sums = gl.allocate_shared_memory(gl.float32, [_KEYS, BLOCK_DV], float32_rows)
    k_rows = gl.allocate_shared_memory(dtype, [2, NARROW, BLOCK_D], plain)
    v_rows = gl.allocate_shared_memory(dtype, [2, NARROW, BLOCK_DV], plain)
    rows_full = barriers(3 * STAGES, 1)  # for tiles of warpgroup 0, of 1, of both
    rows_empty = barriers(STAGES, 2)
    keys_full = barriers(1, 1)
    keys_empty = barriers(1, 2)
    dk_turn = barriers(2, 1)
    dv_turn = barriers(2, 1)
    fence_async_shared()

    sizes = (
        kv_heads, seq, wide_rows, narrow_rows, wide_left, wide_right, narrow_left, narrow_right,
        q_start_default,
    )  # fmt: skip
    strides = (
        stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
        stride_dk_b, stride_dk_h, stride_dk_n, stride_dv_b, stride_dv_h, stride_dv_n,
    )  # fmt: skip
    gl.warp_specialize([
        (sum_keys, (
            0,
            k_narrow, v_narrow, has_huge, dk_wide, dv_wide, dk_parts, dv_parts, kv_bounds, spans,
            q_start, factors, q_tiles, dout_tiles, delta_tiles, lse2_tiles, k_tile, v_tile,
            vk.index(0), vv.index(0), k_rows.index(0), v_rows.index(0), dk_sums, dv_sums,
            rows_full, rows_empty, keys_full, keys_empty, dk_turn, dv_turn,
            sizes, items, heads, splits, tiles, tiles_of_a_part, slots, part_rows, part_shift,
            strides,
    scale, log2_scale,
            k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
            FORM, HEADS, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, STAGES,
            HAS_BOUNDS, HAS_Q_START, HAS_BIAS, DO_ACCUMULATE, IS_CAUSAL, IS_SQUARE, INDEX,
            APART, WIDE,
        )),
        (sum_keys, (
            1,
            k_narrow, v_narrow, has_huge, dk_wide, dv_wide, dk_parts, dv_parts, kv_bounds, spans,
            q_start, factors, q_tiles, dout_tiles, delta_tiles, lse2_tiles, k_tile, v_tile,
            vk.index(1), vv.index(1), k_rows.index(1), v_rows.index(1), dk_sums, dv_sums,
            rows_full, rows_empty, keys_full, keys_empty, dk_turn, dv_turn,
            sizes, items, heads, splits, tiles, tiles_of_a_part, slots, part_rows, part_shift,
            strides,
    scale, log2_scale,
            k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
            FORM, HEADS, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, STAGES,
            HAS_BOUNDS, HAS_Q_START, HAS_BIAS, DO_ACCUMULATE, IS_CAUSAL, IS_SQUARE, INDEX,
            APART, WIDE,
        )),
        (bring_keys, (
            q, dout, delta, lse2, k_wide, v_wide, spans, q_start,
            q_tiles, dout_tiles, delta_tiles, lse2_tiles, k_tile, v_tile,
            rows_full, rows_empty, keys_full, keys_empty, sizes, items, heads, splits, tiles,
    tiles_of_a_part,
            HEADS, BLOCK_D, BLOCK_DV, STAGES, HAS_BOUNDS, HAS_Q_START, IS_CAUSAL, IS_SQUARE,
            APART, WIDE,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Two warpgroups and a warp that brings rows, STAGES tiles of them ahead."""

    stages: int = 2
    num_warps: int = 4
    maxnreg: int = 168  # on average: 240 for the two warpgroups, 24 for the warp

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        columns = traits.block_d + traits.block_dv
        tiles = (self.stages + 1 + 2) * 2 * KEYS * columns  # rows, keys, virtual keys of each
        sums = 4 * KEYS * columns
        rows = 2 * 4 * ROWS * self.stages + 4 * 4 * columns  # statistics, narrow rows
        return tiles + sums + rows + _RESERVE


def backward_keys(
    problem: Problem, statistics: Statistics, plan: Plan, parts: Parts,
    dk_wide: Tensor, dv_wide: Tensor, spans: Tensor | None, scaled: Scaled | None = None,
) -> None:  # fmt: skip
    """Write the wide pair's gradients, and fill the narrow pair's parts.

    For float16 some of what it takes is multiplied by powers of two, and so are the parts.
    """
    delta, lse2, factors = statistics.delta, statistics.lse2, None
    if scaled is not None:
        problem, delta, lse2, factors, _ = scaled
    batch, kv_heads, wide_rows, head_dim = problem.k_wide.shape
    value_dim = problem.v_wide.shape[3]
    heads = batch * kv_heads
    sums = sums_of_splits((dk_wide, dv_wide), plan.splits)
    items = parts.count * plan.splits * heads
    slots_of_rows = next_power_of_2(problem.group)
    launch(
        hopper_backward_keys_kernel, min(problem.device.multiprocessors, items),
        *(_rows(t, problem.group) for t in (problem.q, statistics.dout)),
        _statistic(delta, slots_of_rows, 0.0),
        _statistic(lse2, slots_of_rows, math.inf),
        *(
            describe(t, [1, 1, plan.keys, block(t.shape[3])])
            for t in (problem.k_wide, problem.v_wide)
        ),
        problem.k_narrow, problem.v_narrow, statistics.has_huge, *sums, parts.dk, parts.dv,
        problem.kv_bounds, spans, problem.q_start, factors,
        *problem.sizes(), items, heads, plan.splits, ceil_div(wide_rows, plan.keys), plan.tiles,
        *parts.numbers,
        *problem.k_narrow.stride()[:3], *problem.v_narrow.stride()[:3],
        *(stride for t in sums for stride in t.stride()[-4:-1]),
        problem.scale, problem.log2_scale, *problem.biases(),
        FORM=CODES[problem.form], HEADS=slots_of_rows, DO_ACCUMULATE=plan.tiles > 1,
        HEAD_DIM=head_dim, VALUE_DIM=value_dim,
        BLOCK_D=block(head_dim), BLOCK_DV=block(value_dim),
        HAS_BOUNDS=problem.kv_bounds is not None, HAS_Q_START=problem.q_start is not None,
        HAS_BIAS=any(problem.biases()),
        IS_CAUSAL=problem.wide_reach[1] == problem.narrow_reach[1] == 0,
        IS_SQUARE=problem.q_start is None and problem.q.shape[2] == wide_rows
        and wide_rows == problem.k_narrow.shape[2],
        INDEX=problem.constants()["INDEX"], LAG=lag_of(problem), WIDE=plan.keys,
        config=Config(),
    )  # fmt: skip
    add_splits((dk_wide, dv_wide), sums, plan.splits)


def lag_of(problem: Problem) -> int:
    """Return by how many tiles of rows the second warpgroup's key is after the first one's.

    While one adds up a key's sums, the other multiplies. A tile that only one needs is brought for
    it alone, so windows of few tiles want a shorter way.
    """
    positions = ROWS // next_power_of_2(problem.group)
    width = problem.narrow_width
    return next((lag for lag in (4, 2) if 2 * lag * positions <= width), 1)


def _rows(tensor: Tensor, group: int) -> TensorDescriptor:
    """Describe q or dout [B, H, N, D] as [B, Hkv, N, G, D], in tiles of ROWS rows.

    A tile has a power of two of heads to a position: those beyond G are zero.
    """
    heads = next_power_of_2(group)
    rows = tensor.unflatten(1, (-1, group)).transpose(2, 3)
    return describe(rows, [1, 1, ROWS // heads, heads, block(tensor.shape[3])])


def _statistic(tensor: Tensor, heads: int, beyond: float) -> TensorDescriptor:
    """Describe a statistic [B, Hkv, N, G] as [B * Hkv, N * heads]: those past G are `beyond`."""
    group = tensor.shape[3]
    if heads != group:
        tensor = torch.nn.functional.pad(tensor, (0, heads - group), value=beyond)
    return describe(tensor.flatten(2).flatten(0, 1), [1, ROWS])
