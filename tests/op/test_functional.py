"""The function: its defaults, its results and their memory order, compiled and exported."""

import inspect
import warnings

import pytest
import torch

import simplex_ops
from simplex_ops import reference, simplicial_attention
from simplex_ops.testing import Case, Problem, run_attn

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_it_is_the_operator(device):
    case = Case(2, 1, 3, 9, keys1=12, keys2=12, w1=5, w2=3, bounds="ranges", starts="random")
    inputs = case.inputs(device)
    options = case.options(device) | {"form": "strassen", "scale": 0.3, "v2_bias": 0.5}
    out, lse = torch.ops.simplex.attn(*inputs, 5, 3, **options)
    got = simplicial_attention(*inputs, window=(5, 3), return_lse=True, **options)
    assert torch.equal(got[0], out)
    assert torch.equal(got[1], lse)
    assert torch.equal(simplicial_attention(*inputs, window=(5, 3), **options), out)


def test_the_default_window_is_the_papers(device):
    inputs = Case(1, 1, 2, 40).inputs(device)
    expected = torch.ops.simplex.attn(*inputs, 512, 32)[0]
    assert torch.equal(simplicial_attention(*inputs), expected)
    assert not torch.equal(simplicial_attention(*inputs, window=None), expected)


def test_no_window_is_two_unbounded_ones(device):
    inputs = Case(1, 1, 2, 40).inputs(device)
    for window in (None, (None, None)):
        expected = torch.ops.simplex.attn(*inputs)[0]
        assert torch.equal(simplicial_attention(*inputs, window=window), expected)


def test_defaults_of_function_operator_and_reference_agree():
    schema = torch.ops.simplex.attn.default._schema
    operator = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    by_reference = {
        name: p.default
        for name, p in inspect.signature(reference.attn).parameters.items()
        if p.default is not p.empty
    }
    function = {
        name: p.default
        for name, p in inspect.signature(simplicial_attention).parameters.items()
        if name in operator
    }
    assert operator == by_reference
    assert function == {name: operator[name] for name in function}
    assert set(operator) - set(function) == {"w1", "w2"}


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "fused", "strided", "expanded"])
def test_results_follow_the_memory_order_of_their_inputs(device, layout):
    case = Case(2, 2, 2, 5, keys1=7, keys2=6, head_dim=4, value_dim=3, layout=layout)
    problem = Problem.of(case, device)
    got = run_attn(torch.ops.simplex.attn, problem)
    for name, t in zip(("out", "dk1", "dk2", "dv1", "dv2"), problem.inputs, strict=True):
        value = got[name]
        order = sorted(range(3), key=t.stride, reverse=True)  # stable, as for stride 0
        assert sorted(range(4), key=value.stride, reverse=True) == [*order, 3], name
        dense = torch.empty_permuted(value.shape, (*order, 3)).stride()
        assert value.stride() == dense, name
    assert got["lse"].is_contiguous()


def test_the_heads_of_a_transposed_view_flatten_as_a_view(device):
    q, *keys = Case(2, 1, 3, 6, value_dim=4, layout="transposed").inputs(device)
    out = simplicial_attention(q, *keys)
    flat = out.transpose(1, 2).flatten(2)
    assert flat.shape == (2, 6, 12)
    assert flat.data_ptr() == out.data_ptr()


def test_a_length_may_change_without_a_new_graph(device):
    compiled_for = []

    def count(graph, _):
        compiled_for.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def attend(*inputs):
        return simplicial_attention(*inputs, window=(5, 3), return_lse=True)

    for seq in (9, 12, 31):
        inputs = Case(1, 1, 2, seq).inputs(device)
        got, expected = attend(*inputs), simplicial_attention(
            *inputs, window=(5, 3), return_lse=True
        )  # fmt: skip
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
    assert len(compiled_for) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_gradients_are_those_of_eager_code(device, dynamic):
    case = Case(2, 2, 2, 12, head_dim=6, w1=5, w2=3, bounds="documents", through="both",
                layout="transposed")  # fmt: skip
    problem = Problem.of(case, device)

    def attend(*arguments, **options):
        out, lse = torch.ops.simplex.attn(*arguments, **options)
        return out * 1.0, lse + 0.0

    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected = run_attn(attend, problem)
    for name, value in run_attn(compiled, problem).items():
        torch.testing.assert_close(value, expected[name], msg=lambda t, n=name: f"{n}: {t}")


def test_it_can_be_exported(device):
    class Layer(torch.nn.Module):
        def forward(self, q, k1, k2, v1, v2):
            return simplicial_attention(q, k1, k2, v1, v2, window=(5, 3))

    n = torch.export.Dim("n", min=2, max=64)
    inputs = Case(1, 1, 2, 9).inputs(device)
    shapes = {name: {2: n} for name in ("q", "k1", "k2", "v1", "v2")}
    program = torch.export.export(Layer(), inputs, dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "simplex.attn.default" in targets
    longer = Case(1, 1, 2, 21).inputs(device)
    assert torch.equal(program.module()(*longer), simplicial_attention(*longer, window=(5, 3)))


def test_checkpointing_recomputes_the_same(device):
    from torch.utils.checkpoint import checkpoint

    inputs = [t.requires_grad_() for t in Case(1, 1, 2, 9).inputs(device)]
    plain = torch.autograd.grad(simplicial_attention(*inputs).sum(), inputs)
    again = checkpoint(simplicial_attention, *inputs, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.sum(), inputs), plain, strict=True):
        assert torch.equal(a, b)


def test_it_runs_without_a_warning_on_the_cpu():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = [t.requires_grad_() for t in Case(1, 1, 2, 9).inputs()]
        simplicial_attention(*inputs).sum().backward()


def test_the_flops_counted_are_those_of_visible_pairs(device):
    from torch.utils.flop_counter import FlopCounterMode

    inputs = Case(1, 1, 2, 50, head_dim=8, value_dim=4, w1=1, w2=1).inputs(device)
    with FlopCounterMode(display=False) as counter:
        simplicial_attention(*inputs, window=(1, 1))
    # 2·(D + Dv)·H for each of N visible pairs
    assert counter.get_total_flops() == 2 * (8 + 4) * 2 * 50


def test_the_package_says_its_version():
    assert simplex_ops.__version__.count(".") == 2
