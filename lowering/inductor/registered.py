"""Tells Inductor of both lowerings."""

import functools
from typing import Any

from lowering import compat
from simplex_ops.contract.schema import ATTN_BACKWARD_OP, ATTN_OP


@functools.cache
def register() -> None:
    """Register both lowerings, once; it takes no time before one is used."""
    compat.warn_if_untested()
    compat.register_lowering(ATTN_OP, _attn)
    compat.register_lowering(ATTN_BACKWARD_OP, _attn_backward)


def _attn(*args: Any, **kwargs: Any) -> Any:
    from lowering.inductor.launcher import lower
    from simplex_ops.devices import gpu

    return lower(ATTN_OP, gpu.attn, args, kwargs)


def _attn_backward(*args: Any, **kwargs: Any) -> Any:
    from lowering.inductor.launcher import lower
    from simplex_ops.devices import gpu

    return lower(ATTN_BACKWARD_OP, gpu.attn_backward, args, kwargs)
