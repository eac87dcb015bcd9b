"""The tool that says who is nearer to float64."""

from dataclasses import replace

import pytest
import torch

from simplex_ops.testing import Case, Problem
from tools import precision

CASE = Case(
    kv_heads=2, group=2, seq=12, head_dim=16, w1=8, w2=4, dtype=torch.bfloat16, through="both"
)


def test_the_exact_answer_of_all_heads_is_that_of_each():
    problem = Problem.of(CASE)
    found = precision.exact(problem)
    alone = precision.exact(problem.mapped(lambda t: t[:, t.shape[1] // 2 :]))
    for name, value in found.items():
        assert torch.equal(value[:, value.shape[1] // 2 :], alone[name]), name


def test_rounded_queries_err_by_their_rounding_alone():
    problem = Problem.of(CASE)
    truth = precision.exact(problem)["out"]
    error = precision.relative(precision.rounded_queries(problem), truth)
    assert 1e-4 < error < 1e-2
    powers = problem.inputs[2].copy_(torch.ones_like(problem.inputs[2]))
    assert powers is problem.inputs[2]
    truth = precision.exact(problem)["out"]
    assert precision.relative(precision.rounded_queries(problem), truth) < 1e-12


def test_a_line_has_the_ratio_to_the_portable_kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(precision, "PROBLEMS", {"small": CASE, "half": replace(CASE, group=1)})
    monkeypatch.setattr(precision, "SCALES", (1.0,))
    tables = []
    (line,) = precision.tables(["small"], "cpu", tables.append)
    assert set(line["ratios"]) == {"out", "lse", "dq", "dk1", "dk2", "dv1", "dv2"}
    assert all(ratio == 1.0 for ratio in line["ratios"].values())
    (line,) = precision.roundings("small", "cpu", tables.append)
    assert len(tables) == 2
    assert 0 < line["rounding of q∘k2"] < 1e-2
