"""k2 and v2 in a cache's layers: whatever is done to a cache, what follows is as if recomputed."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recomputed import generating
from tiny_llama import VOCABULARY, attention, llama, mark_layers, tokens
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from simplex_ops import UnservedMarkError, explain
from simplex_ops.marking import cache_layers

W2 = 4
MODELS = {family: generating(family, window=(7, W2)) for family in ("llama", "mistral")}


STEPS = st.tuples(
    st.sampled_from(("add", "add", "crop", "reorder", "repeat", "select")),
    st.integers(1, 6),
    st.integers(0, 10**6),
)


class History:
    """A cache, the tokens of which it should know, and how many rows of k2 it should hold."""

    def __init__(self, model: Any, cache: Any, ids: torch.Tensor) -> None:
        self.model, self.cache, self.ids, self.held = model, cache, ids[:, :0], 0
        self.add(ids)

    def add(self, new: torch.Tensor) -> None:
        self.ids = torch.cat((self.ids, new), 1)
        self.held = min(self.held, W2 - 1 + cache_layers.SLACK) + new.shape[1]
        got = self.model(new, past_key_values=self.cache, use_cache=True).logits
        whole = self.model(self.ids, use_cache=False).logits[:, -new.shape[1] :]
        torch.testing.assert_close(got, whole, rtol=1e-9, atol=1e-9)

    def crop(self, size: int) -> bool:
        """Take tokens back, and say whether the cache still knows what is left."""
        size = min(size, self.ids.shape[1] - 1)
        self.ids, self.held = self.ids[:, : self.ids.shape[1] - size], self.held - size
        if self.held >= min(W2 - 1, self.ids.shape[1]):
            self.cache.crop(-size)
            return True
        text = f"keeps w2 - 1 rows, {cache_layers.SLACK} more and those of the last call"
        with pytest.raises(UnservedMarkError, match=text):
            self.cache.crop(-size)
        with pytest.raises(UnservedMarkError, match=r"holds keys already"):
            self.model(self.ids[:, -1:], past_key_values=self.cache)
        return False

    def step(self, kind: str, size: int, seed: int) -> bool:
        rows = self.ids.shape[0]
        generator = torch.Generator().manual_seed(seed)
        if kind == "crop":
            return self.crop(size)
        if kind == "add":
            self.add(torch.randint(VOCABULARY, (rows, size), generator=generator))
        elif kind == "repeat":
            self.cache.batch_repeat_interleave(2)
            self.ids = self.ids.repeat_interleave(2, 0)
        else:
            chosen = torch.randint(rows, (rows,), generator=generator)
            if kind == "select":
                chosen = chosen[: (rows + 1) // 2]
                self.cache.batch_select_indices(chosen)
            else:
                self.cache.reorder_cache(chosen)
            self.ids = self.ids[chosen]
        return True


@settings(max_examples=15, deadline=None)
@given(st.lists(STEPS, min_size=2, max_size=7), st.sampled_from(tuple(MODELS)), st.integers(0, 9))
@torch.no_grad()
def test_whatever_is_done_to_a_cache_what_follows_is_as_if_recomputed(steps, family, slack):
    model = MODELS[family]
    kept, cache_layers.SLACK = cache_layers.SLACK, slack
    try:
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()  # else sliding layers let go what crop takes back
        history = History(model, cache, tokens(seq=5))
        if all(history.step(*step) for step in steps):
            history.step("add", 1, 0)
    finally:
        cache_layers.SLACK = kept


@torch.no_grad()
def test_a_dynamic_cache_keeps_what_w2_reaches_and_a_slack():
    model, ids = generating(window=(7, 4), num_hidden_layers=1), tokens(seq=200)
    cache = DynamicCache(config=model.config)
    model(ids[:, :150], past_key_values=cache)
    for place in range(150, 160):
        model(ids[:, place : place + 1], past_key_values=cache)
    layer = cache.layers[0]
    assert layer.keys.shape[2] == 160
    for rows in (layer.simplex_k2, layer.simplex_v2):
        assert rows.shape[2] == 3 + cache_layers.SLACK + 1
        assert rows.untyped_storage().nbytes() <= 2 * rows.nbytes
    with pytest.raises(
        UnservedMarkError, match=r"was cropped by 130 tokens.*keeps w2 - 1 rows, 128"
    ):
        copy.deepcopy(cache).crop(-cache_layers.SLACK - 2)
    cache.crop(-cache_layers.SLACK - 1)
    got = model(ids[:, 31:33], past_key_values=cache).logits
    whole = model(ids[:, :33], use_cache=False).logits[:, -2:]
    torch.testing.assert_close(got, whole, rtol=1e-9, atol=1e-9)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(6, 30))
@torch.no_grad()
def test_static_sliding_windows_answer_as_if_recomputed(sizes, length):
    model = MODELS["mistral"]
    cache = StaticCache(config=model.config, max_cache_len=length)
    ids = tokens(seq=sum(sizes))
    whole = model(ids, use_cache=False).logits
    for _ in range(2):  # a cache is used again
        for part, wanted in zip(ids.split(sizes, 1), whole.split(sizes, 1), strict=True):
            got = model(part, past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
        cache.reset()


@torch.no_grad()
def test_a_static_cache_holds_them_at_its_full_length():
    model = generating(num_hidden_layers=1)
    cache = StaticCache(config=model.config, max_cache_len=40)
    model(tokens(seq=5), past_key_values=cache)
    before = cache.layers[0].simplex_k2
    assert before.shape[2] == cache.layers[0].simplex_v2.shape[2] == 40
    cache.reset()
    assert cache.layers[0].simplex_k2 is before
    assert not before.any()


@pytest.mark.parametrize(
    "layer",
    [
        DynamicLayer(),
        DynamicSlidingWindowLayer(5),
        StaticLayer(9),
        StaticSlidingWindowLayer(9, 5),
    ],
    ids=repr,
)
def test_compiled_code_takes_over_all_that_a_layer_has(layer):
    layer.update(*torch.randn(2, 1, 2, 3, 4))
    kind = cache_layers._HOLDING[type(layer)]
    assert set(vars(layer)) == set(kind.simplex_takes)


class PlainQuantizedLayer(QuantizedLayer):
    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, q_tensor):
        return q_tensor


def quantised() -> Any:
    return DynamicCache.__base__(layer_class_to_replicate=PlainQuantizedLayer)


def offloading() -> Any:
    cache = DynamicCache()
    cache.offloading = True
    return cache


def static() -> Any:
    return StaticCache(config=llama().config, max_cache_len=30)


def filled(cache: Any, model: Any = None) -> Any:
    (model or llama())(tokens(seq=4), past_key_values=cache, use_cache=True)
    return cache


WITHOUT = r"holds keys already, and does not hold their k2 and v2: let the marked.*use_cache=False"
REFUSED = {
    "quantised": (quantised, r"do not know the layers of its cache, a PlainQuantizedLayer: give"),
    "offloading": (offloading, r"a DynamicCache that offloads its layers: give a DynamicCache"),
    "filled unmarked": (lambda: filled(DynamicCache()), WITHOUT),
    "static filled unmarked": (lambda: filled(static()), WITHOUT),
}


@pytest.mark.parametrize("kind", REFUSED)
@torch.no_grad()
def test_a_cache_that_cannot_be_served_is_refused_by_name(kind):
    make, text = REFUSED[kind]
    model = mark_layers(llama(), 0, window=(6, 3)).eval()
    with pytest.raises(UnservedMarkError, match=r"model\.layers\.0\.self_attn.*" + text):
        model(tokens(seq=1), past_key_values=make(), use_cache=True)


def test_an_object_that_is_no_cache_is_refused_by_name():
    module = attention(mark_layers(llama(), 0), 0)
    with pytest.raises(UnservedMarkError, match=r"do not know its cache, a dict: give a Dynamic"):
        module(torch.zeros(1, 1, 32), past_key_values={})


@torch.no_grad()
def test_keys_that_came_or_went_without_k2_are_noticed():
    model = mark_layers(llama(), 0, window=(6, 3)).eval()
    module = attention(model, 0)
    cropped, static_cache = filled(DynamicCache(), model), filled(static(), model)
    cropped.layers[0].keys = cropped.layers[0].keys[:, :, :-1]
    cropped.layers[0].values = cropped.layers[0].values[:, :, :-1]
    grown = filled(filled(DynamicCache(), model), model)
    grown.crop(-3)
    grown.layers[0].simplex_change(lambda rows: rows[:, :, -2:])  # as w2 = 3 would leave
    model(tokens(seq=1), past_key_values=grown, use_cache=True)
    module.simplex_mark = dataclasses.replace(module.simplex_mark, w2=5)
    unmarked = llama()
    filled(static_cache, unmarked)
    for cache in (cropped, grown, static_cache):
        with pytest.raises(UnservedMarkError, match=WITHOUT):
            model(tokens(seq=1), past_key_values=cache, use_cache=True)
    static_cache.reset()
    filled(static_cache, model)


@torch.no_grad()
def test_a_mark_that_is_not_causal_takes_an_empty_cache_alone():
    module = mark_layers(llama(layers=1), 0, window=(6, 3), is_causal=False)
    module = attention(module, 0)
    cos_sin = (torch.ones(1, 4, 8), torch.zeros(1, 4, 8))
    module.is_causal = False
    cache, x = DynamicCache(), torch.randn(1, 4, 32)
    got = module(x, position_embeddings=cos_sin, past_key_values=cache)[0]
    assert torch.equal(got, module(x, position_embeddings=cos_sin)[0])
    for filled_or_static in (cache, static()):
        with pytest.raises(
            UnservedMarkError, match=r"marked with is_causal=False.*use_cache=False"
        ):
            module(x, position_embeddings=cos_sin, past_key_values=filled_or_static)


@torch.no_grad()
def test_explain_tells_of_caches():
    model = mark_layers(llama(), 1, window=(6, 3)).eval()
    for cache in (DynamicCache(), filled(DynamicCache(), model), static(), filled(static(), model)):
        for ids in (tokens(seq=1), tokens(seq=5)):
            named = {"past_key_values": copy.deepcopy(cache), "use_cache": True}
            row = explain(model, ids, **named).rows[1]
            assert row.served, row
            with pytest.raises(UnservedMarkError, match=WITHOUT):  # explain() put keys alone
                model(tokens(seq=1), **named)
    row = explain(model, tokens(), past_key_values=quantised(), use_cache=True).rows[1]
    assert (row.served, row.why[:32]) == (False, "marks do not know the layers of ")


def test_a_mask_is_judged_by_where_a_static_cache_stands():
    model = mark_layers(llama(), 0, window=(6, 3)).eval()
    cache = filled(static(), model)
    for shown in (5, 7):
        mask = (torch.arange(30) < shown).expand(2, 1, 1, 30)
        given = {"past_key_values": cache, "attention_mask": mask, "use_cache": True}
        if shown == 5:  # the four that it holds and the query's own
            model(tokens(seq=1), **given)
            continue
        with pytest.raises(UnservedMarkError, match=r"shows a query keys after it"):
            model(tokens(seq=1), **given)


@torch.no_grad()
def test_the_self_attention_of_an_encoder_decoder_cache_is_served():
    model = generating("gpt2", num_hidden_layers=1)
    module, x = model.transformer.h[0].attn, torch.randn(2, 6, 32, dtype=torch.float64)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    whole = module(x)[0]
    for place in range(6):
        got = module(x[:, place : place + 1], past_key_values=cache)[0]
        torch.testing.assert_close(got[:, 0], whole[:, place], rtol=1e-9, atol=1e-9)
    assert cache.self_attention_cache.layers[0].simplex_k2.shape[2] == 6
