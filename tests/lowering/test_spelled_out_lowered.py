"""Spelled-out attention and repeated keys, compiled for an H100 that is not there."""

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from gpuless import compiled_for_gpu
from spellings import Spelling
from tiny_llama import Attention

import simplex_ops
from csrc_free import attn

# Indexing by None, or ~, would ask for a device that a CPU build of torch does not know.
SPELLINGS = {
    "matmul": Spelling(
        "matmul", "unsqueeze and repeat", "* s", "added", "float32 and back", "none"
    ),
    "groups": Spelling("einsum of groups", "expand", "/ s", "added", "F.softmax", "none"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_is_left_is_our_kernel_and_no_softmax(name):
    module = simplex_ops.mark(Attention(SPELLINGS[name]), window=(5, 3)).bfloat16()

    def make():
        for part in module.modules():
            for key, weight in part._parameters.items():
                if weight is not None:
                    part._parameters[key] = nn.Parameter(
                        torch.empty_like(weight, device="cuda"), requires_grad=False
                    )
        return module, torch.empty(2, 40, 32, dtype=torch.bfloat16, device="cuda")

    with attn.portable_alone(), simplex_ops.enable():
        compiled = compiled_for_gpu(lambda module, x: module(x), make)
    assert len(simplex_ops.last_report().joined) == 1
    (wrapper,) = compiled.wrappers
    assert wrapper.count("forward_kernel_0.run(") == 1
    assert "softmax" not in wrapper
    assert "repeat_interleave" not in wrapper
    assert "extern_kernels.bmm" not in wrapper
