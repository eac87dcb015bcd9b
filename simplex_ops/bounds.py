"""kv_bounds from what batches come with: cu_seqlens, document ids or a padding mask.

Each function returns int32 [B, N, 2]: query i of batch row b may see the key positions
[start, end) = kv_bounds[b, i]. As a mask [B, N, M], it reads

    start, end = kv_bounds[:, :, :1], kv_bounds[:, :, 1:]
    key = torch.arange(M, device=kv_bounds.device)
    mask = (start <= key) & (key < end)

and the windows and causality of the operator narrow it further. No function reads a value of a
tensor on a device, so none synchronises, and all can be compiled with fullgraph=True.
"""

from typing import Any

import torch
from torch import Tensor

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def kv_bounds_from_cu_seqlens(cu_seqlens: Tensor, length: int) -> Tensor:
    """Return kv_bounds [B, length, 2] of documents packed end to end: a token sees its document.

    With L the row's `cu_seqlens`, document d is the tokens L[d] <= i < L[d + 1]. The mask it
    stands for is

        token = torch.arange(length)
        document = (token[:, None] >= L).sum(-1)          # 1 for the first; [length]
        mask = document[:, None] == document              # [length, length]
        mask &= (document > 0) & (document < len(L))      # outside all documents: nothing

    Args:
        cu_seqlens: integers, non-decreasing: [documents + 1] for one packed row (B = 1), or
            [B, documents + 1]. Empty documents are allowed, so rows of different counts can be
            filled up by repeating the last value. Tokens from the last value on see nothing.
        length: tokens in a row. It is asked for because reading it from `cu_seqlens` would
            synchronise.

    Raises:
        TypeError: `cu_seqlens` is no tensor of an integer dtype.
        ValueError: `cu_seqlens` has no value, or not 1 or 2 dimensions; `length` is below 0.
    """
    _check_integers("cu_seqlens", cu_seqlens)
    _check_length("length", length)
    if cu_seqlens.dim() not in {1, 2} or cu_seqlens.shape[-1] < 1:
        raise ValueError(
            "cu_seqlens must have shape [documents + 1] or [batch, documents + 1], "
            f"got {list(cu_seqlens.shape)}"
        )
    edges = cu_seqlens if cu_seqlens.dim() == 2 else cu_seqlens[None]
    edges = edges.long().clamp(0, length).to(torch.int32).contiguous()  # of int64 nothing wraps
    token = torch.arange(length, dtype=torch.int32, device=edges.device)
    token = token.expand(edges.shape[0], length).contiguous()
    after = torch.searchsorted(edges, token, right=True)  # [B, length], the edge that ends it
    last = edges.shape[1] - 1
    start = edges.gather(1, (after - 1).clamp(min=0))
    end = edges.gather(1, after.clamp(max=last))
    return torch.stack((start, end), dim=-1)


def kv_bounds_from_document_ids(document_ids: Tensor) -> Tensor:
    """Return kv_bounds [B, N, 2] of rows whose tokens carry ids: a token sees the run it is in.

    A document is a run of equal ids. The mask it stands for is

        id = document_ids
        mask = (id[:, :, None] == id[:, None, :]) & (id >= 0)[:, :, None]   # [B, N, N]

    Args:
        document_ids: integers [B, N]. Tokens with a negative id are padding: they see nothing,
            and no document sees them.

    Raises:
        TypeError: `document_ids` is no tensor of an integer dtype.
        ValueError: not 2 dimensions; or an id that comes back after another one, which a range
            cannot say. This last is checked where looking costs no synchronisation, in eager
            code on CPU tensors; elsewhere each run counts as a document of its own.
    """
    _check_integers("document_ids", document_ids)
    if document_ids.dim() != 2:
        raise ValueError(
            f"document_ids must have shape [batch, seq], got {list(document_ids.shape)}"
        )
    batch, seq = document_ids.shape
    token = torch.arange(seq, dtype=torch.int32, device=document_ids.device).expand(batch, seq)
    if seq == 0:
        return torch.stack((token, token), dim=-1)
    # By rolls, since slices of one token less are traced with a guard against two tokens.
    first = (document_ids != document_ids.roll(1, 1)) | (token == 0)
    final = first.roll(-1, 1)  # before the first token of the next run; the last one too
    start = torch.where(first, token, 0).cummax(1).values
    end = torch.where(final, token + 1, seq).flip(1).cummin(1).values.flip(1)
    real = document_ids >= 0
    if _values_are_at_hand(document_ids):
        ids = torch.where(real, document_ids, -1).sort(1).values
        distinct = (ids[:, 1:] != ids[:, :-1]).sum(1) + 1 - (ids[:, 0] < 0).int()
        runs = (first & real).sum(1)
        comes_back = (runs != distinct).nonzero()
        if len(comes_back):
            raise ValueError(
                "document_ids must hold each id in one run, got an id that comes back in batch "
                f"row {int(comes_back[0, 0])}"
            )
    return torch.stack((start, torch.where(real, end, start)), dim=-1)


def kv_bounds_from_padding_mask(mask: Tensor, queries: int | None = None) -> Tensor:
    """Return kv_bounds [B, N, 2] of padded rows: each query sees the row's real tokens.

    Padding may stand on the left, on the right or on both sides. The mask it stands for is
    `mask[:, None, :].expand(B, N, M)`, padding queries included: they see the real tokens that
    the windows leave them, and their outputs are to be ignored.

    Args:
        mask: [B, M], bool, or integers as tokenizers give them: true (non-zero) at real tokens.
        queries: N; None is M.

    Raises:
        TypeError: `mask` is no tensor of bool or an integer dtype.
        ValueError: not 2 dimensions; `queries` is below 0; or padding between real tokens, which
            a range cannot say. This last is checked where looking costs no synchronisation, in
            eager code on CPU tensors; elsewhere such padding is seen.
    """
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, *_INTEGERS):
        raise TypeError(f"mask must be bool or of an integer dtype, got {_kind(mask)}")
    if queries is not None:
        _check_length("queries", queries)
    if mask.dim() != 2:
        raise ValueError(f"mask must have shape [batch, keys], got {list(mask.shape)}")
    real = mask != 0
    batch, keys = mask.shape
    queries = keys if queries is None else queries
    if keys == 0:
        return mask.new_zeros(batch, queries, 2, dtype=torch.int32)
    key = torch.arange(keys, dtype=torch.int32, device=mask.device)
    end = torch.where(real, key + 1, 0).amax(1)  # [B]
    start = torch.minimum(torch.where(real, key, keys).amin(1), end)
    if _values_are_at_hand(mask):
        holes = (real.sum(1) != end - start).nonzero()
        if len(holes):
            raise ValueError(
                "mask must have its real tokens in one run, got padding between real tokens in "
                f"batch row {int(holes[0, 0])}"
            )
    bounds = torch.stack((start, end), dim=-1).to(torch.int32)
    return bounds[:, None].expand(batch, queries, 2).contiguous()


def _check_integers(name: str, tensor: Tensor) -> None:
    # A plain raise: Dynamo refuses a torch._check whose message looks at a tensor.
    if not isinstance(tensor, Tensor) or tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be of an integer dtype, got {_kind(tensor)}")


def _kind(value: Any) -> Any:
    return value.dtype if isinstance(value, Tensor) else type(value).__name__


def _check_length(name: str, length: int) -> None:
    if length < 0:
        raise ValueError(f"{name} must be at least 0, got {length}")


def _values_are_at_hand(tensor: Tensor) -> bool:
    """Can the values be read without waiting for a device and without leaving a graph?"""
    return type(tensor) is Tensor and tensor.is_cpu and not torch.compiler.is_compiling()
