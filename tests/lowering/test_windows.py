"""Windows in compiled graphs: a schedule of them, and many layers with their own, stay compiled."""

import copy
import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import torch
from tiny_llama import Attention, Residual, assert_same, randomize, states, train_step
from torch import nn

from lowering import last_report
from lowering.backend import serve_marks
from simplex_ops import mark, marked_modules

ATTN = torch.ops.simplex.attn.default


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


def step(run, module):
    """Return the gradient of each weight, and the output."""
    return train_step(lambda x: SimpleNamespace(logits=run(x)), module, states())


WINDOWS = [(1, 3), (4, 3), (3, 3), (3, 1), (None, 3), (5, None), (12, 1), (None, None), (6, 2)]


@pytest.mark.parametrize("start", [(2, 3), (3, 3), (1, 1), (None, None)])
@pytest.mark.parametrize("is_told", [True, False])
def test_a_schedule_of_windows_is_compiled_once_and_once_more_if_it_was_not_told(is_told, start):
    how = {"window_schedule": True} if is_told else {}
    module, backend = randomize(mark(Attention(), window=start, **how)), Counted()
    run = torch.compile(module, backend=backend, fullgraph=True)
    counts = []
    for w1, w2 in (start, *WINDOWS, start):
        module.simplex_mark = dataclasses.replace(module.simplex_mark, w1=w1, w2=w2)
        assert_same(step(run, module), step(module, module))
        counts.append(backend.graphs)
    assert counts == [1] * len(counts) if is_told else [1, *[2] * (len(counts) - 1)]


def test_a_schedule_goes_with_a_copy_and_into_another_process():
    module = randomize(mark(Attention(), window=(2, 3), window_schedule=True))
    other, backend = pickle.loads(pickle.dumps(copy.deepcopy(module))), Counted()
    torch.compiler.config.dynamic_sources = ""  # as another process begins
    other = pickle.loads(pickle.dumps(other))
    run = torch.compile(other, backend=backend, fullgraph=True)
    for w1 in (2, 5, None):
        other.simplex_mark = dataclasses.replace(other.simplex_mark, w1=w1)
        module.simplex_mark = dataclasses.replace(module.simplex_mark, w1=w1)
        torch.testing.assert_close(run(states()), module(states()))
    assert backend.graphs == 1


def test_other_marks_keep_their_constants_beside_a_schedule():
    changing, fixed = (mark(Attention(), window=(2, 3)) for _ in range(2))
    changing.simplex_mark = dataclasses.replace(changing.simplex_mark, w1=4)
    found = []
    for module in (changing, fixed):
        torch.compile(module, backend=lambda gm, _: found.append(gm) or Counted()(gm, _))(states())
    placed = [[n.args[5] for n in gm.graph.nodes if n.target is ATTN] for gm in found]
    assert placed[1] == [2]
    assert isinstance(placed[0][0], torch.fx.Node)


@torch.no_grad()
def test_a_report_says_none_of_a_window_that_is_unbounded_in_a_schedule():
    module = mark(Attention(), window=(None, 3), window_schedule=True)
    torch.compile(module, backend=Counted(), fullgraph=True)(states())
    assert [(r.w1, r.w2) for r in last_report().rewritten] == [(None, 3)]


@torch.no_grad()
def test_many_layers_with_windows_of_their_own_share_graphs():
    model = Residual(*(randomize(mark(Attention(), window=(w, 3))) for w in range(2, 14)))
    backend, expected = Counted(), model(states())
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(model(states()), expected)
    assert backend.graphs == 1


@pytest.mark.parametrize("schedule", [True, False])
@pytest.mark.parametrize(("strict", "name", "place"), [(True, "mark", 4), (False, "attn", 5)])
def test_a_marked_module_is_traced_for_export(strict, name, place, schedule):
    module = mark(Attention(), window=(6, 3), window_schedule=schedule)
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
