"""The pass on Dynamo's graphs: what it rewrites, what it computes then, and what it refuses.

Compiled without Inductor (backend aot_eager behind the pass), which test_backend.py adds.
"""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from passed import Passed, compiled, passed_alone, refusal_of
from tiny_llama import (
    Attention,
    Residual,
    assert_same,
    attention,
    llama,
    mark_layers,
    randomize,
    sdpa,
    softcapped,
    states,
    tokens,
    train_step,
)
from torch import fx, nn
from torch._dynamo.backends.debugging import eager
from torch._dynamo.testing import CompileCounterWithBackend

from lowering.backend import serve_marks
from lowering.graphs.names import Names
from lowering.graphs.subgraphs import Subgraphs
from lowering.passes.marks import rewrite
from lowering.report import last_report
from simplex_ops import mark, unmark
from simplex_ops.marking.mark_op import MARK_OP


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "how", ["static", "static cache", "static checkpoint", "dynamic checkpoint"]
)
def test_a_compiled_llama_computes_what_eager_does(how, device):
    dynamic = "dynamic" in how
    layers = range(1 if dynamic else 2)  # symbolic sizes take five times as long
    model = llama(len(layers), use_cache="cache" in how, device=device)
    mark_layers(model, *layers, window=(9, 4)).train()
    if "checkpoint" in how:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(device=device)
    expected = train_step(model, model, ids)
    got = train_step(compiled(model, dynamic=dynamic), model, ids)
    assert_same(got, expected)
    assert [str(r) for r in last_report().rewritten] == [
        f"model.layers.{i}.self_attn: trilinear, w1=9, w2=4" for i in layers
    ]


@pytest.mark.parametrize("form", ["determinant", "strassen"])
def test_other_forms_compile_to_what_eager_computes(form):
    model = llama(layers=1)
    mark_layers(model, 0, window=(9, None), form=form, init="random", k2_bias=0.5)
    expected = train_step(model, model, tokens())
    assert_same(train_step(compiled(model), model, tokens()), expected)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_computes_what_it_does_in_eager(inside):
    model = mark_layers(llama(layers=1), 0, window=(9, 4)).train()

    def cast(ids):
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids)

    def outside(ids):
        with torch.autocast("cpu", torch.bfloat16):
            return whole(ids)

    expected = train_step(cast, model, tokens())
    assert expected["logits"].dtype == torch.bfloat16
    whole = compiled(model)
    run = torch.compile(cast, backend=Passed(), fullgraph=True) if inside else outside
    assert_same(train_step(run, model, tokens()), expected)
    assert len(last_report().rewritten) == 1


def test_layers_compiled_one_by_one_share_a_graph():
    model = mark_layers(llama(layers=3), 0, 1, 2, window=(9, 4))
    expected, backend = train_step(model, model, tokens()), Passed()
    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    assert_same(train_step(model, model, tokens()), expected)
    assert len(backend.reports) == 1


def test_one_graph_serves_several_lengths(device):
    model = mark_layers(llama(layers=1, device=device), 0, window=(9, 4)).train()
    counter = CompileCounterWithBackend("aot_eager")

    def backend(gm, example_inputs):
        serve_marks(gm)
        return counter(gm, example_inputs)

    run = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    compiled_once = None  # Dynamo starts over within the first call, to make floats constants
    for seq in (24, 7, 40):
        ids = tokens(seq, device=device)
        assert_same(train_step(run, model, ids), train_step(model, model, ids))
        compiled_once = compiled_once or counter.frame_count
        assert counter.frame_count == compiled_once
    assert [r.module for r in last_report().rewritten] == ["model.layers.0.self_attn"]


def test_a_compiled_mark_stays_within_its_window():
    model, ids = mark_layers(llama(layers=1), 0, window=(5, 3)), tokens(batch=1)
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % 64
    run = passed_alone(model)
    with torch.no_grad():
        differs = (run(ids).logits != run(changed).logits).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [9, 10, 11, 12, 13]


def test_only_marked_layers_are_rewritten():
    model = mark_layers(llama(layers=4), 1, window=(9, 4))
    expected = model(tokens()).logits
    torch.testing.assert_close(passed_alone(model)(tokens()).logits, expected)
    report = last_report()
    assert [r.module for r in report.rewritten] == ["model.layers.1.self_attn"]
    assert list(report.unmarked) == [f"model.layers.{i}.self_attn" for i in (0, 2, 3)]
    assert str(report).splitlines() == [
        "rewritten: 1",
        "  - model.layers.1.self_attn: trilinear, w1=9, w2=4",
        "refused: 0",
        "left as they were, not marked: 3",
        *(f"  - model.layers.{i}.self_attn" for i in (0, 2, 3)),
    ]


def test_each_call_of_a_region_is_rewritten_once():
    module = randomize(mark(Attention(), window=(5, 3)))

    @torch.compiler.nested_compile_region
    def region(x):
        return module(x)

    def run(x):
        return region(x + region(x))

    x = states()
    got = torch.compile(run, backend=Passed(), fullgraph=True)(x)
    torch.testing.assert_close(got, run(x))
    assert len(last_report().rewritten) == 2


def test_a_module_that_is_not_causal_is_rewritten():
    module, x = randomize(mark(Attention(is_causal=False), window=(3, 2))), states()
    torch.testing.assert_close(compiled(module)(x), module(x))


def test_a_late_mark_a_new_window_and_an_unmark_compile_again():
    model, ids = llama(), tokens()
    module = attention(model, 1)
    run = passed_alone(model)
    plain = run(ids).logits
    mark_layers(model, 1, window=(3, 2))
    late = run(ids).logits
    torch.testing.assert_close(late, model(ids).logits)
    module.simplex_mark = dataclasses.replace(module.simplex_mark, w1=6)
    wider = run(ids).logits
    torch.testing.assert_close(wider, model(ids).logits)
    assert not torch.equal(late, wider)
    unmark(module)
    assert torch.equal(run(ids).logits, plain)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_without_the_pass_a_compiled_mark_raises(backend):
    module = mark(Attention())
    run = torch.compile(module, backend=backend)
    with pytest.raises(RuntimeError, match=r"compiled without the pass.*backend=\"simplex\""):
        run(states())


def test_a_graph_break_between_mark_and_attention_is_refused():
    def breaks(q, k, v, **options):
        torch._dynamo.graph_break()
        return sdpa(q, k, v, **options)

    message = refusal_of(mark(Attention(breaks)), states(), fullgraph=False)
    assert "a graph break parts the two" in message
    assert "torch._dynamo.config.optimize_ddp = False" in message


def test_a_split_by_ddp_is_refused_and_goes_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)  # split within each layer
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "ddp"), 1), rank=0, world_size=1
    )
    try:
        model = mark_layers(llama(), 0, 1, window=(9, 4))
        parallel = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.01)
        message = refusal_of(parallel, tokens(), fullgraph=False)
        assert "DDPOptimizer did (set torch._dynamo.config.optimize_ddp = False)" in message
        with torch._dynamo.config.patch(optimize_ddp=False):
            run = torch.compile(parallel, backend=Passed(eager))
            assert_same(train_step(run, model, tokens()), train_step(model, model, tokens()))
        assert len(last_report().rewritten) == 2
    finally:
        dist.destroy_process_group()


def test_a_mark_never_takes_the_attention_of_the_next_layer():
    stack = Residual(mark(Attention(softcapped)), Attention())
    message = refusal_of(stack, states())
    assert "blocks.0: its attention scores pass through tanh" in message
    assert list(last_report().unmarked) == ["blocks.1"]


def test_a_refusal_names_those_that_were_served():
    stack = Residual(*(randomize(mark(Attention(f))) for f in (None, softcapped, None)))
    assert "1 of 3 marked modules cannot run" in refusal_of(stack, states())
    assert [r.module for r in last_report().rewritten] == ["blocks.0", "blocks.2"]


@pytest.mark.parametrize(
    ("attend", "text"),
    [
        (
            lambda q, k, v, **o: sdpa(q, k, v, **o) + sdpa(q, k, v, **o),
            "2 calls of scaled_dot_product_attention take their query from it",
        ),
        (lambda q, k, v, **o: sdpa(q, k, v, dropout_p=0.25, **o), "its attention dropout is 0.25"),
        (
            lambda q, k, v, **_: sdpa(q, k, v, is_causal=False),
            "called with is_causal=False and the module was marked with is_causal=True",
        ),
        (
            lambda q, k, v, **_: F.scaled_dot_product_attention(
                q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), is_causal=True
            ),
            "key has 4 heads and k2 has 2",
        ),
        (
            lambda q, k, v, **o: sdpa(q, torch.cat([k, k], 2), torch.cat([v, v], 2), **o),
            "12 queries and 24 keys but 12 rows of k2",
        ),
    ],
    ids=["twice", "dropout", "not causal", "repeated heads", "cache"],
)
def test_a_call_that_a_mark_cannot_take_over_is_refused(attend, text):
    assert text in refusal_of(mark(Attention(attend)), states())


def test_what_the_operator_refuses_is_refused_when_compiled():
    def attend(q, k, v, **options):
        return sdpa(q.double(), k.double(), v.double(), **options).float()

    with pytest.raises(Exception, match=r"k2 must have the dtype of q, torch.float64, got"):
        compiled(mark(Attention(attend)))(states())


def test_dropout_is_refused_under_dynamic_shapes_too():
    model = mark_layers(llama(attention_dropout=0.1), 0).train()
    run = torch.compile(model, backend=Passed(eager), dynamic=True)
    with pytest.raises(Exception, match=r"its attention dropout is 0\.1"):
        run(tokens())


def _traced(function) -> fx.GraphModule:
    """Trace f(x, k2, v2) as fx alone does, without the modules that Dynamo notes."""
    gm = fx.symbolic_trace(function)
    for node in gm.graph.nodes:
        node.meta["example_value"] = torch.zeros(1, 2, 6, 8)
    return gm


def _two_layers(x, k2, v2):
    first = F.scaled_dot_product_attention(MARK_OP(x, k2, v2, None, 3, 2), x, x, is_causal=True)
    return F.scaled_dot_product_attention(first + x, x, x, is_causal=True)


def test_dataflow_stops_at_other_attention():
    gm = _traced(_two_layers)
    report = rewrite(Subgraphs(gm), Names())
    assert (len(report.rewritten), len(report.refused), len(report.unmarked)) == (1, 0, 1)
    x, k2, v2 = torch.randn(3, 1, 2, 6, 8)
    first, _ = torch.ops.simplex.attn(x, x, k2, x, v2, 3, 2)
    expected = F.scaled_dot_product_attention(first + x, x, x, is_causal=True)
    torch.testing.assert_close(gm(x, k2, v2), expected)


def test_a_graph_without_example_tensors_is_refused():
    report = rewrite(Subgraphs(fx.symbolic_trace(_two_layers)), Names())
    assert not report.rewritten
    assert "its graph holds no example tensors" in report.refused[0].reason


def test_a_query_from_two_marks_is_refused():
    def two(x, k2, v2):
        first, second = (MARK_OP(x, k2, v2, None, 3, 2) for _ in range(2))
        return F.scaled_dot_product_attention(first + second, x, x, is_causal=True)

    report = rewrite(Subgraphs(_traced(two)), Names())
    assert not report.rewritten
    assert len(report.refused) == 2
    assert all("comes from other marks" in r.reason for r in report.refused)
