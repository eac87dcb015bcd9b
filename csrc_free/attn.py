"""The two entries of this package: which implementation runs one problem.

A launch takes the current device and its current stream: each entry makes them those of q.
"""

from typing import Any

from torch import Tensor

from csrc_free.launch import on_device_of
from csrc_free.portable import backward, forward

__all__ = ["attn_backward", "attn_forward"]


def attn_forward(q: Tensor, *inputs: Tensor, **arguments: Any) -> None:
    """Write out and lse; see `portable.forward.attn_forward`."""
    with on_device_of(q):
        forward.attn_forward(q, *inputs, **arguments)


def attn_backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, *inputs: Tensor, **arguments: Any
) -> None:
    """Write the wanted gradients; see `portable.backward.attn_backward`."""
    with on_device_of(q):
        backward.attn_backward(dout, dlse, q, *inputs, **arguments)
