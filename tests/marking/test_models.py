"""Many modules at once: which are marked, which are left and why, and what explain() tells."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_llama import (
    Attention,
    Residual,
    attention,
    llama,
    mark_layers,
    matrix_products,
    states,
    tokens,
)
from torch import nn
from transformers import DynamicCache

import simplex_ops
from simplex_ops import (
    SimplicialAttention,
    UnservedMarkError,
    explain,
    mark,
    mark_model,
    marked_modules,
    simplicial_parameters,
    unmark,
)


def test_every_second_layer_is_marked_and_the_rest_left_with_reasons():
    model = llama(layers=5)
    done = mark_model(model, every=2, window=(6, 3))
    assert list(done.marked) == [f"model.layers.{i}.self_attn" for i in (1, 3)]
    assert list(marked_modules(model)) == list(done.marked)
    assert done.left == {
        f"model.layers.{i}.self_attn": f"it is number {i + 1}, and every 2 is marked"
        for i in (0, 2, 4)
    }
    again = mark_model(model, every=1)
    assert len(again.marked) == 3
    assert again.left["model.layers.1.self_attn"] == "it is marked already"
    assert "marked: 3\n  - model.layers.0.self_attn" in str(again)


def test_a_function_chooses_among_attention_modules():
    model = Residual(Attention(), Attention(matrix_products), Attention())
    done = mark_model(model, lambda name, module: name != "blocks.0", window=(6, 3))
    assert list(done.marked) == ["blocks.1", "blocks.2"]
    assert done.left == {"blocks.0": "the function that chooses said no"}


def test_what_no_family_knows_is_left_with_what_it_lacks():
    model = Residual(Attention(), OddAttention())
    done = mark_model(model, every=1)
    assert list(done.marked) == ["blocks.0"]
    assert "register_family" in done.left["blocks.1"]
    done = mark_model(model, lambda name, _: name == "blocks.1", kv_heads=4, head_dim=8)
    assert list(done.marked) == ["blocks.1"]


def test_a_wrong_argument_marks_nothing():
    model = llama(layers=3)
    for wrong in ({"window": (0, 1)}, {"form": "cubic"}, {"every": 0}, {"every": True}):
        with pytest.raises(ValueError, match=r"must be"):
            mark_model(model, **{"every": 1, **wrong})

    def fails_late(name: str, module: nn.Module) -> bool:
        return name.endswith("0.self_attn") or 1 / 0 > 1

    with pytest.raises(ZeroDivisionError):
        mark_model(model, fails_late)
    assert not marked_modules(model)


def test_simplicial_parameters_train_alone():
    model = nn.Sequential(mark(Attention(), window=(6, 3)), SimplicialAttention(32, 4))
    model.requires_grad_(False)
    for parameter in simplicial_parameters(model):
        parameter.requires_grad_(True)
    model(states()).square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "0.simplex_k2.weight",
        "0.simplex_v2.weight",
        "1.k2_proj.weight",
        "1.v2_proj.weight",
    }


def test_attention_dropout_is_dropped_where_the_mark_says_so():
    model, ids = llama(layers=1, attention_dropout=0.5).train(), tokens()
    mark_layers(model, 0, attention_dropout=0.0)
    assert torch.equal(model(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"attention_dropout must be 0\.0.*got 0\.1"):
        mark(Attention(), attention_dropout=0.1)
    mark(unmark(attention(model, 0)))
    with pytest.raises(UnservedMarkError, match=r"is 0\.5.*mark it with attention_dropout=0\.0"):
        model(ids)


def test_copies_start_from_keys_and_values():
    for bias in (False, True):
        module = mark(attention(llama(attention_bias=bias), 0), init="copy")
        for made, own in (("simplex_k2", "k_proj"), ("simplex_v2", "v_proj")):
            assert all(map(torch.equal, *(getattr(module, n).parameters() for n in (made, own))))
        assert (module.simplex_mark.k2_bias, module.simplex_mark.v2_bias) == (0, 0)
    with torch.device("meta"):
        module = Attention()
    with pytest.raises(ValueError, match=r"those of Attention are on the meta device: mark"):
        mark(module, init="copy")


def test_unmark_gives_back_what_stood_on_the_instance():
    module: Any = Attention()
    module.forward = module.forward
    module.config = type("Config", (), {"to_dict": dict})()
    before = dict(vars(module)), dict(vars(module.config))
    mark(module)
    assert module.config.simplex_ops["marks"]["Attention"]["window"] == [512, 32]
    unmark(module)
    after = dict(vars(module)), dict(vars(module.config))
    assert after == before
    assert module.forward.__func__ is Attention.forward


class OddAttention(nn.Module):
    """Its outside is of no family that marking knows."""

    def __init__(self, **attend: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.attend = {"is_causal": True, **attend}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, **self.attend)
        return out.transpose(1, 2).flatten(2)


def said(rows: Any) -> dict[str, tuple[Any, ...]]:
    return {r.name: (r.marked, r.served, r.why) for r in rows}


def test_explain_tells_of_each_module_and_leaves_the_model_as_it_was():
    dropping = mark(Attention(), is_causal=False)
    model = Residual(
        mark(Attention()), Attention(), dropping, Attention(matrix_products), OddAttention()
    )
    state = {name: value.clone() for name, value in model.state_dict().items()}
    table = explain(model, states())
    rows = said(table.rows)
    assert rows["blocks.0"] == (True, True, "")
    assert rows["blocks.1"] == (False, True, "")
    assert rows["blocks.2"][:2] == (True, False)
    assert "is_causal=True" in rows["blocks.2"][2]
    assert rows["blocks.3"][:2] == (False, False)
    assert "0 times in 1 runs" in rows["blocks.3"][2]
    assert rows["blocks.4"][:2] == (False, False)
    assert [r.remedy for r in table.rows][2] == "mark it with is_causal=True"
    assert "blocks.2 | Attention" in str(table)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [r.served for r in explain(model).rows] == [None] * 4 + [False]


def test_what_explain_says_is_what_happens():
    ids = tokens(seq=8)
    for how, given in (
        ({"attn_implementation": "eager"}, {}),
        ({"attention_dropout": 0.1}, {}),
        ({}, {"attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([3]), 0)}),
        ({}, {"attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)}),
        ({}, {"past_key_values": "filled"}),
        ({}, {}),
    ):
        model = mark_layers(llama(**how), 1).train()
        if given.get("past_key_values") == "filled":
            given = {"past_key_values": DynamicCache(config=model.config), "use_cache": True}
            llama(seed=1)(ids, **given)
        row = next(r for r in explain(model, ids, **given).rows if r.marked)
        if not how and (not given or ("attention_mask" in given and given["attention_mask"][0, 3])):
            assert row.served
            model(ids, **given)
            continue
        assert row.served is False
        if "past_key_values" in given:
            given = {"past_key_values": DynamicCache(config=model.config), "use_cache": True}
            llama(seed=1)(ids, **given)
        with pytest.raises(UnservedMarkError) as error:
            model(ids, **given)
        assert row.remedy.split(",")[0] in str(error.value)


def test_a_replaced_mark_is_noted_in_the_config():
    model = mark_layers(llama(), 1, window=(6, 3))
    module = attention(model, 1)
    module.simplex_mark = dataclasses.replace(module.simplex_mark, w1=9)
    noted = model.config.to_dict()["simplex_ops"]["marks"]
    assert noted["LlamaAttention of layer 1"]["window"] == [9, 3]


def test_the_plugin_is_reached_from_the_one_package():
    torch._dynamo.reset()
    module = mark(Attention(), window=(6, 3))
    with simplex_ops.enable():
        torch.compile(module)(states())
    assert [r.w1 for r in simplex_ops.last_report().rewritten] == [6]
    simplex_ops.enable()
    simplex_ops.disable()
    torch._dynamo.reset()
    with pytest.raises(UnservedMarkError, match=r"compiled without the pass"):
        torch.compile(module)(states())
