"""The portable backward: which kernels run, on which buffers. No atomics; repeatable bit for bit.

The wide pair's gradients come from one kernel, dq and the narrow pair's from another; where groups
are large, all four key-value gradients come from one kernel and dq from another.
"""

import dataclasses
import functools

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_free import measured
from csrc_free.device.descriptors import describe
from csrc_free.launch import is_small, launch
from csrc_free.portable import keys, pairs, query, wide
from csrc_free.portable.keys import backward_keys_kernel
from csrc_free.portable.pairs import backward_pairs_kernel
from csrc_free.portable.query import backward_query_kernel
from csrc_free.portable.wide import backward_wide_kernel
from csrc_free.problem import Problem, block, problem_of
from csrc_free.steps.delta import Statistics, statistics_of
from csrc_free.steps.parts import Parts, parts_of_queries, parts_of_wide_keys
from csrc_free.traits import Config, Device, Traits

Pair = tuple[Tensor | None, Tensor | None]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which kernels the backward runs, and how."""

    wide: wide.Config  # the wide pair's gradients
    query: query.Config  # dq alone
    keys: keys.Config  # dq and the narrow pair's gradients, narrow key by narrow key
    tiles_of_a_part: int  # of `keys`
    # The same offset by offset; None: take `keys`.
    query_with_parts: query.Config | None  # pyright: ignore[reportInvalidTypeForm]
    pairs: pairs.Config | None  # all four key-value gradients at once; None: the others

    @property
    def configs(self) -> tuple[Config, ...]:
        """Return the configs of all kernels that may run."""
        all_of_them = (self.wide, self.query, self.keys, self.query_with_parts, self.pairs)
        return tuple(config for config in all_of_them if config is not None)


@functools.cache
def choose(traits: Traits, device: Device) -> Choice:
    """Choose the backward's kernels and their tiles."""
    return Choice(
        wide=wide.choose(traits, device),
        query=query.choose(traits, device),
        keys=keys.choose(traits, device),
        tiles_of_a_part=1 if measured.is_measured(traits, device) else 2,
        query_with_parts=query.choose_with_parts(traits, device),
        pairs=pairs.choose(traits, device),
    )


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
    wide_grads, narrow_grads = problem.by_role((dk1, dv1), (dk2, dv2))
    statistics = statistics_of(problem, dout, dlse, out, lse)
    write_gradients(problem, statistics, dq, wide_grads, narrow_grads)


def write_gradients(
    problem: Problem, statistics: Statistics, dq: Tensor | None, wide: Pair, narrow: Pair
) -> None:
    """Write the gradients that have a tensor: dq, and those of the wide pair and the narrow one."""
    choice = choose(problem.traits(statistics.dout), problem.device)
    _Backward(problem, choice, statistics).run(dq, wide, narrow)


def pairs_serve(problem: Problem, statistics: Statistics) -> bool:
    """Tell whether the narrow pair's gradients come from a kernel that leaves dq to another."""
    return choose(problem.traits(statistics.dout), problem.device).pairs is not None


@dataclasses.dataclass(frozen=True)
class _Backward:
    problem: Problem
    choice: Choice
    statistics: Statistics

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
        config, problem = self.choice.pairs, self.problem
        if config is None:
            return False
        parts = parts_of_wide_keys(problem, config.block_n)
        if parts is None:
            return False
        sums = [
            torch.zeros(t.shape, dtype=torch.float32, device=t.device)
            for t in (problem.k_wide, problem.v_wide)
        ]
        self._launch(
            backward_pairs_kernel, config, self._wide_tiles(config), self._inputs_of_pairs(config),
            [*sums, parts.dk, parts.dv], parts.numbers,
        )  # fmt: skip
        for grad, total in zip(wide, sums, strict=True):
            if grad is not None:
                grad.copy_(total)
        self._sum(parts, narrow)
        return True

    def _run_wide(self, wide: Pair) -> None:
        config, problem = self.choice.wide, self.problem
        dk, dv = complete(wide, problem.k_wide, problem.v_wide)
        self._launch(
            backward_wide_kernel, config, self._wide_tiles(config), self._inputs(), [dk, dv],
            strides=(*dk.stride()[:3], *dv.stride()[:3]),
        )  # fmt: skip

    def _run_query_with_parts(self, dq: Tensor | None, narrow: Pair) -> None:
        problem = self.problem
        dq = torch.empty_like(problem.q) if dq is None else dq
        config = self.choice.query_with_parts
        if config is not None:
            heads = triton.next_power_of_2(problem.group)
            parts = parts_of_queries(problem, heads, config.block_q)
            if parts is not None:
                self._run_query(config, dq, parts, FILLS_DK=True)
                self._run_query(config, dq, parts, NEEDS_DQ=False, FILLS_DV=True)
                self._sum(parts, narrow)
                return
        config, tiles_of_a_part = self.choice.keys, self.choice.tiles_of_a_part
        tiles = self._query_tiles(config)
        parts = None
        while parts is None:
            rows = tiles_of_a_part * config.block_q
            parts = parts_of_queries(problem, problem.group, rows)
            tiles_of_a_part *= 2
        count = rows // config.block_q
        self._launch(
            backward_keys_kernel, config, triton.cdiv(tiles, count), self._inputs_of(config),
            [dq, parts.dk, parts.dv],
            (*parts.numbers, count), dq.stride()[:3],
            PARTS_FOLLOW_QUERIES=parts.do_follow_queries,
        )  # fmt: skip
        self._sum(parts, narrow)

    def _run_query(
        self, config: query.Config, dq: Tensor, parts: Parts | None = None, *,
        NEEDS_DQ: bool = True, FILLS_DK: bool = False, FILLS_DV: bool = False,
    ) -> None:  # fmt: skip
        heads = self.problem.group if parts is None else parts.per_position
        self._launch(
            backward_query_kernel, config, self._query_tiles(config, heads),
            self._inputs_of(config),
            [dq, *((None, None) if parts is None else (parts.dk, parts.dv))],
            (0, 0, 0) if parts is None else parts.numbers, dq.stride()[:3],
            HEADS=heads, NEEDS_DQ=NEEDS_DQ, FILLS_DK=FILLS_DK, FILLS_DV=FILLS_DV,
            PARTS_FOLLOW_QUERIES=parts is not None and parts.do_follow_queries,
        )  # fmt: skip

    def _sum(self, parts: Parts, narrow: Pair) -> None:
        problem = self.problem
        parts.sum_into(*complete(narrow, problem.k_narrow, problem.v_narrow), problem)

    def _wide_tiles(self, config: wide.Config | pairs.Config) -> int:
        return triton.cdiv(self.problem.k_wide.shape[2], config.block_n)

    def _query_tiles(self, config: query.Config | keys.Config, heads: int | None = None) -> int:
        rows = self.problem.q.shape[2] * (heads or self.problem.group)
        return triton.cdiv(rows, config.block_q)

    def _inputs(self) -> list[Tensor | TensorDescriptor]:
        return [*self.problem.tensors, *self.statistics]

    def _inputs_of(self, config: query.Config | keys.Config) -> list[Tensor | TensorDescriptor]:
        """Return the inputs, the wide pair through descriptors where the config says so."""
        if not config.descriptors:
            return self._inputs()
        return [*self.problem.described(config.block_n), *self.statistics]

    def _inputs_of_pairs(self, config: pairs.Config) -> list[Tensor | TensorDescriptor]:
        """Return the inputs, what it reads by rows through descriptors where the config says so."""
        if not config.descriptors:
            return self._inputs()
        q, *kept = self.problem.tensors
        dout, delta, lse2, has_huge = self.statistics
        tile, dout_tile = (
            describe(t.transpose(1, 2), config.block_q, block(t.shape[3])) for t in (q, dout)
        )
        statistics = (describe(t, 1, config.block_q) for t in (delta, lse2))
        return [tile, *kept, dout_tile, *statistics, has_huge]

    def _launch(
        self, kernel: triton.JITFunction, config: Config, tiles: int,
        inputs: list[Tensor | TensorDescriptor], outputs: list[Tensor | None],
        numbers: tuple[int, ...] = (), strides: tuple[int, ...] = (), **constants: object,
    ) -> None:  # fmt: skip
        problem, dout = self.problem, self.statistics.dout
        programs = tiles * problem.k_wide.shape[0] * problem.k_wide.shape[1]
        launch(
            kernel, programs,
            *inputs, *outputs,
            problem.kv_bounds, problem.q_start, *problem.sizes(), *numbers,
            *problem.strides(), *dout.stride()[:3], *strides,
            problem.scale, problem.log2_scale, *problem.biases(),
            **problem.constants(dout, *outputs), **constants, IS_SMALL_GRID=is_small(programs),
            config=config,
        )  # fmt: skip


def complete(pair: Pair, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give a kernel that writes both gradients of a pair a place for each."""
    dk, dv = pair
    return torch.empty_like(k) if dk is None else dk, torch.empty_like(v) if dv is None else dv
