"""AOTInductor packages for sm_90, built without a GPU: the kernels are inside, no call of ours."""

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from offline_package import packaged

from lowering.inductor.registered import register

LENGTH = torch.export.Dim("length", min=2, max=8192)


class Attend(nn.Module):
    def forward(self, q, k1, k2, v1, v2):
        out, lse = torch.ops.simplex.attn(q, k1, k2, v1, v2, 128, 16)
        return out.sigmoid(), lse + 1


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(8, 4), (64, 1)], ids=["group of 2", "where Gluon would serve"])
def test_the_kernels_are_in_the_package_and_no_call_of_ours(heads):
    register()
    q_heads, kv_heads = heads
    inputs = tuple(
        torch.empty(2, count, 512, 64, dtype=torch.bfloat16) for count in (q_heads, *[kv_heads] * 4)
    )
    found = packaged(Attend(), inputs, ({2: LENGTH},) * 5)
    assert "simplex" not in found.calls
    assert "forward_kernel" in found.code
