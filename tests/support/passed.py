"""The pass in front of a backend without Inductor: what tests of the pass compile with.

aot_eager traces the operator's autograd formula and fake kernels too. A test that judges the pass
alone runs what it made as it is (`then=eager`), for a fifth of the time where sizes are symbolic.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_llama import Attention, randomize
from torch import fx, nn
from torch._dynamo.backends.debugging import aot_eager, eager
from torch._dynamo.exc import BackendCompilerFailed

from lowering.backend import serve_marks
from lowering.report import Report, last_report
from simplex_ops import mark


class Passed:
    """A backend: the pass, then another backend. It keeps each graph's report."""

    def __init__(self, then: Callable[..., Any] = aot_eager) -> None:
        self.then = then
        self.reports: list[Report] = []

    def __call__(self, gm: Any, example_inputs: Any) -> Any:
        serve_marks(gm)
        for module in gm.modules():
            if isinstance(module, fx.GraphModule):
                module.graph.lint()
        self.reports.append(last_report())
        return self.then(gm, example_inputs)


def compiled(model: nn.Module, then: Callable[..., Any] = aot_eager, **options: Any) -> Any:
    return torch.compile(model, backend=Passed(then), fullgraph=True, **options)


def passed_alone(model: nn.Module, **options: Any) -> Any:
    """Compile with what the pass made, run as it is."""
    return compiled(model, eager, **options)


def refusal_of(module: nn.Module, *inputs: Any, fullgraph: bool = True, **kwargs: Any) -> str:
    """Compile and run; return the message of the refusal that must come."""
    run = torch.compile(module, backend=Passed(eager), fullgraph=fullgraph)
    return refusal_in(lambda: run(*inputs, **kwargs))


def refusal_in(run: Any) -> str:
    """Run what compiles; return the message of the refusal that must come."""
    with pytest.raises(BackendCompilerFailed) as caught:
        run()
    assert "UnservedMarkError" in str(caught.value)
    return " ".join(str(caught.value).split())


class Masked(nn.Module):
    """A marked attention behind a mask that a function makes."""

    def __init__(self, make: Any, window: Any = (5, 3), attend: Any = None, **how: Any) -> None:
        super().__init__()
        self.attention = randomize(mark(Attention(attend, **how), window=window))
        self.make = make

    def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return self.attention(x, attention_mask=self.make(x, *rest))
