"""The arguments that all kernels take which own tiles, in the order in which they take them."""

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_free.launch import is_small, launch
from csrc_free.problem import Problem
from csrc_free.traits import Config


def launch_tiles(
    kernel: triton.JITFunction, tiles: int, problem: Problem,
    inputs: tuple[Tensor | TensorDescriptor, ...], outputs: tuple[Tensor | None, ...],
    *, others: tuple[Tensor, ...] = (), numbers: tuple[int, ...] = (), strides: tuple[int, ...],
    scales: tuple[float, ...], config: Config, **constants: object,
) -> None:  # fmt: skip
    """Launch `tiles` programs for each key-value head.

    `inputs` are the problem's tensors, or descriptors of them, and what else the kernel reads, of
    which `others` are as large; numbers and strides come after the problem's own.
    """
    programs = tiles * problem.k_wide.shape[0] * problem.k_wide.shape[1]
    launch(
        kernel, programs,
        *inputs, *outputs, problem.kv_bounds, problem.q_start, *problem.numbers(), *numbers,
        *problem.strides(), *strides, *scales, *problem.biases(),
        **problem.constants(*others, *outputs), **constants, IS_SMALL_GRID=is_small(programs),
        config=config,
    )  # fmt: skip
