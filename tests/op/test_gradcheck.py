"""The operator's gradients against finite differences, in float64."""

import pytest
import torch
from torch.autograd import gradcheck

from simplex_ops import reference
from simplex_ops.testing import Case, Problem

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = {
    "causal": Case(1, 1, 2, 6, head_dim=4, w1=4, w2=2),
    "both ways": Case(1, 2, 1, 5, head_dim=4, w1=2, w2=3, is_causal=False),
    "biased": Case(1, 1, 3, 5, head_dim=5, value_dim=3, w1=2, w2=4, k2_bias=1.0, v2_bias=-0.5),
    "cache": Case(2, 1, 2, 2, keys1=7, keys2=4, head_dim=4, w1=5, w2=3),
    "scaled": Case(1, 1, 1, 5, head_dim=4, scale=-0.3),
    "documents": Case(1, 1, 1, 5, head_dim=3, w1=4, w2=3, bounds="documents", seed=2),
}


@pytest.mark.parametrize("form", ["trilinear", "determinant", "strassen"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_out_and_lse_are_those_of_finite_differences(name, form, device):
    case = Case(**{**CASES[name].__dict__, "form": form, "dtype": torch.float64})
    problem = Problem.of(case, device)
    leaves = [t.requires_grad_() for t in problem.inputs]

    def attn(*inputs):
        out, lse = torch.ops.simplex.attn(*inputs, *problem.windows, **problem.options)
        return out, lse.masked_fill(lse.isneginf(), 0.0)  # no differences of infinities

    assert gradcheck(attn, leaves)


def test_the_backward_says_that_it_cannot_be_differentiated(device):
    q, *rest = (t.requires_grad_() for t in Case(seq=4, dtype=torch.float64).inputs(device))
    out, _ = torch.ops.simplex.attn(q, *rest)
    (dq,) = torch.autograd.grad(out.sum(), [q], create_graph=True)
    with pytest.raises(NotImplementedError, match="simplex::attn has no second derivative"):
        dq.sum().backward()


def test_only_what_is_asked_for_is_computed(device):
    """A gradient that is not asked for comes back from the operator with shape [0]."""
    case = Case(1, 1, 2, 9, keys1=12, head_dim=8, w1=4, w2=3, through="both")
    problem = Problem.of(case, device)
    out, lse = torch.ops.simplex.attn(*problem.inputs, *problem.windows, **problem.options)

    def backward(dout, dlse, mask):
        return torch.ops.simplex.attn_backward(
            dout, dlse, *problem.inputs, out, lse, *problem.windows, **problem.options,
            grad_mask=mask,
        )  # fmt: skip

    everything = backward(problem.dout, problem.dlse, [True] * 5)
    for which in range(5):
        mask = [i == which for i in range(5)]
        for i, grad in enumerate(backward(problem.dout, problem.dlse, mask)):
            if i == which:
                torch.testing.assert_close(grad, everything[i])
            else:
                assert grad.shape == (0,)
                assert grad.dtype == problem.inputs[i].dtype
    for grad, t in zip(backward(None, None, [True] * 5), problem.inputs, strict=True):
        assert grad.shape == t.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("asked", [(0,), (2,), (1, 4), (3, 4)])
def test_autograd_hands_over_what_needs_a_gradient(device, asked, monkeypatch):
    inputs = Case(seq=6).inputs(device)
    for i in asked:
        inputs[i].requires_grad_()
    out, lse = torch.ops.simplex.attn(*inputs)
    (out.sum() + lse.sum()).backward()
    assert [t.grad is not None for t in inputs] == [i in asked for i in range(5)]


def test_an_output_without_gradient_costs_none(device):
    """Lse alone, and out alone, through autograd: the other's gradient is None, not zeros."""
    case = Case(1, 1, 2, 6, head_dim=8, w1=3, w2=2)
    inputs = [t.requires_grad_() for t in case.inputs(device)]
    out, lse = torch.ops.simplex.attn(*inputs, 3, 2)
    from_lse = torch.autograd.grad(lse.sum(), inputs, retain_graph=True, allow_unused=True)
    assert all(g is None or (g == 0).all() for g in from_lse[3:])
    from_out = torch.autograd.grad(out.sum(), inputs)
    both = [t.detach().requires_grad_() for t in inputs]
    out, lse = torch.ops.simplex.attn(*both, 3, 2)
    together = torch.autograd.grad([out.sum(), lse.sum()], both)
    for a, b, c in zip(from_out, from_lse, together, strict=True):
        torch.testing.assert_close(a if b is None else a + b, c)


def test_forward_mode_is_refused_and_not_lost(device):
    inputs = [torch.randn(1, 2, 5, 4, device=device) for _ in range(5)]
    tangent = torch.ones_like(inputs[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[0], tangent)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.ops.simplex.attn(dual, *inputs[1:], 3, 2)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(
            lambda q: torch.ops.simplex.attn(q, *inputs[1:], 3, 2)[0], (inputs[0],), (tangent,)
        )


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev"])
def test_gradients_by_torch_func_are_refused_by_name_and_the_reference_has_them(transform):
    q, *keys = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(5))

    def by_torch_func(attn):
        def loss(q):
            return attn(q, *keys, 3, 2)[0].square().sum()

        if transform == "vjp":
            value, pull = torch.func.vjp(loss, q)
            return pull(torch.ones_like(value))[0]
        return getattr(torch.func, transform)(loss)(q)

    with pytest.raises(NotImplementedError, match=r"simplex::attn has no rule for torch\.func's"):
        by_torch_func(torch.ops.simplex.attn)
    leaf = q.clone().requires_grad_()
    torch.ops.simplex.attn(leaf, *keys, 3, 2)[0].square().sum().backward()
    torch.testing.assert_close(by_torch_func(reference.attn), leaf.grad)
