"""The forward for groups of fewer than 64 heads: a tile is P positions of all heads of a group.

Row r of a tile is head r % HEADS of position r // HEADS, where HEADS is the group, or the power of
two above it, and P · HEADS = 64. Work and warps are those of `forward`: here the rows of one
position share a narrow key, and the newest and oldest of the wide keys are masked. Where P is
small, a tail of a few keys holds what P - 1 more positions see, instead of another tile.

The narrow keys of an offset are P consecutive rows of one buffer, which begin a row later for the
offset before.
"""

import functools

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from csrc_free.device.descriptors import can_describe
from csrc_free.device.forms import CODES
from csrc_free.hopper.assembly import declare_flags
from csrc_free.hopper.attend_tiles import attend_tiles
from csrc_free.hopper.bring_tiles import NUMBERS, ROWS, SPANS, UNIT, bring_rows, bring_wide
from csrc_free.hopper.channels import barriers
from csrc_free.hopper.describe import describe, given_or, matrix
from csrc_free.hopper.layouts import plain
from csrc_free.hopper.tiles_config import Config, choose
from csrc_free.launch import launch
from csrc_free.problem import Problem
from csrc_free.rounding import ceil_div


@gluon.jit(do_not_specialize=(
    "has_q_start", "items", "tiles", "kv_heads", "group", "seq", "keys", "wide_rows", "narrow_rows",
    "wide_left", "wide_right", "narrow_left", "narrow_right", "start",
))  # fmt: skip
def hopper_forward_tiles_kernel(
    q, k_wide, v_wide, k_end, v_end, k_narrow, v_narrow, out, lse, kv_bounds, q_start, has_q_start,
    items, tiles, kv_heads, group, seq, keys, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, start,
    stride_o_b, stride_o_h, stride_o_n,
    log2_scale, k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
    FORM: gl.constexpr, HAS_WIDE_BIAS: gl.constexpr, HAS_NARROW_BIAS: gl.constexpr,
    HAS_BOUNDS: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    P: gl.constexpr, BLOCK_N: gl.constexpr, TILES: gl.constexpr, TAIL: gl.constexpr,
    CHUNK: gl.constexpr, NARROW_ROWS: gl.constexpr,
    Q_LAYOUT: gl.constexpr, K_LAYOUT: gl.constexpr, V_LAYOUT: gl.constexpr,
    K_END_LAYOUT: gl.constexpr, V_END_LAYOUT: gl.constexpr,
    K_ROW: gl.constexpr, V_ROW: gl.constexpr, K_BY_HEADS: gl.constexpr, V_BY_HEADS: gl.constexpr,
    Q_BY_SIDES: gl.constexpr,
):  # fmt: skip
    """One program owns every num_programs-th item: P positions of one kv head, their out and lse.

    Inputs are descriptors, k_end and v_end those of the wide pair for a tail.
    """
    declare_flags()
    dtype: gl.constexpr = k_wide.dtype
    HEADS: gl.constexpr = ROWS // P
    ENDS: gl.constexpr = TAIL if TAIL > 0 else BLOCK_N
    V_UNIT: gl.constexpr = NARROW_ROWS * BLOCK_D // UNIT
    units = gl.allocate_shared_memory(
        dtype, [V_UNIT + NARROW_ROWS * BLOCK_DV // UNIT, 1, UNIT], plain(2)
    )
    q_tile = gl.allocate_shared_memory(dtype, [1, 1, P, HEADS, BLOCK_D], q.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [TILES, 1, 1, BLOCK_N, BLOCK_D], k_wide.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [TILES, 1, 1, BLOCK_N, BLOCK_DV], v_wide.layout)
    if TAIL > 0:
        k_tail = gl.allocate_shared_memory(dtype, [1, 1, ENDS, BLOCK_D], k_end.layout)
        v_tail = gl.allocate_shared_memory(dtype, [1, 1, ENDS, BLOCK_DV], v_end.layout)
    else:
        k_tail = k_tiles.index(0)
        v_tail = v_tiles.index(0)
    q_matrix = q_tile._reinterpret(dtype, [1, ROWS, BLOCK_D], Q_LAYOUT)
    k_matrices = k_tiles._reinterpret(dtype, [TILES, BLOCK_N, BLOCK_D], K_LAYOUT)
    v_matrices = v_tiles._reinterpret(dtype, [TILES, BLOCK_N, BLOCK_DV], V_LAYOUT)
    k_end_matrix = k_tail._reinterpret(dtype, [ENDS, BLOCK_D], K_END_LAYOUT)
    v_end_matrix = v_tail._reinterpret(dtype, [ENDS, BLOCK_DV], V_END_LAYOUT)
    hand_out = gl.allocate_shared_memory(
        gl.float32, [2 * ROWS, BLOCK_DV // 2], gl.SwizzledSharedLayout(2, 1, 16, [1, 0])
    )
    hand_sums = gl.allocate_shared_memory(gl.float32, [3, 2 * ROWS], plain(1))
    plans = gl.allocate_shared_memory(gl.int32, [2 * NUMBERS, 1], plain(1))
    spans = gl.allocate_shared_memory(gl.int32, [2 * SPANS, 2 * ROWS], plain(1))
    k_full = barriers(TILES, 1)
    k_empty = barriers(TILES, 1)
    v_full = barriers(TILES, 1)
    v_empty = barriers(TILES, 1)
    tail_full = barriers(1, 1)
    tail_empty = barriers(1, 1)
    rows_full = barriers(1, 1)
    rows_empty = barriers(1, 1)
    values_full = barriers(1, 1)
    values_empty = barriers(1, 1)
    q_full = barriers(1, 1)
    q_empty = barriers(1, 1)
    fence_async_shared()
    grid = (items, tiles, kv_heads, group, seq)
    view = (
        kv_bounds, q_start, has_q_start, keys, wide_rows, narrow_rows,
        wide_left, wide_right, narrow_left, narrow_right, start,
    )  # fmt: skip
    out_strides = (stride_o_b, stride_o_h, stride_o_n)
    biases = (k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias)
    gl.warp_specialize([
        (attend_tiles, (
            q_matrix, k_matrices, v_matrices, k_end_matrix, v_end_matrix, units, plans, spans,
            q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty,
            rows_full, rows_empty, values_full, values_empty, hand_out, hand_sums, out, lse,
            grid, out_strides, log2_scale, biases,
            FORM, HAS_WIDE_BIAS, HAS_NARROW_BIAS, P, VALUE_DIM, BLOCK_D, BLOCK_DV,
            BLOCK_N, TILES, TAIL, CHUNK, NARROW_ROWS, V_UNIT,
            K_ROW, V_ROW, K_BY_HEADS, V_BY_HEADS, Q_BY_SIDES,
        )),
        (bring_wide, (
            q, k_wide, v_wide, k_end, v_end, q_tile, k_tiles, v_tiles, k_tail, v_tail,
            q_full, q_empty, k_full, k_empty, v_full, v_empty, tail_full, tail_empty,
            grid, view, P, HAS_BOUNDS, BLOCK_N, TILES, TAIL, CHUNK,
        )),
        (bring_rows, (
            k_narrow, v_narrow, units, plans, spans,
            rows_full, rows_empty, values_full, values_empty,
            grid, view, P, HAS_BOUNDS, BLOCK_D, BLOCK_DV, BLOCK_N, TILES, TAIL, CHUNK, V_UNIT,
        )),
    ], [1, 1], [24, 24])  # fmt: skip


@functools.cache
def _by_heads(p: int, columns: int) -> gl.DistributedLinearLayout:
    """Return the layout [2, P, 64 / P, columns] that is a product's rows, once reshaped."""
    heads = 64 // p

    def row(bit: int) -> list[int]:
        return [0, 2**bit // heads, 2**bit % heads, 0]

    wide = [[0, 0, 0, 2**bit] for bit in range(3, columns.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 1], row(3), *wide], [[0, 0, 0, 2], [0, 0, 0, 4], row(0), row(1), row(2)],
        [row(4), row(5), [1, 0, 0, 0]], [], [2, p, heads, columns],
    )  # fmt: skip


@functools.cache
def _by_sides(columns: int) -> gl.DistributedLinearLayout:
    """Return the layout [2, 64, columns] that is a product's rows, once reshaped."""
    wide = [[0, 0, 2**bit] for bit in range(3, columns.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 8, 0], *wide], [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[0, 16, 0], [0, 32, 0], [1, 0, 0]], [], [2, 64, columns],
    )  # fmt: skip


@functools.cache
def _row_layout(config: Config, columns: int) -> object:
    """Return the layout of narrow rows in shared memory."""
    within = [[0, 1], [0, 2], [0, 4]]
    rows = [[2**bit, 0] for bit in range(config.narrow_rows.bit_length() - 1)]
    return gl.SharedLinearLayout(
        within + rows + [[0, 2**bit] for bit in range(3, columns.bit_length() - 1)]
    )


def _describable(tensor: Tensor) -> Tensor:
    """Return a tensor that the copy engine can read: itself, or a copy."""
    if can_describe(tensor):
        return tensor
    *rows, columns = tensor.shape
    space = tensor.new_empty(*rows, ceil_div(columns, UNIT.value) * UNIT.value)
    return space[..., :columns].copy_(tensor)


def _descriptors(
    problem: Problem, config: Config, block_d: int, block_dv: int
) -> list[TensorDescriptor]:
    """Describe q, the wide pair, the wide pair again for its tail, and the narrow pair."""
    by_position = problem.q.unflatten(1, (problem.k_wide.shape[1], problem.group)).movedim(3, 2)
    heads, end = 64 // config.p, config.tail or config.block_n
    return [
        describe(by_position, [1, 1, config.p, heads, block_d]),
        describe(problem.k_wide, [1, 1, config.block_n, block_d]),
        describe(problem.v_wide, [1, 1, config.block_n, block_dv]),
        describe(problem.k_wide, [1, 1, end, block_d]),
        describe(problem.v_wide, [1, 1, end, block_dv]),
        *(
            describe(_describable(t), [1, 1, config.narrow_rows, UNIT.value])
            for t in (problem.k_narrow, problem.v_narrow)
        ),
    ]


def compute(problem: Problem, out: Tensor, lse: Tensor, config: Config | None = None) -> None:
    """Write out [B, H, N, Dv] and lse [B, H, N]."""
    batch, _heads, seq, head_dim = problem.q.shape
    value_dim = out.shape[3]
    block_d, block_dv = (64 if dim <= 64 else 128 for dim in (head_dim, value_dim))
    wide_rows, narrow_rows = problem.k_wide.shape[2], problem.k_narrow.shape[2]
    width = min(sum(problem.wide_reach) + 1, wide_rows)
    config = config or choose(problem.group, width, block_d, block_dv)
    kv_heads = problem.k_wide.shape[1]
    tiles = ceil_div(seq, config.p)
    items = batch * kv_heads * tiles
    biases = problem.biases()
    dtype, end = problem.q.dtype, config.tail or config.block_n
    q_start, has_q_start = given_or(problem.q_start, lse)
    kv_bounds, has_bounds = given_or(problem.kv_bounds, lse)
    launch(
        hopper_forward_tiles_kernel, min(problem.device.multiprocessors, items),
        *_descriptors(problem, config, block_d, block_dv), out, lse,
        kv_bounds, q_start, has_q_start,
        items, tiles, kv_heads, problem.group, seq, problem.keys, wide_rows, narrow_rows,
        *problem.wide_reach, *problem.narrow_reach, problem.keys - seq,
        *out.stride()[:3],
        problem.log2_scale, *biases,
        FORM=CODES[problem.form], HAS_WIDE_BIAS=biases[:2] != (0.0, 0.0),
        HAS_NARROW_BIAS=biases[2:] != (0.0, 0.0), HAS_BOUNDS=bool(has_bounds),
        VALUE_DIM=value_dim, BLOCK_D=block_d, BLOCK_DV=block_dv,
        NARROW_ROWS=config.narrow_rows,
        Q_LAYOUT=matrix(dtype, [64, block_d]),
        K_LAYOUT=matrix(dtype, [config.block_n, block_d]),
        V_LAYOUT=matrix(dtype, [config.block_n, block_dv]),
        K_END_LAYOUT=matrix(dtype, [end, block_d]), V_END_LAYOUT=matrix(dtype, [end, block_dv]),
        K_ROW=_row_layout(config, block_d), V_ROW=_row_layout(config, block_dv),
        K_BY_HEADS=_by_heads(config.p, block_d), V_BY_HEADS=_by_heads(config.p, block_dv),
        Q_BY_SIDES=_by_sides(block_d),
        config=config,
    )  # fmt: skip
