"""Tells Inductor of the lowerings."""

import functools
from typing import Any

from lowering import compat
from simplex_ops.contract.schema import ATTN_BACKWARD_OP, ATTN_OP
from simplex_ops.marking.ranges import RANGES_OP, ranges


@functools.cache
def register() -> None:
    """Register the lowerings, once; it takes no time before one is used.

    An untested torch may have nowhere to register them: its compiled code calls the operators.
    """
    compat.warn_if_untested()
    try:
        compat.register_lowering(ATTN_OP, _attn)
        compat.register_lowering(ATTN_BACKWARD_OP, _attn_backward)
        compat.register_lowering(RANGES_OP, _ranges)
    except (AttributeError, ImportError):
        if compat.is_tested():
            raise


def _attn(*args: Any, **kwargs: Any) -> Any:
    from lowering.inductor.launcher import lower
    from simplex_ops.devices import gpu

    return lower(ATTN_OP, gpu.attn, args, kwargs)


def _attn_backward(*args: Any, **kwargs: Any) -> Any:
    from lowering.inductor.launcher import lower
    from simplex_ops.devices import gpu

    return lower(ATTN_BACKWARD_OP, gpu.attn_backward, args, kwargs)


def _ranges(*args: Any, **kwargs: Any) -> Any:
    from lowering.inductor.launcher import lower_to_operations, or_call

    return or_call(lower_to_operations, RANGES_OP, ranges, args, kwargs)
