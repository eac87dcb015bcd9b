"""Buffers: copies in the computing dtype, laid out so that every window is a strided view."""

import torch
from torch import Tensor

from simplex_ops.devices.blocked import forms
from simplex_ops.devices.blocked.plan import Plan
from simplex_ops.devices.blocked.sides import Side


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pack_queries(plan: Plan, x: Tensor) -> Tensor:
    """Return [B, H, N, ...] as [B·Hkv, padded queries, G, ...], zero beyond the sequence.

    Read it only: it is `x` itself where no copy is needed.
    """
    x = x.to(computing_dtype(x.dtype))
    rows = x.unflatten(1, (plan.kv_heads, plan.group)).transpose(2, 3)
    if plan.padded == plan.seq:
        return rows.flatten(0, 1)
    packed = x.new_zeros((plan.batch, plan.kv_heads, plan.padded, plan.group, *x.shape[3:]))
    packed[:, :, : plan.seq] = rows
    return packed.flatten(0, 1)


def queries_to_fill(plan: Plan, out: Tensor) -> Tensor:
    """Return zeros [B·Hkv, padded queries, G, ...] for `store_queries`: a view of `out` or new."""
    rows = out.unflatten(1, (plan.kv_heads, plan.group)).transpose(2, 3)
    is_mergeable = plan.batch == 1 or rows.stride(0) == plan.kv_heads * rows.stride(1)
    if plan.padded == plan.seq and out.dtype == computing_dtype(out.dtype) and is_mergeable:
        return rows.zero_().view(-1, *rows.shape[2:])
    return torch.zeros(
        (plan.batch * plan.kv_heads, plan.padded, plan.group, *out.shape[3:]),
        dtype=computing_dtype(out.dtype),
        device=out.device,
    )


def store_queries(plan: Plan, packed: Tensor, out: Tensor) -> None:
    """Copy what `queries_to_fill` returned back to `out` [B, H, N, ...]."""
    if packed.data_ptr() == out.data_ptr():
        return
    rows = packed.unflatten(0, (plan.batch, plan.kv_heads))[:, :, : plan.seq]
    out.unflatten(1, (plan.kv_heads, plan.group)).copy_(rows.transpose(2, 3))


def pack_rows(side: Side, x: Tensor) -> Tensor:
    """Copy [B, Hkv, rows, D] to [B·Hkv, side.length, D]; a row that does not exist is zero."""
    x = x.to(computing_dtype(x.dtype))
    if not side.slides:
        return x.contiguous().flatten(0, 1)
    index = side.offset[:, None] + torch.arange(side.length, device=x.device)
    return _take_rows(x, index, side.rows).flatten(0, 1)


def load_pairs(
    plan: Plan,
    form: str,
    pair1: tuple[Tensor, Tensor],
    pair2: tuple[Tensor, Tensor],
    biases: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the rows of (narrow k, narrow v, wide k, wide v), biases added, roles exchanged."""
    side1, side2 = plan.by_role(plan.wide, plan.narrow)
    k1, v1 = (pack_rows(side1, x) for x in pair1)
    k2, v2 = (
        pack_rows(side2, x.to(computing_dtype(x.dtype)) + bias if bias else x)
        for x, bias in zip(pair2, biases, strict=True)
    )
    k1, k2 = (forms.to_components(form, k) for k in (k1, k2))
    (wide_k, wide_v), (narrow_k, narrow_v) = plan.by_role((k1, v1), (k2, v2))
    if plan.is_exchanged:
        narrow_k = forms.negate_vectors(form, narrow_k)
    return narrow_k, narrow_v, wide_k, wide_v


def unpack_rows(plan: Plan, side: Side, packed: Tensor, out: Tensor) -> Tensor:
    """Copy [B·Hkv, side.length, D] back to `out` [B, Hkv, rows, D]; a row not packed is zero."""
    packed = packed.unflatten(0, (plan.batch, plan.kv_heads))
    if side.slides:
        index = torch.arange(side.rows, device=out.device) - side.offset[:, None]
        packed = _take_rows(packed, index, side.length)
    return out.copy_(packed)


def _take_rows(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """Return x[b, :, index[b]] as [B, Hkv, len(index), D], zero where the index is outside."""
    batch = torch.arange(x.shape[0], device=x.device)[:, None]
    taken = x[batch, :, index.clamp(0, rows - 1)]  # [B, index, Hkv, D]
    outside = (index < 0) | (index >= rows)
    return taken.masked_fill_(outside[..., None, None], 0).transpose(1, 2).contiguous()


class Workspace:
    """Scratch tensors that are allocated once and taken again by name."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return an uninitialised tensor of this shape, which the next call by this name reuses."""
        size = torch.Size(shape).numel()
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = self._like.new_empty(size)
        return flat[:size].view(shape)
