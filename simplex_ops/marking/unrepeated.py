"""Keys and values that a module repeats to all heads, in eager code, as they were before.

    k[:, :, None].expand(B, Hkv, G, N, D).reshape(B, Hkv * G, N, D)
    repeat_interleave(k, G, dim=1)

are both grouped queries' k, head h of them being head h // G of it. The mode under which a marked
module runs sees every function that is called, so what came out of a repeat is known by it, through
changes of the axes' order and of the dtype; in compiled code a pass does the same. A repeat in
another order (`k.repeat(1, G, 1, 1)`) is not known, and the mark is refused. Neither is anything
once a function has written in place, since that may have been into what is known.
"""

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from simplex_ops.marking.call import SdpaCall

_STRETCHED = ("expand", "expand_as", "broadcast_to", "repeat", "tile")
_MERGED = ("reshape", "flatten", "view")
_WRITING = {
    "__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__",
    "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__idiv__",
    "numpy", "data_ptr", "__dlpack__", "untyped_storage", "storage",  # memory that others write to
}  # fmt: skip
_COPIED = ("contiguous", "clone")
_ALIKE = (
    *_COPIED, "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis",
    "to", "float", "half", "bfloat16", "double", "type", "type_as",
)  # fmt: skip


class Unrepeated:
    """What was repeated while a module runs, each by the tensor that came out."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Look at a call of a function of PyTorch's, and at what it returned."""
        name = getattr(func, "__name__", "")
        if _writes(func, name, kwargs):
            self._known.clear()
        elif isinstance(out, Tensor) and args and isinstance(args[0], Tensor):
            before = self._before(func, name, args, kwargs, out)
            if before is not None:
                self._known[id(out)] = weakref.ref(out), before

    def _before(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> Tensor | None:
        """Return what stands for `out`: fewer heads, or the same stretched by strides of 0."""
        first: Tensor = args[0]
        known = self._of(first)
        if name == "repeat_interleave":
            dim, times = (_given(args, kwargs, *at) for at in ((2, "dim"), (1, "repeats")))
            is_told = isinstance(dim, int) and isinstance(times, int) and times > 1
            return first if is_told else None
        if name in _STRETCHED:
            return _stretched(first, out)
        if name in _MERGED:
            return _merged(first if known is None else known, out)
        if known is None or name not in _ALIKE:
            return None
        return known if name in _COPIED else func(known, *args[1:], **kwargs)

    def _of(self, tensor: Tensor) -> Tensor | None:
        found = self._known.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def folded(self, call: SdpaCall, heads: int) -> SdpaCall:
        """Return a call with its keys and values as they were with so many heads, if both were."""
        before = [self._with(t, heads) for t in (call.key, call.value)]
        if any(t is None for t in before):
            return call
        return replace(call, key=before[0], value=before[1], enable_gqa=True)

    def _with(self, tensor: Tensor, heads: int) -> Tensor | None:
        if tensor.dim() != 4 or tensor.shape[1] <= heads:
            return None
        known = self._of(tensor)
        if known is None:
            return None
        if heads == 1 and known.shape == tensor.shape and known.stride(1) == 0:
            known = known[:, :1]
        rest = (*tensor.shape[:1], *tensor.shape[2:])
        fits = known.dim() == 4 and (*known.shape[:1], *known.shape[2:]) == rest
        fits = fits and known.requires_grad == tensor.requires_grad
        return known if fits and known.shape[1] == heads else None


def _writes(func: Any, name: str, kwargs: dict[str, Any]) -> bool:
    """Say whether a call may write into a tensor that it is given."""
    by_name = name in _WRITING or (name.endswith("_") and not name.startswith("__"))
    return by_name or "out" in kwargs or bool(kwargs.get("inplace")) or _is_mutable(func, kwargs)


def _is_mutable(func: Any, kwargs: dict[str, Any]) -> bool:
    """Say so of an operator, by the schemas of all its overloads where none was named."""
    if isinstance(func, torch._ops.OpOverloadPacket):
        overloads = [getattr(func, name) for name in func.overloads()]
    else:
        overloads = [func] if isinstance(func, torch._ops.OpOverload) else []
    arguments = (argument for overload in overloads for argument in overload._schema.arguments)
    return any(a.is_write and (not a.kwarg_only or a.name in kwargs) for a in arguments)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str) -> Any:
    return args[place] if place < len(args) else kwargs.get(name)


def _stretched(first: Tensor, out: Tensor) -> Tensor | None:
    """Return a tensor stretched to a shape by strides, where its axes of 1 alone were repeated."""
    sizes = (*[1] * (out.dim() - first.dim()), *first.shape)
    fits = all(own in (1, size) for own, size in zip(sizes, out.shape, strict=True))
    return first.expand(out.shape) if fits and first.shape != out.shape else None


def _merged(wide: Tensor, out: Tensor) -> Tensor | None:
    """Return [.., Hkv, ..] of a view [.., Hkv * G, ..] of [.., Hkv, G, ..] whose G is one row."""
    for group in range(1, wide.dim()):
        sizes = wide.shape
        merged = (*sizes[: group - 1], sizes[group - 1] * sizes[group], *sizes[group + 1 :])
        if sizes[group] > 1 and wide.stride(group) == 0 and out.shape == merged:
            return wide.select(group, 0)
    return None
