"""A module of no known family, whose sizes its user gives."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from simplex_ops.marking.families.arguments import by_name
from simplex_ops.marking.families.family import Bound, Projections
from simplex_ops.marking.families.linear import device_of, dtype_of, has_bias, why_not_linear


@dataclass(frozen=True)
class Sized:
    """A module whose forward takes [B, N, E] first and calls scaled_dot_product_attention once.

    E, dtype and device are those of its first linear layer.
    """

    kv_heads: int
    head_dim: int

    def read(self, module: nn.Module) -> Projections | str:
        """Read the width of the input from the first linear layer."""
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        if not parameters or parameters[0].kind not in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        ):
            return "its forward has no first argument by name, from which to make k2 and v2"
        if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
            return "its forward takes *args, so its arguments cannot be told apart by name"
        layers = [(n, m) for n, m in module.named_modules() if why_not_linear(n, m) is None]
        if not layers:
            return "it has no linear layer to tell the width of its input"
        name, first = layers[0]
        return Projections(
            weight=getattr(first, "weight", None),
            weight_name=name,
            in_features=int(first.in_features),  # pyright: ignore[reportArgumentType]
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            v_head_dim=self.head_dim,
            bias=has_bias(first),
            device=device_of(module, first),
            dtype=dtype_of(module, first),
        )

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Find the first argument. A mask is the module's own matter: its attention is asked."""
        first: Any = module
        first = first.simplex_arguments[0]
        return Bound(by_name(module, args, kwargs, first), first)

    def run(self, module: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run its own forward."""
        return forward(**arguments)
