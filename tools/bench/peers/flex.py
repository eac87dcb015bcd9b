"""PyTorch's FlexAttention over materialised pairs: what can be had without a kernel of one's own.

Every pair of keys becomes a key k1∘k2 and a value v1∘v2, M1·M2 of them, and a block mask says which
a query sees: exact for the trilinear form, and in memory for small shapes only. The pairs are made
inside the timed region, and their gradients taken back to the five inputs; the mask is not.
"""

import torch
from torch import Tensor

from tools.bench.anchors import Job, NotRunError
from tools.bench.peers import agreement
from tools.workloads import Direction, Workload, make_inputs, nominal_flops

ROSTER: tuple[tuple[str, Direction], ...] = (("pairs", "forward"), ("pairs", "backward"))
_MOST_PAIRS = 2**19


def build(workload: Workload, direction: Direction, device: torch.device) -> Job:
    """Build FlexAttention's forward of a workload, or its backward through autograd."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seq, w1, w2 = workload.seq, workload.w1, workload.w2
    if workload.form != "trilinear" or not workload.is_causal:
        raise NotRunError("causal, trilinear only")
    if seq * seq > _MOST_PAIRS:
        raise NotRunError(f"{seq * seq:,} pairs of keys: too many to be materialised")

    def is_seen(batch: Tensor, head: Tensor, i: Tensor, pair: Tensor) -> Tensor:
        del batch, head
        first, second = i - pair // seq, i - pair % seq
        return (first >= 0) & (first < w1) & (second >= 0) & (second < w2)

    mask = create_block_mask(is_seen, None, None, seq, seq * seq, device=device.type)
    attend = torch.compile(flex_attention)
    inputs = make_inputs(workload, device)

    def pairs(one: Tensor, other: Tensor) -> Tensor:
        return (one[:, :, :, None] * other[:, :, None]).flatten(2, 3)

    def forward(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
        out = attend(q, pairs(k1, k2), pairs(v1, v2), block_mask=mask, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out

    flops = nominal_flops(workload, direction)
    out, lse = torch.ops.simplex.attn(*inputs.problem, w1, w2, **workload.options)
    if direction == "forward":
        note = agreement([forward(*inputs.problem)], [out])
        return Job(lambda: forward(*inputs.problem), flops, note)
    leaves = [t.detach().requires_grad_() for t in inputs.problem]
    got = forward(leaves[0], leaves[1], leaves[2], leaves[3], leaves[4])

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(got, leaves, inputs.dout, retain_graph=True)

    ours = torch.ops.simplex.attn_backward(
        inputs.dout, None, *inputs.problem, out, lse, w1, w2, **workload.options,
        grad_mask=[True] * 5,
    )  # fmt: skip
    return Job(backward, flops, f"{agreement(backward(), ours)}; through autograd")
