"""FBGEMM's Triton kernels (fbgemm_gpu/experimental/simplicial_attention), from a path.

Its TLX kernels need a compiler fork and are not called. Worked around: head layout (the forward
serves one kv head and a power of two of at least 16 query heads, the backward as many kv heads as
query heads, so no one layout runs both ways), the order of the backward's arguments (its own module
has it wrong; the kernels are called directly), the saved statistic (neither natural nor base 2: the
backward gets our natural lse instead), delta's batch stride (wrong beyond batch 1: batch 1 only),
w2 (the backward asserts 32), and biases (the forward ignores them: the workloads have none).
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from tools.bench.anchors import Job, NotRunError
from tools.bench.peers import agreement
from tools.workloads import Direction, Workload, make_inputs, nominal_flops

ROSTER: tuple[tuple[str, Direction], ...] = (("llama-mqa", "forward"), ("mha", "backward"))


def build(workload: Workload, direction: Direction, device: torch.device, path: Path | None) -> Job:
    """Build FBGEMM's forward or backward of a workload within its limits."""
    if path is None:
        raise NotRunError("give a checkout of pytorch/FBGEMM with --fbgemm")
    _refuse(workload, direction)
    inputs = make_inputs(workload, device)
    w1, w2 = workload.w1, workload.w2
    out, lse = torch.ops.simplex.attn(*inputs.problem, w1, w2, **workload.options)
    # Theirs is [B, N, H, D], contiguous: the layout that the workload has in memory.
    q, k1, k2, v1, v2, dout = (t.transpose(1, 2).contiguous() for t in inputs)
    flops = nominal_flops(workload, direction)

    if direction == "forward":
        forward = _module(path, "fwd").triton_fwd
        got, _ = forward(q, k1, k2, v1, v2, w1, w2)
        note = agreement([got.transpose(1, 2)], [out])
        return Job(lambda: forward(q, k1, k2, v1, v2, w1, w2), flops, f"{note}; bf16 out")

    backward = _module(path, "bwd").triton_bwd
    saved = out.transpose(1, 2).contiguous()

    def run() -> tuple[torch.Tensor, ...]:
        return backward(q, k1, k2, v1, v2, saved, dout, lse, w1, w2)

    ours = torch.ops.simplex.attn_backward(
        inputs.dout, None, *inputs.problem, out, lse, w1, w2, **workload.options,
        grad_mask=[True] * 5,
    )  # fmt: skip
    note = agreement([t.transpose(1, 2) for t in run()], ours)
    return Job(run, flops, f"{note}; kernels called directly with our natural lse")


def _refuse(workload: Workload, direction: Direction) -> None:
    if not workload.is_causal or workload.form != "trilinear":
        raise NotRunError("causal, trilinear only")
    if workload.head_dim & (workload.head_dim - 1) or workload.dv != workload.head_dim:
        raise NotRunError("head_dim a power of two, Dv = D only")
    heads, kv_heads = workload.heads, workload.kv_heads
    if direction == "forward" and (kv_heads != 1 or heads < 16 or heads & (heads - 1)):
        raise NotRunError("forward: one kv head, and heads a power of two from 16 up, only")
    if direction == "backward" and (workload.batch, kv_heads, workload.w2) != (1, heads, 32):
        raise NotRunError("backward: batch 1, as many kv heads as heads, and w2 = 32 only")


def _module(path: Path, name: str) -> ModuleType:
    """Load one file of the checkout: the package's own __init__ files are not needed."""
    places = ("", "simplicial_attention", "fbgemm_gpu/experimental/simplicial_attention")
    for place in places:
        file = path / place / "simplicial" / "ops" / "triton" / f"{name}.py"
        if file.exists():
            break
    else:
        raise NotRunError(f"no simplicial/ops/triton/{name}.py under {path}")
    known = f"fbgemm_simplicial_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, file)
        if spec is None or spec.loader is None:
            raise NotRunError(f"cannot load {file}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[known] = module
    return sys.modules[known]
