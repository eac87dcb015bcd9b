"""`python -m simplex_ops.env`: what a bug report needs, without waking what it reports on."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import simplex_ops
from simplex_ops import env
from simplex_ops.devices import gpu

ROOT = Path(__file__).parents[1]


def said(**variables: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "simplex_ops.env"],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def test_it_says_what_a_bug_report_needs() -> None:
    facts = said(
        TORCHINDUCTOR_MAX_AUTOTUNE="0", SIMPLEX_FUZZ_EXAMPLES="3", OF_NOBODY_ELSES_BUSINESS="x"
    )
    assert facts["simplex"] == simplex_ops.__version__
    assert facts["torch"] == torch.__version__
    assert facts["triton"] == env.version_of("triton")
    assert facts["python"] == platform.python_version()
    assert facts["os"] == platform.platform()
    assert {"cuda", "hip", "driver", "cpu"} <= set(facts)
    assert facts["cpu is served by"] == "the blocked path in PyTorch operations"
    assert facts["$SIMPLEX_FUZZ_EXAMPLES"] == "3"
    assert facts["$TORCHINDUCTOR_MAX_AUTOTUNE"] == "0"
    assert "$OF_NOBODY_ELSES_BUSINESS" not in facts
    assert len([n for n in facts if n.startswith("cuda:")]) == 2 * torch.cuda.device_count()


def test_each_gpu_is_said_with_what_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    monkeypatch.setattr(env, "serving", lambda device: f"kernels of {device}")
    facts = env.report()
    assert facts["cuda:1"] == "card 1, capability 9.1"
    assert facts["cuda:1 is served by"] == "kernels of cuda:1"


def test_who_serves_is_asked_of_the_operator_and_comes_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    assert env.serving(cpu).endswith("PyTorch operations: no kernel runs on cpu devices")
    monkeypatch.setattr(gpu, "unserved", lambda q, v1: None)
    assert env.serving(cpu) == "the Triton kernels"
    monkeypatch.setitem(sys.modules, "csrc_free.attn", None)  # an import of it fails
    assert env.serving(cpu).startswith("nothing: csrc_free.attn cannot be imported: ModuleNotFound")


def test_a_program_that_finds_no_driver_is_not_quoted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert env.driver() == "none"
