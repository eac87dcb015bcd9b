"""The reference: 2-simplicial attention by einsum, as the definition reads, and nothing else.

Everything else is judged by this file, so it imports torch alone and shares no code with what it
judges. It stores every [N, M1, M2] logit: use it on small shapes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attn(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    w1: int | None = None,
    w2: int | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    form: str = "trilinear",
    k2_bias: float = 0.0,
    v2_bias: float = 0.0,
    kv_bounds: Tensor | None = None,
    q_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out [B, H, N, Dv], lse [B, H, N]) with the meaning of `torch.ops.simplex.attn`.

    Computes in the inputs' dtype and is differentiable by autograd: call it on float64 copies for
    exact values. `lse` is a natural logarithm, returned in float32 (float64 for float64 inputs).
    """
    batch, heads, seq, head_dim = q.shape
    group = heads // k1.shape[1]
    k1, k2, v1, v2 = (t.repeat_interleave(group, dim=1) for t in (k1, k2, v1, v2))
    k2, v2 = k2 + k2_bias, v2 + v2_bias
    logits = logits_of(form, q, k1, k2) * (head_dim**-0.5 if scale is None else scale)

    m = max(k1.shape[2], k2.shape[2])
    start = q.new_full((batch,), m - seq, dtype=torch.long) if q_start is None else q_start.long()
    query = start[:, None] + torch.arange(seq, device=q.device)  # [B, N] positions
    sees1 = _visible(query, k1.shape[2], m, w1, is_causal, kv_bounds)  # [B, N, M1]
    sees2 = _visible(query, k2.shape[2], m, w2, is_causal, kv_bounds)  # [B, N, M2]
    pair = (sees1[:, :, :, None] & sees2[:, :, None, :]).unsqueeze(1)  # [B, 1, N, M1, M2]
    sees_any = pair.flatten(3).any(-1)  # [B, 1, N]

    logits = logits.masked_fill(~pair, -torch.inf)
    # One more, invisible, pair: the maximum over no pairs is then defined.
    top = F.pad(logits.detach().flatten(3), (0, 1), value=-torch.inf).amax(-1)
    top = top.masked_fill(~sees_any, 0.0)  # [B, H, N]
    exp = torch.exp(logits - top[..., None, None])
    total = exp.flatten(3).sum(-1).masked_fill(~sees_any, 1.0)
    probability = exp / total[..., None, None]
    out = torch.einsum("bhijk,bhjd,bhkd->bhid", probability, v1, v2)
    lse = (top + total.log()).masked_fill(~sees_any, -torch.inf)
    return out, lse.to(torch.promote_types(q.dtype, torch.float32))


def logits_of(form: str, q: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
    """Return the unscaled logits [B, H, N, M1, M2] of a form."""
    if form == "trilinear":
        return torch.einsum("bhid,bhjd,bhkd->bhijk", q, k1, k2)
    if form == "strassen":
        qk1 = torch.einsum("bhid,bhjd->bhij", q, k1)
        qk2 = torch.einsum("bhid,bhkd->bhik", q, k2)
        k1k2 = torch.einsum("bhjd,bhkd->bhjk", k1, k2)
        return qk1[:, :, :, :, None] + qk2[:, :, :, None, :] + k1k2[:, :, None, :, :]
    if form == "determinant":
        threes = q.shape[-1] // 3 * 3
        q3, k13, k23 = (t[..., :threes].unflatten(-1, (-1, 3)) for t in (q, k1, k2))
        sign = q.new_zeros(3, 3, 3)  # the Levi-Civita symbol
        for x, y, z in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
            sign[x, y, z], sign[z, y, x] = 1.0, -1.0
        rest = torch.einsum(
            "bhid,bhjd,bhkd->bhijk", q[..., threes:], k1[..., threes:], k2[..., threes:]
        )
        return torch.einsum("xyz,bhitx,bhjty,bhktz->bhijk", sign, q3, k13, k23) + rest
    raise ValueError(f"unknown form {form!r}")


def _visible(
    query: Tensor,
    rows: int,
    m: int,
    window: int | None,
    is_causal: bool,
    kv_bounds: Tensor | None,
) -> Tensor:
    """Return [B, N, rows]: does the query at this position see this row of a pair?"""
    key = torch.arange(m - rows, m, device=query.device)
    distance = query[:, :, None] - key  # [B, N, rows]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if is_causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    if kv_bounds is not None:
        seen &= (kv_bounds[..., :1] <= key) & (key < kv_bounds[..., 1:])
    return seen
