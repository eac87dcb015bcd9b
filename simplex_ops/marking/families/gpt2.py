"""Hugging Face's GPT-2: one packed projection, stored the other way round."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from simplex_ops.marking.call import UnservedMarkError
from simplex_ops.marking.families.arguments import by_name
from simplex_ops.marking.families.family import Bound, Copied, Projections
from simplex_ops.marking.families.linear import device_of, dtype_of, has_bias, is_plain
from simplex_ops.marking.naming import running_as


@dataclass(frozen=True)
class GPT2:
    """`forward(hidden_states, ...)` and c_attn, a Conv1D [E, 3E] of queries, keys and values."""

    def read(self, module: nn.Module) -> Projections | str:
        """Read c_attn, or return what the module lacks."""
        missing = [n for n in ("c_attn", "num_heads", "embed_dim") if not hasattr(module, n)]
        if missing:
            return f"it has no {', '.join(missing)}"
        if getattr(module, "is_cross_attention", False):
            return "it is a cross attention: its keys come from another sequence"
        own: Any = module
        width, heads, packed = own.embed_dim, own.num_heads, own.c_attn
        made = getattr(packed, "nf", getattr(packed, "out_features", None))
        if made != 3 * width or width % heads:
            return f"its c_attn makes {made} features, not 3 times its embed_dim {width}"
        return Projections(
            weight=getattr(packed, "weight", None),
            weight_name="c_attn",
            in_features=width,
            kv_heads=heads,
            head_dim=width // heads,
            v_head_dim=width // heads,
            bias=has_bias(packed),
            device=device_of(module, packed),
            dtype=dtype_of(module, packed),
            copied=lambda: _copied(packed, width),
        )

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Find hidden_states, attention_mask and past_key_values."""
        arguments = by_name(module, args, kwargs, "hidden_states")
        if arguments.get("encoder_hidden_states") is not None:
            raise UnservedMarkError(
                f"a marked module, {running_as(module)}, was given encoder_hidden_states, and a "
                "mark serves self-attention alone: call it without, or unmark() it"
            )
        return Bound(arguments, "hidden_states", "attention_mask", "past_key_values")

    def run(self, module: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run its own forward."""
        return forward(**arguments)


def _copied(packed: Any, width: int) -> Copied | str:
    if not is_plain(packed) or tuple(packed.weight.shape) != (width, 3 * width):
        return f"its c_attn, a {type(packed).__name__}, has no matrix [E, 3E] of floats"
    _, k, v = packed.weight.split(width, dim=1)
    biases = (None,) * 3 if packed.bias is None else packed.bias.split(width)
    return Copied(k.T, biases[1], v.T, biases[2])
