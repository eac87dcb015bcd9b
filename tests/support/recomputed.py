"""Greedy decoding that recomputes the whole prefix for each token, which every cache must equal."""

from typing import Any

import torch
from tiny_llama import llama, randomize
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from simplex_ops import mark

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": None,  # so that every row goes on to the end
}
OWN_WINDOW = 6  # of Mistral's layers


def generating(family: str = "llama", window: Any = (9, 4), **config: Any) -> Any:
    """Build a model in float64 whose first and third layers are marked, ready to generate."""
    torch.manual_seed(0)
    sizes = {**_SIZES, **config}
    if family == "gpt2":
        widths = {"n_embd": 32, "n_head": 4, "n_positions": 128}
        layers = sizes["num_hidden_layers"]
        sizes = {k: sizes[k] for k in ("vocab_size", "initializer_range", "eos_token_id")}
        model: Any = GPT2LMHeadModel(GPT2Config(n_layer=layers, **widths, **sizes))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=8, **sizes))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(sliding_window=OWN_WINDOW, **sizes))
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None  # its masks and caches keep the window
    else:
        model = llama(sizes["num_hidden_layers"], **{**sizes, "use_cache": True})
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    for block in (blocks[0], *blocks[2:]):
        module = block.attn if family == "gpt2" else block.self_attn
        randomize(mark(module, window=window))
        if module.simplex_k2_norm is not None:
            nn.init.normal_(module.simplex_k2_norm.weight)
    return model.double().eval()


def left_padded(ids: Tensor, padding: int = 4) -> Tensor:
    """Return an attention mask that hides the first tokens of the first row."""
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return mask


@torch.no_grad()
def recomputed(model: Any, ids: Tensor, mask: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return greedy tokens, the prompt before them, and the logits that each was chosen by."""
    logits = []
    for _ in range(tokens):
        places = (mask.cumsum(1) - 1).clamp(0)
        out = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits[:, -1]
        logits.append(out)
        ids = torch.cat((ids, out.argmax(-1, keepdim=True)), 1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    return ids, torch.stack(logits, 1)


def generated(model: Any, ids: Tensor, mask: Tensor, tokens: int, **how: Any) -> Any:
    """Generate greedily with a cache, keeping the logits."""
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=64,  # no token: masks would be made of what pads
        return_dict_in_generate=True,
        output_logits=True,
        **{"use_cache": True, **how},
    )


def assert_as_recomputed(
    got: Any, expected: tuple[Tensor, Tensor], tolerance: float = 1e-6
) -> None:
    """Hold tokens and logits, which generate() rounds to float32, to those of recomputed()."""
    tokens, logits = expected
    assert torch.equal(got.sequences, tokens)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(torch.stack(got.logits, 1), logits.float(), **close)


def assert_generates_as_recomputed(model: Any, ids: Tensor, tokens: int, **how: Any) -> Any:
    """Hold tokens and logits to recomputation; return what generate() did."""
    mask = torch.ones_like(ids)
    got = generated(model, ids, mask, tokens, **how)
    assert_as_recomputed(got, recomputed(model, ids, mask, tokens))
    return got
