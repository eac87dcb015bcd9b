"""Attention that runs again in the backward: true gradients, or a refusal in the forward."""

import gc
import threading
from typing import Any

import pytest
import torch
from tiny_llama import (
    Attention,
    Residual,
    assert_same,
    llama,
    mark_layers,
    randomize,
    sdpa,
    states,
    tokens,
    train_step,
)
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lowering.backend import serve_marks
from simplex_ops import UnservedMarkError, mark

KINDS = ["reentrant", "without reentry", "selective"]


@pytest.fixture(autouse=True)
def _no_checkpoint_is_left_open():
    """Collect what a refusal leaves.

    PyTorch ends a checkpoint whose function raised, hooks and modes that it pushed included, when
    its generator is collected: here, and not within another test.
    """
    yield
    gc.collect()


def passed(gm, example_inputs):
    """Compile with the pass, then aot_eager."""
    serve_marks(gm)
    return aot_eager(gm, example_inputs)


def save_nothing(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(kind: str, run, *args):
    if kind == "selective":
        return checkpoint(
            run,
            *args,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(save_nothing),
        )
    return checkpoint(run, *args, use_reentrant=kind == "reentrant")


def attend_in(kind: str):
    """Checkpoint the attention alone, inside a module's forward."""

    def attend(q, k, v, **options):
        return checkpointed(kind, lambda *qkv: sdpa(*qkv, **options), q, k, v)

    return attend


def copy_of(module: Any, attend) -> Any:
    other = mark(Attention(attend), window=(6, 3))
    other.load_state_dict(module.state_dict())
    return other


def gradients(module: Any, run=None) -> dict[str, Tensor]:
    x = states().requires_grad_()
    module.zero_grad()
    (run or module)(x).square().sum().backward()
    found = {name: p.grad for name, p in module.named_parameters()}
    return {"x": x.grad, **found}  # pyright: ignore[reportReturnType]


def marked() -> Any:
    torch.manual_seed(0)
    return randomize(mark(Attention(), window=(6, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_that_the_forward_checkpoints_is_refused_in_the_forward(kind):
    model = Residual(copy_of(marked(), attend_in(kind)))
    with pytest.raises(
        UnservedMarkError, match=r"blocks\.0 \(Attention\).*around the whole module"
    ):
        model(states().requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_attention_that_the_forward_checkpoints_is_served_where_nothing_is_recomputed(kind):
    module = marked()
    with torch.no_grad():
        expected = module(states())
        assert torch.equal(copy_of(module, attend_in(kind))(states()), expected)
    with torch.inference_mode():
        assert torch.equal(copy_of(module, attend_in(kind))(states()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_remedy_a_checkpoint_around_the_module_gives_true_gradients(kind):
    module = marked()
    got = gradients(module, lambda x: checkpointed(kind, module, x))
    assert_same(got, gradients(module), rtol=0, atol=0)


@pytest.mark.parametrize("inner", KINDS)
@pytest.mark.parametrize("outer", KINDS)
def test_checkpoints_within_checkpoints_never_give_false_gradients(outer, inner):
    module = copy_of(marked(), attend_in(inner))
    with pytest.raises(UnservedMarkError, match=r"around the whole module"):
        gradients(module, lambda x: checkpointed(outer, module, x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_a_whole_model_change_no_gradient(reentrant):
    model = mark_layers(llama(), 0, 1, window=(8, 4)).train()
    expected = train_step(model, model, tokens())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = train_step(model, model, tokens())
    assert_same(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["reentrant", "without reentry"])
def test_compiled_attention_that_the_forward_checkpoints_is_refused(kind):
    torch._dynamo.reset()
    module = copy_of(marked(), attend_in(kind))
    with pytest.raises((BackendCompilerFailed, UnservedMarkError), match=r"mark"):
        torch.compile(module, backend=passed)(states().requires_grad_())


class Recomputed(torch.autograd.Function):
    """Attention that keeps its inputs alone, and runs again in the backward."""

    @staticmethod
    def forward(ctx, q, k, v):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(q, k, v)
        return sdpa(q, k, v, is_causal=True)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            return torch.autograd.grad(sdpa(*inputs, is_causal=True), inputs, grad)


def test_an_autograd_function_that_attends_is_refused():
    module = copy_of(marked(), lambda q, k, v, **_: Recomputed.apply(q, k, v))
    with pytest.raises(UnservedMarkError, match=r"turns gradients off around"):
        module(states().requires_grad_())


def test_hooks_on_saved_tensors_around_the_module_are_served():
    module = marked()
    with torch.autograd.graph.save_on_cpu():
        got = gradients(module)
    assert_same(got, gradients(module), rtol=0, atol=0)


def test_attention_in_another_thread_is_refused():
    def attend(*qkv, **options):
        out: list[Tensor] = []
        thread = threading.Thread(target=lambda: out.append(sdpa(*qkv, **options)))
        thread.start()
        thread.join()
        return out[0]

    with pytest.raises(UnservedMarkError, match=r"0 times in one forward"):
        copy_of(marked(), attend)(states())


def test_attention_that_waits_until_the_forward_is_over_is_refused():
    class Lazy(Attention):
        def forward(self, hidden_states) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return (super(Lazy, self).forward(x) for x in (hidden_states,))

    with pytest.raises(UnservedMarkError, match=r"0 times in one forward"):
        next(mark(Lazy())(states()))


def test_attention_compiled_alone_is_served_or_refused():
    torch._dynamo.reset()
    module = marked()
    other = copy_of(module, torch.compile(sdpa, backend="aot_eager"))
    for _ in range(2):
        try:
            got = gradients(other)
        except UnservedMarkError:
            continue
        assert_same(got, gradients(module))
        randomize(other)
        module.load_state_dict(other.state_dict())
