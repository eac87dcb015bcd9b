"""simplex::mark, the operator that tells the compiler's pass what a marked module wants.

A marked module compiled by torch.compile passes its input through it:

    x = simplex::mark(hidden_states, k2, v2, attn_mask, w1, w2, ...)

The pass in `lowering` pairs it with the scaled_dot_product_attention whose query comes from x, and
takes it away. It computes nothing, and whoever runs it was compiled without the pass: that raises.
"""

from typing import Any

import torch
from torch import Tensor

from simplex_ops.contract.schema import LIBRARY
from simplex_ops.marking.call import UnservedMarkError

MARK_OP = torch.ops.simplex.mark.default

_REMEDY = (
    "a module marked for 2-simplicial attention was compiled without the pass that rewrites it: "
    'compile with torch.compile(model, backend="simplex"); or let simplex_ops.enable() stand '
    "whenever the model is called, since code is compiled when the model is called, and not by "
    "torch.compile(model), and again for other shapes (torch.compiler.reset() forgets what was "
    "compiled without the pass); or, for torch.export, let it stand around the export; or take the "
    "marks away with simplex_ops.unmark(module)"
)


@torch.library.register_fake("simplex::mark", lib=LIBRARY)
def _fake(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(x)


def _refuse(*_: Any, **__: Any) -> Tensor:
    raise UnservedMarkError(_REMEDY)


def _pass_on(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None, None, None, None, None, None


LIBRARY.impl("mark", _refuse, "CompositeExplicitAutograd")
torch.library.register_autograd("simplex::mark", _pass_on, lib=LIBRARY)
