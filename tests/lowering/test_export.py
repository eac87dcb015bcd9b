"""torch.export: programs that hold simplex::attn, saved, loaded and run at other lengths."""

import io

import pytest
import torch
from tiny_llama import Attention, llama, mark_layers, randomize, states, tokens
from torch import nn

import lowering
from simplex_ops import mark
from simplex_ops.marking.call import UnservedMarkError

STRICT = pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
LENGTH = torch.export.Dim("length", min=2, max=4096)


@pytest.fixture(autouse=True)
def _disabled():
    yield
    lowering.disable()


class Attend(nn.Module):
    def forward(self, q, k1, k2, v1, v2):
        out, lse = torch.ops.simplex.attn(q * 2, k1, k2, v1, v2, 9, 4)
        return out + 1, lse


def operators(program):
    """Return the names of our operators in an exported program."""
    return [
        str(node.target) for node in program.graph.nodes if str(node.target).startswith("simplex.")
    ]


def reloaded(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


@STRICT
def test_an_exported_operator_serves_any_length(strict):
    def inputs(seq):
        return tuple(torch.randn(2, heads, seq, 16) for heads in (4, 2, 2, 2, 2))

    program = torch.export.export(
        Attend(), inputs(24), dynamic_shapes=({2: LENGTH},) * 5, strict=strict
    )
    assert operators(program) == ["simplex.attn.default"]
    loaded = reloaded(program)
    for seq in (2, 24, 50):
        given = inputs(seq)
        torch.testing.assert_close(loaded(*given), Attend()(*given))


@STRICT
def test_an_exported_marked_module_holds_the_operator(strict):
    module = randomize(mark(Attention(), window=(9, 4))).eval()
    with lowering.enable():
        program = torch.export.export(
            module, (states(),), dynamic_shapes=(({1: LENGTH},),), strict=strict
        )
    assert operators(program) == ["simplex.attn.default"]
    loaded = reloaded(program)
    for x in (states(), states()[:, :7]):
        torch.testing.assert_close(loaded(x), module(x))


@STRICT
def test_windows_that_are_numbers_in_graphs_are_constants_in_a_program(strict):
    for w1 in range(2, 8):
        module = randomize(mark(Attention(), window=(w1, 3)))
    with lowering.enable():
        program = torch.export.export(module, (states(),), strict=strict)
    (call,) = (n for n in program.graph.nodes if str(n.target) == "simplex.attn.default")
    assert call.args[5:7] == (7, 3)
    torch.testing.assert_close(program.module()(states()), module(states()))


class Logits(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = mark_layers(llama(layers=1), 0, window=(9, 4)).eval()

    def forward(self, ids):
        return self.model(ids).logits


def test_a_marked_llama_is_exported_under_the_pass():
    model = Logits()
    with lowering.enable():
        program = torch.export.export(model, (tokens(),), strict=True)
    assert operators(program) == ["simplex.attn.default"]
    torch.testing.assert_close(program.module()(tokens(seed=2)), model(tokens(seed=2)))


def test_a_mask_that_is_not_proven_at_every_length_is_looked_at_when_it_runs():
    length, model = torch.export.Dim("length", min=2, max=128), Logits()
    with lowering.enable():
        program = torch.export.export(
            model, (tokens(),), dynamic_shapes=({1: length},), strict=True
        )
    for seq in (13, 40):
        torch.testing.assert_close(program.module()(tokens(seq)), model(tokens(seq)))


def test_without_the_pass_a_strict_export_keeps_the_mark_which_raises():
    module = randomize(mark(Attention())).eval()
    program = torch.export.export(module, (states(),), strict=True)
    assert operators(program) == ["simplex.mark.default"]
    with pytest.raises(UnservedMarkError, match="without the pass"):
        program.module()(states())
