"""The package `simplicial-attention` from PyPI, where it is installed.

Its kernels are right for D <= 64, w2 <= 32, causal, and a sequence that is a multiple of 64 or is
padded to one; beyond these limits its results are wrong without a word, so it is not run there.
Its kv heads are repeated to the query heads before the kernels, inside the timed region.
"""

import importlib

import torch

from tools.bench.anchors import Job, NotRunError
from tools.bench.peers import agreement
from tools.workloads import Direction, Workload, make_inputs, nominal_flops

ROSTER: tuple[tuple[str, Direction], ...] = (("mha-d64", "forward"), ("mha-d64", "backward"))


def build(workload: Workload, direction: Direction, device: torch.device) -> Job:
    """Build the package's forward, or its backward through autograd, of a workload."""
    if workload.head_dim > 64 or workload.w2 > 32 or workload.dv != workload.head_dim:
        raise NotRunError("D <= 64, Dv = D and w2 <= 32 only")
    if not workload.is_causal or workload.form != "trilinear":
        raise NotRunError("causal, trilinear only")
    try:
        module = importlib.import_module("simplicial_attention.triton_two_simplicial_attention")
    except ImportError as error:
        raise NotRunError(f"simplicial-attention cannot be imported: {error}") from None

    inputs = make_inputs(workload, device)
    w1, w2 = workload.w1, workload.w2
    out, lse = torch.ops.simplex.attn(*inputs.problem, w1, w2, **workload.options)
    # Theirs is [B, N, H, D], contiguous.
    q, k1, k2, v1, v2, dout = (t.transpose(1, 2).contiguous() for t in inputs)
    leaves = [q, k1, k2, v1, v2]
    flops = nominal_flops(workload, direction)

    def forward() -> torch.Tensor:
        return module.sliding_two_simplicial_attn(q, (k1, k2), (v1, v2), w1=w1, w2=w2)

    if direction == "forward":
        return Job(forward, flops, agreement([forward().transpose(1, 2)], [out]))

    for leaf in leaves:
        leaf.requires_grad_()
    got = forward()

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(got, leaves, dout, retain_graph=True)

    ours = torch.ops.simplex.attn_backward(
        inputs.dout, None, *inputs.problem, out, lse, w1, w2, **workload.options,
        grad_mask=[True] * 5,
    )  # fmt: skip
    note = agreement([t.transpose(1, 2) for t in backward()], ours)
    return Job(backward, flops, f"{note}; through autograd")
