"""Cost: a training step of one 2-simplicial layer beside one of ordinary attention.

Both layers have the same projections (the 2-simplicial one has those of k2 and v2 as well), are
causal, and take the same input; the ordinary one calls F.scaled_dot_product_attention over the
whole sequence. A step is a forward and a backward, of the layer with its projections. The two are
timed in turn, so that a ratio is of one run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplex_ops import SimplicialAttention
from tools.bench.timing import time_in_turn
from tools.experiments.train import Watch

ORDINARY, SIMPLICIAL = "ordinary", "2-simplicial"


@dataclass(frozen=True)
class Setting:
    """One row: a sequence length, the windows of the 2-simplicial layer, and the layer's sizes."""

    seq: int
    w1: int
    w2: int
    batch: int = 1
    width: int = 2048
    heads: int = 16
    kv_heads: int = 4
    dtype: str = "bfloat16"
    seconds: float = 1.0  # timed, about


class OrdinaryAttention(nn.Module):
    """Causal self-attention by F.scaled_dot_product_attention, [B, N, width] -> [B, N, width]."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out_proj(out.transpose(1, 2).flatten(2))


def settings(seeds: int, *, quick: bool) -> Iterator[tuple[str, Setting]]:
    """Yield (part, setting) of every row; a row repeats its runs itself, and has no seeds."""
    if quick:
        for w1, w2 in ((16, 4), (32, 8)):
            yield "quick", Setting(64, w1, w2, 1, 64, 4, 2, "float32", 0.2)
        return
    for seq in _LENGTHS:
        for w1, w2 in _WINDOWS:
            yield "windows", Setting(seq, w1, w2, batch=max(1, _TOKENS // seq))


def measure(setting: Setting, device: torch.device, watch: Watch) -> dict[str, Any]:
    """Return milliseconds and peak bytes of a step of each layer, and what could not run."""
    torch.manual_seed(0)
    layers = {
        ORDINARY: OrdinaryAttention(setting.width, setting.heads, setting.kv_heads),
        SIMPLICIAL: SimplicialAttention(
            setting.width,
            setting.heads,
            num_kv_heads=setting.kv_heads,
            window=(setting.w1, setting.w2),
        ),
    }
    dtype = getattr(torch, setting.dtype)
    size = (setting.batch, setting.seq, setting.width)
    x = torch.randn(size, device=device, dtype=dtype, requires_grad=True)
    dout = torch.randn(size, device=device, dtype=dtype)
    steps = {}
    result: dict[str, Any] = {name: {} for name in layers}
    for name, layer in layers.items():
        layer = layer.to(device, dtype)
        if name == SIMPLICIAL:
            _leave_the_start(layer)
        inputs = (x, *layer.parameters())

        def step(layer: nn.Module = layer, inputs: tuple[Tensor, ...] = inputs) -> None:
            torch.autograd.grad(layer(x), inputs, dout)

        result[name]["parameters"] = sum(p.numel() for p in layer.parameters())
        try:
            result[name]["peak_bytes"] = _peak_bytes(step, device)
            steps[name] = step
        except torch.OutOfMemoryError as error:
            result[name]["note"] = f"out of memory: {error}".splitlines()[0]
    for name, times in time_in_turn(steps, device, seconds=setting.seconds).items():
        result[name] |= {
            "ms": times.typical,
            "spread": times.spread,
            "runs": len(times.ms),
            "statistic": times.statistic,
        }
    return result


def steps(setting: Setting) -> None:
    return None


def say(line: dict[str, Any]) -> str:
    """Return one row in words."""
    setting, result = line["setting"], line["result"]
    ms = [result[name].get("ms") for name in (ORDINARY, SIMPLICIAL)]
    said = ["cannot run" if m is None else f"{m:.3f} ms" for m in ms]
    return (
        f"N {setting['seq']}, windows {setting['w1']}x{setting['w2']}: "
        f"ordinary {said[0]}, 2-simplicial {said[1]}"
    )


def _leave_the_start(layer: SimplicialAttention) -> None:
    """Draw k2 and v2 anew: products with zeros draw less power, and so run faster."""
    for projection in (layer.k2_proj, layer.v2_proj):
        nn.init.normal_(projection.weight, std=layer.embed_dim**-0.5)


def _peak_bytes(step: Any, device: torch.device) -> int | None:
    """Return what a step allocates at most beyond its input and parameters; None on a CPU.

    The second step counts: the first may compile kernels.
    """
    step()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


_LENGTHS = (8192, 32768, 2048, 49152, 16384, 4096)  # in this order, should time run out
_TOKENS = 16384  # at least: a step of fewer is over before the host has launched it
_WINDOWS = ((128, 8), (256, 16), (512, 16), (512, 32), (1024, 32))
PARTS = ("windows",)
