"""Whether a key-value cache can be served: only while it holds nothing."""

from typing import Any

import torch
from torch import Tensor, nn

from simplex_ops.marking.call import UnservedMarkError
from simplex_ops.marking.naming import running_as

_REMEDY = "call the model with use_cache=False, or with a new cache for each sequence"


def refuse_filled_cache(module: nn.Module, cache: Any) -> None:
    """Raise where a cache holds keys already, since it does not hold their k2 and v2.

    A static cache counts in a tensor once it was used, `reset()` or not. Eager code reads it, which
    waits for the device; compiled code cannot.
    """
    if cache is None:
        return
    # Read here and not before: a guard on layer_idx would compile every layer anew.
    seen = cache.get_seq_length(getattr(module, "layer_idx", 0))
    if isinstance(seen, Tensor) and torch.compiler.is_compiling():
        raise UnservedMarkError(
            f"a marked module, {running_as(module)}, was called with a key-value cache that counts "
            f"its keys in a tensor, and compiled code cannot tell whether it is empty: {_REMEDY}"
        )
    if seen != 0:
        raise UnservedMarkError(
            f"a marked module, {running_as(module)}, was called with a key-value cache that holds "
            f"keys already, and the cache does not hold their k2 and v2: {_REMEDY}"
        )
