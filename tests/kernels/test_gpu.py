"""What only a GPU can show: CUDA graphs, no synchronisation, tensors of over 2^31 elements."""

import pytest
import torch

from simplex_ops.devices import gpu
from simplex_ops.testing import Case, assert_matches_reference

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


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("group", [1, 7, 32])
@pytest.mark.parametrize("dims", [(65, 20), (18, 2), (18, 7), (33, 100)])
def test_rows_of_no_multiple_of_16_bytes_are_read_right(dims, group, is_causal):
    """In tiles of 64 by pointers these gave wrong outputs and illegal accesses."""
    head_dim, value_dim = dims
    case = Case(
        kv_heads=2, group=group, seq=90, head_dim=head_dim, value_dim=value_dim,
        is_causal=is_causal, dtype=torch.bfloat16, through="both",
    )  # fmt: skip
    assert_matches_reference(case, attn, device="cuda")


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
def test_keys_that_no_descriptor_can_read_are_read_by_pointers(group, monkeypatch):
    inputs = _inputs(2, 2 * group, 2, 150, 64, **BF16)
    odd = [inputs[0]]
    for t in inputs[1:]:
        wide = torch.zeros(*t.shape[:3], 72, **BF16)
        wide[..., 1:65] = t.detach()
        odd.append(wide[..., 1:65].requires_grad_())  # one element after an aligned address
    found = _graded(odd, 70, 9)
    for asked in ("problem.can_describe", "problem.are_rows_aligned", "hopper.serve.can_describe"):
        monkeypatch.setattr(f"csrc_free.{asked}", lambda tensor: False)
    for one, other in zip(found, _graded(inputs, 70, 9), strict=True):
        assert torch.equal(one, other)


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_two
@pytest.mark.parametrize("group", [1, 8, 64])
def test_tensors_on_another_device_than_the_current_one(group):
    """The same answers, bit for bit, and the current device stays what it was."""
    inputs = _inputs(1, group, 1, 150, 64, **BF16)
    expected = _graded(inputs, 70, 9)
    there = [t.detach().to("cuda:1").requires_grad_() for t in inputs]
    assert torch.cuda.current_device() == 0
    got = _graded(there, 70, 9)
    assert torch.cuda.current_device() == 0
    for one, other in zip(got, expected, strict=True):
        assert one.device == torch.device("cuda:1")
        assert torch.equal(one.cpu(), other.cpu())


@needs_two
def test_another_device_computes_on_its_own_current_stream():
    """Kernels wait for what that stream has before them: inputs that are late are still read."""
    inputs = [t.detach() for t in _inputs(1, 8, 1, 150, 64, device="cuda:1", dtype=torch.bfloat16)]
    expected = attn(*inputs, 70, 9)
    late = [torch.zeros_like(t) for t in inputs]
    torch.cuda.synchronize(1)
    stream = torch.cuda.Stream("cuda:1")
    with torch.cuda.device(1), torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for tensor, value in zip(late, inputs, strict=True):
            tensor.copy_(value)
        with torch.cuda.device(0):
            got = attn(*late, 70, 9)
    stream.synchronize()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
