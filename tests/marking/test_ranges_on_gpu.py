"""Masks as ranges of keys on a GPU: the same ranges, and an assertion of the device where none."""

import subprocess
import sys

import pytest
import torch

from simplex_ops.marking.ranges import RANGES_OP

pytestmark = pytest.mark.gpu

CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()
HOLE, PADDED = CAUSAL.clone(), CAUSAL.clone()
HOLE[3, 1] = False
PADDED[:, 0] = False
SERVED = {
    "causal": CAUSAL,
    "padded": PADDED,
    "added": torch.zeros(4, 4).masked_fill(~CAUSAL, float("-inf")),
    "smallest": torch.zeros(4, 4).masked_fill(~CAUSAL, torch.finfo(torch.float32).min),
    "each head": torch.stack((CAUSAL, CAUSAL)),
}
REFUSED = {
    "not one range": HOLE,
    "keys after it": ~CAUSAL,
    "from head to head": torch.stack((CAUSAL, HOLE)),
    "as biases do": torch.zeros(4, 4).masked_fill(~CAUSAL, -1e4),
}
# A failed assertion leaves a process without its device.
RUN = """
import sys, torch, simplex_ops
from simplex_ops.marking.ranges import RANGES_OP

def ranges(mask):
    return RANGES_OP(mask, 2, 4, 4) + 1

run = torch.compile(ranges, fullgraph=True) if sys.argv[2] == "compiled" else ranges
mask = torch.load(sys.argv[1]).cuda()
run(mask)
torch.cuda.synchronize()
print("it was served")
"""


@pytest.mark.parametrize("name", SERVED)
def test_the_ranges_are_those_of_the_cpu(name):
    mask = SERVED[name]
    for run in (RANGES_OP, torch.compile(RANGES_OP, fullgraph=True)):
        assert torch.equal(run(mask.cuda(), 2, 4, 4).cpu(), RANGES_OP(mask, 2, 4, 4))


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_range_stops_the_device_and_says_why(reason, how, tmp_path):
    torch.save(REFUSED[reason], tmp_path / "mask.pt")
    command = [sys.executable, "-c", RUN, str(tmp_path / "mask.pt"), how]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode != 0
    assert "it was served" not in done.stdout
    assert "simplex: a mark is not served: its attention mask" in done.stderr
    assert [other for other in REFUSED if other in done.stderr] == [reason]
    assert "unmark() the module" in done.stderr
