"""F.multi_head_attention_forward, spelled out by scaled_dot_product_attention.

PyTorch's own takes one of several ways through C++ and Python, none of which a mark can take over.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simplex_ops.marking.call import UnservedMarkError

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def refuse_unserved(given: dict[str, Any], name: str) -> None:
    """Raise where the arguments of a call ask for what no mark serves.

    Raises:
        UnservedMarkError: naming the argument and what to do.
    """
    reason = None
    if given.get("need_weights", True):
        reason = (
            "need_weights=True asks for attention weights, and there are none of a pair of keys to "
            "give back: pass need_weights=False"
        )
    elif not (given["key"] is given["query"] is given["value"]):
        reason = (
            "query, key and value are not the same tensor, and a mark serves self-attention alone: "
            "pass one tensor as all three, or unmark() it"
        )
    elif given["query"].is_nested:
        reason = (
            "it was given a nested tensor: make nn.TransformerEncoder with "
            "enable_nested_tensor=False"
        )
    if reason is not None:
        raise UnservedMarkError(f"a marked module, {name}, cannot run: {reason}")


def named(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call of F.multi_head_attention_forward by name."""
    given = _SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    return given.arguments


def spelled_out(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Compute what F.multi_head_attention_forward does of the same arguments, without weights."""
    return _attend(**named(*args, **kwargs)), None


def _attend(
    query: Tensor,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    dropout_p: float,
    training: bool,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    use_separate_proj_weight: bool,
    q_proj_weight: Tensor | None,
    k_proj_weight: Tensor | None,
    v_proj_weight: Tensor | None,
    **_: Any,
) -> Tensor:
    x = (query if query.dim() == 3 else query[:, None]).transpose(0, 1)  # [B, N, E]
    weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    mask, is_causal = mask_of(attn_mask, key_padding_mask, is_causal, num_heads)
    out = attend_batch_first(
        x,
        num_heads,
        weights if use_separate_proj_weight else in_proj_weight,
        in_proj_bias,
        dropout_p if training else 0.0,
        mask,
        is_causal,
        out_proj_weight,
        out_proj_bias,
    )
    return out.transpose(0, 1).reshape(query.shape)


def mask_of(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool, num_heads: int
) -> tuple[Tensor | None, bool]:
    """Return the two masks as one of scaled_dot_product_attention, and whether it is causal.

    Here True hides, there it shows. `is_causal` says that attn_mask is causal, which then need not
    be looked at, unless there is padding besides.
    """
    if key_padding_mask is None and is_causal:
        return None, True
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (-1, num_heads)) if attn_mask.dim() == 3 else attn_mask)
    if key_padding_mask is not None:
        padding = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask[None]
        masks.append(padding[:, None, None])
    if not masks:
        return None, False
    if all(mask.dtype == torch.bool for mask in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1]), False
    added = [
        torch.zeros(mask.shape, device=mask.device).masked_fill(mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask
        for mask in masks
    ]
    return (added[0] if len(added) == 1 else added[0] + added[1]), False


def attend_batch_first(
    x: Tensor,
    num_heads: int,
    weights: Any,
    bias: Tensor | None,
    dropout: float,
    mask: Tensor | None,
    is_causal: bool,
    out_weight: Tensor,
    out_bias: Tensor | None,
) -> Tensor:
    """Attend within x [B, N, E]; weights are [3E, E], or three of [E, E]; bias is [3E].

    The mask is one of scaled_dot_product_attention.
    """
    if isinstance(weights, Tensor):
        made = F.linear(x, weights, bias).chunk(3, -1)
    else:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        made = tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in made)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
    )
    return F.linear(out.transpose(1, 2).flatten(2), out_weight, out_bias)
