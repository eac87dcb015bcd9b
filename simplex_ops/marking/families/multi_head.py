"""nn.MultiheadAttention, and so the self-attention of PyTorch's transformer layers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from simplex_ops.marking.families.arguments import by_name
from simplex_ops.marking.families.family import Bound, Copied, Projections
from simplex_ops.marking.multi_head import attend_batch_first, mask_of, refuse_unserved
from simplex_ops.marking.naming import running_as


@dataclass(frozen=True)
class MultiHead:
    """nn.MultiheadAttention, batch first or not, with packed or separate projections.

    Its own forward ends in C++ or in functions that take everything at once, so it is computed here
    by scaled_dot_product_attention, eager and compiled alike. `need_weights=True` (PyTorch's
    default) and cross attention are refused when called.
    """

    def read(self, module: nn.Module) -> Projections | str:
        """Read the sizes, or return what stands against it."""
        if not isinstance(module, nn.MultiheadAttention):
            return "it is no nn.MultiheadAttention"
        if type(module).forward is not nn.MultiheadAttention.forward:
            return "its class has a forward of its own in place of nn.MultiheadAttention's"
        if module.bias_k is not None or module.add_zero_attn:
            return "it adds keys that come from no token (add_bias_kv or add_zero_attn)"
        if module.kdim != module.embed_dim or module.vdim != module.embed_dim:
            return "it is a cross attention: kdim or vdim is not its embed_dim"
        key: Tensor | None = module.in_proj_weight
        name = "in_proj_weight" if key is not None else "k_proj_weight"
        key = key if key is not None else module.k_proj_weight
        if not isinstance(key, Tensor) or not key.dtype.is_floating_point:
            return f"its {name} is no matrix of floats: mark the model before it is quantised"
        return Projections(
            weight=key,
            weight_name=name,
            in_features=module.embed_dim,
            kv_heads=module.num_heads,
            head_dim=module.head_dim,
            v_head_dim=module.head_dim,
            bias=module.in_proj_bias is not None,
            device=key.device,
            dtype=key.dtype,
            copied=lambda: _copied(module),
        )

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Find the one sequence, batch first, and its mask."""
        given = by_name(module, args, kwargs, "query")
        given.setdefault("key", None)
        given.setdefault("value", None)
        refuse_unserved(given, running_as(module))
        x: Tensor = given["query"]
        own: Any = module
        batched = x.dim() == 3
        if not batched:
            x = x[None]
        elif not own.batch_first:
            x = x.transpose(0, 1)
        mask, is_causal = mask_of(
            given.get("attn_mask"),
            given.get("key_padding_mask"),
            bool(given.get("is_causal")),
            own.num_heads,
        )
        arguments = {"x": x, "batched": batched, "is_causal": is_causal, "attn_mask": mask}
        return Bound(arguments, "x", "attn_mask")

    def run(self, module: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Attend, and return (out, None) as need_weights=False does."""
        own: Any = module
        mask, is_causal = arguments["attn_mask"], arguments["is_causal"]
        out = attend_batch_first(
            arguments["x"], own.num_heads, _weights(own), own.in_proj_bias,
            own.dropout if own.training else 0.0, mask, is_causal,
            own.out_proj.weight, own.out_proj.bias,
        )  # fmt: skip
        if not arguments["batched"]:
            return out[0], None
        return (out if own.batch_first else out.transpose(0, 1)), None


def _weights(module: Any) -> Any:
    if module.in_proj_weight is not None:
        return module.in_proj_weight
    return (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)


def _copied(module: Any) -> Copied:
    weights, bias = _weights(module), module.in_proj_bias
    _, k, v = weights.chunk(3) if isinstance(weights, Tensor) else weights
    _, k_bias, v_bias = (None,) * 3 if bias is None else bias.chunk(3)
    return Copied(k, k_bias, v, v_bias)
