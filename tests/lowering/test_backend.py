"""The plugin on Inductor: backend="simplex", enable(), their options, and the compile caches."""

import contextlib
import functools
import warnings

import pytest
import torch
from tiny_llama import (
    Attention,
    assert_same,
    llama,
    mark_layers,
    randomize,
    softcapped,
    states,
    tokens,
    train_step,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor import compile_fx as compile_fx_module
from torch._inductor import config
from torch._inductor.utils import fresh_inductor_cache

import lowering
from lowering import compat
from simplex_ops import mark, unmark
from simplex_ops.marking.call import UnservedMarkError
from simplex_ops.rules import cache_key

PLAIN = compile_fx_module.compile_fx


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    patch = torch.compiler.config.patch  # pyright: ignore[reportAttributeAccessIssue]
    with patch(cache_key_tag=""):
        yield
    lowering.disable()


@pytest.mark.slow
def test_a_llama_trains_on_inductor_as_in_eager_at_several_lengths(device):
    model = mark_layers(llama(layers=1, device=device), 0, window=(9, 4)).train()
    run = torch.compile(model, backend=lowering.simplex, fullgraph=True, dynamic=True)
    for seq in (24, 7):
        ids = tokens(seq, device=device)
        assert_same(train_step(run, model, ids), train_step(model, model, ids))
    assert [r.module for r in lowering.last_report().rewritten] == ["model.layers.0.self_attn"]


@pytest.mark.parametrize("lengths", [(12,), (24, 7)], ids=["one length", "several lengths"])
def test_a_module_trains_on_inductor_as_in_eager(lengths, device):
    module = randomize(mark(Attention(), window=(9, 4))).to(device)
    dynamic = len(lengths) > 1
    run = torch.compile(module, backend=lowering.simplex, fullgraph=True, dynamic=dynamic)
    for seq in lengths:
        found = []
        for function in (run, module):
            module.zero_grad()
            out = function(states(seq).to(device))
            out.square().mean().backward()
            grads = {n: p.grad for n, p in module.named_parameters()}
            found.append({"out": out.detach(), **grads})
        assert_same(*found)


def _recorded(found: list) -> dict:
    """Return Inductor options under which compiling records the options in force."""

    def record(_graph):
        found.append((config.max_autotune, config.epilogue_fusion))

    return {"post_grad_custom_pre_pass": record}


def test_options_reach_inductor():
    found, module = [], randomize(mark(Attention()))
    options = {**_recorded(found), "epilogue_fusion": False}
    run = torch.compile(module, backend=lowering.simplex, options=options)
    with torch.no_grad():
        torch.testing.assert_close(run(states()), module(states()))
    assert found == [(False, False)]


def test_mode_reaches_inductor():
    found, module = [], randomize(mark(Attention()))
    no_templates = {"max_autotune_gemm_backends": "ATEN"}  # there is no C++ to be tuned then
    with config.patch({**_recorded(found), **no_templates}), torch.no_grad():
        run = torch.compile(module, backend=lowering.simplex, mode="max-autotune-no-cudagraphs")
        torch.testing.assert_close(run(states()), module(states()))
    assert found == [(True, True)]


def test_a_reset_forgets_cuda_graphs(monkeypatch):
    from torch._inductor import cudagraph_trees

    calls = []
    monkeypatch.setattr(cudagraph_trees, "reset_cudagraph_trees", lambda: calls.append(1))
    torch._TorchCompileWrapper(lowering.simplex, None, None, None).reset()
    assert calls == [1]


def _served() -> bool:
    """Say whether a plain torch.compile serves a mark now; if not, it raises as it must."""
    torch._dynamo.reset()
    module, x = randomize(mark(Attention(), window=(5, 3))), states()
    run = torch.compile(module, backend="inductor")
    with torch.no_grad(), contextlib.suppress(UnservedMarkError):
        torch.testing.assert_close(run(x), module(x))
        return True
    return False


def on() -> bool:
    """Say whether the pass stands in front of Inductor."""
    return compile_fx_module.compile_fx is not PLAIN


def test_a_with_leaves_what_stood_before_it():
    lowering.enable()
    with lowering.enable():
        assert on()
    assert on()
    lowering.disable()
    assert not on()
    with lowering.enable():
        with lowering.enable():
            assert on()
        assert on()
        lowering.enable()
    assert not on()
    with lowering.enable():
        lowering.disable()  # ends no block
        assert on()
    assert not on()
    kept = lowering.enable()
    lowering.enable()
    lowering.disable()
    assert not on()
    for _ in range(2):
        with kept, kept:
            assert on()
        assert not on()
    with pytest.raises(ZeroDivisionError), lowering.enable():
        _ = 1 / 0
    assert not on()


def test_disable_never_fails_and_can_be_followed_by_enable():
    """Someone wraps compile_fx after enable(), so that ours cannot be taken out of the middle."""
    lowering.enable()
    ours, called = compile_fx_module.compile_fx, []

    @functools.wraps(ours)
    def theirs(*args, **kwargs):
        called.append(1)
        return ours(*args, **kwargs)

    compile_fx_module.compile_fx = theirs
    try:
        lowering.disable()
        assert compile_fx_module.compile_fx is theirs
        assert not _served()
        lowering.enable()
        assert _served()
        assert len(called) == 2
        lowering.disable()
        assert compile_fx_module.compile_fx is theirs
    finally:
        compile_fx_module.compile_fx = PLAIN
    lowering.enable()
    assert _served()
    lowering.disable()
    assert compile_fx_module.compile_fx is PLAIN


def test_what_is_first_called_after_the_with_says_how_to_be_served():
    module, x = randomize(mark(Attention(), window=(5, 3))), states()
    with lowering.enable():
        run = torch.compile(module)
    with torch.no_grad():
        with pytest.raises(UnservedMarkError) as caught:
            run(x)
        message = str(caught.value)
        assert 'torch.compile(model, backend="simplex")' in message
        assert "when the model is called, and not by torch.compile(model)" in message
        assert "torch.compiler.reset()" in message
        torch.testing.assert_close(torch.compile(module, backend=lowering.simplex)(x), module(x))
        with lowering.enable():
            torch.compiler.reset()
            torch.testing.assert_close(run(x), module(x))
        unmark(module)
        torch.testing.assert_close(run(x), module(x))


@pytest.mark.parametrize("backend", [lowering.simplex, "inductor"])
def test_enable_and_options_leave_one_report(backend):
    stack = nn.Sequential(randomize(mark(Attention(), window=(5, 3))), Attention())
    with torch.no_grad(), lowering.enable():
        run = torch.compile(stack, backend=backend, options={"epilogue_fusion": False})
        torch.testing.assert_close(run(states()), stack(states()))
    assert len(lowering.last_report().rewritten) == 1


def test_enable_refuses_what_the_backend_refuses():
    module = mark(Attention(softcapped))
    with lowering.enable(), pytest.raises(Exception, match=r"pass through tanh"):
        torch.compile(module)(states())


def test_enable_leaves_other_models_alone():
    module, x, before = Attention(), states(), lowering.last_report()
    with lowering.enable(), torch.no_grad():
        linear = nn.Linear(32, 4)
        torch.testing.assert_close(torch.compile(linear)(x), linear(x))
        assert lowering.last_report() is before
        torch.testing.assert_close(torch.compile(module)(x), module(x))
    assert not lowering.last_report().rewritten
    assert not lowering.last_report().refused


@pytest.mark.parametrize("how", ["backend", "enable"])
def test_the_caches_follow_marks_windows_and_sources(how, monkeypatch):
    """Fill Inductor's caches with one marking, then run others against them."""
    x, first, second = states(), Attention(), Attention()
    stack = nn.Sequential(first, second)  # nothing to fuse, no C++ to wait for

    def run() -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(
            stack, backend=lowering.simplex if how == "backend" else "inductor"
        )
        torch.testing.assert_close(compiled(x), stack(x))
        found = counters["aot_autograd"]
        return found["autograd_cache_hit"], found["autograd_cache_miss"]

    if how == "enable":
        lowering.enable()
    with torch.no_grad(), fresh_inductor_cache():
        torch.manual_seed(0)
        weights = randomize(mark(first, window=(5, 3))).state_dict()
        del weights["simplex_ops.mark_like"]  # which would not load into another window
        assert run() == (0, 1)
        assert run() == (1, 0)
        unmark(first)
        randomize(mark(second, window=(5, 3)))
        assert run() == (0, 1)
        unmark(second)
        mark(first, window=(5, 3)).load_state_dict(weights, strict=False)
        assert run() == (1, 0)
        unmark(first)
        mark(first, window=(5, 2)).load_state_dict(weights, strict=False)
        assert run() == (0, 1)
        unmark(first)
        mark(first, window=(5, 3)).load_state_dict(weights, strict=False)
        assert run() == (1, 0)
        monkeypatch.setattr(cache_key, "sources", lambda: "other sources")
        assert run() == (0, 1)


def test_the_digest_covers_every_source(tmp_path, monkeypatch):
    assert set(cache_key.PACKAGES) == {"csrc_free", "simplex_ops", "lowering"}
    package = tmp_path / "digested"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "kernel.py").write_text("a = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cache_key, "PACKAGES", ("digested",))
    read = cache_key.sources.__wrapped__
    before = read()
    assert read() == before
    (package / "inner" / "kernel.py").write_text("a = 2")
    changed = read()
    (package / "inner" / "kernel.py").rename(package / "kernel.py")
    assert len({before, changed, read()}) == 3


def test_an_untested_torch_is_warned_of_once(monkeypatch):
    compat.warn_if_untested.cache_clear()
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    with pytest.warns(UserWarning, match=r"tested on torch 2\.11, 2\.13.*; this is 2\.99\.0"):
        compat.warn_if_untested()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.warn_if_untested()
        compat.warn_if_untested.cache_clear()
        for release in compat.TESTED:
            monkeypatch.setattr(torch, "__version__", f"{release}.1")
            compat.warn_if_untested()
            compat.warn_if_untested.cache_clear()


@pytest.mark.parametrize("marked", [False, True])
def test_another_precision_of_float32_is_another_graph(marked, monkeypatch):
    from simplex_ops.rules import lowered

    monkeypatch.setattr(lowered, "guard_precision", lambda _q: compat.guard_precision())
    counter = CompileCounterWithBackend(lowering.simplex)
    heads = torch.randn(5, 1, 2, 6, 8).unbind()
    module = mark(Attention()) if marked else lambda x: torch.ops.simplex.attn(x, *heads[1:])
    run, x = torch.compile(module, backend=counter), states() if marked else heads[0]
    matmul = torch.backends.cuda.matmul
    try:
        for said in ("none", "ieee", "none"):
            matmul.fp32_precision = said
            run(x)
    finally:
        matmul.fp32_precision = "none"
    assert counter.frame_count == 2
