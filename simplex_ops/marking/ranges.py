"""simplex::ranges_of_mask: an attention mask as the range of keys that each query sees.

What a mask says beyond a window (padding, packed documents, chunks, another window) is, for each
query, one range of keys: the kv_bounds of simplex::attn. Whether a mask is such is a matter of its
values, so it is looked at when it runs, at every size and for every batch: what is no range raises,
and ordinary attention or a wider range never stands in.

On a CPU that raises at once, in UnservedMarkError. Elsewhere it would wait for the device, so the
device asserts it (torch._assert_async).
"""

from typing import Any

import torch
from torch import Tensor

from simplex_ops.contract.schema import LIBRARY
from simplex_ops.marking.call import RANGES_REMEDY, UnservedMarkError

RANGES_OP = torch.ops.simplex.ranges_of_mask.default


def _ranges(
    attn_mask: Tensor,
    batch: int,
    queries: int,
    keys: int,
    is_causal: bool = True,
    q_start: Tensor | None = None,
) -> Tensor:
    """Return int32 [batch, queries, 2]: start and end of the keys that each query sees.

    `q_start` is simplex::attn's, by which causality is judged.
    """
    mask = attn_mask.detach()
    while mask.dim() < 4:
        mask = mask[None]
    mask = mask.expand(-1, -1, queries, keys)
    seen = mask if mask.dtype == torch.bool else mask == 0
    plain = torch.ones((), dtype=torch.bool, device=mask.device)
    if mask.dtype != torch.bool:
        plain = (seen | (mask <= torch.finfo(mask.dtype).min)).all()
    alike = plain
    if seen.shape[1] > 1:
        alike = (seen == seen[:, :1]).all()
    seen = seen[:, 0]
    place = torch.arange(keys, dtype=torch.int32, device=mask.device)
    count = seen.sum(-1, dtype=torch.int32)
    if keys:
        start = torch.where(seen, place, keys).amin(-1)
        end = torch.where(seen, place + 1, 0).amax(-1)
    else:
        start = end = count
    empty = count == 0
    start, end = start.masked_fill(empty, 0), end.masked_fill(empty, 0)
    whole = (end - start == count).all()
    behind = plain
    if is_causal:
        first = keys - queries if q_start is None else q_start[:, None]
        after = torch.arange(1, queries + 1, dtype=torch.int32, device=mask.device) + first
        behind = (end <= after).all()
    _hold(mask.device, plain, alike, whole, behind)
    return torch.stack((start, end), -1).to(torch.int32).expand(batch, -1, -1).contiguous()


_AFTER = (
    "its attention mask shows a query keys after it, and the module was marked with is_causal=True "
    "(mark it with is_causal=False)"
)
_REASONS = (
    "its attention mask adds numbers other than 0 and the smallest, as biases do",
    "its attention mask differs from head to head",
    "its attention mask shows a query keys that are not one range",
    _AFTER,
)


def _hold(device: torch.device, *claims: Tensor) -> None:
    if device.type == "meta":
        return
    if device.type != "cpu":
        torch._assert_async(
            torch.stack(claims).all(),
            f"simplex: an attention mask of a marked module is not served: {RANGES_REMEDY}",
        )
        return
    for reason, claim in zip(_REASONS, claims, strict=True):
        if not claim:
            raise UnservedMarkError(f"{reason}: {RANGES_REMEDY}")


@torch.library.register_fake("simplex::ranges_of_mask", lib=LIBRARY)
def _fake(attn_mask: Tensor, batch: Any, queries: Any, keys: Any, *_: Any, **__: Any) -> Tensor:
    return attn_mask.new_empty((batch, queries, 2), dtype=torch.int32)


LIBRARY.impl("ranges_of_mask", _ranges, "CompositeExplicitAutograd")
