"""The models of the support table: tiny, with random weights, all their attention marked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 64
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # so that attention is far from uniform
    "bos_token_id": None,
    "eos_token_id": None,
}
_BERT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}


def tokens(size: int) -> Tensor:
    return torch.randint(VOCABULARY, (2, size), generator=torch.Generator().manual_seed(size))


def states(size: int) -> Tensor:
    return torch.randn(2, size, 32, generator=torch.Generator().manual_seed(size))


def images(size: int) -> Tensor:
    return torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(size))


@dataclass(frozen=True)
class Row:
    """A model, what it is given for a size, and how it is marked."""

    name: str
    build: Callable[[], Any]
    inputs: Callable[[int], Tensor] = tokens
    how: dict[str, Any] | None = field(default_factory=dict)  # of mark_model; None: unmarked
    tier: int = 1
    generates: bool = False
    same_as: Callable[[], Any] | None = None  # computes the same, and eager code serves it


def _hub(name: str, config: dict[str, Any], **more: Any) -> Callable[[], Any]:
    """Build a model of transformers by the name before its ForCausalLM, or its whole name."""

    def build() -> Any:
        import transformers

        made = getattr(transformers, name.removesuffix("Model") + "Config")(**config, **more)
        ending = "" if name.endswith("Model") else "ForCausalLM"
        return getattr(transformers, name + ending)(made)

    return build


def _gpt2(**more: Any) -> Callable[[], Any]:
    def build() -> Any:
        from transformers import GPT2Config, GPT2LMHeadModel

        none: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        none |= {"bos_token_id": None, "eos_token_id": None}
        sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, **more}
        config = GPT2Config(n_positions=128, **sizes, **none)
        return GPT2LMHeadModel(config)

    return build


class SelfAttention(nn.Module):
    """nn.MultiheadAttention of one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Layer(nn.Module):
    """A layer of PyTorch's transformer, causal where it decodes."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layer = kind(32, 4, 48, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.TransformerEncoderLayer):
            return self.layer(x)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return self.layer(x, x, tgt_mask=~seen, tgt_is_causal=True)


class ByHand(nn.Module):
    """Attention of one's own that calls scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2))


def _timm() -> Any:
    timm: Any = import_module("timm.models.vision_transformer")  # neither need be installed
    sizes = {"img_size": 16, "patch_size": 4, "num_classes": 10, "embed_dim": 32}
    return timm.VisionTransformer(depth=2, num_heads=4, **sizes)


def _diffusers() -> Any:
    diffusers: Any = import_module("diffusers.models.attention_processor")
    return nn.Sequential(diffusers.Attention(query_dim=32, heads=4, dim_head=8))


def _named(part: str) -> dict[str, Any]:
    """Mark modules of no known family whose class is named so."""

    def chosen(name: str, module: nn.Module) -> bool:
        return type(module).__name__ == part

    return {"every": chosen, "kv_heads": 4, "head_dim": 8}


_TWO_SIDED = {"is_causal": False}
_LAYER_SELF = {"every": lambda name, _: name == "layer.self_attn"}
ROWS = (
    Row("Llama", _hub("Llama", _LLAMA), generates=True),
    Row("Qwen3", _hub("Qwen3", _LLAMA, head_dim=8), generates=True),
    Row("Mistral", _hub("Mistral", _LLAMA, sliding_window=None), generates=True),
    Row("GPT-2", _gpt2(), generates=True),
    Row(
        'Llama, attn_implementation="eager"',
        _hub("Llama", _LLAMA, attn_implementation="eager"),
        same_as=_hub("Llama", _LLAMA),
    ),
    Row('GPT-2, attn_implementation="eager"', _gpt2(attn_implementation="eager"), same_as=_gpt2()),
    Row("nn.MultiheadAttention", SelfAttention, states, _TWO_SIDED),
    Row(
        "nn.TransformerEncoderLayer",
        lambda: Layer(nn.TransformerEncoderLayer),
        states,
        {**_TWO_SIDED, **_LAYER_SELF},
    ),
    Row("a module that calls SDPA", lambda: nn.Sequential(ByHand()), states, _named("ByHand")),
    Row("Qwen2", _hub("Qwen2", _LLAMA), tier=2, generates=True),
    Row("Mixtral", _hub("Mixtral", _LLAMA, num_local_experts=2), tier=2, generates=True),
    Row("Gemma", _hub("Gemma", _LLAMA, head_dim=8), tier=2, generates=True),
    Row(
        "BERT",
        _hub("BertModel", _BERT, vocab_size=VOCABULARY),
        how={**_named("BertSelfAttention"), **_TWO_SIDED},
        tier=2,
    ),
    Row(
        "ViT",
        _hub("ViTModel", _BERT, image_size=16, patch_size=4),
        images,
        _TWO_SIDED,
        tier=2,
    ),
    Row(
        "nn.TransformerDecoderLayer",
        lambda: Layer(nn.TransformerDecoderLayer),
        states,
        _LAYER_SELF,
        tier=2,
    ),
    Row("timm's ViT", _timm, images, {**_named("Attention"), **_TWO_SIDED}, tier=2),
    Row("diffusers' Attention", _diffusers, states, {**_named("Attention"), **_TWO_SIDED}, tier=2),
)
