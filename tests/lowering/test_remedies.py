"""What a refusal names is the cause, and what it advises works; no call is passed by."""

import gc
import re

import pytest
import torch
import torch.nn.functional as F
from passed import Passed, passed_alone, refusal_in, refusal_of
from tiny_llama import (
    Attention,
    Residual,
    attention,
    llama,
    mark_layers,
    randomize,
    sdpa,
    softcapped,
    states,
    tokens,
)
from torch import nn
from torch._dynamo.backends.debugging import eager
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import simplex_ops
from simplex_ops import mark, unmark
from simplex_ops.marking.call import UnservedMarkError


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@torch.no_grad()
def test_a_graph_break_in_another_layer_is_no_matter_nor_are_layers_compiled_alone():
    model, norms = mark_layers(llama(), 1, window=(6, 3)), []
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, given, out: norms.append(out.norm().item())
    )
    run = torch.compile(model, backend=Passed(eager))
    expected = model(tokens()).logits
    torch.testing.assert_close(run(tokens()).logits, expected)
    assert norms
    model.model.layers[1].compile(backend=Passed(eager), fullgraph=True)
    torch.testing.assert_close(model(tokens()).logits, expected)


def test_layers_compiled_alone_are_named_as_in_the_model():
    model = mark_layers(llama(attention_dropout=0.1), 1).train()
    model.model.layers[1].compile(backend=Passed(eager))
    message = refusal_in(lambda: model(tokens()))
    assert "model.layers.1.self_attn: its attention dropout is 0.1" in message


@torch.no_grad()
def test_without_the_weights_that_were_asked_for_it_is_served():
    model, x = mark_layers(llama(attn_implementation="eager"), 1), states()
    places = model.model.rotary_emb(x, torch.arange(12)[None])
    message = refusal_of(attention(model, 1), x, position_embeddings=places, attention_mask=None)
    assert "model.layers.1.self_attn: its attention weights are used 2 times" in message
    assert "ask for none (output_attentions=False)" in message
    torch._dynamo.reset()
    got = passed_alone(model)(tokens()).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(got, model(tokens()).logits)


def _checkpointed(q, k, v, **options):
    return checkpoint(lambda *x: sdpa(*x, **options), q, k, v, use_reentrant=False)


def test_attention_checkpointed_inside_its_module_is_refused_and_around_it_served():
    message = refusal_of(mark(Attention(_checkpointed)), states())
    assert "its attention is in a part of the module that is checkpointed" in message
    torch._dynamo.reset()
    module, x = randomize(mark(Attention(), window=(5, 3))), states().requires_grad_()

    def around(x):
        return checkpoint(module, x, use_reentrant=False)

    got = torch.compile(around, backend=Passed(eager), fullgraph=True)(x)
    (gradient,) = torch.autograd.grad(got.square().sum(), x)
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


class Latent(Attention):
    """Attention that attends a second time, from a query that is no function of its input."""

    def __init__(self, attend=None):
        super().__init__(attend)
        self.query = nn.Parameter(torch.randn(1, 4, 12, 8))

    def forward(self, hidden_states, attention_mask=None):
        out = super().forward(hidden_states)
        k = self.k_proj(hidden_states).unflatten(-1, (-1, 8)).transpose(1, 2)
        more = F.scaled_dot_product_attention(
            self.query.expand(len(k), -1, -1, -1), k, k, is_causal=True, enable_gqa=True
        )
        return out + more.transpose(1, 2).flatten(2)


def test_a_second_call_from_another_query_is_not_left_ordinary():
    module = mark(Latent())
    message = refusal_of(module, states())
    assert "calls scaled_dot_product_attention again" in message
    with pytest.raises(UnservedMarkError, match="2 times in one forward"):
        module(states())


@torch.library.custom_op("simplex_test::flash_attn_fwd", mutates_args=())
def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@_flash.register_fake
def _(q, k, v):
    return torch.empty_like(q)


def _weighed(weights):
    return lambda q, k, v: weights(q @ k.mT) @ v


def _by_hand(scores):
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


ATEN = torch.ops.aten
SECOND = {
    "softmax": _weighed(lambda s: torch.softmax(s, -1)),
    "softmax.int": _weighed(lambda s: ATEN.softmax.int(s, -1)),
    "_softmax": _weighed(lambda s: ATEN._softmax(s, -1, False)),
    "special_softmax": _weighed(lambda s: torch.special.softmax(s, -1)),
    "exp": _weighed(_by_hand),
    "exp of log_softmax": _weighed(lambda s: s.log_softmax(-1).exp()),
    "scaled_dot_product_attention": ATEN.scaled_dot_product_attention,
    "scaled_dot_product_attention.default": ATEN.scaled_dot_product_attention.default,
    "_scaled_dot_product_flash_attention_for_cpu": lambda *given: (
        ATEN._scaled_dot_product_flash_attention_for_cpu(*given)[0]
    ),
    "_scaled_dot_product_attention_math": lambda *given: torch._scaled_dot_product_attention_math(
        *given
    )[0],
    "flash_attn_fwd": _flash,
    "flex_attention": flex_attention,
}


@torch.no_grad()
@pytest.mark.parametrize("name", SECOND)
def test_a_second_attention_of_another_spelling_is_not_left_ordinary(name):
    def attend(q, k, v, **options):
        wide = (t.repeat_interleave(2, 1) for t in (k, v))
        return sdpa(q, k, v, **options) + SECOND[name](q, *wide)

    module, said = mark(Attention(attend)), name.split(".")[0].split(" ")[0]
    with pytest.raises(UnservedMarkError, match=rf"Attention, cannot run: it attends by {said} to"):
        module(states())
    assert re.search(r"its module attends by \w*(soft|exp|att)", refusal_of(module, states()))


def test_an_exponential_of_another_size_than_scores_is_no_second_attention():
    def attend(q, k, v, **options):
        return sdpa(q * torch.exp(q.mean(-1, keepdim=True)), k, v, **options)

    module, x = randomize(mark(Attention(attend), window=(5, 3))), states(8)  # as head_dim
    torch.testing.assert_close(passed_alone(module)(x), module(x))


def test_a_softmax_that_weighs_no_keys_is_no_second_attention():
    class Gated(Attention):
        def forward(self, hidden_states, attention_mask=None):
            out = super().forward(hidden_states, attention_mask)
            return out * torch.softmax(hidden_states @ self.q_proj.weight, -1)

    module, x = randomize(mark(Gated(), window=(5, 3))), states()
    torch.testing.assert_close(passed_alone(module)(x), module(x))


def test_an_exported_program_that_kept_its_marks_is_served_once_exported_as_it_says():
    module, x = randomize(mark(Attention(), window=(5, 3))), states()
    program = torch.export.export(module, (x,), strict=True)
    assert "export the model under simplex_ops.enable()" in refusal_of(program.module(), x)
    with simplex_ops.enable():
        program = torch.export.export(module, (x,), strict=True)
    torch.testing.assert_close(program.module()(x), module(x))


def test_a_mark_whose_module_attends_from_elsewhere_alone_is_refused():
    class Elsewhere(Latent):
        def __init__(self):
            super().__init__(softcapped)

    assert "its attention scores pass through tanh" in refusal_of(mark(Elsewhere()), states())


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_module_compiled_alone_is_named_as_in_its_model(is_frozen):
    model = Residual(mark(Attention(softcapped)))
    if is_frozen:
        gc.freeze()
    assert "blocks.0: its attention scores pass through tanh" in refusal_of(
        model.blocks[0], states()
    )


def test_a_graph_that_the_pass_does_not_understand_is_refused_and_not_raised_from(monkeypatch):
    from lowering.passes import marks

    def fails(*_):
        raise IndexError("tuple index out of range")

    monkeypatch.setattr(marks, "refusal", fails)
    stack = Residual(mark(Attention()))
    message = refusal_of(stack, states())
    assert "blocks.0: the pass does not understand its graph (IndexError: tuple index" in message


def test_past_the_recompile_limit_a_marked_module_runs_2_simplicial_in_eager():
    module = randomize(mark(Attention(), window=(5, 3)))
    run = torch.compile(module, backend=Passed(eager), dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        for seq in (4, 5, 6, 7, 8):
            torch.testing.assert_close(run(states(seq)), module(states(seq)))


def test_dropout_is_served_once_the_mark_drops_it():
    model = mark_layers(llama(attention_dropout=0.1), 1).train()
    message = refusal_of(model, tokens())
    assert "mark it with attention_dropout=0.0" in message
    torch._dynamo.reset()
    unmark(attention(model, 1))
    mark_layers(model, 1, attention_dropout=0.0)
    passed_alone(model)(tokens())


def test_another_causality_is_served_once_marked_so():
    def attend(q, k, v, **_):
        return sdpa(q, k, v, is_causal=False)

    assert "mark it with is_causal=False" in refusal_of(mark(Attention(attend)), states())
    torch._dynamo.reset()
    module, x = randomize(mark(Attention(attend), is_causal=False, window=(5, 3))), states()
    torch.testing.assert_close(passed_alone(module)(x), module(x))
