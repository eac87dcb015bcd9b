"""The two entries of this package: which implementation runs one problem."""

from csrc_free.portable.backward import attn_backward
from csrc_free.portable.forward import attn_forward

__all__ = ["attn_backward", "attn_forward"]
