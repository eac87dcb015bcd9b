"""Modules shaped as Hugging Face's LlamaAttention."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from simplex_ops.marking.families.arguments import by_name
from simplex_ops.marking.families.family import Bound, Copied, Projections
from simplex_ops.marking.families.linear import (
    device_of,
    dtype_of,
    has_bias,
    is_plain,
    matrix_of,
    why_not_linear,
)

_WANTED = ("q_proj", "k_proj", "v_proj", "head_dim")


@dataclass(frozen=True)
class Llama:
    """`forward(hidden_states, ...)`, linear q_proj, k_proj and v_proj, and head_dim.

    That is LlamaAttention, and those made after it: Mistral's, Qwen's and many others. A k_norm, as
    Qwen3's, gives k2 a norm of its own: `Projections.norm_eps`.
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
        return Projections(
            weight=getattr(own.k_proj, "weight", None),
            weight_name="k_proj",
            in_features=own.k_proj.in_features,
            kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=values // kv_heads,
            bias=has_bias(own.k_proj),
            device=device_of(module, own.k_proj),
            dtype=dtype_of(module, own.k_proj),
            norm_eps=_norm_eps(getattr(module, "k_norm", None)),
            copied=lambda: _copied(own),
        )

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Find hidden_states, attention_mask and past_key_values."""
        arguments = by_name(module, args, kwargs, "hidden_states")
        return Bound(arguments, "hidden_states", "attention_mask", "past_key_values")

    def run(self, module: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run its own forward."""
        return forward(**arguments)


def _copied(module: Any) -> Copied | str:
    k, v = module.k_proj, module.v_proj
    for name, layer in (("k_proj", k), ("v_proj", v)):
        if not is_plain(layer):
            return f"its {name}, a {type(layer).__name__}, has no matrix of floats as its weight"
    return Copied(matrix_of(k), k.bias, matrix_of(v), v.bias)


def _norm_eps(norm: Any) -> float | None:
    if not isinstance(norm, nn.Module) or isinstance(norm, nn.Identity):
        return None
    told = [getattr(norm, name, None) for name in ("variance_epsilon", "eps")]
    return float(next((eps for eps in told if isinstance(eps, float)), 1e-6))
