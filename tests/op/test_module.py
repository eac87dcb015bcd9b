"""The layer: it starts as ordinary attention, and leaves it as it learns."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from simplex_ops import SimplicialAttention, kv_bounds_from_document_ids

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _rotate_as_llama(t, theta, offset=0):
    """Rotate [B, H, N, D] by position, first half of D with the second."""
    *_, seq, head_dim = t.shape
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.outer(torch.arange(seq) + offset, frequency).repeat(1, 2).to(t)
    half = head_dim // 2
    return t * angle.cos() + torch.cat((-t[..., half:], t[..., :half]), -1) * angle.sin()


def _ordinary_attention(layer, x, w1, *, is_causal=True):
    """Apply F.scaled_dot_product_attention with the layer's weights and its band mask."""
    group = layer.num_heads // layer.num_kv_heads
    q, k, v = (
        project(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
        for project in (layer.q_proj, layer.k1_proj, layer.v1_proj)
    )
    if layer.qk_norm:
        q, k = (F.rms_norm(t, t.shape[-1:]) for t in (q, k))
    if layer.rope_theta:
        q, k = (_rotate_as_llama(t, layer.rope_theta) for t in (q, k))
    distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    band = ((distance >= 0) | (not is_causal)) & (distance.abs() < w1)
    band = band.to(x.device)
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=band, scale=layer.scale)
    return layer.out_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rope_theta", [None, 10000.0])
@pytest.mark.parametrize("is_causal", [True, False])
def test_it_starts_as_ordinary_attention(device, qk_norm, rope_theta, is_causal):
    torch.manual_seed(0)
    layer = SimplicialAttention(
        48, 6, num_kv_heads=2, window=(7, 4), qk_norm=qk_norm, rope_theta=rope_theta,
        is_causal=is_causal, bias=True, scale=0.5, device=device,
    )  # fmt: skip
    x = torch.randn(2, 23, 48, device=device)
    expected = _ordinary_attention(layer, x, 7, is_causal=is_causal)
    torch.testing.assert_close(layer(x), expected)


def test_a_strassen_layer_without_a_key_bias_starts_there_too(device):
    layer = SimplicialAttention(24, 3, window=(7, 4), form="strassen", k2_bias=0.0, device=device)
    x = torch.randn(2, 13, 24, device=device)
    torch.testing.assert_close(layer(x), _ordinary_attention(layer, x, 7))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_it_learns_to_leave_ordinary_attention(device, qk_norm):
    """Every parameter has a gradient that is not zero, at once or after the first step."""
    torch.manual_seed(0)
    layer = SimplicialAttention(
        32, 4, num_kv_heads=2, window=(7, 4), qk_norm=qk_norm, rope_theta=100.0, bias=True,
        device=device,
    )  # fmt: skip
    x = torch.randn(2, 16, 32, device=device)
    target = torch.randn_like(x)
    first = F.mse_loss(layer(x), target)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimizer.step()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert 0 < parameter.grad.abs().max() < 10, name
    assert F.mse_loss(layer(x), target) < first
    started = _ordinary_attention(layer, x, 7)
    assert (layer(x) - started).abs().max() > 1e-4


def test_its_output_flattens_without_a_copy(device, monkeypatch):
    seen = []
    layer = SimplicialAttention(24, 4, num_kv_heads=2, rope_theta=100.0, device=device)
    hook = layer.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer(torch.randn(2, 9, 24, device=device))
    hook.remove()
    assert seen[0]._base is not None  # a view of the operator's out
    assert seen[0].is_contiguous()


def test_bounds_keep_documents_apart(device):
    layer = SimplicialAttention(24, 4, window=(9, 4), rope_theta=100.0, device=device)
    torch.nn.init.normal_(layer.k2_proj.weight)
    torch.nn.init.normal_(layer.v2_proj.weight)
    x = torch.randn(1, 15, 24, device=device)
    ids = torch.tensor([[0] * 6 + [1] * 9], device=device)
    packed = layer(x, kv_bounds=kv_bounds_from_document_ids(ids))
    alone = torch.cat((layer(x[:, :6]), layer(x[:, 6:], position_offset=6)), 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert (layer(x) - packed).abs().max() > 1e-3


def test_rotary_positions_are_relative_until_the_second_keys_differ(device):
    layer = SimplicialAttention(24, 2, rope_theta=100.0, device=device)
    x = torch.randn(2, 9, 24, device=device)
    here = layer(x)
    torch.testing.assert_close(layer(x, position_offset=5), here, rtol=1e-4, atol=1e-5)
    offsets = torch.tensor([5, 0], device=device)
    torch.testing.assert_close(layer(x, position_offset=offsets), here, rtol=1e-4, atol=1e-5)
    torch.nn.init.normal_(layer.k2_proj.weight)
    moved = layer(x, position_offset=offsets)
    torch.testing.assert_close(moved[1], layer(x)[1])
    torch.testing.assert_close(moved[0], layer(x, position_offset=5)[0])
    assert (moved[0] - layer(x)[0]).abs().max() > 1e-3


def test_rotation_stays_exact_in_half_precision(device):
    """Position 257 does not exist in bfloat16."""
    layer = SimplicialAttention(16, 1, rope_theta=100.0, device=device, dtype=torch.bfloat16)
    x = torch.randn(1, 2, 16, device=device, dtype=torch.bfloat16)
    wide = SimplicialAttention(16, 1, rope_theta=100.0, device=device)
    wide.load_state_dict(layer.state_dict())
    got, expected = (
        at(x.to(next(at.parameters()).dtype), position_offset=257) for at in (layer, wide)
    )
    torch.testing.assert_close(got.float(), expected, rtol=3e-2, atol=3e-2)


def test_reset_parameters_starts_anew(device):
    layer = SimplicialAttention(24, 4, window=(5, 3), qk_norm=True, device=device)
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, 0.3)
    layer.reset_parameters()
    x = torch.randn(1, 11, 24, device=device)
    torch.testing.assert_close(layer(x), _ordinary_attention(layer, x, 5))
    assert layer.q_proj.weight.std() > 0
    assert layer.k2_proj.weight.std() > 0


def test_it_can_be_made_on_meta_and_in_any_dtype():
    layer = SimplicialAttention(24, 4, qk_norm=True, bias=True, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}
    assert layer(torch.empty(2, 5, 24, device="meta", dtype=torch.float16)).shape == (2, 5, 24)


def test_it_compiles_into_one_graph(device):
    torch._dynamo.reset()
    layer = SimplicialAttention(
        24, 4, num_kv_heads=2, qk_norm=True, rope_theta=100.0, window=(5, 3), device=device
    )
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for seq in (7, 12):
        x = torch.randn(2, seq, 24, device=device, requires_grad=True)
        torch.testing.assert_close(compiled(x), layer(x))
        (got,), (expected,) = (torch.autograd.grad(f(x).sum(), x) for f in (compiled, layer))
        torch.testing.assert_close(got, expected)


def test_it_says_what_it_is():
    layer = SimplicialAttention(24, 4, num_kv_heads=2, window=(64, None), rope_theta=100.0)
    assert layer.extra_repr() == (
        "num_heads=4, num_kv_heads=2, head_dim=6, window=(64, None), form='trilinear', "
        "is_causal=True, k2_bias=1.0, v2_bias=1.0, rope_theta=100.0"
    )


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((24, 4), {"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ((26, 4), {}, "embed_dim must be a multiple of num_heads where head_dim is not given"),
        ((24, 8), {"rope_theta": 10.0}, "head_dim must be even for a rotary embedding, got 3"),
        ((24, 8), {"window": 3}, "window must be None or a pair"),
        ((24, 8), {"window": (0, 3)}, "w1 must be at least 1 .*, got 0"),
        ((24, 8), {"window": (None, -2)}, "w2 must be at least 1 .*, got -2"),
        ((0, 8), {}, "embed_dim must be at least 1, got 0"),
        ((24, 0), {}, "num_heads must be at least 1, got 0"),
        ((24, 8), {"num_kv_heads": -1}, "num_kv_heads must be at least 1, got -1"),
        ((24, 8), {"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ((24, 8), {"form": "bilinear"}, "form must be one of .*, got 'bilinear'"),
        ((24, 4), {"rope_theta": 0.0}, "rope_theta must be positive, got 0.0"),
        ((24, 4), {"rope_theta": math.nan}, "rope_theta must be positive, got nan"),
    ],
)  # fmt: skip
def test_bad_settings_are_named_when_a_layer_is_made(arguments, options, text):
    with pytest.raises(ValueError, match=text):
        SimplicialAttention(*arguments, **options)


@pytest.mark.parametrize("name", ["scale", "k2_bias", "v2_bias"])
def test_a_setting_that_would_lose_its_gradient_is_refused(name):
    with pytest.raises(TypeError, match=f"{name} must be a number, got a tensor that requires"):
        SimplicialAttention(24, 4, **{name: torch.nn.Parameter(torch.ones(()))})


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((7, 24), "x must have shape [batch, seq, 24], got [7, 24]"),
        ((2, 7, 23), "x must have shape [batch, seq, 24], got [2, 7, 23]"),
    ],
)
def test_input_of_another_shape_is_named(shape, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        SimplicialAttention(24, 4, rope_theta=100.0)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3,), (2, 7), ()])
def test_offsets_that_are_not_one_for_each_row_are_refused(shape):
    text = f"position_offset must be an int or have shape [x's batch] = [2], got {list(shape)}"
    layer = SimplicialAttention(24, 4, rope_theta=100.0)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        layer(torch.zeros(2, 7, 24), position_offset=torch.zeros(shape))


def test_it_can_be_traced_symbolically():
    layer = SimplicialAttention(24, 4, rope_theta=100.0, window=(5, 3))
    x = torch.randn(2, 9, 24)
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))
