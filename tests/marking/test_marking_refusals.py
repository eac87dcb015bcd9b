"""What is refused, and why: the cause is true, nothing is left behind, the remedy works."""

import dataclasses
import gc
from typing import Any

import numpy as np
import pytest
import torch
from one_rank import one_rank
from tiny_llama import (
    Attention,
    attention,
    llama,
    mark_layers,
    randomize,
    states,
    tokens,
    train_step,
)
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from simplex_ops import UnservedMarkError, mark, unmark
from simplex_ops.marking.mark import is_marked


class Quantised(nn.Module):
    """A projection whose weight is packed; it still computes what it did."""

    unpacked: torch.Tensor

    def __init__(self, linear: Any, weight: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("unpacked", linear.weight.detach().clone())
        self.bias = None
        if weight is not None:
            self.weight = weight if callable(weight) else nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.unpacked)


QUANTISED = {
    "four bits in bytes": torch.zeros(256, 1, dtype=torch.uint8),
    "float8": torch.zeros(16, 32).to(torch.float8_e4m3fn),
    "no weight": None,
    "a method": lambda: torch.zeros(16, 32),
}


def unchanged(module: nn.Module, state: dict[str, Any]) -> None:
    assert not is_marked(module)
    assert list(module.state_dict()) == list(state)
    assert not any("simplex" in name for name in vars(module))
    assert not any("simplex" in name for name, _ in module.named_modules())


@pytest.mark.parametrize("weight", QUANTISED.values(), ids=QUANTISED.keys())
def test_a_quantised_projection_is_refused_by_name_and_goes_with_its_remedies(weight):
    module: Any = Attention()
    linear = module.k_proj
    module.k_proj = Quantised(linear, weight)
    state = module.state_dict()
    text = (
        r"k_proj of Attention is quantised and .*: give mark\(\) the dtype=.*before it is quantised"
    )
    with pytest.raises(TypeError, match=text):
        mark(module)
    unchanged(module, state)
    mark(module, window=(6, 3), dtype=torch.float32)
    randomize(module)
    expected = module(states())

    k2 = module.simplex_k2.state_dict(), module.simplex_v2.state_dict()
    unmark(module)
    module.k_proj = linear
    mark(module, window=(6, 3))
    for name, given in zip(("simplex_k2", "simplex_v2"), k2, strict=True):
        getattr(module, name).load_state_dict(given)
    assert torch.equal(module(states()), expected)
    module.k_proj = Quantised(linear, weight)
    assert torch.equal(module(states()), expected)


@pytest.mark.parametrize("says", ["compute_dtype", "config"])
def test_a_quantised_projection_gets_k2_in_the_dtype_it_computes_in(says):
    module: Any = Attention()
    module.k_proj = Quantised(module.k_proj, QUANTISED["four bits in bytes"])
    if says == "config":
        module.config = type("Config", (), {"dtype": torch.bfloat16})()
    else:
        module.k_proj.compute_dtype = torch.bfloat16
    mark(module)
    assert module.simplex_k2.weight.dtype == module.simplex_v2.weight.dtype == torch.bfloat16
    unmark(module)
    with pytest.raises(TypeError, match=r"its k_proj, a Quantised, has no matrix of floats"):
        mark(module, init="copy")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_dynamically_quantised_model_is_refused_until_it_is_given_a_dtype():
    model = torch.ao.quantization.quantize_dynamic(llama(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(TypeError, match=r"k_proj of LlamaAttention of layer 0 is quantised"):
        mark(attention(model, 0))
    expected = model(tokens()).logits
    mark(attention(model, 0), dtype=torch.float32)
    torch.testing.assert_close(model(tokens()).logits, expected)


def test_wrapped_projections_are_served():
    peft = pytest.importorskip("peft")
    module: Any = Attention()
    plain = module.k_proj
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["k_proj"]), module)
    assert module.k_proj is not plain
    mark(module, init="copy")
    assert torch.equal(module.simplex_k2.weight, plain.weight)
    assert module.simplex_k2.in_features == 32


def test_a_projection_without_a_width_is_refused():
    module: Any = Attention()
    module.k_proj = nn.Identity()
    with pytest.raises(TypeError, match=r"its k_proj is no linear layer: it has no in_features"):
        mark(module)
    assert not is_marked(module)


def test_an_offloaded_projection_is_refused_and_a_model_not_yet_in_memory_served():
    with torch.device("meta"):
        module: Any = Attention()
    mark(module)
    assert module.simplex_k2.weight.is_meta
    with torch.device("meta"):
        module = Attention()
    module.k_proj._hf_hook = object()
    with pytest.raises(TypeError, match=r"its k_proj is offloaded by accelerate"):
        mark(module)


def test_a_name_that_is_taken_leaves_the_module_as_it_was():
    module: Any = Attention()
    module.simplex_v2 = 1
    state = module.state_dict()
    with pytest.raises(TypeError, match=r"has a simplex_v2 already"):
        mark(module)
    assert not is_marked(module)
    assert list(module.state_dict()) == list(state)


@pytest.fixture
def ranks(tmp_path):
    with one_rank(tmp_path) as mesh:
        yield mesh


def marked_alone() -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    model = mark_layers(llama(), 1, window=(6, 3)).train()
    return model, train_step(model, model, tokens())


@pytest.mark.parametrize("is_frozen", [False, True])
def test_marking_after_ddp_is_refused_and_goes_with_its_remedy(ranks, is_frozen):
    model = llama()
    wrapped = DistributedDataParallel(model)
    if is_frozen:
        gc.freeze()
    state = attention(model, 1).state_dict()
    text = r"part of a model in DistributedDataParallel.*mark the model before Distributed"
    with pytest.raises(ValueError, match=text):
        mark(attention(model, 1))
    unchanged(attention(model, 1), state)
    del wrapped

    model, expected = marked_alone()
    got = train_step(DistributedDataParallel(model), model, tokens())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_marking_another_model_than_the_wrapped_one_is_no_matter(ranks):
    wrapped = DistributedDataParallel(llama())
    assert is_marked(mark(attention(llama(), 1)))
    del wrapped


def test_marking_after_fully_shard_is_refused_and_goes_with_its_remedy(ranks):
    model = llama()
    fully_shard(model, mesh=ranks)
    state = attention(model, 1).state_dict()
    text = r"LlamaAttention of layer 1's k_proj is a DTensor.*before fully_shard"
    with pytest.raises(ValueError, match=text):
        mark(attention(model, 1))
    unchanged(attention(model, 1), state)

    model, expected = marked_alone()
    for part in (attention(model, 1), model):
        fully_shard(part, mesh=ranks)
    got = train_step(model, model, tokens())
    for name, value in expected.items():
        found: Any = got[name]
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        torch.testing.assert_close(found, value)


def test_tensor_parallelism_with_k2_in_the_plan_is_served(ranks):
    model, expected = marked_alone()
    names = ("q_proj", "k_proj", "v_proj", "simplex_k2", "simplex_v2")
    plan = {name: ColwiseParallel() for name in names}
    parallelize_module(attention(model, 1), ranks, {**plan, "o_proj": RowwiseParallel()})
    got = model(tokens()).logits
    torch.testing.assert_close(got, expected["logits"])


def narrowed(module: Any, *names: str) -> None:
    """Keep the first half of the heads, as one of two ranks does."""
    for name in names:
        whole = getattr(module, name)
        half = nn.Linear(whole.in_features, whole.out_features // 2, bias=False)
        half.weight.data.copy_(whole.weight[: half.out_features])
        setattr(module, name, half)


def test_a_plan_that_leaves_k2_out_is_refused_and_goes_with_its_remedy():
    model = mark_layers(llama(), 1, window=(6, 3))
    module = attention(model, 1)
    narrowed(module, "q_proj", "k_proj", "v_proj")
    module.o_proj = nn.Linear(16, 32, bias=False)
    text = r"model\.layers\.1\.self_attn.*key has 1 heads and k2 has 2:.*simplex_k2"
    with pytest.raises(UnservedMarkError, match=text):
        model(tokens())
    narrowed(module, "simplex_k2", "simplex_v2")
    assert model(tokens()).logits.isfinite().all()


def test_an_error_names_the_module_as_its_model_does():
    model = mark_layers(llama(attn_implementation="eager"), 1)
    text = r"module, model\.layers\.1\.self_attn \(LlamaAttention of layer 1\), called"
    with pytest.raises(UnservedMarkError, match=text):
        model(tokens())
    with pytest.raises(UnservedMarkError, match=r"a marked module, Attention, called"):
        mark(Attention(lambda q, k, v, **_: q))(states())


@pytest.mark.parametrize(
    "window",
    [
        (np.int64(6), np.int32(3)),
        [6, 3],
        np.array([6, 3]),
        torch.tensor([6, 3]),
        (torch.tensor(6), 3),
    ],
    ids=str,
)
def test_a_window_takes_what_is_integral(window):
    setting: Any = mark(Attention(), window=window).simplex_mark
    assert (setting.w1, setting.w2) == (6, 3)
    assert type(setting.w1) is type(setting.w2) is int


@pytest.mark.parametrize(
    "bad", [True, 2.0, "6", 0, -1, np.int64(0), np.float32(2), torch.tensor(2.0)]
)
def test_a_window_that_is_no_int_of_at_least_one_is_refused(bad):
    module: Any = Attention()
    with pytest.raises(ValueError, match=r"w2 must be (an int of )?at least 1 .*, got"):
        mark(module, window=(4, bad))
    assert not is_marked(module)
    mark(module)
    with pytest.raises(ValueError, match=r"w1 must be (an int of )?at least 1 .*, got"):
        dataclasses.replace(module.simplex_mark, w1=bad)


@pytest.mark.parametrize("bad", [None, 64, (1, 2, 3), (1,), ()])
def test_a_window_that_is_no_pair_is_refused(bad):
    with pytest.raises(ValueError, match=r"window must be a pair \(w1, w2\)"):
        mark(Attention(), window=bad)


def test_a_window_that_is_replaced_is_seen():
    module: Any = randomize(mark(Attention(), window=(6, 3)))
    first = module(states())
    module.simplex_mark = dataclasses.replace(module.simplex_mark, w1=np.int64(2))
    assert not torch.equal(module(states()), first)
    assert type(module.simplex_mark.w1) is int
