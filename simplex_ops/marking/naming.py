"""How messages name a module."""

import inspect
import sys
from typing import Any

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
    names = (n for model in running() for n, m in model.named_modules() if m is module)
    name = next(names, "")
    return f"{name} ({kind})" if name else kind


def running() -> list[nn.Module]:
    """Return the modules whose methods are the caller's callers, outermost first.

    What wraps a whole model (DistributedDataParallel, torch.compile) stands for the model.
    """
    found: list[nn.Module] = []
    frame = inspect.currentframe()
    while frame is not None:
        model = frame.f_locals.get("self")
        if isinstance(model, nn.Module):
            found.append(_inside(model))
        frame = frame.f_back
    return list(dict.fromkeys(reversed(found)))


def _inside(model: Any) -> nn.Module:
    """Return the model in what wraps it whole."""
    compiled = sys.modules.get("torch._dynamo.eval_frame")
    if compiled is not None and isinstance(model, compiled.OptimizedModule):
        return _inside(model._orig_mod)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return _inside(model.module)
    return model
