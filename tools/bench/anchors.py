"""Anchors: what our rates are compared with, timed in turn with ours."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from simplex_ops import reference
from tools.bench.timing import Function, time_in_turn
from tools.workloads import (
    BACKWARD_FLOPS,
    Direction,
    Workload,
    keys_per_query,
    make_inputs,
    nominal_flops,
)

# Where a GPU's anchors but cuDNN's forward are timed: of equal FLOPs they run at one rate for all.
ROSTER = ("llama-mqa", "mqa-d64", "mha")


class NotRunError(Exception):
    """A reason why a contestant cannot take part, said in its row."""


@dataclass(frozen=True)
class Job:
    """One function to time, the FLOPs it is credited with, and what a reader must know of it."""

    run: Function
    flops: float
    note: str = ""


def matmul(workload: Workload, direction: Direction, device: torch.device) -> Job:
    """Build a square matrix product in the workload's dtype: 8192³ on a GPU, 1024³ on a CPU."""
    del direction
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=workload.dtype) for _ in range(2))
    return Job(lambda: torch.mm(a, b), 2.0 * size**3)


def copy_rate(device: torch.device) -> float:
    """Return the bytes a second that a large copy on a device moves, reads and writes together."""
    source = torch.empty(2**30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = time_in_turn({"copy": lambda: target.copy_(source)}, device, seconds=0.1)
    return 2 * source.numel() / (times["copy"].typical / 1e3)


def cudnn(workload: Workload, direction: Direction, device: torch.device) -> Job:
    """Build cuDNN's dense SDPA with the FLOPs of the workload."""
    return _dense(workload, direction, device, SDPBackend.CUDNN_ATTENTION)


def flash(workload: Workload, direction: Direction, device: torch.device) -> Job:
    """Build the flash attention that PyTorch has, of the same shape."""
    return _dense(workload, direction, device, SDPBackend.FLASH_ATTENTION)


def _dense(
    workload: Workload, direction: Direction, device: torch.device, backend: SDPBackend
) -> Job:
    """Build a dense SDPA with the FLOPs of the workload, and as many kv heads as heads.

    Nq is the workload's N and Nk is w1·w2, so 4·B·H·Nq·Nk·D is the nominal count (to the nearest 64
    keys: where that is not exact, rates still compare).
    """
    if device.type != "cuda":
        raise NotRunError("it serves CUDA devices only")
    if workload.dtype not in (torch.float16, torch.bfloat16):
        raise NotRunError("it serves float16 and bfloat16 only")
    n1, n2 = keys_per_query(workload)
    keys = max(64, round(n1 * n2 / 64) * 64)

    def draw(seq: int, dim: int) -> Tensor:
        shape = (workload.batch, workload.heads, seq, dim)
        return torch.randn(shape, device=device, dtype=workload.dtype)

    q = draw(workload.seq, workload.head_dim)
    k, v = draw(keys, workload.head_dim), draw(keys, workload.dv)
    rows = workload.batch * workload.heads * workload.seq
    flops = 2.0 * (workload.head_dim + workload.dv) * rows * keys

    def forward() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    if direction == "forward":
        return Job(forward, flops)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out, dout = forward(), draw(workload.seq, workload.dv)
    return Job(
        lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True), BACKWARD_FLOPS * flops
    )


def cudnn_forward(workload: Workload, direction: Direction, device: torch.device) -> Job:
    """Build cuDNN's forward, whatever the direction: the yardstick that the aims are given in."""
    del direction
    return cudnn(workload, "forward", device)


def einsum(workload: Workload, direction: Direction, device: torch.device) -> Job:
    """Build the naive einsum, which stores every [B, H, N, M, M] logit."""
    logits = workload.batch * workload.heads * workload.seq**3 * workload.dtype.itemsize
    if logits > 2**28:
        raise NotRunError(f"its logits alone take {logits / 2**30:,.1f} GiB")
    inputs = make_inputs(workload, device)
    w1, w2, options = workload.w1, workload.w2, workload.options
    flops = nominal_flops(workload, direction)
    if direction == "forward":
        return Job(lambda: reference.attn(*inputs.problem, w1, w2, **options), flops)
    leaves = [t.detach().requires_grad_() for t in inputs.problem]
    out, _ = reference.attn(
        leaves[0], leaves[1], leaves[2], leaves[3], leaves[4], w1, w2, **options
    )
    return Job(lambda: torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True), flops)
