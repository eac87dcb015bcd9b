"""The one input check that eager, fake and compiled calls share.

Each rule raises before any kernel starts, with the argument, the rule and what came.
Values of tensors are never read: that would synchronise with the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Marks that were saved hold a form's place among these: add at the end.
FORMS = ("trilinear", "determinant", "strassen")
_IN_PLACE_OF_NUMBERS = {
    "scale": "multiply q by it",
    "k2_bias": "add it to k2",
    "v2_bias": "add it to v2",
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_attn(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    w1: Any = None,
    w2: Any = None,
    *,
    form: str = "trilinear",
    kv_bounds: Tensor | None = None,
    q_start: Tensor | None = None,
    **_: Any,
) -> None:
    """Raise unless the arguments of simplex::attn are well formed.

    Raises:
        TypeError: a dtype that attention cannot take, or tensors of different dtypes.
        ValueError: a wrong rank, shape, window or form.
        RuntimeError: tensors on different devices.
    """
    tensors = {"q": q, "k1": k1, "k2": k2, "v1": v1, "v2": v2}
    _check_dtypes(tensors)
    _check_devices({**tensors, "kv_bounds": kv_bounds, "q_start": q_start})
    for name, tensor in tensors.items():
        _check_rank(name, tensor)
    _check_shapes(q, k1, k2, v1, v2)
    check_window("w1", w1)
    check_window("w2", w2)
    check_form(form)
    batch, seq = q.shape[0], q.shape[2]
    if kv_bounds is not None:
        meaning = "shape [q's batch, q's length, 2]"
        _check_positions("kv_bounds", kv_bounds, meaning, (batch, seq, 2))
    if q_start is not None:
        _check_positions("q_start", q_start, "shape [q's batch]", (batch,))


def check_attn_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    out: Tensor,
    lse: Tensor,
    w1: Any = None,
    w2: Any = None,
    **options: Any,
) -> None:
    """Raise unless the arguments of simplex::attn_backward are well formed; see `check_attn`."""
    check_attn(q, k1, k2, v1, v2, w1, w2, **options)
    rows, shape = "q's batch, heads and length", (*q.shape[:3], v1.shape[3])
    for name, tensor, meaning, expected in (
        ("out", out, f"{rows} and v1's head_dim", shape),
        ("dout", dout, f"{rows} and v1's head_dim", shape),
        ("lse", lse, rows, shape[:3]),
        ("dlse", dlse, rows, shape[:3]),
    ):
        if tensor is not None:
            _check_sizes(name, meaning, expected, tuple(tensor.shape))
    _check_devices({"q": q, "out": out, "dout": dout, "lse": lse, "dlse": dlse})


def check_form(form: str) -> None:
    """Raise ValueError unless the form is one of `FORMS`."""
    _check(ValueError, form in FORMS, lambda: f"form must be one of {FORMS}, got {form!r}")


def check_window(name: str, window: Any) -> None:
    """Raise ValueError unless a window, an int or a symbol, is None or at least 1."""
    _check(
        ValueError,
        window is None or window >= 1,
        lambda: f"{name} must be at least 1 (a window counts the query itself), got {window}",
    )


def check_numbers(**numbers: Any) -> None:
    """Raise TypeError where one of these is a tensor that requires a gradient.

    The dispatcher makes a number of it before any kernel sees it, and its gradient would be lost.
    """
    for name, number in numbers.items():
        if number.__class__ is not float and isinstance(number, Tensor) and number.requires_grad:
            raise TypeError(
                f"{name} must be a number, got a tensor that requires a gradient, which none goes "
                f"to: {_IN_PLACE_OF_NUMBERS[name]} instead"
            )


def _check(error: type[Exception], condition: Any, message: Callable[[], str]) -> None:
    """Do as `torch._check` does, which takes symbolic conditions, and 2 us for plain ones."""
    if condition is not True:
        torch._check_with(error, condition, message)


def _check_dtypes(tensors: dict[str, Tensor]) -> None:
    q = tensors["q"]
    for name, tensor in tensors.items():
        _check(
            TypeError,
            tensor.dtype in _FLOATS,
            lambda name=name, tensor=tensor: (
                f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            ),
        )
        _check(
            TypeError,
            tensor.dtype == q.dtype,
            lambda name=name, tensor=tensor: (
                f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}"
            ),
        )


def _check_devices(tensors: dict[str, Tensor | None]) -> None:
    q = tensors["q"]
    assert q is not None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        _check(
            RuntimeError,
            tensor.device == q.device,
            lambda name=name, tensor=tensor: (
                f"{name} must be on the device of q, {q.device}, got {tensor.device}"
            ),
        )


def _check_rank(name: str, tensor: Tensor) -> None:
    _check(
        ValueError,
        tensor.dim() == 4,
        lambda: (
            f"{name} must have 4 dimensions [batch, heads, seq, head_dim], "
            f"got {tensor.dim()} of shape {list(tensor.shape)}"
        ),
    )


def _check_shapes(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> None:
    heads, head_dim = q.shape[1], q.shape[3]
    kv_heads, value_dim = k1.shape[1], v1.shape[3]
    _check(ValueError, head_dim >= 1, lambda: f"q must have head_dim at least 1, got {head_dim}")
    _check(ValueError, value_dim >= 1, lambda: f"v1 must have head_dim at least 1, got {value_dim}")
    _check(
        ValueError, kv_heads >= 1, lambda: f"k1 must have at least 1 key-value head, got {kv_heads}"
    )
    _check(
        ValueError,
        heads % kv_heads == 0,
        lambda: (
            f"q must have a multiple of k1's key-value heads, got {heads} heads in q "
            f"and {kv_heads} in k1"
        ),
    )
    batch, _, keys1, _ = k1.shape
    batch2, heads2, keys2, dim2 = k2.shape
    _check_sizes("k1", "q's batch and head_dim", (q.shape[0], head_dim), (batch, k1.shape[3]))
    _check_sizes(
        "v1", "k1's batch, heads and length", (batch, kv_heads, keys1), tuple(v1.shape[:3])
    )
    _check_sizes(
        "k2", "k1's batch, heads and head_dim", (batch, kv_heads, head_dim), (batch2, heads2, dim2)
    )
    _check_sizes("v2", "k2's batch, heads and length", (batch2, heads2, keys2), tuple(v2.shape[:3]))
    _check_sizes("v2", "v1's head_dim", (value_dim,), (v2.shape[3],))


def _check_sizes(name: str, meaning: str, expected: tuple[Any, ...], got: tuple[Any, ...]) -> None:
    _check(
        ValueError,
        got == expected,
        lambda: f"{name} must have {meaning} {list(expected)}, got {list(got)}",
    )


def _check_positions(name: str, tensor: Tensor, meaning: str, expected: tuple[Any, ...]) -> None:
    _check(
        TypeError,
        tensor.dtype == torch.int32,
        lambda: f"{name} must be int32, got {tensor.dtype}",
    )
    _check_sizes(name, f"{meaning} =", expected, tuple(tensor.shape))
