"""The public oracle is not fooled: by writes, by strides, by a device, by code that ran eager."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from simplex_ops import reference
from simplex_ops.testing import Case, Problem, assert_matches_reference, cases, judge
from simplex_ops.testing.case import LAYOUTS_OF_ONE

attn = torch.ops.simplex.attn
WHOLE = Case(
    batch=2, seq=6, keys1=9, keys2=9, w1=3, w2=2,
    bounds="documents", starts="random", through="both",
)  # fmt: skip


@pytest.mark.parametrize("name", ["q", "k1", "k2", "v1", "v2", "kv_bounds", "q_start"])
@pytest.mark.parametrize("comes_first", [True, False], ids=["before", "after"])
def test_a_write_into_an_argument_is_reported_by_its_name(name, comes_first):
    def writes(q, k1, k2, v1, v2, *windows, **options):
        def write():
            given = {"q": q, "k1": k1, "k2": k2, "v1": v1, "v2": v2, **options}
            given[name].detach().zero_()

        if comes_first:
            write()
            return attn(q, k1, k2, v1, v2, *windows, **options)
        copies = Problem((q, k1, k2, v1, v2), windows, options).mapped(torch.Tensor.clone)
        out, lse = attn(*copies.inputs, *windows, **copies.options)
        write()
        return out, lse

    with pytest.raises(AssertionError, match=f"^{name} written to"):
        assert_matches_reference(WHOLE, writes)


class _WritesItsGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.mul_(2)


@pytest.mark.parametrize("index", [0, 1])
def test_a_write_into_an_incoming_gradient_is_reported_by_its_name(index):
    def writes(*arguments, **options):
        results = list(attn(*arguments, **options))
        results[index] = _WritesItsGradient.apply(results[index])
        return tuple(results)

    with pytest.raises(AssertionError, match=f"^{('dout', 'dlse')[index]} written to"):
        assert_matches_reference(WHOLE, writes)


def test_a_nan_that_was_given_is_no_write():
    """It is the budget that objects to it, or nothing where no query sees it."""
    inputs = WHOLE.inputs()
    inputs[0][0] = torch.nan
    problem = dataclasses.replace(Problem.of(WHOLE), inputs=inputs)
    with pytest.raises(Exception, match=r".") as caught:
        assert_matches_reference(problem)
    assert "written" not in str(caught.value)


class _TakesGradientForContiguous(torch.autograd.Function):
    """Read an incoming gradient by what its strides would be, were it contiguous."""

    @staticmethod
    def forward(ctx, x):
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad):
        return _taken_for_contiguous(grad)


def _taken_for_contiguous(t):
    room = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    if room < t.numel():  # expanded
        return torch.zeros_like(t, memory_format=torch.contiguous_format)
    return t.as_strided(t.shape, torch.empty(t.shape, device="meta").stride())


def _takes_dout(*arguments, **options):
    out, lse = attn(*arguments, **options)
    return _TakesGradientForContiguous.apply(out), lse


def _takes_dlse(*arguments, **options):
    out, lse = attn(*arguments, **options)
    return out, _TakesGradientForContiguous.apply(lse)


def _takes(name):
    def takes(*arguments, **options):
        if options.get(name) is not None:
            options[name] = _taken_for_contiguous(options[name])
        return attn(*arguments, **options)

    return takes


@pytest.mark.parametrize(
    "wrong",
    [_takes_dout, _takes_dlse, _takes("kv_bounds"), _takes("q_start")],
    ids=["dout", "dlse", "kv_bounds", "q_start"],
)
def test_drawn_cases_find_what_takes_a_tensor_for_contiguous(wrong):
    @settings(
        max_examples=300,
        phases=[Phase.generate],  # shrinking takes 10 s
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(max_seq=10, max_head_dim=16, max_heads=4))
    def fuzz(case):
        assert_matches_reference(case, wrong)

    with pytest.raises(AssertionError):
        fuzz()


@settings(max_examples=60)
@given(case=cases(max_seq=10), layout=st.sampled_from(LAYOUTS_OF_ONE))
def test_a_layout_changes_strides_and_no_value(case, layout):
    plain = dataclasses.replace(
        case, layout_of_gradients="contiguous", layout_of_positions="contiguous"
    )
    laid = dataclasses.replace(case, layout_of_gradients=layout, layout_of_positions=layout)
    for name, was in Problem.of(plain).tensors().items():
        now = Problem.of(laid).tensors()[name]
        assert (now.shape, now.dtype) == (was.shape, was.dtype)
        if layout != "expanded" or name in {"q", "k1", "k2", "v1", "v2"}:
            assert torch.equal(now, was), name


@pytest.mark.parametrize("layout", LAYOUTS_OF_ONE)
def test_positions_and_gradients_of_any_strides_are_within_the_budget(layout, device):
    laid = dataclasses.replace(
        WHOLE, kv_heads=2, group=2, layout_of_gradients=layout, layout_of_positions=layout
    )
    if layout != "contiguous":
        tensors = Problem.of(laid, device).tensors()
        assert not any(tensors[name].is_contiguous() for name in ("kv_bounds", "dout", "dlse"))
    assert_matches_reference(laid, device=device)


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match=r"^layout_of_gradients must be one of .* got 'fused'$"):
        Case(layout_of_gradients="fused")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seq": -1}, "seq must be at least 0, got -1"),
        ({"keys2": -3}, "keys2 must be at least 0, got -3"),
        ({"grad_mask": (True,)}, "grad_mask must have 5 entries, .*, got .True,."),
    ],
)
def test_a_case_of_no_problem_is_refused(change, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        Case(**change)


@pytest.mark.parametrize("results", [None, torch.zeros(1, 1, 8, 8), (torch.zeros(1), None)])
def test_an_implementation_that_gives_no_lse_is_told_so(results):
    with pytest.raises(TypeError, match=r"^attn must return a pair of tensors \(out, lse\), got"):
        assert_matches_reference(Case(), lambda *_, **__: results)


def test_a_device_without_float64_is_judged_on_the_cpu(monkeypatch):
    """The meta device stands for it, with copies that stand for its values."""
    problem = Problem.of(WHOLE)
    on_device = problem.mapped(lambda t: t.to("meta"))
    values = {id(t): problem.tensors()[name] for name, t in on_device.tensors().items()}
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: values[id(t)])
    seen = set()
    inner = reference.attn

    def spy(q, *arguments, **options):
        tensors = [q, *arguments, *options.values()]
        seen.update(t.device.type for t in tensors if isinstance(t, torch.Tensor))
        return inner(q, *arguments, **options)

    monkeypatch.setattr(reference, "attn", spy)
    exact, rounded = judge(on_device)
    assert seen == {"cpu"}
    for name, value in (exact | rounded).items():
        assert value.device.type == "cpu", name


FORMS_AND_SCALES = [(form, scale) for form in ("trilinear", "strassen") for scale in range(1, 7)]


def _counting_backend():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    return graphs, backend


def test_compiled_code_is_compiled_for_every_case():
    """12 cases that no graph is shared by, above Dynamo's recompile limit."""
    graphs, backend = _counting_backend()
    compiled = torch.compile(attn, backend=backend, dynamic=True)
    for form, scale in FORMS_AND_SCALES:
        before = len(graphs)
        assert_matches_reference(Case(form=form, scale=float(scale)), compiled)
        assert len(graphs) > before


def test_a_compiled_module_is_compiled_for_every_case():
    class Attn(torch.nn.Module):
        def forward(self, *arguments, **options):
            return attn(*arguments, **options)

    graphs, backend = _counting_backend()
    compiled = torch.compile(Attn(), backend=backend)
    for form, scale in FORMS_AND_SCALES:
        before = len(graphs)
        assert_matches_reference(Case(form=form, scale=float(scale)), compiled)
        assert len(graphs) > before


def test_compiled_code_inside_another_function_never_runs_eager_unnoticed():
    _, backend = _counting_backend()
    compiled = torch.compile(attn, backend=backend)

    def wrapper(*arguments, **options):
        return compiled(*arguments, **options)

    def run(prepare):
        for form, scale in FORMS_AND_SCALES:
            prepare()
            assert_matches_reference(Case(form=form, scale=float(scale)), wrapper)

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"recompile limit \(8\) is reached.*dynamo\.reset\(\)"):
        run(lambda: None)
    run(torch._dynamo.reset)  # the remedy


def test_results_that_are_wrong_in_several_ways_are_one_failure_to_hypothesis():
    calls = []

    def wrong(*inputs, **options):
        out, lse = torch.ops.simplex.attn(*inputs, **options)
        calls.append(inputs)
        error = float("nan") if inputs[0].shape[2] > 1 else 1.0
        return out + error * out.abs().amax().add(1), lse

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(st.integers(1, 2))
    def fuzz(seq):
        assert_matches_reference(Case(seq=seq), wrong)

    with pytest.raises(AssertionError, match=r"out: error .* is over its budget"):
        fuzz()
    assert {len(inputs[0][0, 0]) for inputs in calls} == {1, 2}
