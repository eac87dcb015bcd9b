"""Hugging Face models with attn_implementation="eager", compiled: as "sdpa" computes it."""

import pytest
import small_models
import torch
from passed import passed_alone
from tiny_llama import assert_same, randomize, tokens, train_step

from lowering.report import last_report
from simplex_ops import mark, marked_modules


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def _two(name, **how):
    """Return a marked model that attends by "eager", and the same one that does by "sdpa"."""
    models = [
        small_models.made(name, attn_implementation=implementation)
        for implementation in ("eager", "sdpa")
    ]
    for model in models:
        torch.manual_seed(1)
        for module in small_models.attentions(model):
            randomize(mark(module, window=(9, 4), **how))
    return models


@pytest.mark.parametrize("name", small_models.NAMES)
def test_a_model_trains_as_its_sdpa_twin_does(name):
    eager, sdpa = _two(name)
    got = train_step(passed_alone(eager.train()), eager, tokens())
    assert_same(got, train_step(sdpa.train(), sdpa, tokens()))
    report = last_report()
    named = tuple(marked_modules(eager))
    assert tuple(one.module for one in report.rewritten) == report.joined == named
    assert report.folded == (() if name == "gpt2" else named)


def test_a_checkpointed_layer_is_served():
    eager, sdpa = _two("llama")
    eager.train().gradient_checkpointing_enable({"use_reentrant": False})
    got = train_step(passed_alone(eager), eager, tokens())
    assert_same(got, train_step(sdpa.train(), sdpa, tokens()))


@torch.no_grad()
def test_one_graph_serves_all_lengths_and_padding():
    eager, sdpa = _two("llama")
    run, padding = passed_alone(eager, dynamic=True), torch.ones(2, 24, dtype=torch.long)
    padding[0, :5] = 0
    for seq in (24, 7):
        torch.testing.assert_close(run(tokens(seq)).logits, sdpa(tokens(seq)).logits)
        reports = last_report()
    assert len(reports.rewritten) == 2
    got = run(tokens(), attention_mask=padding).logits
    torch.testing.assert_close(got, sdpa(tokens(), attention_mask=padding).logits)


@pytest.mark.slow
@torch.no_grad()
def test_in_bfloat16_and_under_autocast_it_is_the_same_operator():
    eager, sdpa = _two("qwen3")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(passed_alone(eager)(tokens()).logits, sdpa(tokens()).logits)
    torch._dynamo.reset()
    eager, sdpa = eager.to(torch.bfloat16), sdpa.to(torch.bfloat16)
    torch.testing.assert_close(passed_alone(eager)(tokens()).logits, sdpa(tokens()).logits)
