"""Whether a model was wrapped for several ranks before it was marked.

What wraps a model takes its parameters then. Those of k2 and v2, made later, would be reduced over
no ranks and sharded over none: each rank would train its own, and nothing would say so.
"""

import sys
from typing import Any

import torch
from torch import nn

from simplex_ops.marking.living import frozen, living
from simplex_ops.marking.naming import described


def refuse_wrapped(module: nn.Module, name: str, weight: Any) -> None:
    """Raise where a module is sharded, or a part of a wrapped model.

    Raises:
        ValueError: it is; the message names what wrapped it.
    """
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is not None and isinstance(weight, tensors.DTensor):
        raise ValueError(
            f"the weight of {described(module)}'s {name} is a DTensor: the model was sharded "
            "already, and k2 and v2 would be left out. Mark the model before fully_shard or "
            "parallelize_module; a plan for tensor parallelism must then shard simplex_k2 and "
            f"simplex_v2 as it shards {name}"
        )
    for wrapper in _wrappers():
        if any(m is module for m in wrapper.modules()):
            raise ValueError(
                f"{described(module)} is part of a model in {type(wrapper).__name__}, which took "
                "its parameters already and would not reduce the gradients of k2 and v2: mark the "
                f"model before {type(wrapper).__name__} wraps it"
            )


def _wrappers() -> list[nn.Module]:
    # A module does not know who wraps it, and marking is rare: look through all that lives.
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    kinds = [nn.parallel.DistributedDataParallel]
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        kinds.append(fsdp.FullyShardedDataParallel)
    return living(tuple(kinds)) + frozen(tuple(kinds))
