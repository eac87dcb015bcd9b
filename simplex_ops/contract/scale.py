"""The scale of the logits, where none is given."""

from torch import Tensor


def scale_of(q: Tensor, scale: float | None) -> float:
    """Return the scale: 1 / sqrt(head_dim) for None."""
    return q.shape[3] ** -0.5 if scale is None else scale
