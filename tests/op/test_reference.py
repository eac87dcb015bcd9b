"""The reference against the definition, written as loops over single pairs."""

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from simplex_ops import reference
from simplex_ops.testing import Case, Problem

attn: Any = reference.attn


def _logit(form, q, k1, k2):
    if form == "strassen":
        return q @ k1 + q @ k2 + k1 @ k2
    if form == "trilinear":
        return (q * k1 * k2).sum()
    threes = len(q) // 3 * 3
    total = (q[threes:] * k1[threes:] * k2[threes:]).sum()
    for d in range(0, threes, 3):
        total = total + torch.linalg.det(torch.stack([t[d : d + 3] for t in (q, k1, k2)]))
    return total


def _by_definition(problem):
    """Return (out, lse) of the contract's section 1, pair by pair."""
    (q, k1, k2, v1, v2), (w1, w2), o = problem.inputs, problem.windows, problem.options
    batch, heads, seq, head_dim = q.shape
    group, m1, m2 = heads // k1.shape[1], k1.shape[2], k2.shape[2]
    m = max(m1, m2)
    scale = 1 / math.sqrt(head_dim) if o["scale"] is None else o["scale"]
    out = q.new_zeros(batch, heads, seq, v1.shape[3])
    lse = q.new_full((batch, heads, seq), -math.inf)

    def visible(b, i, key, window):
        p = (m - seq if o["q_start"] is None else o["q_start"][b].item()) + i
        if o["is_causal"]:
            seen = key <= p and (window is None or p - window < key)
        else:
            seen = window is None or abs(p - key) < window
        if o["kv_bounds"] is not None:
            start, end = o["kv_bounds"][b, i].tolist()
            seen = seen and start <= key < end
        return seen

    for b in range(batch):
        for h in range(heads):
            g = h // group
            for i in range(seq):
                pairs = [
                    (j, k)
                    for j in range(m1)
                    for k in range(m2)
                    if visible(b, i, j + m - m1, w1) and visible(b, i, k + m - m2, w2)
                ]
                if not pairs:
                    continue
                s = torch.stack(
                    [
                        scale
                        * _logit(o["form"], q[b, h, i], k1[b, g, j], k2[b, g, k] + o["k2_bias"])
                        for j, k in pairs
                    ]
                )
                lse[b, h, i] = s.logsumexp(0)
                for weight, (j, k) in zip(s.softmax(0), pairs, strict=True):
                    out[b, h, i] += weight * v1[b, g, j] * (v2[b, g, k] + o["v2_bias"])
    return out, lse


CASES = (
    Case(group=3, seq=5, head_dim=4, w1=3, w2=2),
    Case(batch=2, seq=5, head_dim=7, value_dim=2, w1=2, w2=9, form="determinant", is_causal=False),
    Case(kv_heads=2, seq=4, head_dim=3, w2=3, form="strassen", k2_bias=-0.5, v2_bias=1.0),
    Case(group=2, seq=3, keys1=7, keys2=5, head_dim=5, w1=4, k2_bias=1.0, v2_bias=-0.5),
    Case(seq=6, keys1=2, keys2=4, head_dim=6, form="determinant", scale=0.7, k2_bias=0.3),
    Case(batch=3, seq=5, keys1=6, head_dim=3, bounds="ranges", starts="random", w1=4, w2=3),
    Case(batch=2, seq=5, head_dim=3, bounds="wild", starts="random", is_causal=False, w1=3),
    Case(batch=2, seq=6, head_dim=3, bounds="documents", scale=0.0, w2=2),
    Case(seq=4, keys1=0, head_dim=3),
)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_reference_is_the_definition(case):
    problem = Problem.of(case).to(torch.float64)
    out, lse = attn(*problem.inputs, *problem.windows, **problem.options)
    expected_out, expected_lse = _by_definition(problem)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["trilinear", "determinant", "strassen"])
def test_the_references_gradients_are_those_of_finite_differences(form):
    case = Case(group=2, seq=4, keys1=6, head_dim=4, w1=3, w2=2, form=form, k2_bias=1.0)
    problem = Problem.of(case).to(torch.float64)
    leaves = [t.requires_grad_() for t in problem.inputs]
    torch.autograd.gradcheck(lambda *t: attn(*t, *problem.windows, **problem.options), leaves)


def test_the_reference_gives_zero_gradients_where_nothing_is_visible():
    case = Case(batch=2, seq=6, bounds="ranges", starts="random", through="both", seed=3)
    problem = Problem.of(case).to(torch.float64)
    q, *rest = (t.requires_grad_() for t in problem.inputs)
    out, lse = attn(q, *rest, *problem.windows, **problem.options)
    blind = lse.isneginf()
    assert blind.any()
    assert not blind.all()
    (dq,) = torch.autograd.grad([out, lse], [q], [problem.dout, problem.dlse])
    assert (out[blind] == 0).all()
    assert (dq[blind] == 0).all()
    assert dq.isfinite().all()


def test_the_reference_imports_torch_alone():
    tree = ast.parse(Path(reference.__file__).read_text())
    roots = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
        )
    }
    assert roots == {"torch"}
