"""The named workloads: one list of problems that tests, benches and tuning share."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from simplex_ops.rules.flops import visible_pairs

BACKWARD_FLOPS = 2.5  # five matrix products where the forward has two

Direction = Literal["forward", "backward"]
BOTH: tuple[Direction, ...] = ("forward", "backward")


@dataclass(frozen=True)
class Workload:
    """One problem: its sizes, its windows (in keys), and how its tensors lie in memory.

    `layout` is the order of storage: "bnhd" is [batch, seq, heads, dim] seen through a transpose,
    as a model has it after its projections; "bhnd" is contiguous. The operator sees [B, H, N, D]
    either way. `directions` are those that a bench times, where the problem is not too large.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    seq: int
    head_dim: int
    w1: int
    w2: int
    dtype: torch.dtype = torch.bfloat16
    value_dim: int | None = None  # None is head_dim
    is_causal: bool = True
    form: str = "trilinear"
    q_scale: float = 1.0  # multiplies q, and so the logits, whose deviation is else 1
    layout: Literal["bnhd", "bhnd"] = "bnhd"
    directions: tuple[Direction, ...] = BOTH
    device: Literal["cuda", "cpu"] = "cuda"  # where a bench times it by default

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.name}: {self.kv_heads} kv heads do not divide {self.heads}")

    @property
    def dv(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the operator."""
        return {"is_causal": self.is_causal, "form": self.form}

    def shrunk(self, seq: int = 16, w1: int = 12, w2: int = 5) -> "Workload":
        """The same problem small enough for a float64 reference; head_dim, group and dtype stay."""
        group = self.heads // self.kv_heads
        kv_heads = min(self.kv_heads, 2)
        return replace(
            self,
            name=f"{self.name}-shrunk",
            batch=min(self.batch, 2),
            heads=group * kv_heads,
            kv_heads=kv_heads,
            seq=min(self.seq, seq),
            w1=min(self.w1, w1),
            w2=min(self.w2, w2),
        )


class Inputs(NamedTuple):
    """The operator's tensors, and the gradient of its output."""

    q: Tensor
    k1: Tensor
    k2: Tensor
    v1: Tensor
    v2: Tensor
    dout: Tensor

    @property
    def problem(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self[0], self[1], self[2], self[3], self[4]


def make_inputs(workload: Workload, device: str | torch.device, seed: int = 0) -> Inputs:
    """Draw normal inputs for `workload` on `device`, q times its scale, in its memory order."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=workload.dtype)

    inputs = _inputs_by(draw, workload)
    inputs.q.mul_(workload.q_scale)
    return inputs


def meta_inputs(workload: Workload) -> Inputs:
    """Return the shapes, strides and dtypes of `make_inputs` on the meta device, without values."""

    def shape_only(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=workload.dtype)

    return _inputs_by(shape_only, workload)


def _inputs_by(make: Callable[..., Tensor], workload: Workload) -> Inputs:
    def tensor(heads: int, dim: int) -> Tensor:
        if workload.layout == "bnhd":
            return make(workload.batch, workload.seq, heads, dim).transpose(1, 2)
        return make(workload.batch, heads, workload.seq, dim)

    heads, kv_heads = workload.heads, workload.kv_heads
    return Inputs(
        q=tensor(heads, workload.head_dim),
        k1=tensor(kv_heads, workload.head_dim),
        k2=tensor(kv_heads, workload.head_dim),
        v1=tensor(kv_heads, workload.dv),
        v2=tensor(kv_heads, workload.dv),
        dout=tensor(heads, workload.dv),
    )


def keys_per_query(workload: Workload) -> tuple[int, int]:
    """Return how many first and second keys a query far from the ends sees."""
    w1, w2 = workload.w1, workload.w2
    return (w1, w2) if workload.is_causal else (2 * w1 - 1, 2 * w2 - 1)


def nominal_flops(workload: Workload, direction: Direction = "forward") -> float:
    """Count FLOPs as if every query saw full windows: 4·B·H·N·D·w1·w2, backward 2.5 times that.

    This is the figure that rates are given in, and that anchors are matched to. Where Dv differs
    from D, 4·D is 2·(D + Dv); without causality a window counts its keys on both sides.
    """
    n1, n2 = keys_per_query(workload)
    rows = workload.batch * workload.heads * workload.seq
    forward = 2.0 * (workload.head_dim + workload.dv) * rows * n1 * n2
    return forward * (BACKWARD_FLOPS if direction == "backward" else 1.0)


def useful_flops(workload: Workload, direction: Direction = "forward") -> float:
    """Count 2·(D + Dv)·H FLOPs for each pair that a query really sees, backward 2.5 times that."""
    pairs = visible_pairs(
        workload.seq, workload.seq, workload.seq, workload.w1, workload.w2, workload.is_causal
    )
    forward = 2.0 * (workload.head_dim + workload.dv) * workload.batch * workload.heads * pairs
    return forward * (BACKWARD_FLOPS if direction == "backward" else 1.0)


def _by_name(workloads: Iterable[Workload]) -> dict[str, Workload]:
    table: dict[str, Workload] = {}
    for workload in workloads:
        if workload.name in table:
            raise ValueError(f"two workloads are called {workload.name!r}")
        table[workload.name] = workload
    return table


# Those with an aim (tools/bench) come first: a bench that runs out of time keeps them.
WORKLOADS = _by_name([
    Workload("llama-mqa", 4, 64, 1, 4096, 128, 512, 32),
    Workload("gqa8", 4, 64, 8, 4096, 128, 512, 32, directions=("forward",)),
    Workload("gqa8-2k", 4, 64, 8, 2048, 128, 512, 32, directions=("backward",)),
    Workload("gqa4", 4, 32, 8, 4096, 128, 512, 32),
    Workload("gqa4-2k", 4, 32, 8, 2048, 128, 512, 32, directions=("backward",)),
    Workload("mha16", 4, 16, 16, 4096, 128, 512, 32, directions=("forward",)),
    Workload("mha16-2k", 4, 16, 16, 2048, 128, 512, 32, directions=("backward",)),
    Workload("mqa-b1", 1, 64, 1, 2048, 128, 512, 32),
    # llama-mqa through other windows, at half the columns, in another dtype.
    Workload("mqa-1024x32", 4, 64, 1, 4096, 128, 1024, 32),
    Workload("mqa-256x64", 4, 64, 1, 4096, 128, 256, 64),
    Workload("mqa-128x128", 4, 64, 1, 4096, 128, 128, 128),
    Workload("mqa-512x16", 4, 64, 1, 4096, 128, 512, 16),
    Workload("mqa-32x512", 4, 64, 1, 4096, 128, 32, 512),
    Workload("mqa-d64", 4, 64, 1, 4096, 64, 512, 32),
    Workload("mqa-fp16", 4, 64, 1, 4096, 128, 512, 32, dtype=torch.float16),
    # And of scores that raise a row's maximum now and again.
    Workload("mqa-x100", 4, 64, 1, 4096, 128, 512, 32, q_scale=100.0),
    Workload("mqa-x1000", 4, 64, 1, 4096, 128, 512, 32, q_scale=1000.0),
    Workload("gqa8-x100", 4, 64, 8, 4096, 128, 512, 32, q_scale=100.0, directions=("forward",)),
    Workload("gqa8-x1000", 4, 64, 8, 4096, 128, 512, 32, q_scale=1000.0, directions=("forward",)),
    Workload("mha", 1, 8, 8, 2048, 128, 512, 32),
    Workload("pairs", 1, 8, 1, 512, 64, 64, 8),  # small enough for pairs that are stored
    Workload("mha-d64", 1, 8, 8, 2048, 64, 512, 32),  # all that `simplicial-attention` can run
    Workload("gqa4-d64", 2, 32, 8, 4096, 64, 512, 32),
    # Small or odd ones, each before what it is compared with.
    Workload("gqa4-b1", 1, 32, 8, 1024, 128, 512, 32),
    Workload("gqa5-odd", 2, 40, 8, 3001, 128, 500, 30),
    Workload("gqa5", 2, 40, 8, 3072, 128, 512, 32),
    Workload("odd", 2, 12, 4, 2000, 80, 300, 20, value_dim=96),
    Workload("gqa3-d96", 2, 12, 4, 2048, 96, 512, 32),
    # As many positions in ever longer sequences.
    Workload("n4k", 32, 8, 1, 4096, 128, 512, 32),
    Workload("n32k", 4, 8, 1, 32768, 128, 512, 32),
    Workload("n128k", 1, 8, 1, 131072, 128, 512, 32),
    Workload("fp16", 2, 32, 4, 2048, 128, 512, 32, dtype=torch.float16),
    Workload("two-sided", 1, 16, 2, 2048, 128, 128, 16, is_causal=False),
    Workload("square", 1, 32, 4, 2048, 128, 128, 128),
    Workload("narrow-first", 1, 32, 4, 2048, 128, 32, 512),
    Workload("contiguous", 1, 32, 4, 2048, 128, 512, 32, layout="bhnd"),
    Workload("trilinear", 1, 32, 4, 2048, 128, 512, 32),
    Workload("determinant", 1, 32, 4, 2048, 128, 512, 32, form="determinant"),
    Workload("strassen", 1, 32, 4, 2048, 128, 512, 32, form="strassen"),
    Workload("fp32", 1, 8, 2, 2048, 64, 128, 16, dtype=torch.float32),
    Workload("cpu", 1, 8, 2, 2048, 64, 128, 16, dtype=torch.float32, device="cpu"),
    # Small enough for the reference, which stores every [N, M, M] logit (4 MB here).
    Workload("cpu-short", 1, 4, 2, 64, 64, 32, 8, dtype=torch.float32, device="cpu"),
])  # fmt: skip

# Figures of one size against another: what a plot shows. Some are named workloads, the others too
# much for every bench.
SWEEPS: dict[str, dict[int, Workload]] = {
    # As many positions in all.
    "N": {
        1024: Workload("sweep-n1k", 128, 8, 1, 1024, 128, 512, 32),
        4096: WORKLOADS["n4k"],
        32768: WORKLOADS["n32k"],
        131072: WORKLOADS["n128k"],
    },
    "G": {
        **{
            g: Workload(f"sweep-g{g}", 4, 64, 64 // g, 4096, 128, 512, 32)
            for g in (1, 2, 4, 8, 16, 32)
        },
        64: WORKLOADS["llama-mqa"],
    },
    "w1": {
        128: Workload("sweep-w128", 4, 64, 1, 4096, 128, 128, 32),
        256: Workload("sweep-w256", 4, 64, 1, 4096, 128, 256, 32),
        512: WORKLOADS["llama-mqa"],
        1024: WORKLOADS["mqa-1024x32"],
        2048: Workload("sweep-w2k", 4, 64, 1, 4096, 128, 2048, 32),
    },
}  # fmt: skip
