"""generate() of marked models, eager: with any cache the tokens of the whole prefix, recomputed."""

import copy
import dataclasses

import pytest
import torch
from recomputed import (
    assert_as_recomputed,
    assert_generates_as_recomputed,
    generated,
    generating,
    left_padded,
    recomputed,
)
from tiny_llama import tokens
from transformers import DynamicCache, StaticCache

CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 4},
    "static chunked": {"cache_implementation": "static", "prefill_chunk_size": 4},
}


@pytest.mark.parametrize("window", [(6, 3), (3, 8), (40, 40), (None, None)], ids=str)
def test_tokens_are_those_of_the_whole_prefix(window):
    model, ids = generating(window=window), tokens(seq=10)
    expected = recomputed(model, ids, left_padded(ids), 7)
    for how in CACHES.values():
        assert_as_recomputed(generated(model, ids, left_padded(ids), 7, **how), expected)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "mistral"])
def test_other_families_generate_the_tokens_of_the_whole_prefix(family):
    model, ids = generating(family), tokens(seq=10)
    expected = recomputed(model, ids, left_padded(ids), 7)
    for how in CACHES.values():
        got = generated(model, ids, left_padded(ids), 7, **how)
        assert_as_recomputed(got, expected)


@pytest.mark.parametrize("how", ["dynamic", "static"])
def test_beams_are_those_without_a_cache(how):
    model, ids = generating(), tokens(seq=10)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    expected, got = (
        generated(model, ids, left_padded(ids), 8, **beams, **cache)
        for cache in ({"use_cache": False}, CACHES[how])
    )
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("assistant", ["itself", "another", "the prompt"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_assisted_decoding_takes_tokens_back(family, assistant):
    model, ids = generating(family), tokens(seq=10, batch=1)
    expected, _ = recomputed(model, ids, torch.ones_like(ids), 16)
    how = {
        "itself": {"assistant_model": generating(family)},
        "another": {"assistant_model": generating("llama", num_hidden_layers=1)},
        "the prompt": {"prompt_lookup_num_tokens": 3},
    }[assistant]
    assert torch.equal(generated(model, ids, torch.ones_like(ids), 16, **how).sequences, expected)


@pytest.mark.parametrize("kind", ["dynamic", "made lazily", "static"])
def test_a_cache_is_used_again(kind):
    model, ids = generating(), tokens(seq=6)
    cache = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "made lazily": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=40),
    }[kind]()
    for _ in range(2):
        first = assert_generates_as_recomputed(model, ids, 4, past_key_values=cache)
        more = torch.cat((first.sequences, tokens(seq=3, seed=7)), 1)
        assert_generates_as_recomputed(model, more, 4, past_key_values=copy.deepcopy(cache))
        assert_generates_as_recomputed(model, more, 4, past_key_values=cache)
        cache.reset()


@torch.no_grad()
def test_what_a_static_cache_has_not_filled_never_matters():
    model, ids = generating(), tokens(seq=8)
    cache = StaticCache(config=model.config, max_cache_len=20)
    expected = model(ids, use_cache=False).logits
    model(ids[:, :5], past_key_values=cache)
    layer = cache.layers[0]
    for rows in (layer.keys, layer.values, layer.simplex_k2, layer.simplex_v2):
        rows[:, :, 5:] = 1e30
    for place in (5, 6, 7):  # without a mask too, where transformers gives none to one query
        got = model(ids[:, place : place + 1], past_key_values=cache).logits
        torch.testing.assert_close(got[:, 0], expected[:, place], rtol=1e-9, atol=1e-9)


def test_other_forms_generate_the_tokens_of_the_whole_prefix():
    for form in ("determinant", "strassen"):
        model = generating(num_hidden_layers=1)
        module = model.model.layers[0].self_attn
        module.simplex_mark = dataclasses.replace(module.simplex_mark, form=form)
        assert_generates_as_recomputed(model, tokens(seq=6), 4)
