"""Whether a projection is a linear layer that another can be made like."""

from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def why_not_linear(name: str, layer: Any) -> str | None:
    """Return why k2 and v2 cannot be made like a layer of this name; None where they can."""
    for wanted in ("in_features", "out_features"):
        if not isinstance(getattr(layer, wanted, None), int):
            return f"its {name} is no linear layer: it has no {wanted}"
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        return _quantised(name, layer, "has no tensor as its weight")
    if weight.dtype not in _FLOATS:
        return _quantised(name, layer, f"has a weight of {weight.dtype}")
    if weight.is_meta and hasattr(layer, "_hf_hook"):
        return (
            f"its {name} is offloaded by accelerate, which brings its weight only while it runs "
            "and would not know of k2 and v2: mark the model before it is dispatched, or keep "
            "this module in memory (device_map)"
        )
    return None


def _quantised(name: str, layer: Any, found: str) -> str:
    return (
        f"its {name}, a {type(layer).__name__}, {found}, as quantised layers have, and k2 and v2 "
        "take dtype and device from it: mark the model before it is quantised"
    )
