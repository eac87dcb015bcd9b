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
_LAST = torch.iinfo(torch.int32).max


def ranges(
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
        mask = mask.unsqueeze(0)
    mask = mask.expand(-1, -1, queries, keys)
    seen = mask if mask.dtype == torch.bool else mask == 0
    claims: dict[str, Tensor] = {}  # what must hold, by the reason if not
    if mask.dtype != torch.bool:
        claims[_ADDS] = (seen | (mask <= torch.finfo(mask.dtype).min)).all()
    if seen.shape[1] > 1:
        claims[_HEADS] = (seen == seen.narrow(1, 0, 1)).all()
    seen = seen.select(1, 0)
    place = torch.arange(keys, dtype=torch.int32, device=mask.device)
    count = seen.sum(-1, dtype=torch.int32)
    if keys:
        start = torch.where(seen, place, _LAST).amin(-1)
        end = torch.where(seen, place + 1, 0).amax(-1)
    else:
        start = end = count
    empty = count == 0
    start, end = start.masked_fill(empty, 0), end.masked_fill(empty, 0)
    claims[_HOLES] = (end - start == count).all()
    if is_causal:
        first = keys - queries if q_start is None else q_start.unsqueeze(1)
        after = torch.arange(1, queries + 1, dtype=torch.int32, device=mask.device) + first
        claims[_AFTER] = (end <= after).all()
    _hold(mask.device, claims)
    return torch.stack((start, end), -1).to(torch.int32).expand(batch, -1, -1).contiguous()


_ADDS = "its attention mask adds numbers other than 0 and the smallest, as biases do"
_HEADS = "its attention mask differs from head to head"
_HOLES = "its attention mask shows a query keys that are not one range"
_AFTER = (
    "its attention mask shows a query keys after it, and the module was marked with is_causal=True "
    "(mark it with is_causal=False)"
)


# A device's message ends before its 255th character.
_SHORT_REMEDY = "give each query one range of keys, the same to all heads, or unmark() the module"


def _hold(device: torch.device, claims: dict[str, Tensor]) -> None:
    if device.type == "meta":
        return
    for reason, claim in claims.items():
        if device.type != "cpu":
            torch._assert_async(
                claim,
                f"simplex: a mark is not served: {reason}: {_SHORT_REMEDY}",
            )
        elif not claim:
            raise UnservedMarkError(f"{reason}: {RANGES_REMEDY}")


@torch.library.register_fake("simplex::ranges_of_mask", lib=LIBRARY)
def _fake(attn_mask: Tensor, batch: Any, queries: Any, keys: Any, *_: Any, **__: Any) -> Tensor:
    return attn_mask.new_empty((batch, queries, 2), dtype=torch.int32)


LIBRARY.impl("ranges_of_mask", ranges, "CompositeExplicitAutograd")
