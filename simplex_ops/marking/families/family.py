"""What a family of attention modules is: what marking asks of it, and what it answers."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import nn


@dataclass(frozen=True)
class Projections:
    """The shapes of k2 and v2 for one attention module, and the pattern they follow.

    `like` is the module's own key projection: k2 and v2 take its input width, bias, dtype and
    device. `like_name` is its name in the module, for messages.
    """

    like: Any
    like_name: str
    kv_heads: int
    head_dim: int
    v_head_dim: int


class Bound(NamedTuple):
    """The arguments of one call by name, and under which names marking finds what it must know.

    The module's own forward is called with `arguments`, which marking may change: hence names, not
    values. What was not given, and what the family's forward does not take, is missing there.
    """

    arguments: dict[str, Any]
    x: str  # what k2 and v2 are made from
    mask: str
    cache: str


class Family(Protocol):
    """One kind of attention module. It is stateless, hashable and equal to its copies."""

    def read(self, module: nn.Module) -> Projections | str:
        """Read a module's projections, or return what it lacks to be of this family."""
        ...

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        """Name the arguments of a call of a marked module, as `module.simplex_arguments` does.

        torch.compile traces it: no inspection, no caches.

        Raises:
            TypeError: the arguments do not fit the module's forward.
        """
        ...
