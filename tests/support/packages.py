"""Programs as AOTInductor packages: each is built in one place, and may be run in another.

    python packages.py FOLDER [NAME...]     # build them for sm_90; no GPU is needed

`tests/lowering/test_packages.py` runs what SIMPLEX_PACKAGES, such a folder, holds.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from offline_package import package
from tiny_llama import llama, tokens
from torch import Tensor, nn
from torch.export.experimental import _export_forward_backward
from torch.func import functional_call

import lowering
from lowering.inductor.registered import register
from simplex_ops import mark

LENGTH = torch.export.Dim("length", min=3, max=8192)
OPERATOR = torch.ops.simplex


class Attend(nn.Module):
    """The operator between two pointwise operations."""

    def forward(self, q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> Any:
        out, lse = OPERATOR.attn(q, k1, k2, v1, v2, 128, 16)
        return out.sigmoid(), lse + 1


class Differentiate(nn.Module):
    """Forward and backward, as a training step has them."""

    def forward(self, q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> Any:
        out, lse = OPERATOR.attn(q, k1, k2, v1, v2, 128, 16)
        return OPERATOR.attn_backward(out.sigmoid(), None, q, k1, k2, v1, v2, out, lse, 128, 16)


class Logits(nn.Module):
    """A Llama of two marked layers, whose weights are inputs."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 256, "max_position_embeddings": 8192, "initializer_range": 0.05}
        model = llama(**sizes)
        for layer in model.model.layers:
            nn.init.normal_(mark(layer.self_attn, window=(128, 16)).simplex_k2.weight, std=0.05)
        self.held = (model.bfloat16(),)

    def forward(self, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
        return functional_call(self.held[0], weights, (ids,)).logits


class Loss(Logits):
    """What a training step differentiates."""

    def forward(self, weights: dict[str, Tensor], ids: Tensor) -> Tensor:
        logits = super().forward(weights, ids)[:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _operands(heads: int, kv_heads: int) -> Callable[[int], tuple[Tensor, ...]]:
    def make(seq: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seq)
        shapes = [(2, count, seq, 64) for count in (heads, *[kv_heads] * 4)]
        return tuple(torch.randn(s, generator=generator).bfloat16() for s in shapes)

    return make


def _weights_and_ids(model: Logits) -> Callable[[int], tuple[Any, ...]]:
    held = model.held[0]
    buffers = {name: buffer.clone() for name, buffer in held.named_buffers()}
    weights = {name: weight.detach() for name, weight in held.named_parameters()}

    def make(seq: int) -> tuple[Any, ...]:
        for weight in weights.values():
            weight.requires_grad_()
        return {**weights, **buffers}, tokens(seq)

    return make


@dataclass
class Program:
    """What is packaged, what it is given for a length, and what it must answer in eager code."""

    module: nn.Module
    inputs: Callable[[int], tuple[Any, ...]]
    trains: bool = False

    def exported(self) -> torch.export.ExportedProgram:
        """Export it on the CPU for any length."""
        register()
        given = self.inputs(512)
        if not isinstance(given[0], dict):
            with torch.no_grad():
                return torch.export.export(self.module, given, dynamic_shapes=({2: LENGTH},) * 5)
        shapes = (dict.fromkeys(given[0]), {1: LENGTH})
        with lowering.enable(), torch.set_grad_enabled(self.trains):
            program = torch.export.export(self.module, given, dynamic_shapes=shapes, strict=True)
        return _export_forward_backward(program) if self.trains else program

    def eager(self, given: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Return what the package must: of one that trains the loss and the gradients."""
        if not self.trains:
            with torch.no_grad():
                out = self.module(*given)
            return (out,) if isinstance(out, Tensor) else tuple(out)
        weights = [t for t in given[0].values() if t.requires_grad]
        loss = self.module(*given)
        return loss.detach(), *torch.autograd.grad(loss, weights)


def _model(kind: type[Logits], trains: bool = False) -> Program:
    model = kind()
    return Program(model, _weights_and_ids(model), trains)


PROGRAMS: dict[str, Callable[[], Program]] = {
    "attention": lambda: Program(Attend(), _operands(8, 4)),
    "attention-where-gluon-serves": lambda: Program(Attend(), _operands(64, 1)),
    "backward": lambda: Program(Differentiate(), _operands(8, 4)),
    "backward-where-gluon-serves": lambda: Program(Differentiate(), _operands(64, 1)),
    "marked-model": lambda: _model(Logits),
    "training-step": lambda: _model(Loss, trains=True),
}


def main(folder: str, *names: str) -> None:
    """Build packages."""
    for name in names or PROGRAMS:
        package(PROGRAMS[name]().exported(), Path(folder) / f"{name}.pt2")
        print(name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
