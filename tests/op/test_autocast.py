"""Autocast: the rule of `scaled_dot_product_attention`, which is asked each time."""

import pytest
import torch
import torch.nn.functional as F

from simplex_ops.testing import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _results(device, dtype, to):
    inputs = [t.requires_grad_() for t in Case(seq=6, dtype=dtype).inputs(device)]
    with torch.autocast(device, dtype=to):
        out, lse = torch.ops.simplex.attn(*inputs, 3, 2)
        expected = F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[3])
    return inputs, out, lse, expected


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_has_the_dtype_that_dot_product_attention_has(device, dtype, to):
    inputs, out, lse, expected = _results(device, dtype, to)
    assert out.dtype == expected.dtype
    assert lse.dtype == (torch.float64 if out.dtype == torch.float64 else torch.float32)
    (out.float().sum() + lse.float().sum()).backward()
    assert all(t.grad is not None and t.grad.dtype == dtype for t in inputs)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_autocast_is_a_cast_of_the_inputs(device, to):
    inputs, out, lse, _ = _results(device, torch.float32, to)
    expected = torch.ops.simplex.attn(*(t.to(to) for t in inputs), 3, 2)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_inputs_of_different_dtypes_are_cast_before_the_check(device):
    q, *keys = Case(seq=6).inputs(device)
    q = q.bfloat16()
    with pytest.raises(TypeError, match=r"k1 must have the dtype of q, torch\.bfloat16"):
        torch.ops.simplex.attn(q, *keys)
    with torch.autocast(device, dtype=torch.bfloat16):
        out, _ = torch.ops.simplex.attn(q, *keys)
    assert out.dtype == torch.bfloat16


def test_positions_and_disabled_autocast_are_left_alone(device):
    case = Case(2, seq=6, bounds="ranges", starts="random")
    inputs, options = case.inputs(device), case.options(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        cast, _ = torch.ops.simplex.attn(*inputs, **options)
        with torch.autocast(device, enabled=False):
            plain, _ = torch.ops.simplex.attn(*inputs, **options)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(plain, torch.ops.simplex.attn(*inputs, **options)[0])


def test_autocast_reaches_compiled_code(device):
    q, *keys = Case(seq=6).inputs(device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(*inputs):
        with torch.autocast(device, dtype=torch.bfloat16):
            return torch.ops.simplex.attn(*inputs, 3, 2)

    expected = torch.ops.simplex.attn(*(t.bfloat16() for t in (q, *keys)), 3, 2)
    for got, wanted in zip(attend(q, *keys), expected, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted)
