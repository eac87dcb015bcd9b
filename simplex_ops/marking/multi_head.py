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
    elif given.get("key_padding_mask") is not None:
        reason = (
            "it was given a key_padding_mask, which a window cannot express: where nothing is "
            "padded leave it out (src_key_padding_mask of nn.TransformerEncoder)"
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
    is_causal: bool,
    use_separate_proj_weight: bool,
    q_proj_weight: Tensor | None,
    k_proj_weight: Tensor | None,
    v_proj_weight: Tensor | None,
    **_: Any,
) -> Tensor:
    x = (query if query.dim() == 3 else query[:, None]).transpose(0, 1)  # [B, N, E]
    return (
        attend_batch_first(
            x,
            num_heads,
            in_proj_weight
            if not use_separate_proj_weight
            else (q_proj_weight, k_proj_weight, v_proj_weight),
            in_proj_bias,
            dropout_p if training else 0.0,
            None if is_causal else attn_mask,
            is_causal,
            out_proj_weight,
            out_proj_bias,
        )
        .transpose(0, 1)
        .reshape(query.shape)
    )


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
    """Attend within x [B, N, E]; weights are [3E, E], or three of [E, E]; bias is [3E]."""
    if isinstance(weights, Tensor):
        made = F.linear(x, weights, bias).chunk(3, -1)
    else:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        made = tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in made)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = ~mask  # here True hides, in scaled_dot_product_attention it shows
        if mask.dim() == 3:
            mask = mask.unflatten(0, (-1, num_heads))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
    )
    return F.linear(out.transpose(1, 2).flatten(2), out_weight, out_bias)
