"""Many spellings of one attention, composed of parts that a test draws."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = float("-inf")
_SOFTMAX = nn.Softmax(dim=-1)
_DROPOUT = nn.Dropout(0.25).eval()


def _above(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)


def _added(s: Tensor) -> Tensor:
    return torch.full(s.shape[-2:], HIDDEN, device=s.device, dtype=s.dtype).triu(1)


def _written_into(s: Tensor) -> Tensor:
    s.masked_fill_(_above(s), HIDDEN)
    return s


def _scaled_in_place(s: Tensor) -> Tensor:
    s *= 8**-0.5
    return s


REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "expand": lambda t: t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(t), 4, -1, 8),
    "unsqueeze and repeat": lambda t: t.unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2),
    "contiguous": lambda t: t[:, :, None, ...].expand(-1, -1, 2, -1, -1).contiguous().view(
        len(t), 4, -1, 8
    ),
    "repeat_interleave": lambda t: t.repeat_interleave(2, 1),
    "torch.repeat_interleave": lambda t: torch.repeat_interleave(t, 2, dim=-3),
    "before transposing": lambda t: t.transpose(1, 2).repeat_interleave(2, dim=2).transpose(1, 2),
}  # fmt: skip

Pair = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]


def _merged(t: Tensor) -> Tensor:
    return t.reshape(-1, *t.shape[2:])


def _split(t: Tensor, like: Tensor) -> Tensor:
    return t.view(len(like), 4, *t.shape[1:])


PRODUCTS: dict[str, Pair] = {
    "matmul": (lambda q, k: torch.matmul(q, k.transpose(2, 3)), torch.matmul),
    "@": (lambda q, k: q @ k.mT, lambda p, v: p @ v),
    "method": (
        lambda q, k: q.matmul(k.permute(0, 1, 3, 2)),
        lambda p, v: p.contiguous().matmul(v).contiguous(),
    ),
    "bmm": (
        lambda q, k: _split(torch.bmm(_merged(q), _merged(k).transpose(1, 2)), q),
        lambda p, v: _split(torch.bmm(_merged(p), _merged(v)), v),
    ),
    "baddbmm": (
        lambda q, k: _split(
            torch.baddbmm(
                q.new_empty(len(q) * 4, q.shape[2], k.shape[2]), _merged(q), _merged(k).mT,
                beta=0, alpha=0.5,
            ) * 2,
            q,
        ),
        torch.matmul,
    ),
    "einsum": (
        lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k),
        lambda p, v: torch.einsum("bhij,bhjd->bhid", p, v),
    ),
    "einsum of sequences first": (
        lambda q, k: torch.einsum("bihd, bjhd -> bhij", q.transpose(1, 2), k.transpose(1, 2)),
        lambda p, v: torch.einsum("bhij,bjhd->bihd", p, v.transpose(1, 2)).transpose(1, 2),
    ),
    "einsum with dots": (
        lambda q, k: torch.einsum("...id,...jd->...ij", [q, k]),
        lambda p, v: torch.einsum("...ij,...jd->...id", p, v),
    ),
}  # fmt: skip
GROUPED: dict[str, Pair] = {
    "einsum of groups": (
        lambda q, k: torch.einsum("bkgid,bkjd->bkgij", q.unflatten(1, (2, 2)), k),
        lambda p, v: torch.einsum("bkgij,bkjd->bkgid", p, v).flatten(1, 2),
    ),
    "matmul of groups": (
        lambda q, k: q.unflatten(1, (2, 2)) @ k[:, :, None].mT,
        lambda p, v: (p @ v[:, :, None]).reshape(len(v), 4, -1, 8),
    ),
}

BEFORE: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "q * s": lambda q, k: (q * 8**-0.5, k),
    "q / s": lambda q, k: (q / math.sqrt(q.shape[-1]), k),
    "both": lambda q, k: (q * 8**-0.25, k * 8**-0.25),
}
AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "* s": lambda s: s * 8**-0.5,
    "/ s": lambda s: s / math.sqrt(8),
    "s *": lambda s: torch.mul(s, 8**-0.5),
    "div": lambda s: s.div(8**0.5),
    "*=": _scaled_in_place,
    "/ full": lambda s: s / torch.full([], 8**0.5, dtype=s.dtype, device=s.device),
}
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "masked_fill": lambda s: s.masked_fill(_above(s), HIDDEN),
    "masked_fill of ~": lambda s: torch.masked_fill(s, ~_above(s).logical_not(), -1e9),
    "masked_fill_": _written_into,
    "tril == 0": lambda s: s.masked_fill(
        torch.tril(torch.ones(s.shape[-2:], device=s.device)) == 0, HIDDEN
    ),
    "where": lambda s: torch.where(~_above(s), s, torch.finfo(s.dtype).min),
    "where, the other way": lambda s: torch.where(
        _above(s)[None], torch.tensor(HIDDEN, device=s.device), s
    ),
    "added": lambda s: s + _added(s),
    "added before": lambda s: (
        torch.zeros(s.shape[-2:], device=s.device, dtype=s.dtype).masked_fill(_above(s), HIDDEN) + s
    ),
    "twice": lambda s: (s + _added(s)).masked_fill(_above(s), HIDDEN),
}  # fmt: skip
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "F.softmax": lambda s: F.softmax(s, dim=-1),
    "float32 and back": lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
    "torch.softmax": lambda s: torch.softmax(s.float(), -1).type_as(s),
    "method": lambda s: s.softmax(dim=s.dim() - 1),
    "module": _SOFTMAX,
}
DROPOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda p: p,
    "p=0": lambda p: F.dropout(p, p=0.0, training=True),
    "in eval": _DROPOUT,
}


@dataclass(frozen=True)
class Spelling:
    """The parts of one spelling, by name. Its products repeat keys, or are grouped."""

    products: str
    repeat: str
    scale: str
    mask: str
    softmax: str
    dropout: str

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        scores, values = (PRODUCTS | GROUPED)[self.products]
        if self.products in PRODUCTS:
            k, v = REPEATS[self.repeat](k), REPEATS[self.repeat](v)
        if self.scale in BEFORE:
            q, k = BEFORE[self.scale](q, k)
        s = scores(q, k)
        s = AFTER[self.scale](s) if self.scale in AFTER else s
        s = MASKS[self.mask](s)
        return values(DROPOUTS[self.dropout](SOFTMAXES[self.softmax](s)), v)
