"""The models of the first tier, of random weights and a layer or two."""

from collections.abc import Callable
from typing import Any

import torch
from tiny_llama import llama
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
    "initializer_range": 0.2,
}


def _qwen3(layers: int, **how: Any) -> Any:
    config = Qwen3Config(**_SIZES, head_dim=8, num_hidden_layers=layers, **how)
    return Qwen3ForCausalLM(config)


def _mistral(layers: int, **how: Any) -> Any:
    config = MistralConfig(**_SIZES, sliding_window=None, num_hidden_layers=layers, **how)
    return MistralForCausalLM(config)


def _gpt2(layers: int, **how: Any) -> Any:
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": layers, "n_head": 4, "vocab_size": 64}
    ends = {"use_cache": False, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, **ends, **how))


_MAKERS: dict[str, Callable[..., Any]] = {
    "llama": llama, "qwen3": _qwen3, "mistral": _mistral, "gpt2": _gpt2,
}  # fmt: skip
NAMES = tuple(_MAKERS)


def made(name: str, layers: int = 2, **config: Any) -> Any:
    """Build a Hugging Face model, the same weights each time."""
    torch.manual_seed(0)
    return _MAKERS[name](layers, **config)


def attentions(model: Any) -> list[Any]:
    """Return the attention module of each layer."""
    if hasattr(model, "transformer"):
        return [block.attn for block in model.transformer.h]
    return [layer.self_attn for layer in model.model.layers]
