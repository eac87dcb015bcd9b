"""The Llama-like model that is measured, and a training step of it."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simplex_ops import mark_model


@dataclass(frozen=True)
class Shape:
    """A model's sizes and its batch; every so manieth layer is marked."""

    layers: int = 12
    width: int = 1024
    heads: int = 16
    kv_heads: int = 4
    vocabulary: int = 32000
    batch: int = 4
    seq: int = 4096
    window: tuple[int, int] = (512, 32)
    every: int = 4
    dtype: torch.dtype = torch.bfloat16

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    def plain(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}

    def as_json(self) -> str:
        return json.dumps(self.plain())


def shape_from(text: str) -> Shape:
    """Return the shape that `as_json` wrote."""
    read = json.loads(text)
    return Shape(
        **{**read, "window": tuple(read["window"]), "dtype": getattr(torch, read["dtype"])}
    )


# For a look that the tool works: seconds on two cores.
TOY = Shape(
    layers=2, width=64, heads=4, kv_heads=2, vocabulary=64, batch=2, seq=32, window=(8, 4), every=2,
    dtype=torch.float32,
)  # fmt: skip


def build(shape: Shape, device: torch.device, *, is_marked: bool, attention: str = "sdpa") -> Any:
    """Return a LlamaForCausalLM with random weights, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    how: dict[str, Any] = {"attn_implementation": attention}
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.width,
            intermediate_size=shape.width * 11 // 4,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.seq,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
            **how,
        )
    )
    model = model.to(device, shape.dtype)
    if is_marked:
        mark_model(model, every=shape.every, window=shape.window)
    return model


def tokens(shape: Shape, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(shape.vocabulary, (shape.batch, shape.seq), generator=generator)
    return drawn.to(device)


class Step:
    """One update of a model: loss, gradients, AdamW."""

    def __init__(self, model: nn.Module, run: Callable[..., Any], ids: Tensor) -> None:
        self.model, self.run, self.ids = model, run, ids
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def gradients(self) -> None:
        """Compute the loss and its gradients."""
        self.optimizer.zero_grad()
        self.run(input_ids=self.ids, labels=self.ids).loss.backward()

    def __call__(self) -> None:
        self.gradients()
        self.optimizer.step()
