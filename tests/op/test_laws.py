"""Laws that every path keeps: identities, symmetries, and what a query can never feel."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huge_logits import assert_finite

from simplex_ops import reference
from simplex_ops.contract.checks import FORMS
from simplex_ops.testing import Case, Problem, assert_within_budget, run_attn

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["operator", "reference"])
def attn(request, device):
    """The operator, and the reference that judges it, on the CPU: both keep the laws."""
    if request.param == "reference" and device != "cpu":
        pytest.skip("the reference judges on the CPU")
    return torch.ops.simplex.attn if request.param == "operator" else reference.attn


def _run(attn, case, device, **changes):
    """Return results of a case, its inputs or options replaced by name."""
    problem = Problem.of(case, device)
    inputs: dict[str, Any] = dict(zip(("q", "k1", "k2", "v1", "v2"), problem.inputs, strict=True))
    options = dict(problem.options)
    for name, value in changes.items():
        (inputs if name in inputs else options)[name] = value
    dout, dlse = problem.dout, problem.dlse
    return run_attn(attn, Problem(tuple(inputs.values()), problem.windows, options, dout, dlse))


def _assert_same(got, expected):
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


def _assert_unmoved(got, expected, attn, name=""):
    """Hold what a query gives to be the same after a change that it cannot see.

    The operator takes a cheaper way around the running maximum where a whole tile or call allows
    it, so that its last bits are free to change with what shares them; the reference's are not.
    """
    if attn is reference.attn:
        assert torch.equal(got, expected), name
    else:
        torch.testing.assert_close(got, expected, msg=lambda text: f"{name}: {text}")


def _band(n, m, w, is_causal, device):
    distance = torch.arange(n, device=device)[:, None] + m - n - torch.arange(m, device=device)
    return ((distance >= 0) | (not is_causal)) & (distance.abs() < (w or 2 * m + n))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("w1", "w2"), [(5, 3), (3, 8), (None, 1), (40, None)])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 6), (3, 1)])
def test_trilinear_with_a_second_pair_of_ones_is_dot_product_attention(
    attn, device, is_causal, w1, w2, kv_heads, group
):
    case = Case(2, kv_heads, group, 21, 26, 26, 20, w1=w1, w2=w2, is_causal=is_causal)
    q, k1, k2, v1, _ = case.inputs(device)
    zeros = torch.zeros_like(k2)
    options = {"is_causal": is_causal, "k2_bias": 1.0, "v2_bias": 1.0}
    out, lse = attn(q, k1, zeros, v1, zeros, w1, w2, **options)

    band = _band(21, 26, w1, is_causal, device)
    seconds = _band(21, 26, w2, is_causal, device).sum(-1)

    def dot_product(q, k, v):
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        s = (q @ k.transpose(2, 3) / math.sqrt(20)).masked_fill(~band, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=band), s.logsumexp(-1)

    exact = dot_product(q.double(), k1.double(), v1.double())
    rounded = dot_product(q, k1, v1)
    # The logarithm of the count of second keys joins the statistic in float32.
    assert_within_budget("out", out, exact[0], rounded[0])
    log_seconds = seconds.double().log()
    assert_within_budget("lse", lse, exact[1] + log_seconds, rounded[1] + log_seconds)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("w1", "w2"), [(6, 2), (2, 6), (None, 3)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_two_pairs_can_be_exchanged(attn, device, form, w1, w2, is_causal):
    options = {"is_causal": is_causal, "form": form}
    case = Case(2, 2, 3, 14, keys1=18, keys2=15, head_dim=11, **options)
    q, k1, k2, v1, v2 = (t.double() for t in case.inputs(device))
    threes = 9 if form == "determinant" else 0
    negated = torch.cat((-k1[..., :threes], k1[..., threes:]), -1)
    dout, dlse = torch.randn_like(q), torch.randn_like(q[..., 0])
    biases = {"k2_bias": 0.5, "v2_bias": -0.25}
    one = run_attn(attn, Problem((q, k1, k2, v1, v2), (w1, w2), options | biases, dout, dlse))
    other = run_attn(
        attn, Problem((q, k2 + 0.5, negated, v2 - 0.25, v1), (w2, w1), options, dout, dlse)
    )
    dk1 = other["dk2"]
    other |= {
        "dk1": torch.cat((-dk1[..., :threes], dk1[..., threes:]), -1),
        "dk2": other["dk1"],
        "dv1": other["dv2"],
        "dv2": other["dv1"],
    }
    _assert_same(one, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("w1", "w2"), [(6, 2), (None, None)])
@pytest.mark.parametrize("size", [50.0, 1e4, 1e30])
def test_a_query_never_feels_what_comes_after_it(attn, device, form, w1, w2, size):
    case = Case(1, 2, 2, 24, head_dim=9, w1=w1, w2=w2, form=form)
    q, *keys = case.inputs(device)
    later = [t.clone() for t in keys]
    for t in later:
        t[:, :, 13:] *= size
    before, after = (attn(q, *t, w1, w2, form=form) for t in (keys, later))
    for name, a, b in zip(("out", "lse"), before, after, strict=True):
        _assert_unmoved(b[:, :, :13], a[:, :, :13], attn, name)
        assert not torch.equal(a[:, :, 13:], b[:, :, 13:]), name


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("size", [50.0, 1e4, 1e30])
def test_a_query_never_feels_what_left_its_windows(attn, device, is_causal, size):
    case = Case(1, 1, 3, 20, head_dim=8, w1=4, w2=2, is_causal=is_causal)
    q, *keys = case.inputs(device)
    older = [t.clone() for t in keys]
    for t in older:
        t[:, :, :9] *= size
    before, after = (attn(q, *t, 4, 2, is_causal=is_causal) for t in (keys, older))
    for a, b in zip(before, after, strict=True):
        _assert_unmoved(b[:, :, 12:], a[:, :, 12:], attn)
        assert not torch.equal(a[:, :, 11], b[:, :, 11])


def test_a_document_never_feels_another(attn, device):
    case = Case(1, 1, 2, 20, head_dim=8, w1=6, w2=3, through="both", is_causal=False)
    bounds = torch.zeros(1, 20, 2, dtype=torch.int32, device=device)
    bounds[:, :9, 1], bounds[:, 9:, 0], bounds[:, 9:, 1] = 9, 9, 20
    names = ("q", "k1", "k2", "v1", "v2")
    louder = {}
    for name, t in zip(names, case.inputs(device), strict=True):
        louder[name] = t.clone()
        louder[name][:, :, 9:] *= 20.0
    before = _run(attn, case, device, kv_bounds=bounds)
    after = _run(attn, case, device, kv_bounds=bounds, **louder)
    for name, value in before.items():
        _assert_unmoved(after[name][:, :, :9], value[:, :, :9], attn, name)


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_are_computed_as_if_alone(attn, device, form):
    case = Case(2, 1, 3, 22, head_dim=6, w1=7, w2=4, form=form, through="both", k2_bias=1.0)
    edges = [0, 5, 6, 22]
    bounds = torch.empty(2, 22, 2, dtype=torch.int32, device=device)
    for start, end in pairwise(edges):
        bounds[:, start:end] = torch.tensor([start, end], dtype=torch.int32, device=device)
    packed = _run(attn, case, device, kv_bounds=bounds)
    whole = Problem.of(case, device)
    assert whole.dout is not None
    assert whole.dlse is not None
    for start, end in pairwise(edges):
        rows = slice(start, end)
        alone = Problem(
            tuple(t[:, :, rows] for t in whole.inputs),
            whole.windows,
            whole.options,
            whole.dout[:, :, rows],
            whole.dlse[:, :, rows],
        )
        _assert_same({n: t[:, :, rows] for n, t in packed.items()}, run_attn(attn, alone))


def test_heads_and_batch_rows_are_independent(attn, device):
    case = Case(3, 3, 2, 12, head_dim=10, w1=5, w2=3, through="both", bounds="ranges")
    problem = Problem.of(case, device)
    rows = torch.tensor([2, 0, 1], device=device)
    kv_heads = torch.tensor([1, 2, 0], device=device)
    heads = (kv_heads[:, None] * 2 + torch.tensor([1, 0], device=device)).flatten()

    def shuffled(t: Any, order: torch.Tensor) -> torch.Tensor:
        return t[rows][:, order]

    q, *keys = problem.inputs
    options = problem.options | {"kv_bounds": problem.options["kv_bounds"][rows]}
    moved = Problem(
        (shuffled(q, heads), *(shuffled(t, kv_heads) for t in keys)),
        problem.windows,
        options,
        shuffled(problem.dout, heads),
        shuffled(problem.dlse, heads),
    )
    expected = {
        name: shuffled(t, heads if name in {"out", "lse", "dq"} else kv_heads)
        for name, t in run_attn(attn, problem).items()
    }
    _assert_same(run_attn(attn, moved), expected)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [17, 10**6, 2**31 - 1, 2**40])
def test_a_window_beyond_the_sequence_is_no_window(attn, device, is_causal, window):
    case = Case(1, 1, 2, 12, keys1=17, keys2=17, head_dim=8, is_causal=is_causal)
    inputs = case.inputs(device)
    unbounded = attn(*inputs, is_causal=is_causal)
    for w1, w2 in ((window, None), (None, window), (window, window)):
        for a, b in zip(attn(*inputs, w1, w2, is_causal=is_causal), unbounded, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", range(5))
def test_a_nan_stays_in_its_batch_row_and_kv_head(attn, device, which, bad):
    if attn is reference.attn and math.isinf(bad):
        pytest.skip("says the same as with NaN")
    case = Case(3, 2, 2, 13, head_dim=8, w1=5, w2=3, through="both")
    problem = Problem.of(case, device)
    clean = run_attn(attn, problem)
    poisoned = [t.clone() for t in problem.inputs]
    poisoned[which][1, -1, 6, 3] = bad
    name = ("q", "k1", "k2", "v1", "v2")[which]
    dirty = _run(attn, case, device, **{name: poisoned[which]})
    for result, value in dirty.items():
        group = 1 if result.startswith(("dk", "dv")) else 2
        untouched = torch.ones(value.shape[:2], dtype=torch.bool, device=device)
        untouched[1, -group:] = False
        torch.testing.assert_close(
            value[untouched], clean[result][untouched], msg=lambda t, r=result: f"{r}: {t}"
        )
    # a value reaches out alone, anything else the logits too
    assert dirty["out"][1, -2:].isnan().any() or dirty["out"][1, -2:].isinf().any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_nothing_are_zero(attn, device, form, dtype):
    case = Case(2, 1, 2, 12, head_dim=8, w1=4, w2=2, form=form, dtype=dtype, through="both")
    bounds = torch.zeros(2, 12, 2, dtype=torch.int32, device=device)
    bounds[..., 1] = 12
    bounds[0, 3:7] = 5  # start = end
    bounds[1, 9] = torch.tensor([11, 2], dtype=torch.int32, device=device)  # start > end
    bounds[1, 11] = torch.tensor([0, 3], dtype=torch.int32, device=device)  # out of the windows
    got = _run(attn, case, device, kv_bounds=bounds)
    blind = torch.zeros(2, 12, dtype=torch.bool, device=device)
    blind[0, 3:7] = blind[1, 9] = blind[1, 11] = True
    blind = blind[:, None].expand(2, 2, 12)
    assert torch.equal(got["lse"].isneginf(), blind)
    assert (got["out"][blind] == 0).all()
    assert (got["dq"][blind] == 0).all()
    assert all(t.isfinite().all() for name, t in got.items() if name != "lse")


def test_queries_before_the_first_key_see_nothing(attn, device):
    case = Case(1, 1, 2, 9, keys1=4, keys2=4, head_dim=8, through="both")
    got = _run(attn, case, device)
    assert got["lse"][:, :, :5].isneginf().all()
    assert got["lse"][:, :, 5:].isfinite().all()
    assert (got["out"][:, :, :5] == 0).all()
    assert (got["dq"][:, :, :5] == 0).all()


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"seq": 0, "keys1": 5, "keys2": 5}, {"keys1": 0}, {"keys2": 0},
              {"keys1": 0, "keys2": 0}, {"seq": 0}], ids=repr
)  # fmt: skip
def test_empty_sizes_are_valid(attn, device, sizes):
    case = Case(**{"batch": 2, "group": 2, "seq": 6} | sizes, w1=3, w2=2, through="both")
    got = _run(attn, case, device)
    for name, shape in zip(("dq", "dk1", "dk2", "dv1", "dv2"), case.shapes, strict=True):
        assert got[name].shape == shape
        assert (got[name] == 0).all()
    assert (got["out"] == 0).all()
    assert got["lse"].isneginf().all()


def test_one_query_against_a_cache_is_the_last_row(attn, device):
    """Decoding: N = 1 against M keys, and the second pair cut to its window."""
    case = Case(2, 2, 3, 19, head_dim=8, w1=7, w2=4)
    q, k1, k2, v1, v2 = case.inputs(device)
    whole = attn(q, k1, k2, v1, v2, 7, 4)
    last = attn(q[:, :, -1:], k1, k2, v1, v2, 7, 4)
    cut = attn(q[:, :, -1:], k1, k2[:, :, -4:], v1, v2[:, :, -4:], 7, 4)
    other = attn(q[:, :, -1:], k1[:, :, -7:], k2, v1[:, :, -7:], v2, 7, 4)
    for got in (last, cut, other):
        for a, b in zip(got, whole, strict=True):
            torch.testing.assert_close(a, b[:, :, -1:])


def test_q_start_places_each_row_of_the_batch(attn, device):
    case = Case(3, 1, 2, 5, keys1=20, keys2=20, head_dim=8, w1=6, w2=3)
    q, *keys = case.inputs(device)
    start = torch.tensor([0, 9, 15], dtype=torch.int32, device=device)
    out, lse = attn(q, *keys, 6, 3, q_start=start)
    for row, first in enumerate(start.tolist()):
        one = [t[row : row + 1, :, : first + 5] for t in keys]
        expected = attn(q[row : row + 1], *one, 6, 3)
        torch.testing.assert_close(out[row : row + 1], expected[0])
        torch.testing.assert_close(lse[row : row + 1], expected[1])


def test_bounds_and_start_that_say_the_default_change_nothing(attn, device):
    case = Case(2, 1, 2, 9, keys1=14, keys2=14, head_dim=8, w1=6, w2=3, through="both")
    everything = torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32, device=device)
    start = torch.full((2,), 5, dtype=torch.int32, device=device)
    got = _run(attn, case, device, kv_bounds=everything.expand(2, 9, 2).contiguous(), q_start=start)
    _assert_same(got, _run(attn, case, device))


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_is_an_addition_to_the_second_pair(attn, device, form):
    case = Case(1, 2, 2, 11, head_dim=8, w1=5, w2=7, form=form, through="both")
    _, _, k2, _, v2 = case.inputs(device)
    got = _run(attn, case, device, k2_bias=0.75, v2_bias=-1.5)
    _assert_same(got, _run(attn, case, device, k2=k2 + 0.75, v2=v2 - 1.5))


def test_a_scale_of_zero_is_a_plain_average(attn, device):
    case = Case(1, 1, 2, 8, head_dim=8, is_causal=False)
    q, k1, k2, v1, v2 = case.inputs(device)
    out, lse = attn(q, k1, k2, v1, v2, scale=0.0, is_causal=False)
    mean = (v1.mean(2) * v2.mean(2))[:, :, None].expand_as(out)
    torch.testing.assert_close(out, mean)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(64)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("w1", "w2"), [(16, 4), (4, 16)])
def test_large_finite_inputs_stay_finite(device, form, dtype, w1, w2):
    """Logits in the ten thousands: the softmax is one pair, and q∘k2 is far over 65504."""
    case = Case(1, 1, 2, 24, head_dim=12, w1=w1, w2=w2, form=form, dtype=dtype, through="both")
    q, k1, k2, _, _ = case.inputs(device)
    large = {"q": q * 300.0, "k1": k1 * 0.1, "k2": k2 * 1000.0}
    got = _run(torch.ops.simplex.attn, case, device, **large)
    exact = _run(reference.attn, case, device, **{n: t.double() for n, t in large.items()},
                 **{n: t.double() for n, t in zip(("v1", "v2"), case.inputs(device)[3:],
                                                  strict=True)})  # fmt: skip
    limit = 0.9 * torch.finfo(dtype).max
    for name, value in got.items():
        fits = exact[name].abs() < limit
        assert value[fits].isfinite().all(), name


@pytest.mark.parametrize("size", [1e8, 1e20, 1e30])
@pytest.mark.parametrize("group", [1, 2, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_logits_give_finite_answers(device, dtype, group, size):
    q, *keys = Case(2, 1, group, 12, head_dim=16, w1=6, w2=3, dtype=dtype).inputs(device)
    assert_finite(torch.ops.simplex.attn, q * size, *keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1e20, 1e20, 1e-30), (1e-30, 1e20, 1e20), (1e15, 1e15, 1e15)])
def test_products_beyond_float32_stay_finite_on_the_cpu(sizes, dtype):
    q, k1, k2, v1, v2 = Case(2, 1, 2, 12, w1=6, w2=3, dtype=dtype).inputs()
    large = (t * size for t, size in zip((q, k1, k2), sizes, strict=True))
    assert_finite(torch.ops.simplex.attn, *large, v1, v2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits(device, dtype):
    case = Case(2, 2, 3, 40, head_dim=24, w1=20, w2=6, dtype=dtype, through="both")
    first = _run(torch.ops.simplex.attn, case, device)
    for _ in range(2):
        for name, value in _run(torch.ops.simplex.attn, case, device).items():
            assert torch.equal(value, first[name]), name


def test_the_same_call_gives_the_same_bits_on_several_threads(threads):
    case = Case(2, 2, 3, 90, head_dim=24, w1=20, w2=6, through="both")
    first = _run(torch.ops.simplex.attn, case, "cpu")
    for name, value in _run(torch.ops.simplex.attn, case, "cpu").items():
        assert torch.equal(value, first[name]), name


def test_a_bias_keeps_the_bits_of_a_small_second_key():
    """bfloat16 near 1 has 8 bits: k2 + 1 computed outside loses what k2 says."""
    case = Case(1, 1, 2, 16, head_dim=16, w1=8, w2=4, dtype=torch.bfloat16)
    q, k1, k2, v1, v2 = case.inputs()
    k2 = k2 * 1e-3
    wide = Problem((q, k1, k2, v1, v2), (8, 4), {"k2_bias": 1.0}).to(torch.float64)
    exact = run_attn(reference.attn, wide)["lse"]
    inside = torch.ops.simplex.attn(q, k1, k2, v1, v2, 8, 4, k2_bias=1.0)[1]
    outside = torch.ops.simplex.attn(q, k1, k2 + 1.0, v1, v2, 8, 4)[1]
    assert (inside - exact).abs().max() < 0.25 * (outside - exact).abs().max()
