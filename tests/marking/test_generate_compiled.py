"""generate() of marked models, compiled: by generate() itself, and by the user."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from passed import Passed
from recomputed import (
    assert_as_recomputed,
    generated,
    generating,
    left_padded,
    recomputed,
)
from tiny_llama import llama, tokens
from torch._dynamo.backends.debugging import eager
from transformers import CompileConfig, DynamicCache, StaticCache

import simplex_ops


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def by_generate(backend: Any, **options: Any) -> dict[str, Any]:
    """Return what makes generate() compile its steps, as it does on a GPU of itself."""
    config = CompileConfig(backend="simplex")
    config._compile_all_devices = True
    options = {"backend": backend, "fullgraph": True, **options}
    config.to_dict = lambda: options  # a function as backend cannot be copied
    return {"cache_implementation": "static", "compile_config": config}


def test_generate_compiles_its_steps_once_with_a_static_cache():
    model, backend = generating(num_hidden_layers=1), Passed(eager)
    how = by_generate(backend)
    for seed in (1, 2):  # a new cache of the same size is no new graph
        ids = tokens(seq=8, seed=seed)
        got = generated(model, ids, left_padded(ids), 6, **how)
        assert_as_recomputed(got, recomputed(model, ids, left_padded(ids), 6))
    assert [len(report.rewritten) for report in backend.reports] == [1]


def test_a_compiled_model_generates_with_a_dynamic_cache():
    model, ids, backend = generating(num_hidden_layers=1), tokens(seq=8), Passed(eager)
    expected = recomputed(model, ids, left_padded(ids), 6)
    model.compile(backend=backend, fullgraph=True)
    assert_as_recomputed(generated(model, ids, left_padded(ids), 6), expected)
    assert len(backend.reports) == 3  # the prompt, a step, a step at any length


@torch.no_grad()
def test_compiled_code_asserts_that_a_cache_it_meets_is_empty():
    model = generating(num_hidden_layers=1)
    run = torch.compile(model, backend=Passed(eager), fullgraph=True)
    for cache, fills in (
        (StaticCache(config=model.config, max_cache_len=20), False),
        (StaticCache(config=model.config, max_cache_len=20), True),
    ):
        sizes = {"batch_size": 2, "num_heads": 2, "head_dim": 8}
        cache.early_initialization(**sizes, dtype=torch.float64, device=torch.device("cpu"))
        if fills:
            llama(1).double()(tokens(seq=3), past_key_values=cache, use_cache=True)
            with pytest.raises(RuntimeError, match=r"does not hold their k2 and v2: reset\(\) it"):
                run(tokens(seq=4), past_key_values=cache)
            continue
        got = run(tokens(seq=4), past_key_values=cache).logits
        torch.testing.assert_close(got, model(tokens(seq=4), use_cache=False).logits)


@torch.no_grad()
def test_a_cache_that_cannot_be_served_is_refused_when_compiled():
    model = generating(num_hidden_layers=1)
    run = torch.compile(model, backend=Passed(eager), fullgraph=True)
    cache = DynamicCache()
    llama(1).double()(tokens(seq=3), past_key_values=cache, use_cache=True)
    with pytest.raises(Exception, match=r"holds keys already, and does not hold their k2 and v2"):
        run(tokens(seq=1), past_key_values=cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dynamic"),
    [
        ("llama", None),
        ("llama", True),
        ("gpt2", None),
        ("qwen3", None),
        pytest.param("mistral", None, marks=pytest.mark.long),
    ],
)
def test_compiled_models_generate_with_any_cache(family, dynamic):
    model, ids = generating(family, num_hidden_layers=2), tokens(seq=10)
    expected = recomputed(model, ids, left_padded(ids), 6)
    model.compile(backend=Passed(eager), fullgraph=True, dynamic=dynamic)
    caches: list[dict[str, Any]] = [{}, {"prefill_chunk_size": 4}]
    caches += [{"cache_implementation": "static", **how} for how in caches]
    for how in caches:
        torch._dynamo.reset()
        assert_as_recomputed(generated(model, ids, left_padded(ids), 6, **how), expected)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["the user", "generate", "a named backend"])
def test_inductor_generates_the_tokens_of_the_whole_prefix(by):
    model, ids = generating(num_hidden_layers=1), tokens(seq=10)
    expected, how = recomputed(model, ids, left_padded(ids), 6), {}
    if by == "the user":
        model.compile(fullgraph=True)
    else:
        config = CompileConfig(backend="simplex" if by == "a named backend" else "inductor")
        config._compile_all_devices = True
        how = {"cache_implementation": "static", "compile_config": config}
    with nullcontext() if by == "a named backend" else simplex_ops.enable():
        got = generated(model, ids, left_padded(ids), 6, **how)
    assert_as_recomputed(got, expected, 1e-4)  # Inductor keeps other parts of a norm in float64
    assert len(simplex_ops.last_report().rewritten) == 1


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_step_lets_rows_go_beyond_the_slack():
    model, ids = generating(window=(7, 4), num_hidden_layers=1), tokens(seq=160, batch=1)
    whole = model(ids, use_cache=False).logits
    backend = Passed(eager)
    run, cache = torch.compile(model, backend=backend, fullgraph=True), DynamicCache()
    run(ids[:, :120], past_key_values=cache)
    for place in range(120, 160):
        got = run(ids[:, place : place + 1], past_key_values=cache).logits
        torch.testing.assert_close(got[:, 0], whole[:, place], rtol=1e-9, atol=1e-9)
    assert cache.layers[0].simplex_k2.shape[2] == 3 + 128 + 1
    assert len(backend.reports) <= 5
