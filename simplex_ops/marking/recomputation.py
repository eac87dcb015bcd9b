"""Whether a call of attention will run again in the backward, outside the module's forward.

In eager code a mark stands while the module's forward runs. A function that the forward itself
checkpoints runs once more in the backward, where the mark does not stand: ordinary attention would
be computed there, and its gradients. Two things tell of it, both put on inside the forward:

- gradients turned off: reentrant checkpoints, and other autograd functions that recompute;
- hooks on saved tensors: checkpoints without reentry.

A checkpoint around the whole module recomputes the module, mark and all: that is served.

Private name: torch._C._autograd._top_saved_tensors_default_hooks, seen in 2.11, 2.13 and 2.15.
"""

from typing import Any, NamedTuple

import torch

_REMEDY = (
    "where that is a checkpoint, put it around the whole module or its layer, as transformers' "
    "gradient checkpointing does, not around the attention inside"
)


class Surroundings(NamedTuple):
    """What decides how autograd records a call."""

    grad: bool
    hooks: tuple[Any, Any] | None

    @classmethod
    def here(cls) -> "Surroundings":
        """Take those of the caller."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
        return cls(torch.is_grad_enabled(), hooks)


def why_recomputed(entry: Surroundings) -> str | None:
    """Return why a call here may run again without the forward that was entered at `entry`."""
    here = Surroundings.here()
    if entry.grad and not here.grad:
        return (
            "its forward turns gradients off around scaled_dot_product_attention, as reentrant "
            "checkpoints do to run it again in the backward, where the mark would not stand; "
            + _REMEDY
        )
    if here.grad and here.hooks is not None and not _same(here.hooks, entry.hooks):
        return (
            "its forward puts hooks on saved tensors around scaled_dot_product_attention, as "
            "checkpoints do to run it again in the backward, where the mark would not stand; "
            + _REMEDY
        )
    return None


def _same(one: tuple[Any, Any], other: tuple[Any, Any] | None) -> bool:
    return other is not None and one[0] is other[0] and one[1] is other[1]
