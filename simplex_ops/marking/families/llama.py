"""What marking must know of an attention module: where its input enters and how wide its keys are.

One function for each family of modules; a new family is a new function in `FAMILIES`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

_WANTED = ("q_proj", "k_proj", "v_proj", "head_dim")


@dataclass(frozen=True)
class Projections:
    """The shapes of k2 and v2 for one attention module, and the pattern they follow.

    `like` is the module's own key projection: k2 and v2 take its input width, bias, dtype and
    device.
    """

    like: Any
    in_features: int
    kv_heads: int
    head_dim: int
    v_head_dim: int


def of_llama(module: Any) -> Projections | str:
    """Read a module shaped as Hugging Face's LlamaAttention, or return what it lacks.

    That is: `forward(hidden_states, ...)`, linear q_proj, k_proj and v_proj, and head_dim.
    """
    missing = [name for name in _WANTED if not hasattr(module, name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    parameters = inspect.signature(type(module).forward).parameters
    if list(parameters)[1:2] != ["hidden_states"]:
        return "the first argument of its forward is not hidden_states"
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values()):
        return "its forward takes *args, so its arguments cannot be told apart by name"
    if "key_value_states" in parameters or "encoder_hidden_states" in parameters:
        return "it is a cross attention: its keys come from another sequence"
    if getattr(module, "sliding_window", None) is not None:
        return (
            f"it has a sliding window of its own ({module.sliding_window}); "
            "take it away and give mark() the window"
        )
    for name in ("k_proj", "v_proj"):
        if not hasattr(getattr(module, name), "out_features"):
            return f"its {name} is no linear layer: it has no out_features"
    head_dim = module.head_dim
    k_proj, v_proj = module.k_proj, module.v_proj
    if not isinstance(head_dim, int) or k_proj.out_features % head_dim:
        return (
            f"its k_proj makes {k_proj.out_features} features, no multiple of head_dim {head_dim}"
        )
    kv_heads = k_proj.out_features // head_dim
    return Projections(
        k_proj, k_proj.in_features, kv_heads, head_dim, v_proj.out_features // kv_heads
    )


FAMILIES: tuple[Callable[[nn.Module], Projections | str], ...] = (of_llama,)


def projections_of(module: nn.Module) -> Projections:
    """Return the first family's reading of a module.

    Raises:
        TypeError: no family knows the module; the message says what each found missing.
    """
    found = [read(module) for read in FAMILIES]
    for reading in found:
        if isinstance(reading, Projections):
            return reading
    raise TypeError(
        "mark() serves attention modules shaped as Hugging Face's LlamaAttention, got "
        f"{type(module).__name__}: {'; '.join(str(reading) for reading in found)}"
    )
