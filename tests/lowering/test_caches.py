"""The compile caches across processes: hits for the same model, misses for whatever changes it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("csrc_free", "simplex_ops", "lowering")
HIT, MISS = [[1, 0], [2, 0]], [[0, 1], [0, 2]]  # a forward and a backward graph
# A process of its own for what one cannot change in itself; test_backend.py has windows, modules
# and that every file of each package counts.
EXPECTED = {
    "same": HIT,
    "form": MISS,
    "pass": MISS,
    "figures": HIT,  # of a measured table: why a choice is what it is
    "choice": MISS,
    "lowering/inductor/launcher.py": MISS,
}


def run(sources: Path, cache: Path, device: str, *changes: str) -> dict[str, list[list[int]]]:
    """Train a marked model after each change, all in one new process."""
    command = [sys.executable, str(ROOT / "tests/support/cached_run.py"), device, *changes]
    environment = {
        "PYTHONPATH": str(sources),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        # One assembler for all: PyTorch's worker processes take its own, and its main process
        # Triton's, where it has asked for the version before it compiles (DESIGN.md, known limits).
        "TRITON_PTXAS_PATH": str(Path(torch.__file__).parent / "bin" / "ptxas"),
    }
    if not Path(environment["TRITON_PTXAS_PATH"]).exists():
        del environment["TRITON_PTXAS_PATH"]
    done = subprocess.run(
        command, cwd=sources, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return {change: found for change, *found in lines}


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_new_processes_hit_for_the_same_model_and_miss_for_any_other(device, tmp_path):
    sources, cache = tmp_path / "sources", tmp_path / "cache"
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, sources / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    assert run(sources, cache, device, "same") == {"same": MISS}
    kernels = set(cache.rglob("*.cubin"))
    assert bool(kernels) == (device == "cuda")
    assert run(sources, cache, device, "same") == {"same": HIT}
    assert set(cache.rglob("*.cubin")) == kernels  # Triton's own cache hits too
    assert run(sources, cache, device, *EXPECTED) == EXPECTED
