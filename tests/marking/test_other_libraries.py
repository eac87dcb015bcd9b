"""Marks beside torchao, accelerate and peft themselves, where they are installed.

What of them marks must meet is tested without them too, by stand-ins (test_marking_refusals.py,
test_marking_passed_by.py); peft's round trips are in test_travel.py.
"""

import copy
from typing import Any

import pytest
import torch
from tiny_llama import attention, llama, mark_layers, tokens

from simplex_ops import from_pretrained, mark, mark_like, unmark

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

DEVICES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def marked() -> Any:
    return mark_layers(llama(), 1, window=(6, 3)).eval()


def logits(model: Any) -> torch.Tensor:
    return model(tokens()).logits


def quantised(model: Any, how: str = "Int8WeightOnlyConfig") -> Any:
    torchao = pytest.importorskip("torchao")
    torchao.quantization.quantize_(model, getattr(torchao.quantization, how)())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_k2_and_v2_beside_torchaos_weights_are_of_the_activations_dtype(how, dtype):
    model = quantised(llama().to(dtype), how)
    module, before = attention(model, 1), logits(model)
    mark(module, window=(6, 3))
    assert module.simplex_k2.weight.dtype == module.simplex_v2.weight.dtype == dtype
    assert type(module.simplex_k2.weight) is torch.nn.Parameter
    logits(model)
    unmark(module)
    assert torch.equal(logits(model), before)
    mark(module, init="copy")
    assert torch.equal(module.simplex_k2.weight, module.k_proj.weight.dequantize())


def test_a_marked_model_that_torchao_quantises_keeps_its_mark_and_its_answer():
    model = marked()
    exact, plain = logits(model), logits(llama())
    model = quantised(model)
    error = (logits(model) - exact).abs().max()
    assert error < 0.2 * (plain - exact).abs().max()
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), logits(model))
    other = llama().eval()
    mark_like(other, model.state_dict())
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(logits(other), logits(model))
    torch._dynamo.reset()
    run = torch.compile(model, backend="simplex", fullgraph=True)
    torch.testing.assert_close(logits(run), logits(model))


def dispatched(model: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(model, DEVICES, main_device="cpu", force_hooks=True)


def offloaded(model: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


@pytest.mark.parametrize("put_on", [dispatched, offloaded])
def test_a_marked_model_under_accelerates_hooks_answers_as_before(put_on):
    model = marked()
    expected = logits(model)
    model = put_on(model)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits(model), expected)


def test_a_dispatched_model_can_be_marked_and_an_offloaded_one_is_refused_by_name():
    model = dispatched(llama().eval())
    mark(attention(model, 1), window=(6, 3))
    model.load_state_dict(marked().state_dict())
    assert torch.equal(logits(model), logits(marked()))
    with pytest.raises(TypeError, match=r"its k_proj is offloaded by accelerate.*before it is dis"):
        mark(attention(offloaded(llama()), 1))


@pytest.mark.parametrize("layer", ["cpu", "disk"])
def test_a_marked_checkpoint_loads_with_a_device_map(layer, tmp_path):
    pytest.importorskip("accelerate")
    marked().save_pretrained(tmp_path)
    where = {**DEVICES, "model.layers.1": layer}
    folder = tmp_path / "offloaded"
    model = from_pretrained(type(marked()), tmp_path, device_map=where, offload_folder=folder)
    assert attention(model, 1).simplex_k2.weight.is_meta == (layer == "disk")
    assert torch.equal(logits(model.eval()), logits(marked()))


def test_hooks_that_break_the_graph_in_a_marked_module_are_refused_by_its_name():
    model = offloaded(marked())
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"model\.layers\.1\.self_attn: no scaled_dot_product_att"):
        logits(torch.compile(model, backend="simplex"))


def test_adapters_on_quantised_projections_train_beside_whole_k2_and_v2():
    peft, model = pytest.importorskip("peft"), quantised(llama())
    mark(attention(model, 1), window=(6, 3))
    expected, names = logits(model.eval()), ["simplex_k2", "simplex_v2"]
    how = peft.LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=names)
    adapted = peft.get_peft_model(model, how).eval()
    assert torch.equal(logits(adapted), expected)
    with torch.enable_grad():
        logits(adapted).square().mean().backward()
    moved = {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert sum("modules_to_save" in name for name in moved) == 2
    assert sum("k_proj.lora_B" in name for name in moved) == 2
