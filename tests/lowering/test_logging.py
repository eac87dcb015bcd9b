"""What the pass did is logged in the manner of TORCH_LOGS, by the names that users know."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from passed import Passed, refusal_of
from tiny_llama import Attention, Residual, llama, mark_layers, states, tokens
from torch._dynamo.backends.debugging import eager

import simplex_ops

NAME = "model.layers.1.self_attn"


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def test_a_report_names_what_was_rewritten_and_what_was_left(caplog):
    model = mark_layers(llama(), 1, window=(6, 3))
    with caplog.at_level(logging.INFO, "simplex_ops"):
        torch.compile(model, backend=Passed(eager))(tokens())
    (record,) = caplog.records
    assert record.message == str(simplex_ops.last_report())
    assert list(simplex_ops.marked_modules(model)) == [NAME]
    assert record.message == (
        f"rewritten: 1\n  - {NAME}: trilinear, w1=6, w2=3\nrefused: 0\n"
        "left as they were, not marked: 1\n  - model.layers.0.self_attn"
    )


def test_a_refusal_is_logged_with_its_reason(caplog):
    model = mark_layers(llama(attention_dropout=0.1), 0).train()
    with caplog.at_level(logging.INFO, "simplex_ops"):
        refusal_of(model, tokens())
    assert "refused: 1\n  - model.layers.0.self_attn: its attention dropout is 0.1" in caplog.text


def test_a_layer_compiled_alone_is_named_as_in_its_model_also_behind_a_compiled_one():
    model = mark_layers(llama(), 1, window=(6, 3))
    for layer in model.model.layers:
        layer.compile(backend=Passed(eager))
    model(tokens())
    assert [r.module for r in simplex_ops.last_report().rewritten] == [NAME]
    stack = Residual(Attention(), simplex_ops.mark(Attention(), window=(6, 3)))
    stack.blocks[1] = torch.compile(stack.blocks[1], backend=Passed(eager))
    stack(states())
    assert [r.module for r in simplex_ops.last_report().rewritten] == ["blocks.1"]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["simplex_ops", "+simplex_ops"])
def test_torch_logs_turns_it_on(setting):
    program = (
        "import torch, simplex_ops\n"
        "from tiny_llama import Attention, states\n"
        "model = torch.nn.Sequential(simplex_ops.mark(Attention(), window=(6, 3)))\n"
        "torch.compile(model, backend='simplex')(states())\n"
    )
    environment = {**os.environ, "TORCH_LOGS": setting, "PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stderr
    assert "rewritten: 1\n" in said
    assert "  - 0: trilinear, w1=6, w2=3\n" in said
    assert ("torch.ops.simplex.attn" in said) == setting.startswith("+")
