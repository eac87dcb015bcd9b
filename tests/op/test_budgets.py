"""Error budgets: every dtype, against float64, for out, lse and the five gradients."""

import pytest
import torch

from simplex_ops.testing import Case, assert_matches_reference, assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

CASES = {
    "wide first": Case(2, 2, 2, 28, head_dim=24, w1=20, w2=4, through="both"),
    "wide second": Case(2, 2, 2, 28, head_dim=24, w1=4, w2=20, through="both"),
    "unbounded": Case(1, 1, 4, 20, head_dim=24, value_dim=40, through="both"),
    "both ways": Case(1, 2, 1, 27, head_dim=16, w1=9, w2=5, is_causal=False, through="both"),
    "cache": Case(2, 1, 6, 3, keys1=37, keys2=12, head_dim=20, w1=16, w2=5, through="both"),
    "large head": Case(1, 1, 2, 12, head_dim=256, value_dim=200, w1=8, w2=3, through="both"),
    "packed": Case(2, 1, 3, 24, head_dim=16, w1=12, w2=6, bounds="documents", through="both"),
    "placed": Case(3, 1, 2, 9, keys1=24, keys2=24, w1=12, w2=4, starts="random", through="both"),
    "biased": Case(1, 2, 2, 24, head_dim=16, w1=10, w2=6, k2_bias=1.0, v2_bias=-0.5),
    "one pair": Case(1, 1, 2, 6, head_dim=8, w1=1, w2=1),
    "sharp": Case(1, 1, 2, 24, head_dim=16, w1=16, w2=4, amplitude=8.0, through="both"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["trilinear", "determinant", "strassen"])
@pytest.mark.parametrize("name", CASES)
def test_the_operator_is_within_its_budget(name, form, dtype, device):
    fields = {**CASES[name].__dict__, "form": form, "dtype": dtype}
    assert_matches_reference(Case(**fields), device=device)


@pytest.mark.parametrize("layout", ["transposed", "fused", "strided", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_are_within_the_budget(layout, dtype, device):
    case = Case(3, 2, 2, 21, keys1=26, head_dim=24, w1=9, w2=4, dtype=dtype, layout=layout)
    assert_matches_reference(case, device=device)


@pytest.mark.parametrize("is_causal", [True, False])
def test_several_threads_are_within_the_budget(threads, is_causal):
    case = Case(2, 2, 2, 70, head_dim=16, w1=20, w2=6, is_causal=is_causal, through="both")
    assert_matches_reference(case)


def test_a_budget_is_spent_on_the_largest_error():
    exact = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    rounded = exact + torch.tensor([0.0, 0.01, 0.0])
    assert_within_budget("x", (exact + 0.019).float(), exact, rounded)
    with pytest.raises(AssertionError, match=r"x: error 2\.10e-02 is over its budget 2\.00e-02"):
        assert_within_budget("x", (exact + 0.021).float(), exact, rounded)
    with pytest.raises(AssertionError, match=r"x: nan at \[1\]"):
        assert_within_budget("x", torch.tensor([1.0, torch.nan, 4.0]), exact, rounded)
    with pytest.raises(AssertionError, match=r"x: shape \[2\], not \[3\]"):
        assert_within_budget("x", torch.ones(2), exact, rounded)
    with pytest.raises(ValueError, match="x: plain PyTorch in this dtype overflows"):
        assert_within_budget("x", exact.float(), exact, rounded * torch.inf)


def test_an_infinite_exact_value_asks_for_the_same_infinity():
    exact = torch.tensor([-torch.inf, 1.0], dtype=torch.float64)
    assert_within_budget("lse", exact.float(), exact, exact)
    for wrong in (torch.inf, torch.nan, -1e30):
        with pytest.raises(AssertionError, match="lse: "):
            assert_within_budget("lse", torch.tensor([wrong, 1.0]), exact, exact)
    with pytest.raises(AssertionError, match=r"lse: -inf at \[1\]"):
        assert_within_budget("lse", torch.tensor([-torch.inf, -torch.inf]), exact, exact)


def _wrong_by(result, factor):
    """Return an implementation that is right but for one result."""

    def attn(*arguments, **options):
        out, lse = torch.ops.simplex.attn(*arguments, **options)
        if result == "out":
            return out * factor, lse
        if result == "lse":
            return out, lse * factor
        # a gradient: the same value, another slope
        which = ("dq", "dk1", "dk2", "dv1", "dv2").index(result)
        bent = list(arguments)
        t = bent[which]
        bent[which] = t.detach() + factor * (t - t.detach())
        return torch.ops.simplex.attn(*bent, **options)

    return attn


@pytest.mark.parametrize("result", ["out", "lse", "dq", "dk1", "dk2", "dv1", "dv2"])
@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float64, 1 + 1e-12), (torch.float32, 1.0001), (torch.bfloat16, 1.2)],
    ids=str,
)
def test_the_oracle_sees_a_result_that_is_off(result, dtype, factor):
    case = Case(1, 1, 2, 16, head_dim=16, w1=8, w2=4, dtype=dtype, through="both")
    with pytest.raises(AssertionError, match=f"{result}: error .* is over its budget"):
        assert_matches_reference(case, _wrong_by(result, factor))
