"""Windows in compiled graphs: a schedule of them, and many layers with their own, stay compiled."""

import dataclasses

import pytest
import torch
from tiny_llama import Attention, Residual, randomize, states
from torch import nn

from lowering import last_report
from lowering.backend import serve_marks
from simplex_ops import mark, marked_modules


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


class Counted:
    """A backend: the pass alone; it counts graphs."""

    graphs = 0

    def __call__(self, gm, example_inputs):
        serve_marks(gm)
        self.graphs += 1
        return gm.forward


@torch.no_grad()
def test_a_schedule_of_windows_is_compiled_a_few_times_in_all():
    module, backend = randomize(mark(Attention(), window=(1, 3))), Counted()
    run = torch.compile(module, backend=backend, fullgraph=True)
    counts = []
    for w1 in (1, *range(4, 14), 3, None):
        module.simplex_mark = dataclasses.replace(module.simplex_mark, w1=w1)
        torch.testing.assert_close(run(states()), module(states()))
        counts.append(backend.graphs)
    assert counts == [1, *[2] * 10, counts[-2], counts[-1]]
    assert counts[-1] <= 4  # of 1, of equal and of unbounded windows there are graphs apart


@torch.no_grad()
def test_many_layers_with_windows_of_their_own_share_graphs():
    model = Residual(*(randomize(mark(Attention(), window=(w, 3))) for w in range(2, 14)))
    backend, expected = Counted(), model(states())
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(model(states()), expected)
    assert backend.graphs == 1


@pytest.mark.parametrize(("strict", "name", "place"), [(True, "mark", 4), (False, "attn", 5)])
def test_a_marked_module_is_traced_for_export(strict, name, place):
    module = mark(Attention(), window=(6, 3))
    program = torch.export.export(module, (states(),), strict=strict)
    nodes = [n for n in program.graph.nodes if str(n.target) == f"simplex.{name}.default"]
    assert [n.args[place : place + 2] for n in nodes] == [(6, 3)]


def test_a_module_reached_past_its_attributes_is_named_as_in_its_model():
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Residual(mark(Attention()))

        def forward(self, x):
            return self.__dict__["_modules"]["inner"](x)

    model = Past()
    torch.compile(model, backend=Counted(), fullgraph=True)(states())
    assert [r.module for r in last_report().rewritten] == list(marked_modules(model))
