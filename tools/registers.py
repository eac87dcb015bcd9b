"""Registers and spills of every kernel, compiled offline, in a table that may only shrink.

    python -m tools.registers            # print what the kernels need now
    python -m tools.registers --check    # fail where they need more than tools/registers.json says
    python -m tools.registers --update   # write the table anew, for the installed triton

It needs triton and no GPU: the launchers run on meta tensors, with the launch choices of each
target, and every kernel that they would launch is compiled instead. The table is kept for each
triton version, since a compiler release moves every figure.
"""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from unittest import mock

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from simplex_ops.devices import gpu
from tools.workloads import WORKLOADS, Workload, meta_inputs

if TYPE_CHECKING:  # it imports triton, and triton.jit looks at TRITON_INTERPRET
    from tools.launches import Launch

# Every kernel, at each tile size, dtype and form that makes it another program.
NAMED = ("llama-mqa", "gqa8-2k", "mha", "fp16", "determinant")
TABLE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Target:
    """What Triton compiles for, and the shared memory that one program may have there, in bytes."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166_912),
    "sm_90": Target("cuda", 90, 32, 232_448),
    "sm_100": Target("cuda", 100, 32, 232_448),
    "gfx942": Target("hip", "gfx942", 64, 65_536),
}


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs: registers a thread, bytes spilled a thread, shared bytes."""

    registers: int
    spills: int
    shared: int


Usages = dict[str, dict[str, Usage]]  # by target, by kernel and workload


def launches(target: str) -> dict[str, "Launch"]:
    """Return every different launch that the named workloads make on a target, by name."""
    from csrc_free.launch import Device
    from tools.launches import recorded

    arch = TARGETS[target].arch
    device = Device("cuda", arch) if isinstance(arch, int) else Device("hip", 0)
    found: dict[str, Launch] = {}
    for name in NAMED:
        workload = WORKLOADS[name]
        with recorded(device) as noted, mock.patch.object(gpu, "unserved", return_value=None):
            _run_on_meta(workload)
        for launch in noted:
            if launch not in found.values():
                kernel = launch.kernel.__name__
                same = sum(key.split(" #")[0] == f"{kernel} {name}" for key in found)
                found[f"{kernel} {name}" + (f" #{same + 1}" if same else "")] = launch
    return found


def _run_on_meta(workload: Workload) -> None:
    """Run the GPU implementation forward and backward, with shapes and strides alone."""
    inputs = meta_inputs(workload)
    w1, w2, options = workload.w1, workload.w2, workload.options
    out, lse = gpu.attn(*inputs.problem, w1, w2, **options)
    gpu.attn_backward(inputs.dout, None, *inputs.problem, out, lse, w1, w2, **options)


def usage_of(launch: "Launch", target: Target) -> Usage:
    """Compile one launch for one target and read what the assembler reports."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # a cached kernel has no log
        compiled = launch.compile(GPUTarget(target.backend, target.arch, target.warp_size))
    report = log.getvalue() if target.backend == "cuda" else compiled.asm["amdgcn"]
    registers, spills = (read_ptxas if target.backend == "cuda" else read_amdgcn)(report)
    return Usage(registers, spills, compiled.metadata.shared)


def read_ptxas(log: str) -> tuple[int, int]:
    """Return registers a thread and bytes of spill stores from the log of `ptxas -v`."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores", log)
    if not registers or not spills:
        raise ValueError(f"no register count in ptxas's log: {log[:300]!r}")
    return max(map(int, registers)), sum(map(int, spills))


def read_amdgcn(assembly: str) -> tuple[int, int]:
    """Return vector registers a thread and bytes of vector spills from AMD assembly's metadata."""
    registers = re.findall(r"\.vgpr_count:\s*(\d+)", assembly)
    spills = re.findall(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    if not registers or not spills:
        raise ValueError("no .vgpr_count in the assembly")
    return max(map(int, registers)), 4 * sum(map(int, spills))


def measure(targets: Iterable[str]) -> tuple[Usages, list[str]]:
    """Compile every launch for each target; return what they need, and what did not compile.

    Each compiles in a worker process: a compiler that aborts takes no more than its pool with it.
    """
    # Under the interpreter triton.jit makes functions that cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    usages: Usages = {target: {} for target in targets}
    failures: list[str] = []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(min(os.cpu_count() or 1, 8), mp_context=context) as pool,
        Progress(console=Console(stderr=True)) as progress,
    ):
        jobs: dict[Future[Usage], tuple[str, str]] = {
            pool.submit(_compile, target, name): (target, name)
            for target in usages
            for name in _launches(target)
        }
        task = progress.add_task("compiling", total=len(jobs))
        for job in as_completed(jobs):
            target, name = jobs[job]
            error = job.exception()
            if error is None:
                usages[target][name] = job.result()
            elif isinstance(error, BrokenProcessPool):
                failures.append(f"{target} {name}: not compiled: a compiler process died")
            else:
                failures.append(f"{target} {name}: {type(error).__name__}: {error}")
            progress.advance(task)
    return usages, failures


def complaints(now: Usages, table: Mapping[str, Mapping[str, Usage]]) -> list[str]:
    """Return what is wrong with `now`: growth over the table, no room, lines without a match."""
    wrong = []
    for target, kernels in now.items():
        known = table.get(target, {})
        for name, usage in kernels.items():
            limit = TARGETS[target].shared_limit
            if usage.shared > limit:
                wrong.append(f"{target} {name}: shared memory {usage.shared} is over {limit}")
            if name not in known:
                wrong.append(f"{target} {name}: not in the table; accept it with --update")
                continue
            for what in ("registers", "spills"):
                before, after = getattr(known[name], what), getattr(usage, what)
                if after > before:
                    wrong.append(f"{target} {name}: {what} grew from {before} to {after}")
        gone = sorted(set(known) - set(kernels))
        wrong += [f"{target} {name}: in the table, but no such kernel" for name in gone]
    return wrong


def read_table(version: str) -> dict[str, dict[str, Usage]] | None:
    """Return the committed table of a triton version, or None where there is none."""
    tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if version not in tables:
        return None
    return {
        target: {name: Usage(**usage) for name, usage in kernels.items()}
        for target, kernels in tables[version].items()
    }


def write_table(version: str, usages: Usages) -> None:
    """Replace the table of a triton version, and of the targets measured, leaving the others."""
    tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    kept = tables.setdefault(version, {})
    for target, kernels in usages.items():
        kept[target] = {name: asdict(usage) for name, usage in sorted(kernels.items())}
    TABLE.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n")


_launches = functools.cache(launches)


def _compile(target: str, name: str) -> Usage:
    return usage_of(_launches(target)[name], TARGETS[target])


def main(
    check: Annotated[bool, typer.Option("--check", help="fail where a figure grew")] = False,
    update: Annotated[bool, typer.Option("--update", help="write the table anew")] = False,
    target: Annotated[list[str] | None, typer.Option(help="a target, again for more")] = None,
) -> None:
    """Compile every kernel offline and print its registers, spills and shared memory."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    unknown = sorted(set(target or ()) - set(TARGETS))
    if unknown:
        raise typer.BadParameter(f"no target {unknown}; there are {list(TARGETS)}")
    version = metadata.version("triton")
    before = read_table(version)
    if check and before is None:
        console.print(f"tools/registers.json has no table for triton {version}: run --update")
        raise typer.Exit(2)
    usages, failures = measure(target or TARGETS)
    console.print(_rich_table(usages, before or {}, version))
    wrong = failures + (complaints(usages, before) if check and before is not None else [])
    for line in wrong:
        console.print(line, style="red", highlight=False, soft_wrap=True)
    if update and not failures:
        write_table(version, usages)
        console.print(f"wrote {TABLE.name} for triton {version}")
    if wrong:
        raise typer.Exit(1)


def _rich_table(usages: Usages, before: Mapping[str, Mapping[str, Usage]], version: str) -> Table:
    table = Table(title=f"registers / bytes spilled / shared bytes, triton {version}")
    table.add_column("kernel", no_wrap=True)
    for target in usages:
        table.add_column(target, justify="right", no_wrap=True)
    names = sorted({name for kernels in usages.values() for name in kernels})
    for name in names:
        table.add_row(
            name, *(_cell(usages[t].get(name), before.get(t, {}).get(name)) for t in usages)
        )
    return table


def _cell(usage: Usage | None, before: Usage | None) -> str:
    if usage is None:
        return ""
    text = f"{usage.registers} / {usage.spills} / {usage.shared}"
    if before is not None and usage != before:
        text += f" (was {before.registers} / {before.spills} / {before.shared})"
    return text


if __name__ == "__main__":
    typer.run(main)
