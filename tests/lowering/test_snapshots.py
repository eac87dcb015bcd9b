"""What the passes make of six models: their marked modules' part of Dynamo's graph, in print."""

from typing import Any

import expecttest
import small_models
import torch
from listing import listing
from tiny_llama import states, tokens
from torch import Tensor, nn

from lowering.passes.pipeline import run_passes
from simplex_ops import mark


def _printed(model: nn.Module, within: str, *inputs: Tensor) -> str:
    """Return the part of one module of the graph that the passes made."""
    graphs: list[str] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        assert not run_passes(gm).refused
        gm.graph.lint()
        graphs.append(listing(gm.graph, within))
        return gm

    torch._dynamo.reset()
    no_window_changed_yet = torch.compiler.config.patch(dynamic_sources="")
    with torch.no_grad(), no_window_changed_yet:
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    return "\n".join(graphs)


def _of_model(name: str, within: str, implementation: str) -> str:
    model = small_models.made(name, layers=1, attn_implementation=implementation)
    mark(small_models.attentions(model)[0], window=(9, 4))
    return _printed(model, within, tokens())


class _Layer(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        out = self.attention(x)
        return x + (out[0] if isinstance(out, tuple) else out)


class _ByHand(nn.Module):
    """As such modules are written: one projection, einsum, a mask, softmax, einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 8).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class TestGraphs(expecttest.TestCase):
    maxDiff = None

    def test_llama_by_eager(self):
        self.assertExpectedInline(
            _of_model("llama", "model.layers.0.self_attn", "eager"),
            """\
%0 [2, 24, 16] = linear(<[2, 24, 32]>, simplex_k2.weight, None)
%1 [2, 24, 2, 8] = unflatten(%0, -1, (-1, 8))
%2 [2, 24, 16] = linear(<[2, 24, 32]>, simplex_v2.weight, None)
%3 [2, 24, 2, 8] = unflatten(%2, -1, (-1, 8))
%4 [2, 2, 24, 8] = transpose(%1, 1, 2)
%5 [2, 2, 24, 8] = transpose(%3, 1, 2)
%6 [2, 24, 32] = linear(<[2, 24, 32]>, q_proj.weight, None)
%7 [2, 24, 4, 8] = view(%6, (2, 24, -1, 8))
%8 [2, 4, 24, 8] = transpose(%7, 1, 2)
%9 [2, 24, 16] = linear(<[2, 24, 32]>, k_proj.weight, None)
%10 [2, 24, 2, 8] = view(%9, (2, 24, -1, 8))
%11 [2, 2, 24, 8] = transpose(%10, 1, 2)
%12 [2, 24, 16] = linear(<[2, 24, 32]>, v_proj.weight, None)
%13 [2, 24, 2, 8] = view(%12, (2, 24, -1, 8))
%14 [2, 2, 24, 8] = transpose(%13, 1, 2)
%15 [1, 1, 24, 8] = unsqueeze(<[1, 24, 8]>, 1)
%16 [1, 1, 24, 8] = unsqueeze(<[1, 24, 8]>, 1)
%17 [2, 4, 24, 8] = mul(%8, %15)
%18 [2, 4, 24, 4] = getitem(%8, (Ellipsis, slice(None, 4, None)))
%19 [2, 4, 24, 4] = getitem(%8, (Ellipsis, slice(4, None, None)))
%20 [2, 4, 24, 4] = neg(%19)
%21 [2, 4, 24, 8] = cat((%20, %18), dim=-1)
%22 [2, 4, 24, 8] = mul(%21, %16)
%23 [2, 4, 24, 8] = add(%17, %22)
%24 [2, 2, 24, 8] = mul(%11, %15)
%25 [2, 2, 24, 4] = getitem(%11, (Ellipsis, slice(None, 4, None)))
%26 [2, 2, 24, 4] = getitem(%11, (Ellipsis, slice(4, None, None)))
%27 [2, 2, 24, 4] = neg(%26)
%28 [2, 2, 24, 8] = cat((%27, %25), dim=-1)
%29 [2, 2, 24, 8] = mul(%28, %16)
%30 [2, 2, 24, 8] = add(%24, %29)
%31 = attn.default(%23, %30, %4, %14, %5, 9, 4,
    scale=0.353553,
    is_causal=True,
    form='trilinear',
    k2_bias=1,
    v2_bias=1)
%32 [2, 4, 24, 8] = getitem(%31, 0)
%33 [2, 24, 4, 8] = transpose(%32, 1, 2)
%34 [2, 24, 4, 8] = contiguous(%33)
%35 [2, 24, 32] = reshape(%34, 2, 24, -1)
%36 [2, 24, 32] = contiguous(%35)
%37 [2, 24, 32] = linear(%36, o_proj.weight, None)""",
        )

    def test_qwen3_by_sdpa(self):
        self.assertExpectedInline(
            _of_model("qwen3", "model.layers.0.self_attn", "sdpa"),
            """\
%0 [2, 24, 16] = linear(<[2, 24, 32]>, simplex_k2.weight, None)
%1 [2, 24, 2, 8] = unflatten(%0, -1, (-1, 8))
%2 [2, 24, 2, 8] = rms_norm(%1, (8), simplex_k2_norm.weight, 1e-06)
%3 [2, 24, 16] = linear(<[2, 24, 32]>, simplex_v2.weight, None)
%4 [2, 24, 2, 8] = unflatten(%3, -1, (-1, 8))
%5 [2, 2, 24, 8] = transpose(%2, 1, 2)
%6 [2, 2, 24, 8] = transpose(%4, 1, 2)
%7 [2, 24, 32] = linear(<[2, 24, 32]>, q_proj.weight, None)
%8 [2, 24, 4, 8] = view(%7, (2, 24, -1, 8))
%9 [2, 24, 4, 8] = to(%8, torch.float32)
%10 [2, 24, 4, 8] = pow(%9, 2)
%11 [2, 24, 4, 1] = mean(%10, -1, keepdim=True)
%12 [2, 24, 4, 1] = add(%11, 1e-06)
%13 [2, 24, 4, 1] = rsqrt(%12)
%14 [2, 24, 4, 8] = mul(%9, %13)
%15 [2, 24, 4, 8] = to(%14, torch.float32)
%16 [2, 24, 4, 8] = mul(q_norm.weight, %15)
%17 [2, 4, 24, 8] = transpose(%16, 1, 2)
%18 [2, 24, 16] = linear(<[2, 24, 32]>, k_proj.weight, None)
%19 [2, 24, 2, 8] = view(%18, (2, 24, -1, 8))
%20 [2, 24, 2, 8] = to(%19, torch.float32)
%21 [2, 24, 2, 8] = pow(%20, 2)
%22 [2, 24, 2, 1] = mean(%21, -1, keepdim=True)
%23 [2, 24, 2, 1] = add(%22, 1e-06)
%24 [2, 24, 2, 1] = rsqrt(%23)
%25 [2, 24, 2, 8] = mul(%20, %24)
%26 [2, 24, 2, 8] = to(%25, torch.float32)
%27 [2, 24, 2, 8] = mul(k_norm.weight, %26)
%28 [2, 2, 24, 8] = transpose(%27, 1, 2)
%29 [2, 24, 16] = linear(<[2, 24, 32]>, v_proj.weight, None)
%30 [2, 24, 2, 8] = view(%29, (2, 24, -1, 8))
%31 [2, 2, 24, 8] = transpose(%30, 1, 2)
%32 [1, 1, 24, 8] = unsqueeze(<[1, 24, 8]>, 1)
%33 [1, 1, 24, 8] = unsqueeze(<[1, 24, 8]>, 1)
%34 [2, 4, 24, 8] = mul(%17, %32)
%35 [2, 4, 24, 4] = getitem(%17, (Ellipsis, slice(None, 4, None)))
%36 [2, 4, 24, 4] = getitem(%17, (Ellipsis, slice(4, None, None)))
%37 [2, 4, 24, 4] = neg(%36)
%38 [2, 4, 24, 8] = cat((%37, %35), dim=-1)
%39 [2, 4, 24, 8] = mul(%38, %33)
%40 [2, 4, 24, 8] = add(%34, %39)
%41 [2, 2, 24, 8] = mul(%28, %32)
%42 [2, 2, 24, 4] = getitem(%28, (Ellipsis, slice(None, 4, None)))
%43 [2, 2, 24, 4] = getitem(%28, (Ellipsis, slice(4, None, None)))
%44 [2, 2, 24, 4] = neg(%43)
%45 [2, 2, 24, 8] = cat((%44, %42), dim=-1)
%46 [2, 2, 24, 8] = mul(%45, %33)
%47 [2, 2, 24, 8] = add(%41, %46)
%48 = attn.default(%40, %47, %5, %31, %6, 9, 4,
    scale=0.353553,
    is_causal=True,
    form='trilinear',
    k2_bias=1,
    v2_bias=1)
%49 [2, 4, 24, 8] = getitem(%48, 0)
%50 [2, 4, 24, 8] = reshape(%49, 2, -1, 24, 8)
%51 [2, 24, 4, 8] = transpose(%50, 1, 2)
%52 [2, 24, 4, 8] = contiguous(%51)
%53 [2, 24, 32] = reshape(%52, 2, 24, -1)
%54 [2, 24, 32] = contiguous(%53)
%55 [2, 24, 32] = linear(%54, o_proj.weight, None)""",
        )

    def test_mistral_by_sdpa(self):
        self.assertExpectedInline(
            _of_model("mistral", "model.layers.0.self_attn", "sdpa"),
            """\
%0 [2, 24, 16] = linear(<[2, 24, 32]>, simplex_k2.weight, None)
%1 [2, 24, 2, 8] = unflatten(%0, -1, (-1, 8))
%2 [2, 24, 16] = linear(<[2, 24, 32]>, simplex_v2.weight, None)
%3 [2, 24, 2, 8] = unflatten(%2, -1, (-1, 8))
%4 [2, 2, 24, 8] = transpose(%1, 1, 2)
%5 [2, 2, 24, 8] = transpose(%3, 1, 2)
%6 [2, 24, 32] = linear(<[2, 24, 32]>, q_proj.weight, None)
%7 [2, 24, 4, 8] = view(%6, (2, 24, -1, 8))
%8 [2, 4, 24, 8] = transpose(%7, 1, 2)
%9 [2, 24, 16] = linear(<[2, 24, 32]>, k_proj.weight, None)
%10 [2, 24, 2, 8] = view(%9, (2, 24, -1, 8))
%11 [2, 2, 24, 8] = transpose(%10, 1, 2)
%12 [2, 24, 16] = linear(<[2, 24, 32]>, v_proj.weight, None)
%13 [2, 24, 2, 8] = view(%12, (2, 24, -1, 8))
%14 [2, 2, 24, 8] = transpose(%13, 1, 2)
%15 [1, 1, 24, 8] = unsqueeze(<[1, 24, 8]>, 1)
%16 [1, 1, 24, 8] = unsqueeze(<[1, 24, 8]>, 1)
%17 [2, 4, 24, 8] = mul(%8, %15)
%18 [2, 4, 24, 4] = getitem(%8, (Ellipsis, slice(None, 4, None)))
%19 [2, 4, 24, 4] = getitem(%8, (Ellipsis, slice(4, None, None)))
%20 [2, 4, 24, 4] = neg(%19)
%21 [2, 4, 24, 8] = cat((%20, %18), dim=-1)
%22 [2, 4, 24, 8] = mul(%21, %16)
%23 [2, 4, 24, 8] = add(%17, %22)
%24 [2, 2, 24, 8] = mul(%11, %15)
%25 [2, 2, 24, 4] = getitem(%11, (Ellipsis, slice(None, 4, None)))
%26 [2, 2, 24, 4] = getitem(%11, (Ellipsis, slice(4, None, None)))
%27 [2, 2, 24, 4] = neg(%26)
%28 [2, 2, 24, 8] = cat((%27, %25), dim=-1)
%29 [2, 2, 24, 8] = mul(%28, %16)
%30 [2, 2, 24, 8] = add(%24, %29)
%31 = attn.default(%23, %30, %4, %14, %5, 9, 4,
    scale=0.353553,
    is_causal=True,
    form='trilinear',
    k2_bias=1,
    v2_bias=1)
%32 [2, 4, 24, 8] = getitem(%31, 0)
%33 [2, 4, 24, 8] = reshape(%32, 2, -1, 24, 8)
%34 [2, 24, 4, 8] = transpose(%33, 1, 2)
%35 [2, 24, 4, 8] = contiguous(%34)
%36 [2, 24, 32] = reshape(%35, 2, 24, -1)
%37 [2, 24, 32] = contiguous(%36)
%38 [2, 24, 32] = linear(%37, o_proj.weight, None)""",
        )

    def test_gpt2_by_eager(self):
        self.assertExpectedInline(
            _of_model("gpt2", "transformer.h.0.attn", "eager"),
            """\
%0 [2, 24, 32] = linear(<[2, 24, 32]>, simplex_k2.weight, simplex_k2.bias)
%1 [2, 24, 4, 8] = unflatten(%0, -1, (-1, 8))
%2 [2, 24, 32] = linear(<[2, 24, 32]>, simplex_v2.weight, simplex_v2.bias)
%3 [2, 24, 4, 8] = unflatten(%2, -1, (-1, 8))
%4 [2, 4, 24, 8] = transpose(%1, 1, 2)
%5 [2, 4, 24, 8] = transpose(%3, 1, 2)
%6 [48, 32] = view(<[2, 24, 32]>, -1, 32)
%7 [48, 96] = addmm(c_attn.bias, %6, c_attn.weight)
%8 [2, 24, 96] = view(%7, (2, 24, 96))
%9 = split(%8, 32, dim=2)
%10 [2, 24, 32] = getitem(%9, 0)
%11 [2, 24, 32] = getitem(%9, 1)
%12 [2, 24, 32] = getitem(%9, 2)
%13 [2, 24, 4, 8] = view(%11, (2, 24, -1, 8))
%14 [2, 24, 4, 8] = view(%12, (2, 24, -1, 8))
%15 [2, 24, 4, 8] = view(%10, (2, 24, -1, 8))
%16 [2, 4, 24, 8] = permute(%15, 0, 2, 1, 3)
%17 [2, 4, 24, 8] = permute(%13, 0, 2, 1, 3)
%18 [2, 4, 24, 8] = permute(%14, 0, 2, 1, 3)
%19 = attn.default(%16, %17, %4, %18, %5, 9, 4,
    scale=0.353553,
    is_causal=True,
    form='trilinear',
    k2_bias=1,
    v2_bias=1)
%20 [2, 4, 24, 8] = getitem(%19, 0)
%21 [2, 24, 4, 8] = transpose(%20, 1, 2)
%22 [2, 24, 32] = reshape(%21, 2, 24, -1)
%23 [2, 24, 32] = contiguous(%22)
%24 [48, 32] = view(%23, -1, 32)
%25 [48, 32] = addmm(c_proj.bias, %24, c_proj.weight)
%26 [2, 24, 32] = view(%25, (2, 24, 32))
%27 [2, 24, 32] = dropout(%26, 0, True, False)""",
        )

    def test_multihead_attention(self):
        model = _SelfAttention()
        mark(model.attention, window=(9, 4), is_causal=False)
        self.assertExpectedInline(
            _printed(model, "attention", states()),
            """\
%0 [2, 12, 32] = linear(<[2, 12, 32]>, simplex_k2.weight, simplex_k2.bias)
%1 [2, 12, 4, 8] = unflatten(%0, -1, (-1, 8))
%2 [2, 12, 32] = linear(<[2, 12, 32]>, simplex_v2.weight, simplex_v2.bias)
%3 [2, 12, 4, 8] = unflatten(%2, -1, (-1, 8))
%4 [2, 4, 12, 8] = transpose(%1, 1, 2)
%5 [2, 4, 12, 8] = transpose(%3, 1, 2)
%6 [2, 12, 96] = linear(<[2, 12, 32]>, attention.in_proj_weight, attention.in_proj_bias)
%7 = chunk(%6, 3, -1)
%8 [2, 12, 32] = getitem(%7, 0)
%9 [2, 12, 32] = getitem(%7, 1)
%10 [2, 12, 32] = getitem(%7, 2)
%11 [2, 12, 4, 8] = unflatten(%8, -1, (4, -1))
%12 [2, 4, 12, 8] = transpose(%11, 1, 2)
%13 [2, 12, 4, 8] = unflatten(%9, -1, (4, -1))
%14 [2, 4, 12, 8] = transpose(%13, 1, 2)
%15 [2, 12, 4, 8] = unflatten(%10, -1, (4, -1))
%16 [2, 4, 12, 8] = transpose(%15, 1, 2)
%17 = attn.default(%12, %14, %4, %16, %5, 9, 4,
    scale=None,
    is_causal=False,
    form='trilinear',
    k2_bias=1,
    v2_bias=1)
%18 [2, 4, 12, 8] = getitem(%17, 0)
%19 [2, 12, 4, 8] = transpose(%18, 1, 2)
%20 [2, 12, 32] = flatten(%19, 2)
%21 [2, 12, 32] = linear(%20, out_proj.weight, out_proj.bias)""",
        )

    def test_a_module_by_hand(self):
        model = _Layer(mark(_ByHand(), window=(9, 4), kv_heads=4, head_dim=8))
        self.assertExpectedInline(
            _printed(model, "attention", states()),
            """\
%0 [2, 12, 32] = linear(<[2, 12, 32]>, simplex_k2.weight, simplex_k2.bias)
%1 [2, 12, 4, 8] = unflatten(%0, -1, (-1, 8))
%2 [2, 12, 32] = linear(<[2, 12, 32]>, simplex_v2.weight, simplex_v2.bias)
%3 [2, 12, 4, 8] = unflatten(%2, -1, (-1, 8))
%4 [2, 4, 12, 8] = transpose(%1, 1, 2)
%5 [2, 4, 12, 8] = transpose(%3, 1, 2)
%6 [2, 12, 96] = linear(<[2, 12, 32]>, qkv.weight, qkv.bias)
%7 [2, 12, 3, 4, 8] = view(%6, 2, 12, 3, 4, 8)
%8 = unbind(%7, 2)
%9 [2, 12, 4, 8] = getitem(%8, 0)
%10 [2, 12, 4, 8] = getitem(%8, 1)
%11 [2, 12, 4, 8] = getitem(%8, 2)
%12 [12, 12] = ones(12, 12, dtype=torch.bool)
%13 [12, 12] = triu(%12, 1)
%14 [2, 4, 12, 8] = permute(%9, 0, 2, 1, 3)
%15 [2, 4, 12, 8] = permute(%10, 0, 2, 1, 3)
%16 [2, 4, 12, 8] = permute(%11, 0, 2, 1, 3)
%17 [12, 12] = invert(%13)
%18 = attn.default(%14, %15, %4, %16, %5, 9, 4,
    scale=0.353553,
    is_causal=True,
    form='trilinear',
    k2_bias=1,
    v2_bias=1)
%19 [2, 4, 12, 8] = getitem(%18, 0)
%20 [2, 12, 4, 8] = permute(%19, 0, 2, 1, 3)
%21 [2, 12, 32] = flatten(%20, 2)
%22 [2, 12, 32] = linear(%21, out.weight, out.bias)""",
        )
