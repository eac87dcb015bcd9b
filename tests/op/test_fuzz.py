"""Hypothesis over the whole contract: the operator against its error budget, and the fakes.

On a GPU nearly every problem compiles kernels first, some three seconds of it. There `tools.fuzz`
holds drawn problems to the budget, in several processes and for as long as it is told.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from simplex_ops.testing import Case, Problem, assert_matches_reference, cases

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ASKED = "SIMPLEX_FUZZ_EXAMPLES" in os.environ


# Found by tools.fuzz: long chains of additions, in the logits and over the rows that see a key.
CHAINS = (
    Case(group=64, seq=11, head_dim=2, dtype=torch.float64, through="lse", seed=1664),
    Case(2, 2, 16, 6, keys1=5, head_dim=256, value_dim=8, w2=31, scale=0.25, form="strassen",
         v2_bias=1.0, through="lse", seed=90220),
    Case(1, 1, 32, 9, head_dim=256, value_dim=1, w1=1, scale=1.0, is_causal=False,
         form="determinant", through="both", seed=108),
    Case(3, 3, 1, 1, head_dim=255, w1=3, w2=3, bounds="wild", through="both", seed=2147483646),
    Case(1, 2, 2, 120, head_dim=192, w2=154, scale=0.0, k2_bias=1.0, bounds="documents",
         starts="end", layout="expanded", seed=2361),
)  # fmt: skip


@pytest.mark.parametrize("case", CHAINS, ids=range(len(CHAINS)))
def test_long_chains_are_within_the_budget(case, device):
    assert_matches_reference(case, device=device)


@given(case=cases(dtypes=DTYPES, max_work=200_000))
@(settings() if ASKED else settings(max_examples=500))
def test_the_operator_is_within_its_budget(case):
    assert_matches_reference(case)


@given(case=cases(max_seq=70, max_head_dim=24, max_heads=4, max_batch=2, max_work=2_000_000))
@(settings() if ASKED else settings(max_examples=120))
def test_longer_sequences_are_within_the_budget(case):
    """More than one block of queries, keys and offsets."""
    assert_matches_reference(case)


def test_the_fake_kernels_say_what_comes(device):
    @(settings() if ASKED else settings(max_examples=300 if device == "cpu" else 15))
    @given(case=cases(dtypes=DTYPES))
    def check(case):
        problem = Problem.of(case, device)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            faked = _results(_faked(problem, mode))
        for name, fake, real in zip(
            ("out", "lse", "dq", "dk1", "dk2", "dv1", "dv2"), faked, _results(problem), strict=True
        ):
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype), name
            assert fake.stride() == real.stride(), name

    check()


def _results(problem):
    arguments = (*problem.windows,)
    out, lse = torch.ops.simplex.attn(*problem.inputs, *arguments, **problem.options)
    grads = torch.ops.simplex.attn_backward(
        problem.dout, problem.dlse, *problem.inputs, out, lse, *arguments,
        **problem.options, grad_mask=list(problem.grad_mask),
    )  # fmt: skip
    return out, lse, *grads


def _faked(problem, mode):
    def fake(t):
        return mode.from_tensor(t) if isinstance(t, torch.Tensor) else t

    return Problem(
        tuple(map(fake, problem.inputs)),
        problem.windows,
        {name: fake(value) for name, value in problem.options.items()},
        fake(problem.dout),
        fake(problem.dlse),
        problem.grad_mask,
    )


@given(case=cases(dtypes=DTYPES))
@settings(max_examples=200)
def test_a_case_prints_as_the_expression_that_makes_it(case):
    assert eval(repr(case), {"Case": Case, "torch": torch}) == case  # noqa: S307
