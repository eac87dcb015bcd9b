"""What can be learned from a projection: sizes, dtype and device, of one that is quantised too."""

from typing import Any

import torch
from torch import Tensor, nn

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def why_not_linear(name: str, layer: Any) -> str | None:
    """Return why k2 and v2 cannot be made like a layer of this name; None where they can."""
    for wanted in ("in_features", "out_features"):
        if not isinstance(getattr(layer, wanted, None), int):
            return f"its {name} is no linear layer: it has no {wanted}"
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta and hasattr(layer, "_hf_hook"):
        return (
            f"its {name} is offloaded by accelerate, which brings its weight only while it runs "
            "and would not know of k2 and v2: mark the model before it is dispatched, or keep "
            "this module in memory (device_map)"
        )
    return None


def is_plain(layer: Any) -> bool:
    """Say whether a layer's weight is a matrix of floats, and not packed or quantised."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    plain_bias = bias is None or isinstance(bias, Tensor)
    return isinstance(weight, Tensor) and weight.dtype in _FLOATS and plain_bias


def matrix_of(layer: Any) -> Tensor:
    """Return the weight of a layer that `is_plain`, where torchao holds it quantised too."""
    weight = layer.weight
    whole = type(weight) in (Tensor, nn.Parameter)
    return weight if whole else weight.dequantize()


def dtype_of(module: nn.Module, layer: Any) -> torch.dtype | None:
    """Return the dtype of the activations that a projection of a module takes, if anything tells.

    A plain weight has it. A quantised layer may say in which dtype it computes; a model's config
    says in which it was loaded.
    """
    if is_plain(layer):
        return layer.weight.dtype
    config = getattr(module, "config", None)
    told = (
        getattr(layer, "compute_dtype", None),
        getattr(getattr(layer, "base_layer", None), "compute_dtype", None),
        getattr(config, "dtype", None),
    )
    return next((t for t in told if t in _FLOATS), None)


def device_of(module: nn.Module, layer: Any) -> torch.device:
    """Return the device of a projection's weight, however that is held."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        return weight.device
    of = layer if isinstance(layer, nn.Module) else module
    tensors = [*of.parameters(), *of.buffers(), *module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def has_bias(layer: Any) -> bool:
    """Say whether a projection adds a bias, as far as it can be told."""
    return isinstance(getattr(layer, "bias", None), Tensor)
