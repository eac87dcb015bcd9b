"""Modules shaped as Hugging Face's LlamaAttention."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from simplex_ops.marking.families.family import Bound, Projections
from simplex_ops.marking.families.linear import why_not_linear

_WANTED = ("q_proj", "k_proj", "v_proj", "head_dim")


@dataclass(frozen=True)
class Llama:
    """`forward(hidden_states, ...)`, linear q_proj, k_proj and v_proj, and head_dim.

    That is LlamaAttention, and those made after it: Mistral's, Qwen's and many others.
    """

    def read(self, module: nn.Module) -> Projections | str:
        """Read the key and value projections, or return what the module lacks."""
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
        own: Any = module
        if getattr(module, "sliding_window", None) is not None:
            return (
                f"it has a sliding window of its own ({own.sliding_window}); "
                "take it away and give mark() the window"
            )
        lack = why_not_linear("k_proj", own.k_proj)
        if lack is not None:
            return lack
        if not isinstance(getattr(own.v_proj, "out_features", None), int):
            return "its v_proj is no linear layer: it has no out_features"
        head_dim, keys, values = own.head_dim, own.k_proj.out_features, own.v_proj.out_features
        if not isinstance(head_dim, int) or keys % head_dim:
            return f"its k_proj makes {keys} features, no multiple of head_dim {head_dim}"
        kv_heads = keys // head_dim
        return Projections(own.k_proj, "k_proj", kv_heads, head_dim, values // kv_heads)

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Find hidden_states, attention_mask and past_key_values."""
        names: Any = module.simplex_arguments
        if len(args) > len(names):
            raise TypeError(
                f"forward of a marked module takes {len(names)} positional arguments "
                f"({', '.join(names)}), got {len(args)}"
            )
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(arguments) != len(args) + len(kwargs):
            raise TypeError("forward of a marked module got an argument by position and by name")
        if "hidden_states" not in arguments:
            raise TypeError("forward of a marked module was not given hidden_states")
        return Bound(arguments, "hidden_states", "attention_mask", "past_key_values")
