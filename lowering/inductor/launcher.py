"""A lowering by tracing: the operator's own GPU implementation, run on the node's fake tensors.

What it allocates and launches becomes nodes of Inductor's graph, so kernels, choices and buffers
keep their one home, and no call of ours is left in the compiled code. Before, in Inductor's graph:

    out, lse = simplex::attn(q, k1, k2, v1, v2, 512, 32)

After:

    out = aten.empty(...);  lse = aten.empty(...)
    triton_kernel_wrapper_mutation(forward_kernel, grid, {q, k_wide, ..., out, lse, 8, 4096, ...})
"""

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from csrc_free.tracing import traced_by
from lowering import compat
from lowering.inductor.tracer import InductorTracer, NotTraceable
from simplex_ops.devices.gpu import unserved

# What was traced for a graph: layers of one shape share it. None: it cannot be traced.
_TRACED: weakref.WeakKeyDictionary[Any, dict[Any, fx.GraphModule | None]] = (
    weakref.WeakKeyDictionary()
)


def lower(
    op: torch._ops.OpOverload,
    implementation: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Lower the current node, a call of `op` on tensors and numbers of Inductor's.

    Where no kernel serves it, or one that Inductor cannot write out, it stays a call.
    """
    return or_call(lower_to_kernels, op, implementation, args, kwargs)


def or_call(
    attempt: Callable[..., Any],
    op: torch._ops.OpOverload,
    implementation: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Lower the current node by an attempt, or to a call of its operator where that gives None.

    It stays a call, too, where this torch is none that was tested, and has no longer what a
    lowering needs.
    """
    try:
        found = attempt(op, implementation, compat.by_name(op, args, kwargs))
    except Exception as error:
        if compat.is_tested():
            raise
        warnings.warn(
            f"{op} is called by the compiled code, and its kernels are not part of it: they could "
            f"not be lowered on torch {torch.__version__} ({type(error).__name__}: {error})",
            stacklevel=2,
        )
        found = None
    return compat.leave_to_operator(op, args, kwargs) if found is None else found


def lower_to_kernels(
    op: torch._ops.OpOverload, implementation: Callable[..., Any], given: dict[str, Any]
) -> Any:
    """Lower the current node to launches, or return None where it must stay a call."""
    fakes = compat.arguments_of_current_node(op)
    if fakes["q"].device.type != "cuda":
        return None
    for name in ("q", "k1", "k2", "v1", "v2"):  # tiles and descriptors need numbers
        compat.fix_sizes(fakes[name], (1, 3))
    if unserved(fakes["q"], fakes["v1"]):
        return None
    boxes, values = {}, {}
    for name, fake in fakes.items():
        if isinstance(fake, Tensor):
            boxes[name], values[name] = compat.laid_out(given[name], fake)
        elif compat.is_symbolic(fake) and compat.number(fake) is fake:
            boxes[name], values[name] = given[name], fake
        else:
            values[name] = compat.number(fake)
    traced = _trace_once(op, implementation, values, tuple(boxes))
    return None if traced is None else compat.inline(traced, list(boxes.values()))


def lower_to_operations(
    op: torch._ops.OpOverload, implementation: Callable[..., Any], given: dict[str, Any]
) -> Any:
    """Lower the current node to the operations that it consists of, or return None on a CPU."""
    fakes = compat.arguments_of_current_node(op)
    if next(fake for fake in fakes.values() if isinstance(fake, Tensor)).device.type == "cpu":
        return None
    values = {name: compat.number(fake) for name, fake in fakes.items()}
    inputs = [
        name
        for name, value in values.items()
        if isinstance(value, Tensor) or compat.is_symbolic(value)
    ]
    traced = _trace_once(op, implementation, values, tuple(inputs))
    return None if traced is None else compat.inline(traced, [given[name] for name in inputs])


def _trace_once(
    op: torch._ops.OpOverload,
    implementation: Callable[..., Any],
    values: dict[str, Any],
    inputs: tuple[str, ...],
) -> fx.GraphModule | None:
    known = _TRACED.setdefault(compat.current_graph(), {})
    key = (op, *((name, compat.identity_of(value)) for name, value in values.items()))
    if key not in known:
        try:
            known[key] = _trace(implementation, values, inputs)
        except NotTraceable:
            known[key] = None
    return known[key]


def _trace(
    implementation: Callable[..., Any], values: dict[str, Any], inputs: tuple[str, ...]
) -> fx.GraphModule:
    def run(*traced: Any) -> Any:
        return implementation(**{**values, **dict(zip(inputs, traced, strict=True))})

    with traced_by(InductorTracer()):
        return compat.trace_to_graph(run, [values[name] for name in inputs])
