"""The one model of the experiments: blocks of `SimplicialAttention` and an MLP, no positions."""

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from simplex_ops import SimplicialAttention

Kind = Literal["ordinary", "2-simplicial", "frozen"]


@dataclass(frozen=True)
class Shape:
    """A model's layers, first to last, and sizes.

    "2-simplicial" is the layer as a user gets it. "frozen" is the same with k2_proj and v2_proj
    held at their zero start, where the operator is ordinary attention for every second window;
    "ordinary" is that through a second window of one key, which costs what ordinary attention does.
    """

    layers: tuple[Kind, ...]
    width: int = 64
    heads: int = 1
    w1: int | None = None  # None is unbounded
    w2: int | None = None

    def __post_init__(self) -> None:
        unknown = set(self.layers) - set(get_args(Kind))
        if unknown or not self.layers:
            raise ValueError(f"layers must be of {get_args(Kind)}, at least one, got {self.layers}")


class Model(nn.Module):
    """Tokens of several fields to classes, [B, N, fields] -> [B, N, classes]."""

    def __init__(self, shape: Shape, fields: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, shape.width) for size in fields)
        self.blocks = nn.ModuleList(Block(shape, kind) for kind in shape.layers)
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.stack([e(tokens[..., n]) for n, e in enumerate(self.embeddings)]).sum(0)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    def __init__(self, shape: Shape, kind: Kind) -> None:
        super().__init__()
        width = shape.width
        self.attention = SimplicialAttention(
            width,
            shape.heads,
            window=(shape.w1, 1 if kind == "ordinary" else shape.w2),
            is_causal=False,
        )
        if kind != "2-simplicial":
            for projection in (self.attention.k2_proj, self.attention.v2_proj):
                projection.requires_grad_(False)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@functools.cache
def trained_parameters(shape: Shape, fields: tuple[int, ...], classes: int) -> int:
    """Count the parameters that training changes: the frozen ones are no part of the model."""
    with torch.device("meta"):
        model = Model(shape, fields, classes)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
