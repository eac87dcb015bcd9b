"""The one way to launch a kernel: on its tensors' device, with the options that all share."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITCallable

from csrc_free import tracing
from csrc_free.traits import Config

# The kernels reason about fused multiply-adds: a settled maximum is subtracted inside one.
OPTIONS = {"enable_fp_fusion": True}
_settled: set[int] = set()
# What Triton compiled for a launch, with its kernel and the arguments after those that are given.
_compiled: dict[tuple[object, ...] | None, tuple[object, CompiledKernel, tuple[object, ...]]] = {}
_MOST_COMPILED = 4096
_FOR_TRITON = ("num_warps", "num_stages", "maxnreg")


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make a tensor's device the current one: Triton launches there, on its current stream."""
    device = tensor.device
    if device.type in ("cpu", "meta") or tracing.tracer() is not None:
        return contextlib.nullcontext()
    return torch.get_device_module(device).device(device.index)


def launch(
    kernel: triton.JITFunction, programs: int, *args: object, config: Config, **constants: object
) -> None:
    """Launch a kernel in a grid of one dimension, tiled and compiled as its config says."""
    tracer = tracing.tracer()
    if tracer is not None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | constants | _said_of(config)
        options = {name: named.pop(name) for name in _FOR_TRITON if name in named}
        tracer.launch(kernel, programs, named, options)
        return
    key = _what_it_depends_on(kernel, config, args, constants)
    known = _compiled.get(key)
    if known is not None:
        _kernel, program, rest = known
        program[programs, 1, 1](*args, *rest)
        return
    if isinstance(kernel, JITCallable):  # the interpreter's are not
        settle_cache_key(kernel)
    constants |= _said_of(config)
    program = kernel[(programs,)](*args, **constants, **OPTIONS)
    if key is not None and isinstance(program, CompiledKernel):
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        _compiled[key] = kernel, program, rest


def _what_it_depends_on(
    kernel: triton.JITFunction, config: Config, args: Iterable[Any], constants: dict[str, object]
) -> tuple[object, ...] | None:
    """Return all that Triton can compile a launch for, and more; None: that is not known here.

    It compiles for the types of arguments, for whether addresses are multiples of 16 and for some
    values of integers: here every integer counts as it is.
    """
    if torch.version.hip is not None:  # it asks for more
        return None
    found: list[object] = [id(kernel), config, *constants.items()]
    for arg in args:
        kind = type(arg)
        if kind is int or arg is None:
            found.append(arg)
        elif isinstance(arg, Tensor):
            found.append((arg.dtype, arg.device, arg.data_ptr() % 16))
        elif kind is float:
            found.append(kind)
        elif hasattr(arg, "block_shape"):  # a descriptor, Triton's or Gluon's, which has a layout
            layout = getattr(arg, "layout", None)
            found.append((kind, arg.base.dtype, layout, *arg.block_shape))
        else:
            return None
    return tuple(found)


def settle_cache_key(function: JITCallable) -> None:
    """Have Triton compute a kernel's cache key after those of the functions that it calls.

    Computed before, it leaves out what these refer to (3.6 and 3.7.1), and so a process found no
    kernel in the cache where another had run others first: ten seconds of compilation for each.
    """
    if id(function) in _settled:  # its hash is the cache key
        return
    _settled.add(id(function))
    for name in function.fn.__code__.co_names:
        inner = function.fn.__globals__.get(name)
        if isinstance(inner, JITCallable):
            settle_cache_key(inner)
    _ = function.cache_key


@functools.cache
def _said_of(config: Config) -> dict[str, Any]:
    """Return a config's fields as a launch takes them."""
    return {
        field.name if field.name in _FOR_TRITON else field.name.upper(): getattr(config, field.name)
        for field in dataclasses.fields(config)
    }


def is_small(programs: int) -> bool:
    """Tell whether a grid has so few programs for each multiprocessor that its last ones matter."""
    return tracing.likely(programs <= 1024)
