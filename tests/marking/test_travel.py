"""A mark travels with its model: saved, loaded, compared; and the start survives initialisation."""

import copy
import dataclasses
import json
import pickle
from typing import Any, ClassVar

import pytest
import torch
from one_rank import one_rank
from passed import Passed
from safetensors.torch import load_file, save_file
from tiny_llama import (
    Attention,
    Residual,
    attention,
    llama,
    mark_layers,
    states,
    tokens,
)
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from simplex_ops import from_pretrained, mark, mark_like, marked_modules, simplicial_parameters
from simplex_ops.marking.saved import decoded, encoded
from simplex_ops.marking.setting import Mark

NAME = "model.layers.1.self_attn"
KEY = f"{NAME}.simplex_ops.mark_like"
OTHERS = [
    {"window": (7, 3)},
    {"window": (6, None)},
    {"form": "strassen"},
    {"k2_bias": 0.5},
    {"is_causal": False},
    {"attention_dropout": 0.0},
]


def marked(seed: int = 0, **how: Any) -> Any:
    return mark_layers(llama(seed=seed), 1, **{"window": (6, 3), **how}).eval()


@pytest.mark.parametrize(
    "mark",
    [
        Mark(512, 32, "trilinear", 1.0, 1.0, True, 64, 64),
        Mark(None, 1, "determinant", -0.1, 1e-300, False, 1, 2, True, "copy", 3),
        Mark(2**40 - 1, None, "strassen", 0.0, 2.0**60, True, 256, 8, False, "residual", 128),
    ],
)
def test_settings_are_read_as_they_were_written(mark):
    saved = encoded(mark, torch.device("cpu"))
    assert decoded(saved) == mark
    assert decoded(saved.float().to(torch.int64)) == mark
    for wrong in (saved[:-1], saved + 1, saved[None]):
        with pytest.raises(ValueError, match=r"settings must hold 20 integers"):
            decoded(wrong)


def through_safetensors(model, folder):
    save_file(model.state_dict(), folder / "m.safetensors")
    return load_file(folder / "m.safetensors")


def through_torch(model, folder):
    torch.save(model.state_dict(), folder / "m.pt")
    return torch.load(folder / "m.pt")


def through_bfloat16(model, folder):
    return copy.deepcopy(model).bfloat16().float().state_dict()


def through_an_average(model, folder):
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    average.update_parameters(model)
    return average.module.state_dict()


@pytest.mark.parametrize(
    "through", [through_safetensors, through_torch, through_bfloat16, through_an_average]
)
def test_a_state_dict_marks_and_fills_an_unmarked_model(through, tmp_path):
    model = marked(form="strassen", k2_bias=0.25)
    state = through(model, tmp_path)
    other = llama(seed=7)
    done = mark_like(other, state)
    assert list(done.marked) == [NAME]
    other.load_state_dict(state)
    assert attention(other, 1).simplex_mark == attention(model, 1).simplex_mark
    assert (other(tokens()).logits - model(tokens()).logits).abs().max() < 0.5
    if through is not through_bfloat16:
        torch.testing.assert_close(other(tokens()).logits, model(tokens()).logits)
    assert mark_like(other, model).left == {NAME: "it is marked so already"}


@pytest.mark.parametrize("how", OTHERS, ids=str)
def test_another_mark_is_noticed_and_the_remedy_works(how):
    model, state = llama(), marked().state_dict()
    mark(attention(model, 1), **{"window": (6, 3), **how})
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"window=\(6, 3\).*mark_like\(model, state_dict\)"):
            model.load_state_dict(state, strict=strict)
    with pytest.raises(ValueError, match=r"is marked with .* unmark\(\) it first"):
        mark_like(model, state)
    model = llama(seed=3)
    mark_like(model, state)
    model.load_state_dict(state)


def test_a_mark_changed_after_loading_is_saved_as_it_is_now():
    model = marked()
    module = attention(model, 1)
    module.simplex_mark = dataclasses.replace(module.simplex_mark, w1=9)
    assert decoded(model.state_dict()[KEY]).w1 == 9
    model(tokens())


def test_marked_into_unmarked_and_back_is_noticed_and_the_key_names_the_call():
    model = llama()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*simplex_ops\.mark_like"):
        model.load_state_dict(marked().state_dict())
    other = marked()
    with pytest.raises(RuntimeError, match=r"Missing key.*simplex_ops\.mark_like"):
        other.load_state_dict(model.state_dict())
    k2 = attention(other, 1).simplex_k2.weight.clone()
    other.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(attention(other, 1).simplex_k2.weight, k2)
    text = r"no mark was saved here.*Load these weights into the unmarked model, then mark\(\) it"
    with pytest.raises(ValueError, match=text):
        mark_like(model, model.state_dict())


def test_settings_put_there_past_all_that_loads_are_noticed_at_the_next_call():
    model = marked()
    saved = attention(model, 1).simplex_ops
    saved._buffers["mark_like"] = encoded(
        dataclasses.replace(saved.mark, w2=5), torch.device("cpu")
    )
    with pytest.raises(ValueError, match=r"window=\(6, 5\).*is loaded into"):
        model(tokens())
    saved._buffers["mark_like"] = encoded(saved.mark, torch.device("cpu"))
    model(tokens())


def test_a_saved_mark_of_another_model_is_refused():
    state = marked().state_dict()
    with pytest.raises(
        ValueError, match=r"saved for model\.layers\.1\.self_attn, and .* no module"
    ):
        mark_like(llama(layers=1), state)
    with pytest.raises(ValueError, match=r"has head_dim \(4, 4\).*has \(8, 8\)"):
        mark_like(llama(head_dim=4), state)


def test_a_name_with_a_prefix_more_or_less_is_found():
    state = marked().state_dict()
    inner: Any = llama().model
    assert list(mark_like(inner, state).marked) == ["layers.1.self_attn"]
    outer = nn.ModuleDict({"model": llama()})
    assert list(mark_like(outer, state).marked) == [f"model.{NAME}"]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_saves_its_own_settings(again):
    model = marked()
    other = again(model)
    module = attention(other, 1)
    module.simplex_mark = dataclasses.replace(module.simplex_mark, w1=2)
    assert decoded(other.state_dict()[KEY]).w1 == 2
    assert decoded(model.state_dict()[KEY]).w1 == 6


def test_a_whole_model_goes_through_torch_save(tmp_path):
    model = marked()
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, LlamaForCausalLM], ids=lambda c: c.__name__)
def test_a_transformers_model_comes_back_marked(cls, tmp_path):
    model = marked()
    model.save_pretrained(tmp_path)
    noted = json.loads((tmp_path / "config.json").read_text())["simplex_ops"]
    assert noted["marks"]["LlamaAttention of layer 1"]["window"] == [6, 3]
    assert noted["load_with"].startswith("simplex_ops.from_pretrained")
    other = from_pretrained(cls, tmp_path)
    assert type(other) is LlamaForCausalLM
    assert list(marked_modules(other)) == [NAME]
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)


def test_a_base_model_in_another_dtype_comes_back_marked(tmp_path):
    marked().save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model, said = from_pretrained(
        AutoModel, tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert type(model) is LlamaModel
    assert list(marked_modules(model)) == ["layers.1.self_attn"]
    assert model.layers[1].self_attn.simplex_k2.weight.dtype == torch.bfloat16
    assert not said["missing_keys"]
    mark_like(llama(), tmp_path)


def test_an_unmarked_checkpoint_loads_as_ever(tmp_path):
    model = llama().eval()
    model.save_pretrained(tmp_path)
    other = from_pretrained(LlamaForCausalLM, tmp_path)
    assert not marked_modules(other)
    assert torch.equal(other(tokens()).logits, model(tokens()).logits)


class MarksItself(LlamaForCausalLM):
    """A user's class that marks when it is built."""

    how: ClassVar[Any] = {"window": (512, 32)}

    def __init__(self, config):
        super().__init__(config)
        mark(attention(self, 1), **self.how)


def test_a_class_that_marks_starts_as_the_checkpoint_and_notices_another_mark(tmp_path):
    plain = llama().eval()
    plain.save_pretrained(tmp_path / "plain")
    model = MarksItself.from_pretrained(tmp_path / "plain").eval()
    for parameter in simplicial_parameters(model):
        assert parameter.eq(0).all()
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits)

    marked().save_pretrained(tmp_path / "marked")
    with pytest.raises(ValueError, match=r"window=\(6, 3\).*simplex_ops\.from_pretrained"):
        MarksItself.from_pretrained(tmp_path / "marked")
    own = type("MarksSo", (MarksItself,), {"how": {"window": (6, 3)}})
    loaded = own.from_pretrained(tmp_path / "marked").eval()
    assert torch.equal(loaded(tokens()).logits, marked()(tokens()).logits)


def by_reset_parameters(model):
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def by_apply(model):
    def draw(module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(std=0.5)

    model.apply(draw)


def by_init_weights(model):
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()


@pytest.mark.parametrize("again", [by_reset_parameters, by_apply, by_init_weights])
def test_zero_stays_zero_when_layers_are_initialised_anew(again):
    model = llama()
    mark(attention(model, 1))
    drawn = attention(model, 1).q_proj.weight.clone()
    again(model)
    assert not torch.equal(attention(model, 1).q_proj.weight, drawn)
    assert all(parameter.eq(0).all() for parameter in simplicial_parameters(model))


def test_what_writes_nothing_leaves_trained_weights():
    model = marked()
    before = model.state_dict()
    expected = {name: value.clone() for name, value in before.items()}
    model.apply(lambda module: module.requires_grad_(False))
    model.float().to("cpu")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("init", ["residual", "random"])
def test_the_start_survives_the_meta_device(init):
    with torch.device("meta"):
        module: Any = mark(Attention(), window=(6, 3), init=init)
    module.to_empty(device="cpu")
    for name in ("simplex_k2", "simplex_v2"):
        weight = getattr(module, name).weight
        assert weight.eq(0).all() if init == "residual" else 0 < weight.abs().max() < 1
    assert decoded(module.simplex_ops.mark_like) == module.simplex_mark
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        nn.init.normal_(getattr(module, name).weight)
    with torch.device("meta"):
        empty = mark(Attention(), window=(6, 3), init=init)
    empty.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(empty(states()), module(states()))


def test_the_start_survives_torchtitans_order(tmp_path):
    """Meta, parallelise, compile each block, to_empty, init_weights."""
    torch._dynamo.reset()
    with one_rank(tmp_path) as mesh:
        with torch.device("meta"):
            model = Residual(Attention(), mark(Attention(), window=(512, 3)))
        backends = []
        for block in model.blocks:
            backends.append(Passed())
            block.compile(backend=backends[-1], fullgraph=True)
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        torch.manual_seed(0)
        for block in model.blocks:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                nn.init.trunc_normal_(getattr(block, name).weight, std=0.2)
        got = model(states())
        got.square().mean().backward()
        assert len(backends[1].reports[-1].rewritten) == 1
        grads = [p.grad.full_tensor() for p in simplicial_parameters(model)]  # type: ignore[union-attr]
        state = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in model.state_dict().items()
        }
        checkpoint.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "saved")
    plain = Residual(Attention(), Attention())
    plain.load_state_dict({k: v for k, v in state.items() if "simplex" not in k})
    torch.testing.assert_close(got.detach(), plain(states()))
    assert all(grad.abs().max() > 0 for grad in grads)

    resumed = Residual(Attention(), Attention())
    assert list(mark_like(resumed, tmp_path / "saved").marked) == ["blocks.1"]
    held = {"model": resumed.state_dict()}
    checkpoint.load(held, checkpoint_id=tmp_path / "saved", no_dist=True)
    resumed.load_state_dict(held["model"])
    torch.testing.assert_close(resumed(states()), got.detach())


def test_adapters_train_merge_and_come_back(tmp_path):
    peft = pytest.importorskip("peft")
    base, ids = marked(), tokens()
    how = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, how).eval().double()  # merging rounds
    found = [
        name for name, _ in model.named_parameters() if "simplex_k2" in name and "lora" in name
    ]
    assert len(found) == 2
    expected = model(ids).logits
    assert not torch.equal(expected, marked().double()(ids).logits)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(marked(), tmp_path).eval().double()
    torch.testing.assert_close(again(ids).logits, expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected)
    other = llama().double()
    mark_like(other, merged.state_dict())
    other.load_state_dict(merged.state_dict())
    torch.testing.assert_close(other.eval()(ids).logits, expected)


def test_whole_layers_train_beside_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    how = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["simplex_k2", "simplex_v2"]
    )
    model, ids = peft.get_peft_model(marked(), how), tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and "simplex" in n}
    assert len(trained) == 2
    assert all("modules_to_save" in name for name in trained)
    for name, parameter in model.named_parameters():
        if name in trained:
            nn.init.normal_(parameter, std=0.2)
    expected = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(marked(), tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, expected)


@pytest.mark.parametrize("init", ["residual", "copy"])
def test_adapters_that_divide_by_norms_leave_out_what_starts_at_zero(init):
    peft = pytest.importorskip("peft")
    model, names = llama(), ["simplex_k2", "simplex_v2"]
    mark(attention(model, 1), init=init)
    apart = {"exclude_modules": names, "modules_to_save": names} if init == "residual" else {}
    how = peft.LoraConfig(target_modules="all-linear", use_dora=True, **apart)
    adapted = peft.get_peft_model(model, how)
    assert adapted(tokens()).logits.isfinite().all()
    assert any(p.requires_grad for n, p in adapted.named_parameters() if "simplex_k2" in n)
