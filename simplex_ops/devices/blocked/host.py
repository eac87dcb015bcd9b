"""What the host may look at: values on the CPU; elsewhere reading one would synchronise."""

import torch
from torch import Tensor

TAME = 1e36  # sums of products that stay below it cannot overflow float32


def can_look(x: Tensor) -> bool:
    """May a decision depend on the values of x?"""
    return x.device.type == "cpu"


def is_known(claim: Tensor) -> bool:
    """Is this true, and may the host look?"""
    return can_look(claim) and bool(claim)


def are_tame(*factors: Tensor, terms: float) -> bool:
    """Is every sum of `terms` products of elements of these tensors, or of some of them, finite?

    False where the host may not look.
    """
    if not all(can_look(factor) for factor in factors):
        return False
    bound = 8.0 * terms
    for factor in factors:
        bound *= 1 + torch.linalg.vector_norm(factor).item()  # the cheapest bound of an element
    return bound < TAME  # False for NaN


def are_moderate(*factors: Tensor) -> bool:
    """May these be multiplied with numbers between 1e-13 and 1e17 without a loss?

    False where the host may not look.
    """
    return all(
        can_look(factor) and 1e-8 < torch.linalg.vector_norm(factor).item() < 1e8
        for factor in factors
    )
