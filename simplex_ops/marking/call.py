"""One call of scaled_dot_product_attention: what it says, and why a mark cannot take it over.

Eager code and the compiler's pass ask the same question here, with real and with fake tensors.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SDPA = F.scaled_dot_product_attention  # torch._C._nn's own, as Dynamo's graphs hold it

RANGES_REMEDY = (
    "a mark serves masks that show each query one range of keys, the same to all heads (causal, "
    "padding, packed documents, windows, chunks): give such a mask, or unmark() the module"
)


class UnservedMarkError(RuntimeError):
    """A marked module cannot run 2-simplicial attention; ordinary attention never stands in."""


@dataclass(frozen=True)
class SdpaCall:
    """The arguments of a call, in the order and with the defaults of PyTorch's signature."""

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False

    @classmethod
    def bind(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "SdpaCall":
        """Name positional arguments."""
        names = (field.name for field in fields(cls))
        return cls(**dict(zip(names, args, strict=False)), **kwargs)


class Refusal(NamedTuple):
    """Why a mark cannot take over a call, and what to do about it."""

    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.why}: {self.remedy}"


class Expected(NamedTuple):
    """What a call must be of a module that was given a key-value cache."""

    queries: Any
    keys: Any  # all that the cache hands over, which may be more than the rows of k2
    causal_by_mark: bool  # the module was told is_causal=False, and the mark says what is seen


def refusal(
    call: SdpaCall,
    k2: Tensor,
    is_causal: bool,
    without_dropout: bool = False,
    expected: Expected | None = None,
) -> Refusal | None:
    """Return why a mark with `k2` [B, Hkv, N, D] cannot take over this call; None where it can."""
    q, k = call.query, call.key
    if call.dropout_p != 0.0 and not without_dropout:
        return Refusal(
            f"its attention dropout is {float(call.dropout_p)}, and 2-simplicial attention has "
            "none",
            "mark it with attention_dropout=0.0, which drops the dropout, or call model.eval()",
        )
    if q.dim() != 4 or k.dim() != 4:
        return Refusal(
            f"query and key must have 4 dimensions, got {q.dim()} and {k.dim()}",
            "give the module's scaled_dot_product_attention [B, H, N, D]",
        )
    found = _why_of_other_length(q, k, k2, expected)
    if found is not None:
        return found
    if k.shape[1] < k2.shape[1]:
        return Refusal(
            f"key has {k.shape[1]} heads and k2 has {k2.shape[1]}",
            "what shards k_proj and v_proj over ranks must shard simplex_k2 and simplex_v2 alike "
            "(add them to the plan of tensor parallelism)",
        )
    if k.shape[1] != k2.shape[1]:
        return Refusal(
            f"key has {k.shape[1]} heads and k2 has {k2.shape[1]}",
            "keys must keep their key-value heads (enable_gqa=True), not be repeated; where it was "
            f"marked with kv_heads, mark it with kv_heads={k.shape[1]}",
        )
    if q.shape[3] != k2.shape[3]:
        return Refusal(
            f"query and key have head_dim {q.shape[3]} and k2 has {k2.shape[3]}",
            f"mark it with head_dim={q.shape[3]}",
        )
    if call.attn_mask is not None:
        # A mask of the call says all, causality too; its values are looked at when it runs.
        reason = why_no_ranges(call.attn_mask, q.shape[2], k.shape[2], q.shape[0], q.shape[1])
        return (
            None
            if reason is None
            else Refusal(f"its attention mask is not served: {reason}", RANGES_REMEDY)
        )
    if q.shape[2] == 1:  # one query at the last key is causal and not
        return None
    if expected is not None and expected.causal_by_mark and not call.is_causal:
        return None
    if call.is_causal and q.shape[2] != k.shape[2]:
        return Refusal(
            f"scaled_dot_product_attention was called with is_causal=True for {q.shape[2]} queries "
            f"and {k.shape[2]} keys, which puts the first query at the first key",
            "give the module an attention mask",
        )
    if bool(call.is_causal) != is_causal:
        return Refusal(
            f"scaled_dot_product_attention was called with is_causal={bool(call.is_causal)} and "
            f"the module was marked with is_causal={is_causal}",
            f"mark it with is_causal={bool(call.is_causal)}",
        )
    return None


def _why_of_other_length(q: Any, k: Any, k2: Tensor, expected: Expected | None) -> Refusal | None:
    if expected is None:
        if k.shape[2] == k2.shape[2] and q.shape[2] == k2.shape[2]:
            return None
        return Refusal(
            f"there are {q.shape[2]} queries and {k.shape[2]} keys but {k2.shape[2]} rows of k2",
            "give the module its key-value cache as past_key_values, which will hold k2 and v2 "
            "too, or call the model with use_cache=False",
        )
    if k.shape[2] == expected.keys and q.shape[2] == expected.queries:
        return None
    return Refusal(
        f"there are {q.shape[2]} queries and {k.shape[2]} keys, but {expected.queries} tokens and "
        f"{expected.keys} keys in its key-value cache",
        "its forward must put its keys into the cache that it was given and attend to all that "
        "this returns; or call the model with use_cache=False",
    )


def with_mask(call: SdpaCall, mask: Any) -> tuple[SdpaCall, Refusal | None]:
    """Return a call with the mask that its module was given and a mark took over, if any."""
    if mask is None:
        return call, None
    if call.attn_mask is None:
        return replace(call, attn_mask=mask), None
    return call, Refusal(
        "it was given an attention mask, and its forward attends with another of its own making",
        "leave the attention mask out",
    )


def why_no_ranges(mask: Any, queries: Any, keys: Any, batch: Any, heads: Any) -> str | None:
    """Return why a mask's shape or kind rules out that it is ranges; None where it does not."""
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        return (
            f"it is of {mask.dtype}, and scaled_dot_product_attention takes truth values or floats"
        )
    if mask.requires_grad:
        return "it is an additive bias that is trained"
    if mask.dim() not in (2, 3, 4):
        return (
            f"it has {mask.dim()} dimensions, and a mask [{queries}, {keys}] or one with heads and "
            "batch before that is wanted"
        )
    if mask.shape[-2] not in (1, queries) or mask.shape[-1] not in (1, keys):
        return (
            f"it has {mask.shape[-2]} queries and {mask.shape[-1]} keys, and the attention "
            f"{queries} and {keys}"
        )
    for size, wanted in zip(reversed(mask.shape[:-2]), (heads, batch), strict=False):
        if size not in (1, wanted):
            shape = list(mask.shape)
            return f"it is of shape {shape}, and the query has {batch} rows of {heads} heads"
    return None
