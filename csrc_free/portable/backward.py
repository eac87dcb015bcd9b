"""The portable backward: which kernels run, on which buffers. No atomics; repeatable bit for bit.

The wide pair's gradients come from one kernel, dq and the narrow pair's from another; where groups
are large, all four key-value gradients come from one kernel and dq from another.
"""

import dataclasses

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_free import launch
from csrc_free.device.descriptors import describe
from csrc_free.launch import BackwardChoice, Choice
from csrc_free.portable.keys import backward_keys_kernel
from csrc_free.portable.pairs import backward_pairs_kernel
from csrc_free.portable.query import backward_query_kernel
from csrc_free.portable.wide import backward_wide_kernel
from csrc_free.problem import Problem, block, problem_of
from csrc_free.steps.delta import delta_kernel
from csrc_free.steps.parts import Parts, parts_of_queries, parts_of_wide_keys

Pair = tuple[Tensor | None, Tensor | None]


def attn_backward(
    dout: Tensor | None, dlse: Tensor | None,
    q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, out: Tensor, lse: Tensor, *,
    reach1: tuple[int, int], reach2: tuple[int, int], scale: float, form: str,
    k2_bias: float, v2_bias: float, kv_bounds: Tensor | None, q_start: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    """Write the gradients of q, k1, k2, v1 and v2, each where `grads` has a tensor for it."""
    if any(t.numel() == 0 for t in (q, k1, k2)):
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    problem = problem_of(
        q, k1, k2, v1, v2, reach1, reach2, scale, form, k2_bias, v2_bias, kv_bounds, q_start
    )
    dq, dk1, dk2, dv1, dv2 = grads
    first, second = (dk1, dv1), (dk2, dv2)
    wide, narrow = (second, first) if problem.is_exchanged else (first, second)
    dout, *statistics = _statistics(problem, dout, dlse, out, lse)
    choice = launch.backward_choice(problem.traits(dout), launch.device_of(q.device))
    _Backward(problem, choice, dout, *statistics).run(dq, wide, narrow)


@dataclasses.dataclass(frozen=True)
class _Backward:
    problem: Problem
    choice: BackwardChoice
    dout: Tensor  # [B, H, N, Dv]
    delta: Tensor  # float32 [B, Hkv, N, G]
    lse2: Tensor  # float32 [B, Hkv, N, G]
    has_huge: Tensor  # int32 [B, Hkv]

    def run(self, dq: Tensor | None, wide: Pair, narrow: Pair) -> None:
        """Run the kernels that the wanted gradients need."""
        needs_narrow = any(grad is not None for grad in narrow)
        needs_wide = any(grad is not None for grad in wide)
        if needs_narrow and self._run_pairs(wide, narrow):
            needs_narrow = needs_wide = False
        if needs_wide:
            self._run_wide(wide)
        if needs_narrow:
            self._run_query_with_parts(dq, narrow)
        elif dq is not None:
            self._run_query(self.choice.query, dq)

    def _run_pairs(self, wide: Pair, narrow: Pair) -> bool:
        choice, problem = self.choice.pairs, self.problem
        if choice is None:
            return False
        parts = parts_of_wide_keys(problem, choice.constants["BLOCK_N"])
        if parts is None:
            return False
        sums = [
            torch.zeros(t.shape, dtype=torch.float32, device=t.device)
            for t in (problem.k_wide, problem.v_wide)
        ]
        self._launch(
            backward_pairs_kernel, choice, self._wide_tiles(choice), self._inputs_of_pairs(choice),
            [*sums, parts.dk, parts.dv], parts.numbers,
        )  # fmt: skip
        for grad, total in zip(wide, sums, strict=True):
            if grad is not None:
                grad.copy_(total)
        self._sum(parts, narrow)
        return True

    def _run_wide(self, wide: Pair) -> None:
        choice, problem = self.choice.wide, self.problem
        dk, dv = _complete(wide, problem.k_wide, problem.v_wide)
        self._launch(
            backward_wide_kernel, choice, self._wide_tiles(choice), self._inputs(choice), [dk, dv],
            strides=(*dk.stride()[:3], *dv.stride()[:3]),
        )  # fmt: skip

    def _run_query_with_parts(self, dq: Tensor | None, narrow: Pair) -> None:
        problem = self.problem
        dq = torch.empty_like(problem.q) if dq is None else dq
        if self.choice.query_with_parts is not None:
            choice = self.choice.query_with_parts
            heads = triton.next_power_of_2(problem.group)
            parts = parts_of_queries(problem, heads, choice.block_q)
            if parts is not None:
                self._run_query(choice, dq, parts, FILLS_DK=True)
                self._run_query(choice, dq, parts, NEEDS_DQ=False, FILLS_DV=True)
                self._sum(parts, narrow)
                return
        choice = self.choice.keys
        tiles = self._query_tiles(choice)
        tiles_of_a_part = choice.tiles_of_a_part
        parts = None
        while parts is None:
            rows = tiles_of_a_part * choice.block_q
            parts = parts_of_queries(problem, problem.group, rows)
            tiles_of_a_part *= 2
        count = rows // choice.block_q
        self._launch(
            backward_keys_kernel, choice, triton.cdiv(tiles, count), self._inputs(choice),
            [dq, parts.dk, parts.dv],
            (*parts.numbers, count), dq.stride()[:3],
            PARTS_FOLLOW_QUERIES=parts.do_follow_queries,
        )  # fmt: skip
        self._sum(parts, narrow)

    def _run_query(
        self, choice: Choice, dq: Tensor, parts: Parts | None = None, *,
        NEEDS_DQ: bool = True, FILLS_DK: bool = False, FILLS_DV: bool = False,
    ) -> None:  # fmt: skip
        heads = self.problem.group if parts is None else parts.per_position
        self._launch(
            backward_query_kernel, choice, self._query_tiles(choice, heads), self._inputs(choice),
            [dq, *((None, None) if parts is None else (parts.dk, parts.dv))],
            (0, 0, 0) if parts is None else parts.numbers, dq.stride()[:3],
            HEADS=heads, NEEDS_DQ=NEEDS_DQ, FILLS_DK=FILLS_DK, FILLS_DV=FILLS_DV,
            PARTS_FOLLOW_QUERIES=parts is not None and parts.do_follow_queries,
        )  # fmt: skip

    def _sum(self, parts: Parts, narrow: Pair) -> None:
        problem = self.problem
        parts.sum_into(*_complete(narrow, problem.k_narrow, problem.v_narrow), problem)

    def _wide_tiles(self, choice: Choice) -> int:
        return triton.cdiv(self.problem.k_wide.shape[2], choice.constants["BLOCK_N"])

    def _query_tiles(self, choice: Choice, heads: int | None = None) -> int:
        rows = self.problem.q.shape[2] * (heads or self.problem.group)
        return triton.cdiv(rows, choice.block_q)

    def _inputs(self, choice: Choice) -> list[Tensor | TensorDescriptor]:
        return [
            *self.problem.sources(choice), self.dout, self.delta, self.lse2, self.has_huge
        ]  # fmt: skip

    def _inputs_of_pairs(self, choice: Choice) -> list[Tensor | TensorDescriptor]:
        """Return the inputs, what it reads by rows through descriptors where the choice says so."""
        q, *keys = self.problem.tensors
        if not choice.reads_by_descriptor:
            return [q, *keys, self.dout, self.delta, self.lse2, self.has_huge]
        tile, dout_tile = (
            describe(t.transpose(1, 2), choice.block_q, block(t.shape[3])) for t in (q, self.dout)
        )
        statistics = (describe(t, 1, choice.block_q) for t in (self.delta, self.lse2))
        return [tile, *keys, dout_tile, *statistics, self.has_huge]

    def _launch(
        self, kernel: triton.JITFunction, choice: Choice, tiles: int,
        inputs: list[Tensor | TensorDescriptor], outputs: list[Tensor | None],
        numbers: tuple[int, ...] = (), strides: tuple[int, ...] = (), **constants: object,
    ) -> None:  # fmt: skip
        problem = self.problem
        grid = (tiles * problem.k_wide.shape[0] * problem.k_wide.shape[1],)
        kernel[grid](
            *inputs, *outputs,
            problem.kv_bounds, problem.q_start, *problem.sizes(), *numbers,
            *problem.strides(), *self.dout.stride()[:3], *strides,
            problem.scale, problem.log2_scale, *problem.biases(),
            **problem.constants(self.dout, *outputs), **choice.constants, **constants,
            IS_SMALL_GRID=launch.is_small(grid),
            num_warps=choice.num_warps, num_stages=choice.num_stages,
        )  # fmt: skip


def _statistics(
    problem: Problem, dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dout, delta, lse2 and has_huge."""
    dout = torch.zeros_like(out) if dout is None else dout
    dout, out = (t if t.stride(3) == 1 else t.contiguous() for t in (dout, out))
    batch, heads, seq, value_dim = dout.shape
    kv_heads = heads // problem.group
    delta = torch.empty(
        batch, kv_heads, seq, problem.group, dtype=torch.float32, device=dout.device
    )
    lse2 = torch.empty_like(delta)
    has_huge = torch.zeros(batch, kv_heads, dtype=torch.int32, device=dout.device)
    block_q = 32
    tiles = triton.cdiv(seq * problem.group, block_q)
    delta_kernel[(tiles * batch * kv_heads,)](
        dout, out, lse.contiguous(), None if dlse is None else dlse.contiguous(),
        delta, lse2, has_huge,
        kv_heads, seq, *dout.stride()[:3], *out.stride()[:3],
        GROUP=problem.group, HAS_DLSE=dlse is not None,
        VALUE_DIM=value_dim, BLOCK_DV=block(value_dim), BLOCK_Q=block_q,
    )  # fmt: skip
    return dout, delta, lse2, has_huge


def _complete(pair: Pair, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give a kernel that writes both gradients of a pair a place for each."""
    dk, dv = pair
    return torch.empty_like(k) if dk is None else dk, torch.empty_like(v) if dv is None else dv
