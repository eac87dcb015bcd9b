"""The passes in their order: what they run on, what they report, and that caches know them."""

import pytest
import torch
from torch import fx, nn

from lowering.backend import serve_marks
from lowering.graphs.names import Names
from lowering.graphs.subgraphs import Subgraphs
from lowering.passes import pipeline
from lowering.report import Report, Rewritten


def _pass(name: str, ran: list[str]) -> pipeline.Pass:
    """Make a pass that notes its name and reports one module."""

    def run(subgraphs: Subgraphs, names: Names) -> Report:
        ran.append(name)
        return Report((Rewritten(name, 3, 2, "trilinear"),), (), ())

    run.__name__ = name
    return run


def test_passes_run_in_their_order_and_report_together(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(pipeline, "PASSES", (_pass("second", ran), _pass("first", ran)))
    found = pipeline.run_passes(fx.symbolic_trace(nn.ReLU()))
    assert ran == ["second", "first"]
    assert [r.module for r in found.rewritten] == ["second", "first"]


def test_which_passes_ran_and_in_which_order_joins_the_compile_caches_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = _pass("one", []), _pass("other", [])
    keys = []
    for passes in ((one, other), (other, one), (one,), ()):
        monkeypatch.setattr(pipeline, "PASSES", passes)
        patch = torch.compiler.config.patch  # pyright: ignore[reportAttributeAccessIssue]
        with patch(cache_key_tag=""):
            serve_marks(fx.symbolic_trace(nn.ReLU()))
            keys.append(torch.compiler.config.cache_key_tag)
        assert f"passes:{pipeline.identity()}" in keys[-1]
    assert len(set(keys)) == len(keys)


def test_a_pass_is_named_with_its_module() -> None:
    """Two files may each have a function of one name."""
    named = pipeline.identity().split()
    assert len(named) == len(set(named)) == len(pipeline.PASSES)
    for name, run in zip(named, pipeline.PASSES, strict=True):
        assert name == f"{run.__module__}.{run.__name__}"
        assert name.startswith("lowering.passes.")
