"""Each kind of attention module: its start, eager and compiled alike, gradients, refusals."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_llama import assert_same, states, tokens
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import lowering
from lowering.backend import serve_marks
from simplex_ops import (
    UnservedMarkError,
    explain,
    mark,
    mark_model,
    marked_modules,
    register_family,
    simplicial_parameters,
    unmark,
)
from simplex_ops.marking.families import known
from simplex_ops.marking.families.family import Bound, Projections
from simplex_ops.marking.families.llama import Llama
from simplex_ops.testing import assert_within_budget

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
    "initializer_range": 0.2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 64,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "use_cache": False,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CAUSAL = nn.Transformer.generate_square_subsequent_mask(12)


class Alone(nn.Module):
    """nn.MultiheadAttention on one sequence, as need_weights=False."""

    def __init__(self, separate: bool = False, **how: Any) -> None:
        super().__init__()
        self.attn: Any = nn.MultiheadAttention(32, 4, **how)
        if separate:
            q, k, v = (nn.Parameter(w) for w in self.attn.in_proj_weight.detach().chunk(3))
            self.attn.q_proj_weight, self.attn.k_proj_weight, self.attn.v_proj_weight = q, k, v
            self.attn.in_proj_weight, self.attn._qkv_same_embed_dim = None, False

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Encoder(nn.Module):
    """nn.TransformerEncoder, whose layers take PyTorch's fast path in inference."""

    def __init__(self, causal: bool, **how: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, **how)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, mask=CAUSAL if self.causal else None, is_causal=self.causal)


class ByHand(nn.Module):
    """Attention of the user's own, by one function or the other."""

    def __init__(self, by: str = "sdpa") -> None:
        super().__init__()
        self.by, self.qkv, self.out = by, nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        if self.by == "sdpa":
            q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(out.transpose(1, 2).flatten(2))
        x = x.transpose(0, 1)
        out, _ = F.multi_head_attention_forward(
            x, x, x, 32, 4, self.qkv.weight, self.qkv.bias, None, None, False, 0.0,
            self.out.weight, self.out.bias, need_weights=False, is_causal=True,
            attn_mask=CAUSAL,
        )  # fmt: skip
        return out.transpose(0, 1)


MODELS: dict[str, Any] = {
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)), tokens, {}),
    "mistral": (
        lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
        tokens,
        {},
    ),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), tokens, {}),
    "mha": (Alone, lambda: states().transpose(0, 1), {"is_causal": False}),
    "mha batch first": (lambda: Alone(batch_first=True), states, {"is_causal": False}),
    "mha no bias": (lambda: Alone(batch_first=True, bias=False), states, {"is_causal": False}),
    "mha separate": (lambda: Alone(True, batch_first=True), states, {"is_causal": False}),
    "mha one row": (Alone, lambda: states()[0], {"is_causal": False}),
    "encoder": (lambda: Encoder(False, batch_first=True), states, {"is_causal": False}),
    "encoder causal": (lambda: Encoder(True, batch_first=True, norm_first=True), states, {}),
    "by hand": (lambda: nn.Sequential(ByHand()), states, {"kv_heads": 4, "head_dim": 8}),
    "by mhaf": (lambda: nn.Sequential(ByHand("mhaf")), states, {"kv_heads": 4, "head_dim": 8}),
}


def made(name: str) -> tuple[Any, Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    build, inputs, how = MODELS[name]
    return build(), inputs(), how


def logits(model: Any, x: Tensor) -> Tensor:
    out = model(x)
    return getattr(out, "logits", out)


def mark_last(model: nn.Module, **how: Any) -> Any:
    """Mark the last attention module."""
    if "kv_heads" in how:
        done = mark_model(model, lambda name, _: bool(name), **how)
    else:
        count = len(mark_model(copy.deepcopy(model), every=1, **how).marked)
        done = mark_model(model, every=count, **how)
    (module,) = done.marked.values()
    return module


def randomize(module: Any) -> None:
    for layer in (module.simplex_k2_norm or module.simplex_k2, module.simplex_v2):
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)


def step(run: Any, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out = logits(run, x)
    out.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **grads}


def passed(gm: Any, example_inputs: Any) -> Any:
    """Compile with the pass alone."""
    serve_marks(gm)
    return gm.forward


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_mark_is_the_plain_model_and_can_be_taken_back(name):
    model, x, how = made(name)
    model.eval()
    with torch.no_grad():  # where PyTorch takes its fast path
        rounded, exact = logits(model, x), logits(copy.deepcopy(model).double(), _double(x))
        module = mark_last(model, **how)
        assert_within_budget("logits", logits(model, x), exact, rounded)
        randomize(module)
        assert (logits(model, x) - rounded).abs().max() > 1e-3
        unmark(module)
        assert torch.equal(logits(model, x), rounded)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("name", [name for name in MODELS if name != "by mhaf"])
def test_compiled_is_as_eager_in_training_and_inference(name):
    torch._dynamo.reset()
    model, x, how = made(name)
    randomize(mark_last(model, window=(6, 3), **how))
    expected = step(model.train(), model, x)
    run = torch.compile(model, backend=passed, fullgraph=True)
    assert_same(step(run, model, x), expected)
    assert all(n in expected for n, p in model.named_parameters() if "simplex" in n)
    with torch.no_grad():
        torch.testing.assert_close(logits(run, x), expected["out"])
        if name.startswith(("encoder", "mha batch")):  # they have a fast path in inference
            torch.testing.assert_close(logits(run.eval(), x), expected["out"])
    assert [r.w1 for r in lowering.last_report().rewritten] == [6]


def test_multi_head_attention_forward_is_refused_when_compiled():
    torch._dynamo.reset()
    model, x, how = made("by mhaf")
    mark_last(model, **how)
    with pytest.raises(Exception, match=r"it attends by multi_head_attention_forward"):
        torch.compile(model, backend=passed)(x)


@pytest.mark.parametrize("name", ["gpt2", "mha no bias", "mha separate", "mha batch first"])
def test_copies_start_from_the_modules_own_keys_and_values(name):
    model, _, how = made(name)
    module = mark_last(model, init="copy", **how)
    if name == "gpt2":
        _, k, v = module.c_attn.weight.T.chunk(3)
        _, k_bias, v_bias = module.c_attn.bias.chunk(3)
    else:
        separate = (None, module.k_proj_weight, module.v_proj_weight)
        _, k, v = separate if name == "mha separate" else module.in_proj_weight.chunk(3)
        bias = module.in_proj_bias
        _, k_bias, v_bias = (None,) * 3 if bias is None else bias.chunk(3)
    for layer, weight, bias in ((module.simplex_k2, k, k_bias), (module.simplex_v2, v, v_bias)):
        assert torch.equal(layer.weight, weight)
        assert layer.bias is bias or torch.equal(layer.bias, bias)


def test_a_norm_of_keys_gives_k2_a_norm_that_starts_at_zero():
    model, x, _ = made("qwen3")
    module = mark_last(model)
    assert module.simplex_k2_norm.weight.eq(0).all()
    assert module.simplex_k2.weight.ne(0).any()
    grads = step(model, model, x)
    assert grads["model.layers.1.self_attn.simplex_k2_norm.weight"].abs().max() > 0
    assert module.simplex_k2_norm.weight in set(simplicial_parameters(model))
    nn.init.ones_(module.simplex_k2_norm.weight)
    k2, _ = module.simplex_second_pair(torch.randn(2, 5, 32))
    torch.testing.assert_close(k2.square().mean(-1), torch.ones(2, 2, 5), rtol=1e-3, atol=0)


def test_the_fast_path_is_off_while_a_mark_stands_and_a_copy_keeps_it_so():
    model, x, how = made("encoder")
    model.eval()
    module = mark_last(model, **how)
    randomize(module)
    with torch.no_grad():
        expected = logits(model, x)
        assert torch.equal(logits(copy.deepcopy(model), x), expected)
    torch.testing.assert_close(logits(model, x).detach(), expected)  # gradients on: never fast
    unmark(module)
    assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, r"need_weights=True.*pass need_weights=False"),
        (
            {"need_weights": False, "attn_mask": torch.randn(12, 12)},
            r"adds numbers other than 0 and the smallest",
        ),
        ({"need_weights": False}, r"is_causal=False and the module was marked with is_causal=True"),
    ],
)
def test_what_multi_head_attention_cannot_serve_is_refused(given, text):
    module, x = mark(nn.MultiheadAttention(32, 4, batch_first=True)), states()
    with pytest.raises(UnservedMarkError, match=text):
        module(x, x, x, **given)
    (row,) = explain(module, x, x, x, **given).rows
    assert row.served is False
    module(x, x, x, need_weights=False, attn_mask=CAUSAL, is_causal=True)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.MultiheadAttention(32, 4, add_bias_kv=True), r"as MultiHead, it adds keys"),
        (nn.MultiheadAttention(32, 4, add_zero_attn=True), r"as MultiHead, it adds keys"),
        (nn.MultiheadAttention(32, 4, kdim=16), r"as MultiHead, it is a cross attention"),
        (type("Own", (nn.MultiheadAttention,), {"forward": lambda self, x: x})(32, 4), r"its own"),
    ],
)
def test_multi_head_attention_of_another_kind_is_refused(module, text):
    with pytest.raises(TypeError, match=text.replace("its own", "its class has a forward")):
        mark(module)


@pytest.mark.parametrize(
    "given",
    [
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL.isinf()},
        {"attn_mask": CAUSAL.isinf().expand(8, -1, -1)},
        {"key_padding_mask": torch.arange(12).expand(2, -1) >= 9},
        {"key_padding_mask": torch.arange(12).expand(2, -1) >= 9, "attn_mask": CAUSAL},
        {
            "key_padding_mask": torch.arange(12).expand(2, -1) >= 9,
            "attn_mask": CAUSAL.isinf(),
            "is_causal": True,
        },
    ],
)
def test_masks_of_multi_head_attention_mean_what_they_do_without_a_mark(given):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, x = nn.MultiheadAttention(32, 4, batch_first=True), states()
    given = {"need_weights": False, **given}
    expected, _ = module(x, x, x, **given)
    mark(module, is_causal=False)
    got, _ = module(x, x, x, **given)
    torch.testing.assert_close(got, expected)
    randomize(module)
    run = torch.compile(module, backend=passed, fullgraph=True)
    torch.testing.assert_close(run(x, x, x, **given)[0], module(x, x, x, **given)[0])


def test_cross_attention_is_refused():
    module, x = mark(nn.MultiheadAttention(32, 4, batch_first=True)), states()
    with pytest.raises(UnservedMarkError, match=r"not the same tensor.*unmark\(\)"):
        module(x, x + 1, x + 1, need_weights=False)
    attn: Any = GPT2LMHeadModel(GPT2Config(**GPT2)).transformer.h[0].attn
    mark(attn)
    with pytest.raises(UnservedMarkError, match=r"given encoder_hidden_states"):
        attn(x, encoder_hidden_states=x)


def test_sizes_are_given_for_a_module_of_no_known_family_alone():
    with pytest.raises(TypeError, match=r"does not know.*ByHand.*kv_heads= and head_dim="):
        mark(ByHand())
    with pytest.raises(ValueError, match=r"given together.*kv_heads=4 and head_dim=None"):
        mark(ByHand(), kv_heads=4)
    with pytest.raises(ValueError, match=r"head_dim must be an int of at least 1.*got 0"):
        mark(ByHand(), kv_heads=4, head_dim=0)
    with pytest.raises(ValueError, match=r"kv_heads of a MultiheadAttention is 4, got 2: leave"):
        mark(nn.MultiheadAttention(32, 4), kv_heads=2, head_dim=8)
    for heads, size, text in ((2, 8, "with kv_heads=4"), (4, 4, "head_dim=8")):
        module = mark(ByHand(), kv_heads=heads, head_dim=size)
        with pytest.raises(UnservedMarkError, match=text):
            module(states())


@dataclass(frozen=True)
class OfTests:
    """A family of the user's own: ByHand, told by its class."""

    def read(self, module: nn.Module) -> Projections | str:
        if not isinstance(module, ByHand):
            return "it is not ByHand"
        weight = module.qkv.weight
        return Projections(weight, "qkv", 32, 4, 8, 8, False, weight.device, weight.dtype)

    def bind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bound:
        return Bound({"x": args[0]}, "x")

    def run(self, module: nn.Module, forward: Any, arguments: dict[str, Any]) -> Any:
        return forward(**arguments)


def test_a_registered_family_serves_its_modules(monkeypatch):
    monkeypatch.setattr(known, "_FAMILIES", list(known._FAMILIES))
    with pytest.raises(TypeError, match=r"must have read, bind and run, and .* has no run"):
        register_family(type("Half", (), {"read": len, "bind": len})())  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        register_family(OfTests())
    assert known._FAMILIES.count(OfTests()) == 1
    assert Llama() in known._FAMILIES
    model = nn.Sequential(ByHand(), nn.Linear(32, 32), ByHand())
    assert list(mark_model(model, every=2, window=(6, 3)).marked) == ["2"]
    assert list(marked_modules(model)) == ["2"]
    assert model(states()).isfinite().all()
