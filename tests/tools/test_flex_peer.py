"""FlexAttention over materialised pairs: its adaptor is right, and says what it cannot run."""

import re

import pytest
import torch

from tools.bench.anchors import NotRunError
from tools.bench.peers import flex
from tools.workloads import WORKLOADS, Workload

SMALL = Workload("pairs", 1, 4, 2, 16, 16, 8, 4, dtype=torch.float32)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Compiling it takes a minute."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize(
    ("direction", "device"),
    [("forward", "cpu"), pytest.param("backward", "cuda", marks=pytest.mark.gpu)],
)
def test_pairs_that_are_stored_give_our_answer(direction, device):
    job = flex.build(SMALL, direction, torch.device(device))
    found = re.search(r"agrees with ours to (\S+)", job.note)
    assert found is not None, job.note
    assert float(found[1].rstrip(";")) < 1e-5
    job.run()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama-mqa", "too many to be materialised"),
        ("two-sided", "causal"),
        ("strassen", "trilinear"),
    ],
)
def test_what_it_cannot_run_is_said(name, reason):
    with pytest.raises(NotRunError, match=reason):
        flex.build(WORKLOADS[name], "forward", torch.device("cpu"))
