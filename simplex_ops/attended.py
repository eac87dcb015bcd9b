"""Which pairs of keys each query attends to most, for looking inside a trained model."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from simplex_ops.contract.scale import scale_of
from simplex_ops.contract.windows import reach
from simplex_ops.devices.blocked import forms
from simplex_ops.functional import Window, simplicial_attention, window_pair

QUERIES_AT_ONCE = 16
LOGITS_AT_ONCE = 2**20


class AttendedPairs(NamedTuple):
    """The pairs with the largest weights, heaviest first."""

    j: Tensor  # int64 [B, H, N, top], row of k1 and v1; -1 where fewer pairs are visible
    k: Tensor  # int64 [B, H, N, top], row of k2 and v2; -1 likewise
    weight: Tensor  # [B, H, N, top], the softmax's weight of the pair; 0 likewise


@torch.no_grad()
def attended_pairs(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    *,
    window: Window = (512, 32),
    scale: float | None = None,
    is_causal: bool = True,
    form: str = "trilinear",
    k2_bias: float = 0.0,
    kv_bounds: Tensor | None = None,
    q_start: Tensor | None = None,
    top: int = 8,
) -> AttendedPairs:
    """Return, for each query, the pairs (j, k) with the largest weights, and the weights.

    A weight is the softmax's own, exp(s[j,k] - lse) with `s` and `lse` as in
    `simplicial_attention`, whose arguments these are; over all visible pairs they sum to 1. Among
    equal weights any may come first. Memory beyond the inputs is O(N · top), whatever the windows;
    every logit is computed in plain PyTorch operations and the host waits for what each query
    sees, so this is for looking, not for training. It is not differentiable.

    Args:
        q: [B, H, N, D] queries.
        k1: [B, Hkv, M1, D] first keys.
        k2: [B, Hkv, M2, D] second keys.
        window: (w1, w2) in keys, the query's own position included; None is unbounded.
        scale: multiplies the logits; None is 1 / sqrt(D).
        is_causal: whether a query sees only keys at its own position and before.
        form: "trilinear", "determinant" or "strassen".
        k2_bias: added to k2.
        kv_bounds: int32 [B, N, 2], range of key positions that each query may see.
        q_start: int32 [B], position of the first query; None is M - N.
        top: how many pairs of each query, at least 1.

    Returns:
        `AttendedPairs`: rows j of k1 and k of k2, int64 [B, H, N, top], and their weights in
        float32 (float64 for float64 inputs), heaviest first. Where a query sees fewer than `top`
        pairs, the rest has j = k = -1 and weight 0.

    Raises:
        TypeError, ValueError, RuntimeError: as `simplicial_attention`.
        ValueError: top is no int, or below 1.

    Example::

        j, k, weight = attended_pairs(q, k1, k2, window=(64, 16), top=3)
        j[0, 2, -1]  # the rows of k1 in the three heaviest pairs of head 2's last query
    """
    if not isinstance(top, int) or top < 1:
        raise ValueError(
            f"top must be an int, at least 1 (pairs to return for each query), got {top!r}"
        )
    w1, w2 = window_pair(window)
    given = {"scale": scale, "is_causal": is_causal, "form": form, "k2_bias": k2_bias}
    positions = {"kv_bounds": kv_bounds, "q_start": q_start}
    no_values = (k.new_zeros(()).expand(*k.shape[:3], 1) for k in (k1, k2))
    _, lse = simplicial_attention(
        q, k1, k2, *no_values, window=window, return_lse=True, **given, **positions
    )
    batch, heads, seq, _ = q.shape
    best = AttendedPairs(
        torch.full((batch, heads, seq, top), -1, device=q.device),
        torch.full((batch, heads, seq, top), -1, device=q.device),
        torch.zeros(batch, heads, seq, top, device=q.device, dtype=lse.dtype),
    )
    factor = scale_of(q, scale)
    keys = max(k1.shape[2], k2.shape[2])
    for b in range(batch):
        start = keys - seq if q_start is None else int(q_start[b])
        bounds = None if kv_bounds is None else kv_bounds[b].long()
        query = start + torch.arange(seq, device=q.device)
        sees1 = _rows_seen(query, k1.shape[2], keys, reach(w1, is_causal), bounds)
        sees2 = _rows_seen(query, k2.shape[2], keys, reach(w2, is_causal), bounds)
        for h in range(heads):
            kv_head = h // (heads // k1.shape[1])
            rows = (q[b, h], k1[b, kv_head], k2[b, kv_head])
            one, first, second = (forms.to_components(form, t.to(lse.dtype)) for t in rows)
            second = second + k2_bias
            for i in range(0, seq, QUERIES_AT_ONCE):
                mine = slice(i, i + QUERIES_AT_ONCE)
                logits = _Logits(form, factor, one[mine], first, second)
                logit, j, k = _heaviest(logits, sees1[mine], sees2[mine], top)
                seen = logit > -torch.inf
                best.j[b, h, mine] = torch.where(seen, j, -1)
                best.k[b, h, mine] = torch.where(seen, k, -1)
                weight = (logit - lse[b, h, mine, None]).exp()
                best.weight[b, h, mine] = torch.where(seen, weight, 0.0)
    return best


def _rows_seen(
    query: Tensor, rows: int, keys: int, window: tuple[int, int], bounds: Tensor | None
) -> Tensor:
    """Return [N, 2]: the range of a pair's rows that the query at each position sees."""
    left, right = window
    begin, end = query - left, query + right + 1
    if bounds is not None:
        begin, end = torch.maximum(begin, bounds[:, 0]), torch.minimum(end, bounds[:, 1])
    return torch.stack((begin, end), dim=-1).sub_(keys - rows).clamp_(0, rows)


@dataclass(frozen=True)
class _Logits:
    """The logits of some queries of one head, with any rows of its pairs."""

    form: str
    scale: float
    q: Tensor  # [queries, D], like k1 and k2 in the order of `forms.to_components`
    k1: Tensor  # [M1, D]
    k2: Tensor  # [M2, D], k2_bias included

    def of(self, j: slice, k: slice) -> Tensor:
        """Return [queries, k, j]."""
        q, k2 = self.q[:, None], self.k2[k]
        virtual = self.q.new_empty(q.shape[0], *k2.shape)
        logits = forms.virtual_query(self.form, q, k2, virtual) @ self.k1[j].mT * self.scale
        constant = forms.row_constant(self.form, self.scale, q, k2[None])
        return logits if constant is None else logits + constant[..., None]


def _heaviest(
    logits: _Logits, sees1: Tensor, sees2: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logit, j, k), each [queries, top], in falling order; logit -inf for no pair."""
    queries = sees1.shape[0]
    best = logits.q.new_full((queries, top), -torch.inf)
    pair = sees1.new_full((2, queries, top), -1)
    sees_any = ((sees1[:, 0] < sees1[:, 1]) & (sees2[:, 0] < sees2[:, 1])).nonzero()[:, 0]
    if len(sees_any) == 0:
        return best, pair[0], pair[1]
    j_first, j_end = _union(sees1[sees_any])
    k_first, k_end = _union(sees2[sees_any])
    j = torch.arange(j_first, j_end, device=best.device)
    hides_j = (j < sees1[:, :1]) | (j >= sees1[:, 1:])  # [queries, j]
    step = max(LOGITS_AT_ONCE // (queries * len(j)), 1)
    for first in range(k_first, k_end, step):
        k = torch.arange(first, min(first + step, k_end), device=best.device)
        hides_k = (k < sees2[:, :1]) | (k >= sees2[:, 1:])  # [queries, k]
        found = logits.of(slice(j_first, j_end), slice(first, first + len(k)))
        found = found.masked_fill(hides_j[:, None] | hides_k[:, :, None], -torch.inf).flatten(1)
        found, column = found.topk(min(top, found.shape[1]))
        rows = torch.stack((j[column % len(j)], k[column // len(j)]))
        best, order = torch.cat((best, found), dim=1).topk(top)
        pair = torch.cat((pair, rows), dim=2).gather(2, order.expand(2, -1, -1))
    return best, pair[0], pair[1]


def _union(ranges: Tensor) -> tuple[int, int]:
    return int(ranges[:, 0].min()), int(ranges[:, 1].max())
