"""Hugging Face's Trainer compiles and trains a marked model by the pass."""

import pytest
import torch
from tiny_llama import attention, llama, mark_layers, tokens
from transformers import Trainer, TrainingArguments

import simplex_ops


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def trained(folder, compiled: bool, **settings) -> tuple[list[float], torch.nn.Module]:
    """Train a marked Llama for a few steps; return its losses and itself."""
    model = mark_layers(llama(layers=1), 0, window=(6, 3))
    data = [{"input_ids": t, "labels": t} for t in tokens(seq=16, batch=12)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        torch_compile=compiled,
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        **settings,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], model


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True, "bf16": True}], ids=str)
def test_a_compiled_trainer_trains_what_an_eager_one_does(settings, tmp_path):
    expected, eager = trained(tmp_path, False, **settings)
    with simplex_ops.enable():
        got, model = trained(tmp_path, True, **settings)
    report = simplex_ops.last_report()
    assert [r.module.endswith("model.layers.0.self_attn") for r in report.rewritten] == [True]
    tolerance = 5e-2 if settings else 1e-3
    assert got == pytest.approx(expected, rel=tolerance)
    start = mark_layers(llama(layers=1), 0, window=(6, 3))
    for name in ("simplex_k2", "simplex_v2"):
        a, b, c = (getattr(attention(m, 0), name).weight for m in (model, eager, start))
        assert not torch.equal(a, c)
        if not settings:
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_a_compiled_trainer_without_the_pass_trains_nothing(tmp_path):
    with pytest.raises(RuntimeError, match=r"compiled without the pass"):
        trained(tmp_path, True)
