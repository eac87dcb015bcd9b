"""Other implementations of 2-simplicial attention, each behind an adaptor of its own.

None of their code is here: an adaptor calls what whoever runs the bench has installed or fetched,
within the limits of that peer, and says in its note what it had to work around.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

# Peers round more than operands to bf16 (FBGEMM its lse, 8 bits of a number near 10), so percents
# apart can be right. The figure itself stands in the note.
TOLERANCE = 1e-1


def agreement(peers: Iterable[Tensor], ours: Iterable[Tensor]) -> str:
    """Say how far a peer's results are from ours, as the largest relative error in the 2-norm."""
    errors = [
        (torch.linalg.vector_norm(p.float() - o.float()) / torch.linalg.vector_norm(o.float()))
        for p, o in zip(peers, ours, strict=True)
    ]
    worst = torch.stack(errors).max().item()
    return f"agrees with ours to {worst:.0e}" if worst < TOLERANCE else f"WRONG by {worst:.0e}"
