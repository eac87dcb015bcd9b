"""`import simplex_ops` is all a user writes: it must be cheap and need neither triton nor a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BLOCKED = ("triton", "hypothesis", "transformers", "numba", "einops", "torch._inductor")

# What torch needs to load is torch's; only what simplex_ops adds is judged.
MEASURE = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import simplex_ops
seconds = time.process_time() - start
new, cuda = sorted(set(sys.modules) - before), torch.cuda.is_initialized()
print(json.dumps({"seconds": seconds, "new": new, "cuda": cuda}))
"""

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""

ATTEND = """
import torch, simplex_ops
q, k1, k2, v1, v2 = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(5))
out, lse = torch.ops.simplex.attn(q, k1, k2, v1, v2, 3, 2)
(out.sum() + lse.sum()).backward()
assert all(t.grad.isfinite().all() for t in (q, k1, k2, v1, v2))
assert "triton" not in sys.modules
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def measure() -> dict[str, Any]:
    return json.loads(run(MEASURE))


def test_import_adds_no_heavy_module_and_does_not_initialise_cuda() -> None:
    said = measure()
    heavy = [name for name in said["new"] if name.startswith(BLOCKED)]
    assert not heavy, f"import simplex_ops imported {heavy}"
    assert not [name for name in said["new"] if name.startswith(("csrc_free", "lowering"))]
    assert not said["cuda"]


def test_import_takes_under_a_fifth_of_a_second_of_processor_time_beyond_torch() -> None:
    # Neighbours on the machine add to that, too, if less than to the time of day.
    seconds = []
    for _ in range(7):
        seconds.append(measure()["seconds"])
        if seconds[-1] < 0.2:
            return
    pytest.fail(f"import simplex_ops takes {min(seconds):.2f} s beyond import torch, at most 0.2")


def test_operator_runs_and_every_module_imports_where_triton_is_missing() -> None:
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "simplex_ops").rglob("*.py")
    )
    imports = f"import importlib\nfor name in {modules}: importlib.import_module(name)"
    run(BLOCK + ATTEND + imports)


@pytest.mark.gpu  # elsewhere no test sees one
def test_operator_runs_where_no_gpu_is_visible() -> None:
    run("import sys" + ATTEND.replace('assert "triton" not in sys.modules', ""),
        CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("first", ["simplex_ops", "torch.utils.flop_counter"])
def test_flops_are_counted_whichever_is_imported_first(first: str) -> None:
    count = """
import torch, simplex_ops
from torch.utils.flop_counter import FlopCounterMode
q = torch.randn(1, 2, 1, 8)
with FlopCounterMode(display=False) as counter:
    torch.ops.simplex.attn(q, q, q, q, q)
assert counter.get_total_flops() == 2 * (8 + 8) * 2, counter.get_total_flops()
"""
    run(f"import {first}" + count)
