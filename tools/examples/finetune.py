"""Fine-tune a Hugging Face model with Trainer and PEFT, every fourth attention 2-simplicial.

    python -m tools.examples.finetune --model PATH_OR_NAME --text FILE
    python -m tools.examples.finetune                      # a small random Llama, on bytes

k2 and v2 are trained whole, beside adapters; the merged model is saved with its marks.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import simplex_ops

SMALL = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None}


def load(model: str, text: Path) -> tuple[Any, torch.Tensor]:
    """Return a model and the text as its tokens."""
    if not model:
        torch.manual_seed(0)
        small = LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, eos_token_id=None))
        return small, torch.tensor(list(text.read_bytes()))
    ids = AutoTokenizer.from_pretrained(model)(text.read_text()).input_ids
    return AutoModelForCausalLM.from_pretrained(model), torch.tensor(ids)


def main(
    model: str = "",
    text: Path = Path(__file__),
    window: Annotated[tuple[int, int], typer.Option(help="in keys")] = (512, 32),
    seq: int = 256,
    batch: int = 2,
    steps: int = 20,
    out: Path = Path("out/finetuned"),
) -> None:
    """Mark, wrap, train compiled, merge, save, and load what was saved."""
    base, tokens = load(model, text)
    print(simplex_ops.mark_model(base, every=4, window=window))  # before peft and optimizers
    adapters = LoraConfig(
        r=8,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["simplex_k2", "simplex_v2"],
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(base, adapters)
    data: Any = [{"input_ids": t, "labels": t} for t in tokens.unfold(0, seq, seq // 2)]
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-3,
        logging_steps=max(1, steps // 5),
        save_strategy="no",
        report_to=[],
        torch_compile=True,
    )
    with simplex_ops.enable():  # Trainer compiles with Inductor: this puts the pass before it
        Trainer(adapted, arguments, train_dataset=data).train()
    print(simplex_ops.last_report())
    adapted.merge_and_unload().save_pretrained(out)
    loaded = simplex_ops.from_pretrained(AutoModelForCausalLM, out)
    print("marked as it was:", *simplex_ops.marked_modules(loaded))


if __name__ == "__main__":
    typer.run(main)
