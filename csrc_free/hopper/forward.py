"""The forward for groups of a multiple of 64 heads: a tile is 64 heads of one query.

Other groups are `forward_tiles`'s.

All rows of such a tile see the same keys of both pairs, so a narrow key is one row for all of them
and only the oldest wide tiles are masked. One warp brings q and the wide pair by TMA, one the
narrow rows; two warpgroups take every second narrow key each, with sums of their own, and the
second hands its sums over to the first.

TILES wide tiles of BLOCK_N keys are the whole ring: tile t of a group always lies in slot t and
stays there for all narrow keys of a chunk, so T of one narrow key accumulates over them in
registers, and then out += T ∘ v.

The maximum lags, as in the portable forward: a row's exponentials begin at 2^-36, and where a part
of their running sum passes 2^24 the tile's product is made again under a raised maximum, before
anything that grew too large was multiplied.
"""

from dataclasses import dataclass

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from csrc_free.device.forms import CODES
from csrc_free.hopper import forward_tiles
from csrc_free.hopper.assembly import declare_flags
from csrc_free.hopper.attend import attend
from csrc_free.hopper.bring import ROWS, ROWS_AT_ONCE, bring, bring_narrow
from csrc_free.hopper.channels import barriers
from csrc_free.hopper.describe import describe, given_or, matrix
from csrc_free.hopper.layouts import bytes_of, kept_dtype, permuted_rows, plain
from csrc_free.hopper.ordered import ordered
from csrc_free.launch import launch
from csrc_free.problem import Problem
from csrc_free.traits import Device, Traits


@gluon.jit(do_not_specialize=(
    "has_bounds", "has_q_start", "items", "seq", "per_query", "kv_heads", "head_tiles",
    "keys", "wide_rows", "narrow_rows",
    "wide_left", "wide_right", "narrow_left", "narrow_right", "start",
))  # fmt: skip
def hopper_forward_kernel(
    q, k_wide, v_wide, k_narrow, v_narrow, out, lse, kv_bounds, has_bounds, q_start, has_q_start,
    items, seq, per_query, kv_heads, head_tiles, keys, wide_rows, narrow_rows,
    wide_left, wide_right, narrow_left, narrow_right, start,
    stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n,
    stride_o_b, stride_o_h, stride_o_n,
    log2_scale, k_wide_bias, v_wide_bias, k_narrow_bias, v_narrow_bias,
    FORM: gl.constexpr, HAS_WIDE_BIAS: gl.constexpr, HAS_NARROW_BIAS: gl.constexpr,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, CHUNK: gl.constexpr,
    Q_LAYOUT: gl.constexpr, K_LAYOUT: gl.constexpr, V_LAYOUT: gl.constexpr,
):  # fmt: skip
    """One program owns every num_programs-th item: 64 heads of one query, of out and of lse.

    q, k_wide and v_wide are descriptors; the layouts are of their tiles as matrices.
    """
    declare_flags()
    dtype: gl.constexpr = k_wide.dtype
    narrow_dtype: gl.constexpr = kept_dtype(dtype, HAS_NARROW_BIAS)
    q_tile = gl.allocate_shared_memory(dtype, [1, ROWS, 1, BLOCK_D], q.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [TILES, 1, 1, BLOCK_N, BLOCK_D], k_wide.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [TILES, 1, 1, BLOCK_N, BLOCK_DV], v_wide.layout)
    q_matrix = q_tile._reinterpret(dtype, [ROWS, BLOCK_D], Q_LAYOUT)
    k_matrices = k_tiles._reinterpret(dtype, [TILES, BLOCK_N, BLOCK_D], K_LAYOUT)
    v_matrices = v_tiles._reinterpret(dtype, [TILES, BLOCK_N, BLOCK_DV], V_LAYOUT)
    k_space = gl.allocate_shared_memory(narrow_dtype, [2 * CHUNK, BLOCK_D], plain(2))
    v_space = gl.allocate_shared_memory(gl.float32, [2 * CHUNK, BLOCK_DV], plain(2))
    k_bytes: gl.constexpr = bytes_of(narrow_dtype)
    few: gl.constexpr = 2 * CHUNK // ROWS_AT_ONCE
    k_rows = k_space._reinterpret(
        narrow_dtype, [2 * CHUNK, 1, BLOCK_D], permuted_rows(1, BLOCK_D, k_bytes)
    )
    v_rows = v_space._reinterpret(
        gl.float32, [2 * CHUNK, 1, BLOCK_DV], permuted_rows(1, BLOCK_DV, 4)
    )
    k_written = k_space._reinterpret(
        narrow_dtype, [few, ROWS_AT_ONCE, BLOCK_D], permuted_rows(ROWS_AT_ONCE, BLOCK_D, k_bytes)
    )
    v_written = v_space._reinterpret(
        gl.float32, [few, ROWS_AT_ONCE, BLOCK_DV], permuted_rows(ROWS_AT_ONCE, BLOCK_DV, 4)
    )
    hand_out = gl.allocate_shared_memory(
        gl.float32, [ROWS, BLOCK_DV], gl.SwizzledSharedLayout(2, 1, 16, [1, 0])
    )
    hand_sums = gl.allocate_shared_memory(gl.float32, [3, ROWS], plain(1))
    k_full = barriers(TILES, 1)
    k_empty = barriers(TILES, 2)
    v_full = barriers(TILES, 1)
    v_empty = barriers(TILES, 2)
    narrow_full = barriers(2, 1)
    narrow_empty = barriers(2, 2)
    q_full = barriers(1, 1)
    q_empty = barriers(1, 2)
    hand_full = barriers(1, 1)
    hand_empty = barriers(1, 1)
    fence_async_shared()
    grid = (items, seq, per_query, kv_heads, head_tiles)
    view = (
        kv_bounds, q_start, has_bounds, has_q_start, keys, wide_rows, narrow_rows,
        wide_left, wide_right, narrow_left, narrow_right, start,
    )  # fmt: skip
    narrow_strides = (stride_kn_b, stride_kn_h, stride_kn_n, stride_vn_b, stride_vn_h, stride_vn_n)
    out_strides = (stride_o_b, stride_o_h, stride_o_n)
    gl.warp_specialize([
        (attend, (
            0, q_matrix, k_matrices, v_matrices, k_rows, v_rows,
            q_full, q_empty, k_full, k_empty, v_full, v_empty, narrow_full, narrow_empty,
            hand_full, hand_empty, hand_out, hand_sums, out, lse,
            grid, view, out_strides, log2_scale, k_wide_bias, v_wide_bias,
            FORM, HAS_WIDE_BIAS, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, TILES, CHUNK,
        )),
        (attend, (
            1, q_matrix, k_matrices, v_matrices, k_rows, v_rows,
            q_full, q_empty, k_full, k_empty, v_full, v_empty, narrow_full, narrow_empty,
            hand_full, hand_empty, hand_out, hand_sums, out, lse,
            grid, view, out_strides, log2_scale, k_wide_bias, v_wide_bias,
            FORM, HAS_WIDE_BIAS, VALUE_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, TILES, CHUNK,
        )),
        (bring, (
            q, k_wide, v_wide, q_tile, k_tiles, v_tiles,
            q_full, q_empty, k_full, k_empty, v_full, v_empty, grid, view,
            BLOCK_N, TILES, CHUNK,
        )),
        (bring_narrow, (
            k_narrow, v_narrow, k_written, v_written, narrow_full, narrow_empty,
            grid, view,
            narrow_strides, k_narrow_bias, v_narrow_bias, HAS_NARROW_BIAS,
            HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, CHUNK,
        )),
    ], [4, 1, 1], [240, 24, 24])  # fmt: skip


@dataclass(frozen=True)
class Config:
    """TILES tiles of BLOCK_N wide keys stay in shared memory for CHUNK narrow rows at a time."""

    tiles: int
    block_n: int = 64
    chunk: int = 32
    num_warps: int = 4
    num_stages: int = 1
    maxnreg: int = 168  # on average: 240 for the two warpgroups, 24 for the warps that bring

    def shared_bytes(self, traits: Traits, device: Device) -> int:
        """Return a bound on the shared memory that the kernel needs."""
        q, v = traits.block_d, traits.block_dv
        rows = 2 * 64 * q + 2 * 4 * self.chunk * v  # narrow keys in float32 come in half as many
        tiles = 2 * self.tiles * self.block_n * (q + v)
        return 2 * 64 * q + tiles + rows + 4 * 64 * v + 2048


def choose(width: int, block_d: int, block_dv: int, *, has_bias: bool) -> Config:
    """Choose how many tiles stay, for a wide window of so many keys.

    What is computed is a multiple of the tiles. A pass over them costs 0.6 of a tile of 64 more.
    Of 64 columns, tiles of 128 keys fit in registers (512 x 32, G = 64: 451 TFLOP/s with two, 409
    with four, 377 with four of 64; H100, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-25).
    """
    chunk = 16 if has_bias else 32
    blocks = -(-width // 64)
    if block_d == block_dv == 64 and blocks > 1:
        return Config(2 if blocks > 2 else 1, 128, chunk)
    kept = min((4, 3, 2, 1), key=lambda n: -(-blocks // n) * (n + 0.6))
    return Config(kept, chunk=chunk)


def compute(problem: Problem, out: Tensor, lse: Tensor) -> None:
    """Write out [B, H, N, Dv] and lse [B, H, N]."""
    problem = ordered(problem)
    if problem.group % 64:
        forward_tiles.compute(problem, out, lse)
        return
    batch, heads, seq, head_dim = problem.q.shape
    value_dim = out.shape[3]
    block_d, block_dv = (64 if dim <= 64 else 128 for dim in (head_dim, value_dim))
    wide_rows, narrow_rows = problem.k_wide.shape[2], problem.k_narrow.shape[2]
    biases = problem.biases()
    has_narrow_bias = biases[2:] != (0.0, 0.0)
    width = min(sum(problem.wide_reach) + 1, wide_rows)
    config = choose(width, block_d, block_dv, has_bias=has_narrow_bias)
    kv_heads = problem.k_wide.shape[1]
    per_query = batch * heads // 64
    items = per_query * seq
    blocks = [1, 64, 1, block_d], [1, 1, config.block_n, block_d], [1, 1, config.block_n, block_dv]
    tiles = (problem.q, problem.k_wide, problem.v_wide)
    described = [describe(t, block) for t, block in zip(tiles, blocks, strict=True)]
    sides = (64, block_d), (config.block_n, block_d), (config.block_n, block_dv)
    q_layout, k_layout, v_layout = (matrix(problem.q.dtype, [*side]) for side in sides)
    launch(
        hopper_forward_kernel, min(problem.device.multiprocessors, items),
        *described, problem.k_narrow, problem.v_narrow, out, lse,
        *given_or(problem.kv_bounds, lse), *given_or(problem.q_start, lse),
        items, seq, per_query, kv_heads, problem.group // 64,
        problem.keys, wide_rows, narrow_rows,
        *problem.wide_reach, *problem.narrow_reach, problem.keys - seq,
        *problem.k_narrow.stride()[:3], *problem.v_narrow.stride()[:3], *out.stride()[:3],
        problem.log2_scale, *biases,
        FORM=CODES[problem.form], HAS_WIDE_BIAS=biases[:2] != (0.0, 0.0),
        HAS_NARROW_BIAS=has_narrow_bias, HEAD_DIM=head_dim, VALUE_DIM=value_dim,
        BLOCK_D=block_d, BLOCK_DV=block_dv,
        Q_LAYOUT=q_layout, K_LAYOUT=k_layout, V_LAYOUT=v_layout, config=config,
    )  # fmt: skip
