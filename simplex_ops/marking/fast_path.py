"""PyTorch's fast path for nn.TransformerEncoderLayer, which passes a marked module by.

In inference the layer hands all its weights to one C++ function and never calls its attention. It
does not where any of its modules has a hook.
"""

from typing import Any

from torch import nn


def turn_off(module: nn.Module) -> None:
    """Keep whoever holds the module on the path that calls it."""
    if isinstance(module, nn.MultiheadAttention):
        module.register_forward_pre_hook(does_nothing)


def turn_on(module: nn.Module) -> None:
    """Undo `turn_off`."""
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is does_nothing]:
        del hooks[key]


def does_nothing(module: nn.Module, args: Any) -> None:
    """Be a hook."""
