"""How messages name a module."""

import inspect

import torch
from torch import nn


def described(module: nn.Module) -> str:
    """Name a module by what it knows of itself: its class and its layer."""
    layer = getattr(module, "layer_idx", None)
    kind = getattr(type(module), "simplex_base", type(module)).__name__
    return f"{kind} of layer {layer}" if isinstance(layer, int) else kind


def running_as(module: nn.Module) -> str:
    """Name a module whose forward runs by its name in the outermost model that is running.

    Modules do not know their names; the callers' frames hold the model. For error messages alone.
    """
    kind = described(module)
    if torch.compiler.is_compiling():
        return kind  # a trace has no callers' frames
    name, frame = "", inspect.currentframe()
    while frame is not None:
        model = frame.f_locals.get("self")
        if isinstance(model, nn.Module):
            name = next((n for n, m in model.named_modules() if m is module), name)
        frame = frame.f_back
    return f"{name} ({kind})" if name else kind
