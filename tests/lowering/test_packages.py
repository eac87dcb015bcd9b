"""AOTInductor packages for sm_90, built without a GPU: the kernels are inside, no call of ours."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.cpp_extension import CUDA_HOME

pytest.importorskip("triton")

from offline_package import package, packaged

from csrc_free import attn
from lowering.inductor.registered import register

LENGTH = torch.export.Dim("length", min=2, max=8192)


class Attend(nn.Module):
    def forward(self, q, k1, k2, v1, v2):
        out, lse = torch.ops.simplex.attn(q, k1, k2, v1, v2, 128, 16)
        return out.sigmoid(), lse + 1


def inputs_of(heads, kv_heads, seq=512, device="cpu"):
    return tuple(
        torch.randn(2, count, seq, 64, device=device).to(torch.bfloat16)
        for count in (heads, *[kv_heads] * 4)
    )


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(8, 4), (64, 1)], ids=["group of 2", "where Gluon would serve"])
def test_the_kernels_are_in_the_package_and_no_call_of_ours(heads):
    register()
    found = packaged(Attend(), inputs_of(*heads), ({2: LENGTH},) * 5)
    assert "simplex" not in found.calls
    assert "forward_kernel" in found.code


class Differentiate(nn.Module):
    def forward(self, q, k1, k2, v1, v2):
        out, lse = torch.ops.simplex.attn(q, k1, k2, v1, v2, 128, 16)
        return torch.ops.simplex.attn_backward(
            out.sigmoid(), None, q, k1, k2, v1, v2, out, lse, 128, 16
        )


@pytest.mark.long
@pytest.mark.parametrize("heads", [(8, 4), (64, 1)], ids=["group of 2", "where Gluon would serve"])
def test_a_backward_is_in_its_package_too(heads):
    register()
    found = packaged(Differentiate(), inputs_of(*heads), ({2: LENGTH},) * 5)
    assert "simplex" not in found.calls
    for name in ("forward_kernel", "backward_query_kernel", "delta_kernel"):
        assert name in found.code


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_package_is_written_where_there_is_no_gpu(tmp_path, monkeypatch):
    """Linked, where torch has the headers and libraries for it; it runs on any sm_90."""
    if torch.version.cuda is None or not Path(CUDA_HOME or "", "include/cuda.h").exists():
        pytest.skip("needs a CUDA build of torch, and CUDA's headers")
    # The driver's library comes with a driver: a stand-in is linked to.
    source = tmp_path / "driver.c"
    source.write_text("int cuLaunchKernel(void) { return 0; }")
    library = tmp_path / "libcuda.so"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", library]
    subprocess.run(command, check=True)
    monkeypatch.setenv("CPATH", f"{CUDA_HOME}/include")
    monkeypatch.setenv("LIBRARY_PATH", str(tmp_path))
    register()
    path = tmp_path / "attend.pt2"
    package(Attend(), inputs_of(8, 4), ({2: LENGTH},) * 5, path)
    suffixes = {Path(name).suffix for name in zipfile.ZipFile(path).namelist()}
    assert {".so", ".cubin"} <= suffixes


CONTROL = """
import sys, torch
layer, x = torch.nn.Linear(8, 8).cuda(), torch.ones(2, 8, device="cuda")
path = torch._inductor.aoti_compile_and_package(
    torch.export.export(layer, (x,)), package_path=sys.argv[1])
torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), layer(x))
"""
RUN = """
import sys, torch
package, cases = torch._inductor.aoti_load_package(sys.argv[1]), torch.load(sys.argv[2])
for inputs, expected in cases:
    for got, value in zip(package(*inputs), expected, strict=True):
        torch.testing.assert_close(got, value)
assert not {"simplex_ops", "csrc_free", "lowering"} & set(sys.modules)
"""


def _run(script, *arguments):
    """Return the error of a script in a process of its own; empty where it ran."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    # Which vector instructions there are is tried out by compiling for each.
    environment = os.environ | {"TORCHINDUCTOR_VEC_ISA_OK": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=200, env=environment
        )
    except subprocess.TimeoutExpired as late:
        return str(late)
    return done.stderr or "no error was said" if done.returncode else ""


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_package_runs_in_a_process_that_imports_torch_alone(tmp_path):
    error = _run(CONTROL, tmp_path / "control.pt2")
    if error:
        pytest.skip(f"no package of AOTInductor runs here: {error[-200:]}")
    given = [inputs_of(8, 4, seq, "cuda") for seq in (512, 777)]
    program = torch.export.export(Attend(), given[0], dynamic_shapes=({2: LENGTH},) * 5)
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "attend.pt2")
    )
    with attn.portable_alone():
        torch.save([(each, Attend()(*each)) for each in given], tmp_path / "cases.pt")
    assert _run(RUN, path, tmp_path / "cases.pt") == ""
