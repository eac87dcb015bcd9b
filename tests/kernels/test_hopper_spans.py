"""Which queries see a tile of wide keys: on a GPU, and in the interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

pytest.importorskip("triton")

from csrc_free.hopper.key_plan import KEYS
from csrc_free.hopper.spans import spans_of
from csrc_free.problem import problem_of
from simplex_ops.contract.windows import reach
from simplex_ops.testing import Case


@pytest.mark.parametrize("case", [
    Case(batch=2, seq=300, keys1=330, w1=70, w2=9, bounds="documents"),
    Case(batch=2, seq=200, w1=70, w2=300, bounds="wild", is_causal=False),
    Case(batch=3, seq=150, keys2=100, w1=40, w2=5, bounds="ranges", starts="random"),
    Case(batch=2, seq=150, w1=40, w2=5, bounds="padding", starts="end"),
])  # fmt: skip
def test_spans_hold_what_is_seen_and_no_tile_more(case, device):
    """Against the visible pairs themselves."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    q, k1, k2, v1, v2 = case.inputs(device)
    options = case.options(device)
    kv_bounds, q_start = options["kv_bounds"], options["q_start"]
    reach1, reach2 = (reach(w, case.is_causal) for w in case.windows)
    problem = problem_of(
        q, k1, k2, v1, v2, reach1, reach2, 1.0, "trilinear", 0.0, 0.0, kv_bounds, q_start
    )
    spans = spans_of(problem, KEYS)
    assert spans is not None
    found = spans.cpu()
    keys = max(case.m1, case.m2)
    start = torch.full((case.batch,), keys - case.seq) if q_start is None else q_start.cpu()
    position = start[:, None] + torch.arange(case.seq)
    key = torch.arange(keys)
    bounds = kv_bounds.cpu().long()

    def visible(reached, first):
        offset = key - position[..., None]
        seen = (offset >= -reached[0]) & (offset <= reached[1]) & (key >= first)
        return seen & (key >= bounds[..., :1]) & (key < bounds[..., 1:])

    wide_reach, narrow_reach = problem.wide_reach, problem.narrow_reach
    wide = visible(wide_reach, problem.wide_first)
    narrow = visible(narrow_reach, problem.narrow_first)
    for batch in range(case.batch):
        for tile in range(found.shape[1]):
            first = problem.wide_first + tile * KEYS
            sees = wide[batch, :, first : first + KEYS].any(-1) & narrow[batch].any(-1)
            begin, end, narrow_begin, narrow_end, lo, hi = found[batch, tile].tolist()
            if not sees.any():
                assert begin >= end
                continue
            at = sees.nonzero()[:, 0]
            assert (begin, end) == (at[0], at[-1] + 1)
            of_those = narrow[batch, sees].any(0).nonzero()[:, 0]
            assert (narrow_begin, narrow_end) == (of_those[0], of_those[-1] + 1)
            met = bounds[batch, begin:end]
            assert lo == max(0, met[:, 0].max())
            assert hi == min(keys, met[:, 1].min())
