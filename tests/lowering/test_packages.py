"""AOTInductor packages for sm_90, built without a GPU: the kernels are inside, no call of ours."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

pytest.importorskip("triton")

from offline_package import package, packaged
from packages import PROGRAMS
from torch.utils import _pytree as pytree

from csrc_free import attn

KERNELS = {
    "attention": ("forward_kernel",),
    "attention-where-gluon-serves": ("forward_kernel",),
    "backward": ("forward_kernel", "backward_query_kernel", "delta_kernel"),
    "backward-where-gluon-serves": ("forward_kernel", "backward_query_kernel", "delta_kernel"),
    "marked-model": ("forward_kernel",),
    "training-step": ("forward_kernel", "backward_query_kernel", "delta_kernel"),
}
DEAR = ("backward-where-gluon-serves", "training-step")  # beside another of their kind


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name in DEAR else pytest.mark.slow)
        for name in PROGRAMS
    ],
)
def test_the_kernels_are_in_the_package_and_no_call_of_ours(name):
    found = packaged(PROGRAMS[name]().exported())
    assert "simplex" not in found.calls
    for kernel in KERNELS[name]:
        assert kernel in found.code


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_package_is_written_where_there_is_no_gpu(tmp_path):
    """Linked, where torch has the headers and libraries for it; it runs on any sm_90."""
    if torch.version.cuda is None or not Path(CUDA_HOME or "", "include/cuda.h").exists():
        pytest.skip("needs a CUDA build of torch, and CUDA's headers")
    path = tmp_path / "attention.pt2"
    package(PROGRAMS["attention"]().exported(), path)
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
    pairs = zip(package.loader.run(inputs), expected, strict=True)
    errors = [((got.float() - e.float()).norm() / e.float().norm()).item() for got, e in pairs]
    print([f"{error:.1e}" for error in errors])
    # Of float32's gradients of the model, bfloat16's are up to 1.3e-2 apart.
    assert max(errors) <= 3e-2, errors
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
    print(done.stdout)
    return done.stderr or "no error was said" if done.returncode else ""


def _package(name, tmp_path):
    """Return a package: of those made elsewhere, by SIMPLEX_PACKAGES, or made here."""
    made = os.environ.get("SIMPLEX_PACKAGES")
    if made:
        path = Path(made, f"{name}.pt2")
        return path if path.exists() else pytest.skip(f"{made} has no {path.name}")
    error = _run(CONTROL, tmp_path / "control.pt2")
    if error:
        pytest.skip(f"no package of AOTInductor is made here: {error[-200:]}")
    path = tmp_path / f"{name}.pt2"
    package(PROGRAMS[name]().exported(), path)
    return path


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_package_runs_in_a_process_that_imports_torch_alone(name, tmp_path):
    path, program, cases = _package(name, tmp_path), PROGRAMS[name](), []
    for seq in (512, 777):
        given = pytree.tree_map_only(
            torch.Tensor,
            lambda t: t.detach().cuda().requires_grad_(t.requires_grad),
            program.inputs(seq),
        )
        with attn.portable_alone():
            expected = program.eager(given)
        cases.append([[t.detach() for t in pytree.tree_leaves(given)], list(expected)])
    torch.save(cases, tmp_path / "cases.pt")
    assert _run(RUN, path, tmp_path / "cases.pt") == ""
