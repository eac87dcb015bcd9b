"""torch.library.opcheck on both operators over a matrix of inputs."""

from itertools import product

import pytest
import torch
from torch.library import opcheck

from simplex_ops.testing import Case, Problem

CASES = {
    "plain": Case(2, 1, 2, 8, head_dim=8, w1=4, w2=2),
    "transposed": Case(2, 2, 2, 8, head_dim=8, w1=4, w2=2, layout="transposed"),
    "fused": Case(2, 2, 1, 8, head_dim=8, value_dim=5, layout="fused", form="determinant"),
    "strided": Case(1, 2, 3, 7, keys1=9, keys2=5, head_dim=6, layout="strided", form="strassen"),
    "bounded": Case(2, 1, 2, 8, w1=4, w2=9, bounds="ranges", starts="random", k2_bias=1.0),
    "both ways": Case(1, 1, 2, 8, w1=3, is_causal=False, scale=0.5, v2_bias=1.0),
    "no queries": Case(2, 1, 2, 0, keys1=4, keys2=4, w1=4, w2=2),
    "no keys": Case(1, 1, 2, 4, keys1=0, keys2=0),
    "no batch": Case(0, 1, 2, 4),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("dtype", "needs_grad"),
    [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)],
    ids=str,
)
def test_attn_is_registered_well(name, dtype, needs_grad, device):
    problem = Problem.of(Case(**{**CASES[name].__dict__, "dtype": dtype}), device)
    inputs = tuple(t.detach().requires_grad_(needs_grad) for t in problem.inputs)
    arguments = (*inputs, *problem.windows)
    opcheck(torch.ops.simplex.attn.default, arguments, problem.options)


@pytest.mark.parametrize(
    ("name", "through"),
    [*((name, "both") for name in CASES), *product(("plain", "bounded"), ("out", "lse"))],
)
def test_attn_backward_is_registered_well(name, through, device):
    case = Case(**{**CASES[name].__dict__, "through": through})
    problem = Problem.of(case, device)
    out, lse = torch.ops.simplex.attn(*problem.inputs, *problem.windows, **problem.options)
    arguments = (problem.dout, problem.dlse, *problem.inputs, out, lse, *problem.windows)
    opcheck(torch.ops.simplex.attn_backward.default, arguments, problem.options)


@pytest.mark.parametrize("grad_mask", [(True, False, True, False, True), (False,) * 5], ids=str)
def test_attn_backward_with_a_mask_is_registered_well(grad_mask, device):
    problem = Problem.of(CASES["transposed"], device)
    out, lse = torch.ops.simplex.attn(*problem.inputs, *problem.windows, **problem.options)
    arguments = (problem.dout, None, *problem.inputs, out, lse, *problem.windows)
    options = {**problem.options, "grad_mask": list(grad_mask)}
    opcheck(torch.ops.simplex.attn_backward.default, arguments, options)
