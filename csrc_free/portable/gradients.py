"""What the launchers of the backward's kernels share: the order of arguments, and whole pairs."""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_free.portable.arguments import launch_tiles
from csrc_free.problem import Problem
from csrc_free.steps.delta import Statistics
from csrc_free.steps.parts import Parts
from csrc_free.traits import Config

PairGradients = tuple[Tensor | None, Tensor | None]


def launch_backward(
    kernel: triton.JITFunction, tiles: int,
    problem: Problem, statistics: Statistics,
    inputs: tuple[Tensor | TensorDescriptor, ...], outputs: tuple[Tensor | None, ...],
    numbers: tuple[int, ...] = (), strides: tuple[int, ...] = (),
    *, config: Config, **constants: object,
) -> None:  # fmt: skip
    """Launch `tiles` programs for each key-value head; strides are those that the kernel writes by.

    `inputs` are the problem's tensors and the statistics, or descriptors of them.
    """
    dout = statistics.dout
    launch_tiles(
        kernel, tiles, problem, inputs, outputs, others=(dout,), numbers=numbers,
        strides=(*dout.stride()[:3], *strides), scales=(problem.scale, problem.log2_scale),
        config=config, **constants,
    )  # fmt: skip


def inputs_of(
    problem: Problem, statistics: Statistics, described_rows: int | None = None
) -> tuple[Tensor | TensorDescriptor, ...]:
    """Return a kernel's inputs; the wide pair through descriptors of so many rows, if any."""
    tensors = problem.tensors if described_rows is None else problem.described(described_rows)
    return *tensors, *statistics


def complete(pair: PairGradients, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give a kernel that writes both gradients of a pair a place for each."""
    dk, dv = pair
    return torch.empty_like(k) if dk is None else dk, torch.empty_like(v) if dv is None else dv


def sum_parts(parts: Parts, narrow: PairGradients, problem: Problem) -> None:
    """Sum the parts into the narrow pair's gradients."""
    parts.sum_into(*complete(narrow, problem.k_narrow, problem.v_narrow), problem)
