"""A default device is for the user's tensors: what the operator makes is where its inputs are."""

import pytest
import torch
from blind_host import blind

import simplex_ops
from simplex_ops import bounds, reference
from simplex_ops.attended import attended_pairs
from simplex_ops.devices import cpu
from simplex_ops.testing import Case, Problem, assert_matches_reference, run_attn
from simplex_ops.testing.case import BOUNDS, LAYOUTS, LAYOUTS_OF_ONE, STARTS

SHAPES = {
    "windows": {"w1": 6, "w2": 3},
    "exchanged": {"w1": 3, "w2": 6},
    "wide": {"w1": None, "w2": 3},
    "unbounded": {"w1": None, "w2": None},
    "both ways": {"w1": 6, "w2": 3, "is_causal": False},
    "cache": {"seq": 3, "keys1": 20, "keys2": 11, "w1": 9, "w2": 4},
    "no keys": {"keys1": 0, "keys2": 0},
}


class _Direct(torch.autograd.Function):
    """The CPU's functions, called as such.

    Inside an operator PyTorch takes the default device off (torch 2.13), so that a test of the
    operator alone sees nothing.
    """

    @staticmethod
    def forward(ctx, q, k1, k2, v1, v2, windows, options):
        out, lse = cpu.attn(q, k1, k2, v1, v2, *windows, **options)
        ctx.save_for_backward(q, k1, k2, v1, v2, out, lse)
        ctx.windows, ctx.options = windows, options
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        grads = cpu.attn_backward(dout, dlse, *ctx.saved_tensors, *ctx.windows, **ctx.options)
        return *grads, None, None


def direct(q, k1, k2, v1, v2, *windows, **options):
    assert torch.empty(1).is_meta
    return _Direct.apply(q, k1, k2, v1, v2, windows, options)


@pytest.fixture(autouse=True)
def on_meta():
    """Make every tensor without a device a tensor without values."""
    torch.set_default_device("meta")
    assert torch.empty(1).is_meta
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("form", ["trilinear", "determinant", "strassen"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attn", [direct, torch.ops.simplex.attn], ids=["direct", "operator"])
def test_both_directions_run_where_the_inputs_are(form, shape, attn):
    """On what a case makes, which is on the CPU as well."""
    for kind, start in [("none", "none"), ("documents", "end"), ("wild", "random")]:
        fields = {"batch": 2, "group": 2, "seq": 20, "through": "both"} | SHAPES[shape]
        case = Case(**fields, form=form, bounds=kind, starts=start)
        problem = Problem.of(case)
        assert all(t.device.type == "cpu" for t in problem.tensors().values())
        got = assert_matches_reference(case, attn)
        assert all(t.device.type == "cpu" for t in got.values())


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_case_is_the_same_whatever_the_default_device(bound, layout):
    for start, strides in zip(STARTS * 2, LAYOUTS_OF_ONE, strict=False):
        case = Case(
            batch=2,
            bounds=bound,
            starts=start,
            layout=layout,
            layout_of_gradients=strides,
            layout_of_positions=strides,
            through="both",
        )
        here = Problem.of(case).tensors()
        with torch.device("cpu"):
            usual = Problem.of(case).tensors()
        for name, tensor in usual.items():
            assert torch.equal(here[name], tensor), name
            assert here[name].stride() == tensor.stride(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_what_shapes_alone_decide_is_decided_on_the_host(shape, monkeypatch):
    """Elsewhere than on the CPU too, where taking it from the default device would synchronise."""
    blind(monkeypatch)
    fields = {"batch": 2, "group": 2, "seq": 20, "through": "both"} | SHAPES[shape]
    assert_matches_reference(Case(**fields), direct)


def test_huge_logits_are_computed_in_float64_where_the_inputs_are():
    case = Case(seq=20, w1=6, w2=3, amplitude=1e37)
    out = run_attn(direct, Problem.of(case))["out"]
    assert out.device.type == "cpu"
    assert out.isfinite().all()


def test_bounds_are_where_what_they_are_made_from_is():
    edges = torch.tensor([0, 3, 3, 8], device="cpu")
    ids = torch.tensor([[0, 0, 1, 1, -1]], device="cpu")
    for made in (
        bounds.kv_bounds_from_cu_seqlens(edges, 8),
        bounds.kv_bounds_from_document_ids(ids),
        bounds.kv_bounds_from_padding_mask(ids >= 0),
        bounds.kv_bounds_from_padding_mask(ids[:, :0] >= 0, 2),
    ):
        assert made.device.type == "cpu"


def test_a_layer_runs_where_its_parameters_are():
    """Positions of the rotary embedding included, and those that a tensor offsets."""
    layer = simplex_ops.SimplicialAttention(
        16, 2, window=(4, 2), rope_theta=1e4, qk_norm=True, device="cpu"
    )
    x = torch.randn(2, 9, 16, device="cpu")
    for offset in (0, torch.tensor([0, 5], device="cpu")):
        y = layer(x, position_offset=offset)
        y.square().sum().backward()
        assert y.device.type == "cpu"
    assert all(p.grad is not None and p.grad.device.type == "cpu" for p in layer.parameters())


def test_the_reference_and_the_most_attended_pairs_run_where_the_inputs_are():
    case = Case(batch=2, seq=9, w1=4, w2=3, bounds="documents", starts="random")
    problem = Problem.of(case)
    for form in ("trilinear", "determinant", "strassen"):
        out, lse = reference.attn(
            *problem.inputs, *case.windows, **{**problem.options, "form": form}
        )
        assert (out.device.type, lse.device.type) == ("cpu", "cpu")
    found = attended_pairs(*problem.inputs[:3], window=case.windows, top=2)
    assert {t.device.type for t in found} == {"cpu"}


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_code_runs_where_the_inputs_are(backend):
    compiled = torch.compile(torch.ops.simplex.attn, backend=backend, dynamic=True)
    assert_matches_reference(
        Case(batch=2, seq=20, w1=6, w2=3, bounds="documents", starts="random"), compiled
    )
