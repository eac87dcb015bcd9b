"""Models of a few thousand weights that the tests of marking and of the pass share."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from simplex_ops import mark

SEQ = 24
VOCABULARY = 64


def llama(layers: int = 2, seed: int = 0, device: str = "cpu", **config: Any) -> Any:
    """Build a Llama of 4 query heads and 2 key-value heads with random weights."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "use_cache": False,
        "initializer_range": 0.2,  # so that attention is far from uniform
    }
    model: Any = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
    return model.to(device)


def attention(model: Any, layer: int) -> Any:
    return model.model.layers[layer].self_attn


def mark_layers(model: Any, *layers: int, **how: Any) -> Any:
    """Mark some layers with random k2 and v2 around 1, so that no two paths agree by accident."""
    for layer in layers:
        randomize(mark(attention(model, layer), **how))
    return model


def randomize(module: Any) -> Any:
    for projection in (module.simplex_k2, module.simplex_v2):
        nn.init.normal_(projection.weight, std=0.2)
    return module


def tokens(seq: int = SEQ, batch: int = 2, device: str = "cpu", seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, seq), generator=generator).to(device)


def band(seq: int, window: int, batch: int = 1) -> Tensor:
    """Return the dense mask [batch, 1, seq, seq] of causal attention to the last `window` keys."""
    offset = torch.arange(seq)[:, None] - torch.arange(seq)
    return ((offset >= 0) & (offset < window)).expand(batch, 1, seq, seq)


def train_step(run: Callable[[Tensor], Any], model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Return the logits and the gradient of each weight, of a loss that weighs every logit."""
    model.zero_grad()
    logits = run(ids).logits
    logits.float().square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: Any) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, msg=lambda m, name=name: f"{name}: {m}", **tolerance
        )


class Attention(nn.Module):
    """Attention with LlamaAttention's outside, whose inside a test chooses."""

    def __init__(self, attend: Callable[..., Tensor] | None = None, is_causal: bool = True) -> None:
        super().__init__()
        self.head_dim, self.is_causal = 8, is_causal
        self.q_proj = nn.Linear(32, 32, bias=False)
        self.k_proj = nn.Linear(32, 16, bias=False)
        self.v_proj = nn.Linear(32, 16, bias=False)
        self.o_proj = nn.Linear(32, 32, bias=False)
        self.attend = attend or sdpa

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = self.attend(q, k, v, attn_mask=attention_mask, is_causal=self.is_causal)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    if options.get("attn_mask") is not None:
        options["is_causal"] = False
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def matrix_products(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Attend without scaled_dot_product_attention."""
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    return torch.softmax(q @ k.mT, -1) @ v


def softcapped(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Attend as no mark can take it over."""
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    return torch.softmax(torch.tanh(q @ k.mT), -1) @ v


class Residual(nn.Module):
    """Attention modules one after another, each added to its input."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def states(seq: int = 12, batch: int = 2) -> Tensor:
    return torch.randn(batch, seq, 32, generator=torch.Generator().manual_seed(2))
