"""What a family of attention modules is: what marking asks of it, and what it answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Copied(NamedTuple):
    """A module's own key and value projections as linear layers: [out, in] and [out], or None."""

    k_weight: Tensor
    k_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None


@dataclass(frozen=True)
class Projections:
    """What k2 and v2 of one attention module are made like.

    `weight` is the module's own key projection as it stands: whoever shards it must shard k2.
    `weight_name` is its name in the module, for messages. `dtype` is None where the module's own
    weights do not tell it, as quantised ones do not. `norm_eps` is that of the norm over head_dim
    that the module puts on its keys; None where it has none. `copied` gives the weights that
    init="copy" copies, or says why it cannot.
    """

    weight: Any
    weight_name: str
    in_features: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    bias: bool
    device: torch.device
    dtype: torch.dtype | None
    norm_eps: float | None = None
    copied: Callable[[], Copied | str] = lambda: "its keys and values are not read apart"


class Bound(NamedTuple):
    """The arguments of one call by name, and under which names marking finds what it must know.

    The module is run with `arguments`, which marking may change: hence names, not values. What was
    not given, and what the family's forward does not take, is missing there.
    """

    arguments: dict[str, Any]
    x: str  # what k2 and v2 are made from, [B, N, in_features]
    mask: str = ""
    cache: str = ""


class Family(Protocol):
    """One kind of attention module. It is stateless, hashable and equal to its copies.

    `simplex_ops.register_family` adds one. Where its class is importable, marked modules can be
    pickled.
    """

    def read(self, module: nn.Module) -> Projections | str:
        """Read a module's projections, or return what it lacks to be of this family."""
        ...

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Name the arguments of a call of a marked module, as `module.simplex_arguments` does.

        torch.compile traces it: no inspection, no caches.

        Raises:
            TypeError: the arguments do not fit the module's forward.
            UnservedMarkError: they ask for what no mark can serve.
        """
        ...

    def run(self, module: nn.Module, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run the module on bound arguments: `forward(**arguments)`, its own, where that will do.

        It must call scaled_dot_product_attention once, on heads made from the argument that `bind`
        called x. torch.compile traces it.
        """
        ...
