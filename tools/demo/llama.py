"""The small Llama that the demo trains, from Hugging Face's code with random weights."""

from dataclasses import dataclass

import torch
from torch import nn

VOCABULARY = 256  # bytes


@dataclass(frozen=True)
class Setting:
    """A model, its marked layers' windows in keys, and how it is trained."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    seq: int
    batch: int
    window: tuple[int, int]
    steps: int
    learning_rate: float
    dtype: torch.dtype = torch.float32  # of the activations; weights are float32

    @property
    def marked_layers(self) -> list[int]:
        """Every fourth layer, counted from the first: 3, 7, ..."""
        return list(range(3, self.layers, 4))

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seq


# Few layers, small batches: two cores compile it soon and have time for many updates.
CPU = Setting(
    layers=4,
    hidden=128,
    heads=4,
    kv_heads=2,
    seq=128,
    batch=8,
    window=(64, 8),
    steps=600,
    learning_rate=4e-3,
)
CUDA = Setting(
    layers=12,
    hidden=512,
    heads=8,
    kv_heads=2,
    seq=1024,
    batch=16,
    window=(512, 32),
    steps=600,
    learning_rate=2e-3,
    dtype=torch.bfloat16,
)


def build(setting: Setting, *, seed: int = 0) -> nn.Module:
    """Return a LlamaForCausalLM of bytes; the same seed gives the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=setting.hidden,
            intermediate_size=3 * setting.hidden,
            num_hidden_layers=setting.layers,
            num_attention_heads=setting.heads,
            num_key_value_heads=setting.kv_heads,
            max_position_embeddings=setting.seq,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
