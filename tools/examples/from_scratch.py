"""A language model of one's own, with `SimplicialAttention` in place of attention.

python -m tools.examples.from_scratch --text FILE      # trains on the file's bytes
"""

from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from simplex_ops import SimplicialAttention


class Block(nn.Module):
    """Attention and a perceptron, each normed before and added to its input."""

    def __init__(self, dim: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.attention = SimplicialAttention(
            dim, num_heads=dim // 16, num_kv_heads=1, window=window, qk_norm=True, rope_theta=1e4
        )
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class LanguageModel(nn.Module):
    """Bytes [B, N] to logits [B, N, 256]."""

    def __init__(self, dim: int, layers: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        self.blocks = nn.Sequential(*(Block(dim, window) for _ in range(layers)))
        self.head = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, 256, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


def main(
    text: Path = Path(__file__),
    dim: int = 64,
    layers: int = 2,
    seq: int = 128,
    batch: int = 8,
    steps: int = 60,
    seed: int = 0,
) -> None:
    """Train, print the loss, and let the model write."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.tensor(list(text.read_bytes()), device=device)
    model = LanguageModel(dim, layers, window=(seq // 2, 8)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        starts = torch.randint(len(data) - seq, (batch,)).tolist()
        tokens = torch.stack([data[start : start + seq + 1] for start in starts])
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 6) == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.3f} nats per byte")
    written = data[:seq]
    with torch.no_grad():
        for _ in range(40):
            written = torch.cat([written, model(written[None, -seq:])[0, -1:].argmax(-1)])
    print(repr(bytes(written[seq:].tolist())))


if __name__ == "__main__":
    typer.run(main)
