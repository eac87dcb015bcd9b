"""Marked modules in eager code: what they compute, that they stay modules, what they refuse."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_llama import (
    SEQ,
    Attention,
    attention,
    band,
    llama,
    mark_layers,
    matrix_products,
    randomize,
    sdpa,
    states,
    tokens,
    train_step,
)
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from simplex_ops import UnservedMarkError, mark, marked_modules, unmark
from simplex_ops.marking.mark import is_marked
from simplex_ops.testing import assert_within_budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["trilinear", "strassen"])
@pytest.mark.parametrize("w1", [1, 6, SEQ, 100, None])
def test_a_fresh_mark_is_window_attention(w1, form, dtype, device):
    model, ids = llama(device=device).to(dtype), tokens(device=device)
    mask = band(SEQ, w1 or SEQ, 2).to(device)
    with torch.no_grad():
        rounded = model(ids, attention_mask=mask).logits
        exact = copy.deepcopy(model).double()(ids, attention_mask=mask).logits
        for layer in (0, 1):
            mark(attention(model, layer), window=(w1, 4), form=form)
        got = model(ids).logits
    assert_within_budget("logits", got, exact, rounded)


def test_a_fresh_mark_beyond_the_sequence_is_the_plain_model():
    model, ids = llama(layers=3).eval(), tokens()
    with torch.no_grad():
        rounded, exact = model(ids).logits, copy.deepcopy(model).double()(ids).logits
        mark(attention(model, 1), window=(512, 32))
        got = model(ids).logits
    assert_within_budget("logits", got, exact, rounded)


@pytest.mark.parametrize("form", ["trilinear", "determinant", "strassen"])
def test_a_marked_attention_is_the_operator_on_its_projections(form):
    model = mark_layers(
        llama(), 0, window=(7, 3), form=form, k2_bias=0.5, v2_bias=-0.25, init="random"
    )
    module, h = attention(model, 0), torch.randn(2, SEQ, 32)
    cos, sin = model.model.rotary_emb(h, torch.arange(SEQ)[None])
    q, k, v, k2, v2 = (
        getattr(module, name)(h).unflatten(-1, (-1, 8)).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj", "simplex_k2", "simplex_v2")
    )
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    out, _ = torch.ops.simplex.attn(
        q, k, k2, v, v2, 7, 3, scale=8**-0.5, form=form, k2_bias=0.5, v2_bias=-0.25
    )
    expected = module.o_proj(out.transpose(1, 2).flatten(2))
    got, _ = module(h, position_embeddings=(cos, sin))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_marked_attention_sees_its_window_and_no_more():
    model, ids = mark_layers(llama(layers=1), 0, window=(5, 3)), tokens(batch=1)
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % 64
    with torch.no_grad():
        differs = (model(ids).logits != model(changed).logits).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [9, 10, 11, 12, 13]


def test_a_module_that_is_not_causal_looks_both_ways():
    module = randomize(mark(Attention(is_causal=False), window=(3, 2)))
    assert not module.simplex_mark.is_causal
    x = states(batch=1)
    changed = x.clone()
    changed[0, 6] += 1
    with torch.no_grad():
        differs = (module(x) != module(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [4, 5, 6, 7, 8]


def test_gradients_reach_zero_projections():
    model = llama()
    module: Any = mark(attention(model, 1), window=(8, 4))
    grads = train_step(model, model, tokens())
    assert module.simplex_k2.weight.eq(0).all()
    for name in ("simplex_k2", "simplex_v2"):
        assert grads[f"model.layers.1.self_attn.{name}.weight"].abs().max() > 0


def test_checkpointing_changes_no_gradient():
    model = mark_layers(llama(), 0, window=(8, 4)).train()
    expected = train_step(model, model, tokens())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = train_step(model, model, tokens())
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_autocast_runs_a_marked_model_in_its_dtype():
    model, ids = mark_layers(llama(), 0, window=(8, 4)), tokens()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids).logits
        rounded = copy.deepcopy(model).bfloat16()(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            got = model(ids).logits
    assert got.dtype == torch.bfloat16
    assert_within_budget("logits", got, exact, rounded)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_marked_and_computes_the_same(again):
    model, ids = mark_layers(llama(), 1, window=(8, 4)), tokens()
    other = again(model)
    assert list(marked_modules(other)) == ["model.layers.1.self_attn"]
    assert type(attention(other, 1)) is type(attention(model, 1))
    assert attention(other, 1).simplex_mark == attention(model, 1).simplex_mark
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_a_state_dict_makes_another_marked_model_the_same():
    model, ids = mark_layers(llama(), 1, window=(8, 4)), tokens()
    other = llama(seed=7)
    mark(attention(other, 1), window=(8, 4))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, model(ids).logits)
    added = model.state_dict().keys() - llama().state_dict().keys()
    names = ("simplex_k2.weight", "simplex_ops.mark_like", "simplex_v2.weight")
    assert sorted(added) == [f"model.layers.1.self_attn.{name}" for name in names]


def test_unmark_gives_the_model_back():
    model, ids = llama(), tokens()
    before, kind = model(ids).logits, type(attention(model, 0))
    keys = model.state_dict().keys()
    mark_layers(model, 0, window=(4, 4))
    assert not torch.equal(model(ids).logits, before)
    assert isinstance(attention(model, 0), kind)
    unmark(attention(model, 0))
    assert type(attention(model, 0)) is kind
    assert model.state_dict().keys() == keys
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("bias", [False, True])
def test_projections_follow_the_modules_own(bias):
    module = attention(llama(attention_bias=bias).bfloat16(), 0)
    marked: Any = mark(module, init="random")
    assert marked is module
    assert is_marked(marked)
    for name in ("simplex_k2", "simplex_v2"):
        made, own = getattr(marked, name), module.k_proj
        assert made.weight.shape == own.weight.shape
        assert made.weight.dtype == torch.bfloat16
        assert (made.bias is not None) == bias
        assert made.weight.abs().max() > 0


def test_a_mask_that_hides_nothing_is_no_mask():
    model, ids = mark_layers(llama(), 0), tokens()
    got = model(ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(got, model(ids).logits)


def test_generation_without_a_cache_is_the_model_token_by_token():
    model, ids = mark_layers(llama(), 0, window=(6, 3)).eval(), tokens(seq=5, batch=1)
    got = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    expected = ids
    for _ in range(6):
        following = model(expected).logits[:, -1:].argmax(-1)
        expected = torch.cat([expected, following], 1)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("left", [True, False])
def test_a_padded_row_is_the_row_alone(left):
    model, ids = mark_layers(llama(), 0, 1, window=(6, 3)), tokens()
    shown = slice(5, None) if left else slice(0, 19)
    mask = torch.zeros_like(ids)
    mask[:, shown] = 1
    got = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits
    torch.testing.assert_close(got[:, shown], model(ids[:, shown]).logits)


def test_packed_documents_are_each_alone():
    model, ids = mark_layers(llama(), 0, 1, window=(6, 3)), tokens(batch=1)
    got = model(ids, position_ids=torch.arange(24).remainder(8)[None]).logits
    for start in (0, 8, 16):
        alone = model(ids[:, start : start + 8]).logits
        torch.testing.assert_close(got[:, start : start + 8], alone)


def test_dropout_is_refused():
    model, ids = mark_layers(llama(attention_dropout=0.1), 0).train(), tokens()
    with pytest.raises(UnservedMarkError, match=r"its attention dropout is 0\.1"):
        model(ids)
    model.eval()(ids)


@pytest.mark.parametrize(
    ("attend", "calls"),
    [(matrix_products, 0), (lambda *a, **k: sdpa(*a, **k) + sdpa(*a, **k), 2)],
)
def test_a_module_must_call_sdpa_exactly_once(attend, calls):
    module = mark(Attention(attend))
    with pytest.raises(UnservedMarkError, match=rf"{calls} times in one forward.*exactly one"):
        module(states())


def test_another_attention_implementation_is_refused():
    model = mark_layers(llama(attn_implementation="eager"), 0)
    with pytest.raises(UnservedMarkError, match=r'attn_implementation="sdpa"'):
        model(tokens())


@pytest.mark.parametrize(
    ("attend", "text"),
    [
        (
            lambda q, k, v, **_: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
            r"is_causal=False and the module was marked with is_causal=True",
        ),
        (
            lambda q, k, v, **_: F.scaled_dot_product_attention(
                q[:, :, -1:], k, v, enable_gqa=True
            ),
            r"there are 1 queries and 12 keys but 12 rows of k2",
        ),
        (
            lambda q, k, v, **_: F.scaled_dot_product_attention(q[0], q[0], q[0]),
            r"must have 4 dimensions, got 3 and 3",
        ),
    ],
)
def test_a_call_that_a_mark_cannot_take_over_is_refused(attend, text):
    module = mark(Attention(attend))
    with pytest.raises(UnservedMarkError, match=text):
        module(states())


def _taking(forward) -> nn.Module:
    return type("Other", (Attention,), {"forward": forward})()


def _with(**attributes) -> nn.Module:
    module = Attention()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Linear(8, 8), r"Linear: as Llama, it has no q_proj, k_proj, v_proj, head_dim; as GPT2"),
        (_taking(lambda self, hidden_states, key_value_states: None), r"cross attention"),
        (_taking(lambda self, x: None), r"first argument of its forward is not hidden_states"),
        (_taking(lambda self, hidden_states, *rest: None), r"forward takes \*args"),
        (_with(sliding_window=16), r"sliding window of its own \(16\)"),
        (_with(head_dim=7), r"k_proj makes 16 features, no multiple of head_dim 7"),
        (_with(v_proj=nn.Identity()), r"v_proj is no linear layer"),
    ],
)
def test_a_module_of_another_shape_is_refused(module, text):
    with pytest.raises(TypeError, match=text):
        mark(module)
    assert not is_marked(module)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"window": (0, 4)}, r"w1 must be at least 1 .*, got 0"),
        ({"window": (4, -1)}, r"w2 must be at least 1 .*, got -1"),
        ({"window": (4, 2.5)}, r"w2 must be an int of at least 1 .*, got 2\.5"),
        ({"form": "bilinear"}, r"form must be one of .*got 'bilinear'"),
        ({"init": "zeros"}, r"init must be \"residual\", \"copy\" or \"random\", got 'zeros'"),
        ({"form": "determinant"}, r"no k2 makes the determinant form ordinary attention"),
    ],
)
def test_a_bad_mark_is_refused_and_leaves_the_module(how, text):
    module = Attention()
    names = set(module.state_dict())
    with pytest.raises(ValueError, match=text):
        mark(module, **how)
    assert not is_marked(module)
    assert set(module.state_dict()) == names


def test_marks_do_not_stack():
    module = mark(Attention())
    with pytest.raises(ValueError, match=r"Attention is marked already"):
        mark(module)
    with pytest.raises(ValueError, match=r"Attention is not marked"):
        unmark(unmark(module))
