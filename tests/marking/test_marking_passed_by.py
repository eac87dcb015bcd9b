"""Nothing passes a mark by: what is put on a module before or after is served, or raises."""

import copy
import functools
from types import MethodType
from typing import Any

import pytest
import torch
from tiny_llama import (
    Attention,
    Residual,
    assert_same,
    attention,
    llama,
    mark_layers,
    randomize,
    states,
    tokens,
    train_step,
)
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaAttention

from lowering.backend import serve_marks
from simplex_ops import UnservedMarkError, mark, marked_modules, unmark
from simplex_ops.marking.marked import is_marked


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def passed(gm, example_inputs):
    """Compile with the pass alone."""
    serve_marks(gm)
    return gm.forward


def run_of(model, how):
    return torch.compile(model, backend=passed, fullgraph=True) if how == "compiled" else model


def hook(module: Any, before=lambda *args, **kwargs: (args, kwargs)) -> None:
    """Put a hook on a module as accelerate does for device_map and dispatch_model."""
    old_forward = module._old_forward if hasattr(module, "_hf_hook") else module.forward
    module._old_forward, module._hf_hook = old_forward, before

    def new_forward(module, *args, **kwargs):
        args, kwargs = module._hf_hook(*args, **kwargs)
        return module._old_forward(*args, **kwargs)

    forward = functools.partial(new_forward, module)
    module.forward = functools.update_wrapper(forward, old_forward)


def unhook(module: Any) -> None:
    module.forward = module._old_forward
    del module._old_forward, module._hf_hook


def hook_all(model: nn.Module) -> None:
    for module in list(model.modules()):
        hook(module)


def hook_and_unhook(model: nn.Module) -> None:
    for module in list(model.modules()):
        hook(module)
        unhook(module)


def bind_to_itself(model: nn.Module) -> None:
    for module in model.modules():
        module.forward = module.forward  # type: ignore[method-assign]


def wrap_in_a_closure(model: nn.Module) -> None:
    for module in model.modules():
        inner = module.forward
        module.forward = lambda *args, inner=inner, **kwargs: inner(*args, **kwargs)


def write_into_its_dict(model: nn.Module) -> None:
    for module in model.modules():
        vars(module)["forward"] = MethodType(type(module).forward, module)


def add_pre_hooks(model: nn.Module) -> None:
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: None)
        module.register_forward_hook(lambda module, args, out: None)


BEFORE = [hook_all, hook_and_unhook, bind_to_itself, write_into_its_dict, add_pre_hooks]
AFTER = [*BEFORE, wrap_in_a_closure]


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("put_on", BEFORE)
def test_what_was_put_on_before_marking_is_served(put_on, how):
    expected = train_step(model := mark_layers(llama(), 1, window=(6, 3)), model, tokens())
    other = llama()
    put_on(other)
    mark_layers(other, 1, window=(6, 3))
    other.load_state_dict(model.state_dict())
    assert_same(train_step(run_of(other, how), other, tokens()), expected)


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("put_on", AFTER)
def test_what_is_put_on_after_marking_is_served(put_on, how):
    model = mark_layers(llama(), 1, window=(6, 3))
    expected = train_step(model, model, tokens())
    put_on(model)
    assert_same(train_step(run_of(model, how), model, tokens()), expected)


def test_hooks_run_around_the_marked_forward():
    module, x = mark(Attention()), states()
    randomize(module)
    expected = module(2 * x)
    for marked_first in (True, False):
        other: Any = Attention()
        for step in (mark, hook) if marked_first else (hook, mark):
            step(other)
        other.load_state_dict(module.state_dict())
        other._hf_hook = lambda x: ((2 * x,), {})
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_hooks_and_checkpoints_around_a_marked_layer_go_together(how):
    model = mark_layers(llama(), 0, 1, window=(6, 3)).train()
    expected = train_step(model, model, tokens())
    hook_all(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(train_step(run_of(model, how), model, tokens()), expected)


def test_a_copy_of_a_hooked_module_is_served_by_its_own_weights():
    model = mark_layers(llama(), 1, window=(6, 3))
    hook_all(model)
    other = copy.deepcopy(model)
    randomize(attention(other, 1))
    expected = llama()
    mark(attention(expected, 1), window=(6, 3))
    expected.load_state_dict(other.state_dict())
    assert torch.equal(other(tokens()).logits, expected(tokens()).logits)


def another_forward(module: Any) -> None:
    module.forward = lambda hidden_states, **_: hidden_states


def the_class_of_before(module: Any) -> None:
    module.forward = MethodType(Attention.forward, module)


def the_class_of_before_in_its_dict(module: Any) -> None:
    vars(module)["forward"] = MethodType(Attention.forward, module)


def hooks_around_the_class_of_before(module: Any) -> None:
    the_class_of_before(module)
    hook(module)


PAST_THE_MARK = [
    another_forward,
    the_class_of_before,
    the_class_of_before_in_its_dict,
    hooks_around_the_class_of_before,
]


@pytest.mark.parametrize("compiled_before", [False, True])
@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("put_on", PAST_THE_MARK)
def test_a_forward_that_passes_the_mark_by_is_refused(put_on, how, compiled_before):
    model = Residual(randomize(mark(Attention(), window=(6, 3))))
    expected = model(states())
    run = torch.compile(model, backend=passed) if how == "compiled" else model
    if compiled_before:
        run(states())
    put_on(model.blocks[0])
    name = r"Attention" if how == "compiled" else r"blocks\.0 \(Attention\)"  # frames are gone
    with pytest.raises(UnservedMarkError, match=rf"{name}, has a forward on the instance"):
        run(states())
    del model.blocks[0].forward
    assert torch.equal(run(states()), expected)


def test_a_forward_that_goes_past_the_mark_now_and_then_is_refused_then():
    module = randomize(mark(Attention(), window=(6, 3)))
    own, x = module.forward, states()
    served = module(x)
    module.forward = lambda x, past=False: Attention.forward(module, x) if past else own(x)
    assert torch.equal(module(x), served)
    with pytest.raises(UnservedMarkError, match=r"passes the mark by"):
        module(x, past=True)
    assert torch.equal(module(x), served)


@pytest.mark.parametrize("put_on", [wrap_in_a_closure, another_forward])
def test_marking_under_another_forward_is_refused_and_goes_with_its_remedy(put_on):
    module, x = Attention(), states()
    put_on(module)
    with pytest.raises(TypeError, match=r"Attention has a forward on the instance.*del module\."):
        mark(module, window=(6, 3))
    assert not is_marked(module)
    assert not any("simplex" in name for name in module.state_dict())
    del module.forward
    randomize(mark(module, window=(6, 3)))
    expected = module(x)
    wrap_in_a_closure(module)
    assert torch.equal(module(x), expected)


def test_a_change_of_class_that_drops_the_mark_is_refused():
    model = mark_layers(llama(), 1)
    module = attention(model, 1)
    with pytest.raises(UnservedMarkError, match=r"LlamaAttention of layer 1 is marked, and as a"):
        module.__class__ = LlamaAttention
    assert list(marked_modules(model)) == ["model.layers.1.self_attn"]
    unmark(module).__class__ = type("Other", (LlamaAttention,), {})
    assert is_marked(mark(module))


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_class_derived_from_the_marked_one_is_served(how):
    model = mark_layers(llama(), 1, window=(6, 3))
    expected = train_step(model, model, tokens())
    module = attention(model, 1)
    marked_class = type(module)
    module.__class__ = type("Wrapped", (marked_class,), {})
    assert_same(train_step(run_of(model, how), model, tokens()), expected)
    with pytest.raises(ValueError, match=r"became a Wrapped after it was marked"):
        unmark(module)
    module.__class__ = marked_class
    unmark(module)
    assert type(module) is LlamaAttention


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("where", ["a derived class", "the marked class"])
def test_a_class_whose_forward_passes_the_mark_by_is_refused(where, how, monkeypatch):
    module, x = randomize(mark(Attention(), window=(6, 3))), states()
    marked, expected = type(module), module(x)

    def past(self, hidden_states, attention_mask=None):
        return Attention.forward(self, hidden_states, attention_mask)

    def through(self, hidden_states, attention_mask=None):
        return marked.forward(self, hidden_states, attention_mask)

    if where == "a derived class":
        module.__class__ = type("Other", (marked,), {"forward": past})
    else:
        monkeypatch.setattr(marked, "forward", past, raising=False)
    run = torch.compile(module, backend=passed) if how == "compiled" else module
    with pytest.raises(UnservedMarkError, match=r"has a forward of its own, as a .* super\(\)"):
        run(x)
    if where == "a derived class":
        module.__class__ = type("Other", (marked,), {"forward": through})
        assert torch.equal(run(x), expected)


def past_its_call(self, hidden_states, attention_mask=None):
    return Attention.forward(self, hidden_states, attention_mask)


def through_its_call(self, *args, **kwargs):
    return nn.Module.__call__(self, *args, **kwargs)


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("where", ["a derived class", "the class of before"])
def test_a_class_whose_call_passes_the_mark_by_is_refused(where, how):
    def marked(call):
        own = type("Other", (Attention,), {"__call__": call})
        module = mark(own() if where == "the class of before" else Attention(), window=(6, 3))
        if where == "a derived class":
            module.__class__ = type("Other", (type(module),), {"__call__": call})
        return randomize(module)

    passing, through, x = marked(past_its_call), marked(through_its_call), states()
    run = torch.compile(passing, backend=passed) if how == "compiled" else passing
    with pytest.raises(UnservedMarkError, match=r"has a __call__ of its own.*super\(\).__call__"):
        run(x)
    served = mark(Attention(), window=(6, 3))
    served.load_state_dict(through.state_dict())
    assert torch.equal(run_of(through, how)(x), served(x))
    with pytest.raises(UnservedMarkError, match=r"has a __call__ of its own"):
        copy.deepcopy(passing)(x)
    if where == "the class of before":
        run = run_of(through, how)
        run(x)
        unmark(through)  # which a compiled module notices
        assert torch.equal(run(x), through(x))
        assert not torch.equal(run(x), served(x))


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_class_whose_call_is_a_checkpoint_is_served(how):
    class Checkpointed(Attention):
        def __call__(self, *args, **kwargs):
            return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)

    module, served = (randomize(mark(c(), window=(6, 3))) for c in (Checkpointed, Attention))
    served.load_state_dict(module.state_dict())
    assert torch.equal(run_of(module, how)(states()), served(states()))


def test_an_ensemble_by_vmap_is_served():
    models = [randomize(mark(Attention(), window=(6, 3))) for _ in range(2)]
    weights, buffers = torch.func.stack_module_state(models)
    base, x = copy.deepcopy(models[0]).to("meta"), states()
    out = torch.func.vmap(lambda *held: torch.func.functional_call(base, held, (x,)))(
        weights, buffers
    )
    torch.testing.assert_close(out, torch.stack([model(x) for model in models]))


@pytest.mark.parametrize("other", [{"window": (5, 3)}, {"window": (6, 3), "form": "strassen"}])
def test_an_ensemble_by_vmap_of_models_that_are_not_marked_alike_is_refused(other):
    models = [mark(Attention(), **how) for how in ({"window": (6, 3)}, other)]
    held, x = torch.func.stack_module_state(models), states()

    def run(base, dim):
        call = torch.func.vmap(lambda *held: torch.func.functional_call(base, held, (x,)), dim)
        return call(*({n: t.movedim(0, dim) for n, t in part.items()} for part in held))

    for base, number in ((models[0], 1), (models[1], 0), (copy.deepcopy(models[0]).to("meta"), 1)):
        for dim in (0, -1):
            with pytest.raises(ValueError, match=rf"model {number} of those that vmap stacks is"):
                run(base, dim)


def test_parametrized_projections_are_served():
    model = mark_layers(llama(), 1, window=(6, 3))
    expected = model(tokens()).logits

    class Same(nn.Module):
        def forward(self, weight):
            return weight * 1

    for name in ("k_proj", "simplex_k2"):
        parametrize.register_parametrization(getattr(attention(model, 1), name), "weight", Same())
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize("marked_first", [False, True])
def test_a_module_with_compile_of_its_own_is_served_or_raises(marked_first):
    expected = train_step(model := mark_layers(llama(), 1, window=(6, 3)), model, tokens())
    other = llama()
    if not marked_first:
        attention(other, 1).compile(backend=passed)
        other(tokens())
    mark_layers(other, 1, window=(6, 3))
    other.load_state_dict(model.state_dict())
    if marked_first:
        attention(other, 1).compile(backend=passed)
    assert_same(train_step(other, other, tokens()), expected)
    torch._dynamo.reset()
    plain = mark_layers(llama(), 1)
    attention(plain, 1).compile(backend="aot_eager")
    with pytest.raises(UnservedMarkError, match=r"compiled without the pass"):
        plain(tokens())


def test_a_patched_class_is_served_with_the_arguments_it_takes(monkeypatch):
    mark(Attention())  # so that the class was read before it is patched
    plain = Attention.forward

    def patched(self, hidden_states, scale=1.0, attention_mask=None):
        return plain(self, hidden_states * scale, attention_mask)

    monkeypatch.setattr(Attention, "forward", patched)
    module = randomize(mark(Attention(), window=(6, 3)))
    x = states()
    out = module(x, 0.5)
    assert torch.equal(out, module(x, scale=0.5))
    assert not torch.equal(out, module(x))


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        (("x", None, None), {}, r"takes 2 positional arguments \(hidden_states, attention_mask\)"),
        (("x",), {"hidden_states": "x"}, r"an argument by position and by name"),
        ((), {"attention_mask": None}, r"was not given hidden_states"),
    ],
)
def test_arguments_that_do_not_fit_are_a_type_error(args, kwargs, text):
    with pytest.raises(TypeError, match=text):
        mark(Attention())(*args, **kwargs)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_module_that_sets_attributes_in_its_forward_is_served(how):
    def attend(self, hidden_states, attention_mask=None):
        self.last_length = hidden_states.shape[1]
        return Attention.forward(self, hidden_states, attention_mask)

    module: Any = mark(type("Noting", (Attention,), {"forward": attend})(), window=(6, 3))
    run = torch.compile(module, backend=passed, fullgraph=True) if how == "compiled" else module
    run(states())
    assert module.last_length == 12


def test_traced_modules_are_refused():
    class Traced(fx.GraphModule):
        pass

    with pytest.raises(TypeError, match=r"before it is traced or scripted"):
        mark(Traced(nn.Module(), fx.Graph()))


def test_unmark_under_a_forward_that_may_hold_the_marked_one_is_refused():
    module: Any = mark(Attention())
    x = states()
    wrap_in_a_closure(module)
    with pytest.raises(ValueError, match=r"may call the marked one: take it away first"):
        unmark(module)
    assert is_marked(module)
    del module.forward
    assert torch.equal(unmark(module)(x), Attention.forward(module, x))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("marked_first", [False, True])
def test_unmark_under_hooks_gives_the_model_back(marked_first):
    model = llama()
    expected = model(tokens()).logits
    if not marked_first:
        hook_all(model)
    mark_layers(model, 1, window=(2, 2))
    if marked_first:
        hook_all(model)
    assert not torch.equal(model(tokens()).logits, expected)
    unmark(attention(model, 1))
    assert torch.equal(model(tokens()).logits, expected)
    for module in list(model.modules()):
        unhook(module)
    assert torch.equal(model(tokens()).logits, expected)
