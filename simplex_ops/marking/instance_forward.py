"""A `forward` that stands on the instance, or in a class derived later, and hides the marked one.

Hooks of accelerate (device_map, dispatch_model) put one there, and so does whoever patches one
module alone. A mark lives in the class: nothing may pass it by.

- When marking: accelerate's forward calls the bound method that it keeps as `_old_forward`, so the
  marked one is put in its place, and hooks run around it as ever. Another is refused.
- Put on afterwards, there or by another class: it may call the marked forward, or not. Each call of
  the module watches that the marked one has run.
"""

import functools
import inspect
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from simplex_ops.marking.call import UnservedMarkError
from simplex_ops.marking.naming import running_as

_awaiting = threading.local()  # .module: the one whose marked forward has still to run


def hides(module: nn.Module, function: Any) -> bool:
    """Say whether a forward on the instance may hide a class's, where `put_inside` cannot serve."""
    held, kept = vars(module).get("forward"), vars(module).get("_old_forward")
    if held is None or _is_method(held, module, function):
        return False
    hooked = "_hf_hook" in vars(module) and isinstance(held, functools.partial)
    return not (hooked and _is_method(kept, module, function))


def put_inside(module: nn.Module, old: Any, new: Any) -> None:
    """Replace the forward `old` of a class by `new`, where the instance holds it."""
    if _is_method(vars(module).get("forward"), module, old):
        del module.forward  # says no more than the class
        vars(module)["simplex_had_forward"] = True
    if _is_method(vars(module).get("_old_forward"), module, old):
        module._old_forward = MethodType(new, module)  # pyright: ignore[reportArgumentType]


def put_back(module: nn.Module, marked: Any, old: Any) -> None:
    """Undo `put_inside`."""
    put_inside(module, marked, old)
    if vars(module).pop("simplex_had_forward", False) and "forward" not in vars(module):
        vars(module)["forward"] = MethodType(old, module)


def call_watched(
    module: nn.Module,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    method: str = "forward",  # that may pass the mark by
) -> Any:
    """Call a marked module and raise where its marked forward was passed by."""
    outer = getattr(_awaiting, "module", None)
    _awaiting.module = module
    try:
        result = call(*args, **kwargs)
        if _awaiting.module is module:
            raise UnservedMarkError(
                f"a marked module, {running_as(module)}, has a {method} {_where(module, method)}"
            )
    finally:
        _awaiting.module = outer
    return result


def watched(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `__call__` of marked modules that raises where it passes their mark by.

    Compiled, one that calls another `__call__` is trusted: it may do so in a checkpoint, which
    allows no watch.
    """
    code = getattr(inspect.unwrap(call), "__code__", None)
    is_trusted = code is not None and "__call__" in code.co_names

    @functools.wraps(call)
    def call_and_watch(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "simplex_mark"):  # torch.compile(module) holds this beyond unmark()
            return self(*args, **kwargs)
        if is_trusted and torch.compiler.is_compiling():
            return call(self, *args, **kwargs)
        return call_watched(self, functools.partial(call, self), args, kwargs, "__call__")

    return call_and_watch


def _where(module: nn.Module, method: str) -> str:
    if method in vars(module):
        return (
            "on the instance that passes the mark by. Take it away (`del module.forward`), or put "
            "there one that calls the marked forward"
        )
    return (
        f"of its own, as a {type(module).__name__}, that passes the mark by: let that class call "
        f"super().{method}, or unmark() the module before it becomes one, and mark it then"
    )


def marked_forward_runs(module: nn.Module) -> None:
    """Tell `call_watched` that it was not passed by."""
    if getattr(_awaiting, "module", None) is module:
        _awaiting.module = None


def _is_method(held: Any, module: nn.Module, function: Any) -> bool:
    return isinstance(held, MethodType) and held.__self__ is module and held.__func__ is function
