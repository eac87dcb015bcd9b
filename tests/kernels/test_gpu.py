"""What only a GPU can show: CUDA graphs, no synchronisation, tensors of over 2^31 elements."""

import pytest
import torch

from simplex_ops.devices import gpu

pytestmark = pytest.mark.gpu
attn = torch.ops.simplex.attn
BF16 = {"device": "cuda", "dtype": torch.bfloat16}


def _inputs(batch, heads, kv_heads, seq, head_dim, **factory):
    return [
        torch.randn(batch, seq, h, head_dim, **factory).transpose(1, 2).requires_grad_()
        for h in (heads, kv_heads, kv_heads, kv_heads, kv_heads)
    ]


def _graded(inputs, *windows, **options):
    out, lse = attn(*inputs, *windows, **options)
    return [out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), inputs)]


@pytest.mark.parametrize("group", [1, 8, 64])
def test_forward_and_backward_are_captured_and_replayed(group):
    inputs = _inputs(1, group, 1, 150, 64, **BF16)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # capture refuses what autograd saw on the default stream
        expected = _graded(inputs, 70, 9)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _graded(inputs, 70, 9)
    for tensor in got:
        tensor.detach().fill_(torch.nan)
    graph.replay()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("group", [1, 8, 64])
def test_nothing_waits_for_the_device(group):
    inputs = _inputs(2, group, 1, 100, 64, **BF16)
    bounds = torch.tensor([0, 100], dtype=torch.int32, device="cuda").expand(2, 100, 2)
    start = torch.zeros(2, dtype=torch.int32, device="cuda")
    _graded(inputs, 40, 7, kv_bounds=bounds, q_start=start)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _graded(inputs, 40, 7, kv_bounds=bounds, q_start=start)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", ["trilinear", "determinant", "strassen"])
@pytest.mark.parametrize("group", [1, 3, 8, 64])
def test_gradients_repeat_bit_for_bit(form, group):
    inputs = _inputs(2, 2 * group, 2, 170, 48, **BF16)
    first = _graded(inputs, 60, 12, form=form)
    for _ in range(3):
        for one, other in zip(_graded(inputs, 60, 12, form=form), first, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dim", [320, 64])
def test_what_no_kernel_serves_is_said_and_computed(dim):
    dtype = torch.float32 if dim > 256 else torch.float64
    inputs = _inputs(1, 2, 1, 20, dim, device="cuda", dtype=dtype)
    gpu._warn.cache_clear()  # it warns once
    with pytest.warns(gpu.SlowPathWarning, match="no kernel"):
        out, _ = attn(*inputs, 9, 3)
    expected, _ = attn(*(t.cpu() for t in inputs), 9, 3)
    torch.testing.assert_close(out.cpu(), expected)


def test_a_tensor_of_over_two_to_the_31_elements():
    """The last queries of a long sequence, whose offsets do not fit in 32 bits."""
    heads, head_dim, tail = 64, 128, 96
    seq = 2**31 // (heads * head_dim) + 64
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    inputs = _inputs(1, heads, 1, seq, head_dim, **BF16)
    assert inputs[0].numel() > 2**31
    out, lse = attn(*inputs, 40, 3)
    last = [t.detach()[:, :, -tail:].clone().requires_grad_() for t in inputs]
    last_out, last_lse = attn(*last, 40, 3)
    seen = tail - 40  # of these, every key is among the last
    torch.testing.assert_close(out[:, :, -seen:], last_out[:, :, -seen:], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse[:, :, -seen:], last_lse[:, :, -seen:], atol=1e-2, rtol=1e-2)
    dout = torch.zeros_like(out)
    dout[:, :, -seen:] = torch.randn_like(dout[:, :, -seen:])
    dq, *_, dv2 = torch.autograd.grad(out, inputs, dout)
    last_dq, *_, last_dv2 = torch.autograd.grad(last_out, last, dout[:, :, -tail:])
    torch.testing.assert_close(dq[:, :, -seen:], last_dq[:, :, -seen:], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(dv2[:, :, -seen:], last_dv2[:, :, -seen:], atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("group", [1, 8, 64])
def test_keys_that_no_descriptor_can_read_are_read_by_pointers(group):
    inputs = _inputs(2, 2 * group, 2, 150, 64, **BF16)
    odd = [inputs[0]]
    for t in inputs[1:]:
        wide = torch.zeros(*t.shape[:3], 72, **BF16)
        wide[..., 1:65] = t.detach()
        odd.append(wide[..., 1:65].requires_grad_())  # one element after an aligned address
    for one, other in zip(_graded(odd, 70, 9), _graded(inputs, 70, 9), strict=True):
        torch.testing.assert_close(one, other)
