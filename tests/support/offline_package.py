"""AOTInductor packages for a GPU, which need not be there: compiled to the binary, run elsewhere.

AOTInductor learns what the C++ code must know of each kernel by running it once; here that is read
off the compiled kernel. It needs a CUDA build of torch, for its headers and libraries.
"""

import contextlib
import dataclasses
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from gpuless import Compiled, pretended_gpu
from torch.utils.cpp_extension import CUDA_HOME

INDUCTOR = {
    "compile_threads": 1,
    "force_disable_caches": True,
    "use_static_cuda_launcher": False,
    "joint_graph_constant_folding": False,  # it makes the constants
    "cpp.simdlen": 1,  # where it runs the processor may be another
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
}


@dataclasses.dataclass
class Packaged:
    """What AOTInductor wrote: the C++ code, and the calls of operators that it leaves, as JSON."""

    code: str
    calls: str


def package(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write an AOTInductor package of a program, exported on the CPU, for sm_90.

    It takes CUDA's headers, where CUDA_HOME says.
    """
    with _driver_to_link(), _ready(program) as moved:
        torch._inductor.aoti_compile_and_package(
            moved, package_path=str(path), inductor_configs=INDUCTOR
        )


def packaged(program: torch.export.ExportedProgram) -> Packaged:
    """Return what `package` would hand to a C++ compiler, on any build of torch."""
    from torch._inductor import codecache, package

    written: list[Packaged] = []

    def note(
        _graph: Any, code: str, _kernels: str, calls: str | None, **_options: Any
    ) -> list[Any]:
        written.append(Packaged(code, calls or ""))
        return []

    with (
        _ready(program) as moved,
        mock.patch.object(codecache.AotCodeCompiler, "compile", note),
        mock.patch.object(package, "package_aoti", lambda path, _files: path),
    ):
        torch._inductor.aoti_compile_and_package(
            moved, package_path="unwritten.pt2", inductor_configs=INDUCTOR
        )
    (found,) = written
    return found


@contextlib.contextmanager
def _driver_to_link() -> Iterator[None]:
    """Let what is linked find the driver's library, which comes with a driver: a stand-in."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "driver.c"), Path(folder, "libcuda.so")
        source.write_text("int cuLaunchKernel(void) { return 0; }")
        command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", library]
        subprocess.run(command, check=True)
        found = {"CPATH": f"{CUDA_HOME}/include", "LIBRARY_PATH": folder}
        with mock.patch.dict(os.environ, {} if torch.cuda.is_available() else found):
            yield


@contextlib.contextmanager
def _ready(program: torch.export.ExportedProgram) -> Iterator[torch.export.ExportedProgram]:
    """Move a program to a GPU, and let AOTInductor compile it for one inside."""
    from torch.export.passes import move_to_device_pass

    program._example_inputs = None  # they would be moved too
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            notes_kernels = _kernels_noted_unrun()  # it asks for what the pretended GPU replaces
            stack.enter_context(pretended_gpu(Compiled(), to_binary=True))
            stack.enter_context(notes_kernels)
        with torch.no_grad():  # a build of torch without CUDA has no stream to differentiate on
            moved = move_to_device_pass(program, "cuda:0")
        fakes = (node.meta["val"] for node in moved.graph.nodes if node.op == "placeholder")
        given, _ = pytree.tree_unflatten(list(fakes), moved.call_spec.in_spec)
        moved._example_inputs = (given, {})
        yield moved


def _kernels_noted_unrun() -> contextlib.AbstractContextManager[None]:
    from torch._dynamo import device_interface
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.compiler import CompiledKernel

    tuners: list[CachingAutotuner] = []
    make_launchers = CachingAutotuner._make_launchers

    def make_and_note(tuner: CachingAutotuner, *args: Any) -> None:
        make_launchers(tuner, *args)
        tuners.append(tuner)

    def without_handles(kernel: CompiledKernel) -> None:
        vars(kernel).update(
            module=0, function=0, n_regs=0, n_spills=0, n_max_threads=1024, _run=lambda *_: None
        )

    def note_kernels(wrapper: PythonWrapperCodegen) -> None:
        source = wrapper.kernel_autotune_defs.getvalue()
        exec(source + "\nasync_compile.wait(globals())\ndel async_compile\n", {})
        for tuner in tuners:
            if tuner.inductor_meta.get("kernel_name"):
                tuner.save_gpu_kernel(0, tuner.launchers[0])

    @contextlib.contextmanager
    def noted() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for owner, name, value in (
                (CachingAutotuner, "_make_launchers", make_and_note),
                (CompiledKernel, "_init_handles", without_handles),
                (CompiledKernel, "run", property(lambda _: lambda *_: None)),
                (PythonWrapperCodegen, "generate_and_run_autotune_block", note_kernels),
                (device_interface, "DeviceGuard", lambda *_: contextlib.nullcontext()),
            ):
                stack.enter_context(mock.patch.object(owner, name, value))
            yield

    return noted()
