"""Positions at the ends of int32: what an unbounded window sees does not depend on how far."""

import pytest
import torch

from simplex_ops import reference

INT32 = torch.iinfo(torch.int32)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("windows", [(None, None), (None, 3), (3, None), (2, 3), (2**31, 2**31)])
@pytest.mark.parametrize("start", [INT32.max, INT32.min, 2**30 + 5, -(2**30) - 5])
def test_q_start_at_the_ends_of_int32(start, windows, is_causal):
    torch.manual_seed(0)
    given = [torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    bounds = torch.tensor([INT32.min, INT32.max], dtype=torch.int32).expand(2, 5, 2)
    starts = torch.tensor([start, 0], dtype=torch.int32)
    options = {"is_causal": is_causal, "q_start": starts, "kv_bounds": bounds}
    results = []
    for attn in (torch.ops.simplex.attn, reference.attn):
        out, lse = attn(*given, *windows, **options)
        results.append((out, lse, *torch.autograd.grad(out.square().sum(), given)))
    torch.testing.assert_close(*results)
    if (start > 0 or not is_causal) and windows == (None, None):
        assert results[0][1][0].isfinite().all()
