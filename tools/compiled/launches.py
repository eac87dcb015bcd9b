"""Record the kernel launches that the launchers would make on a device, with no device at hand.

The launchers run as they are, on meta tensors; instead of launching, each kernel is noted with all
that `triton.compile` needs to build it for a target.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_free import problem
from csrc_free.traits import Device

_POINTER = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]  # arguments that are multiples of 16
    options: dict[str, int]

    def compile(self, target: GPUTarget) -> Any:
        """Compile for a target; `asm` of the result has the stages' texts."""
        names = self.kernel.arg_names
        language = GluonASTSource if self.kernel.is_gluon() else ASTSource
        source = language(
            fn=self.kernel,
            signature=self.signature,
            constexprs={(names.index(name),): value for name, value in self.constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in self.divisible},
        )
        return triton.compile(source, target=target, options=self.options)


@contextlib.contextmanager
def recorded(device: Device) -> Iterator[list[Launch]]:
    """Note every launch made inside, with the launch choices of `device`."""
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_launch_of(kernel, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(problem, "device_of", return_value=device),
    ):
        yield launches


def _launch_of(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, divisible = {}, {}, []
    for param in kernel.params:
        value = values[param.name]
        if param.is_constexpr or value is None:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, (TensorDescriptor, GluonDescriptor)):
            element = _POINTER[value.base.dtype].removeprefix("*")
            layout = f",{value.layout!r}" if isinstance(value, GluonDescriptor) else ""
            signature[param.name] = f"tensordesc<{element}{list(value.block_shape)}{layout}>"
        elif isinstance(value, torch.Tensor):
            signature[param.name] = _POINTER[value.dtype]
            divisible.append(param.name)
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        elif value == 1 and not param.do_not_specialize:
            signature[param.name], constants[param.name] = "constexpr", 1
        else:
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                divisible.append(param.name)
    return Launch(kernel, signature, constants, tuple(divisible), options)
