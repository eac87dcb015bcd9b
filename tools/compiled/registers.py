"""Registers, spills and shared memory of every kernel, compiled offline, in a table.

    python -m tools.compiled.registers            # print what the kernels need now
    python -m tools.compiled.registers --check    # fail where they need more than the table says
    python -m tools.compiled.registers --update   # write the table anew, for the installed triton
    python -m tools.compiled.registers --check --quick    # what CI compiles

It needs triton and no GPU: the launchers run on meta tensors, with the launch choices of each
target, and every kernel that they would launch is compiled instead, on all cores. A run that was
cut short goes on where it stopped. The table is kept for each triton version, since a compiler
release moves every figure: for the pinned one, and for the one that a device's figures are quoted
for. Its digest says which sources were compiled.
"""

import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from simplex_ops.devices import gpu
from tools.workloads import WORKLOADS, Workload, meta_inputs

if TYPE_CHECKING:  # it imports triton, and triton.jit looks at TRITON_INTERPRET
    from csrc_free.traits import Device
    from tools.compiled.launches import Launch

ROOT = Path(__file__).parent.parent.parent
SOURCES = ROOT / "csrc_free"
TABLE = Path(__file__).with_suffix(".json")
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
QUICK = ("sm_80", "sm_90", "gfx942")
# Every kernel, at each tile size, dtype and form that makes it another program: the named
# workloads, and others of the same sizes.
NAMED = ("llama-mqa", "gqa8-2k", "mha", "fp16", "determinant")
_LIKE = WORKLOADS["gqa8-2k"]
OTHERS = (
    replace(_LIKE, name="strassen", form="strassen"),
    WORKLOADS["fp32"],
    replace(_LIKE, name="d256", head_dim=256),
    replace(_LIKE, name="d256-fp32", head_dim=256, dtype=torch.float32),
)
# Where no table was measured, groups change numbers in a kernel and not its tiles.
_SAME_TILES = ("llama-mqa", "mha")


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs: registers a thread, bytes spilled a thread, shared bytes."""

    registers: int
    spills: int
    shared: int


Usages = dict[str, dict[str, Usage]]  # by target, by kernel and workload


def device_of(target: str) -> "Device":
    """Return what launch choices know of a target."""
    from csrc_free.traits import DEVICES

    return DEVICES[target]


def workloads_of(target: str, *, is_quick: bool = False) -> tuple[Workload, ...]:
    """Return the problems whose kernels are compiled for a target."""
    from csrc_free.measured import table

    has_table = table(target) is not None
    named = (WORKLOADS[name] for name in NAMED if has_table or name not in _SAME_TILES)
    return (*named, *(() if is_quick else OTHERS))


def launches(target: str, *, is_quick: bool = False) -> dict[str, "Launch"]:
    """Return every different launch that the workloads make on a target, by name."""
    from csrc_free.attn import portable_alone
    from tools.compiled.launches import recorded

    found: dict[str, Launch] = {}
    for workload in workloads_of(target, is_quick=is_quick):
        for is_portable in (False, True):  # the second adds nothing where none but these serve
            with (
                recorded(device_of(target)) as noted,
                mock.patch.object(gpu, "unserved", return_value=None),
                portable_alone() if is_portable else contextlib.nullcontext(),
            ):
                _run_on_meta(workload)
            for launch in noted:
                if launch not in found.values():
                    name = f"{launch.kernel.__name__} {workload.name}"
                    if launch.kernel.is_gluon():
                        name = f"gluon {name}"
                    same = sum(key.split(" #")[0] == name for key in found)
                    found[name + (f" #{same + 1}" if same else "")] = launch
    return found


def _run_on_meta(workload: Workload) -> None:
    """Run the GPU implementation forward and backward, with shapes and strides alone."""
    inputs = meta_inputs(workload)
    w1, w2, options = workload.w1, workload.w2, workload.options
    out, lse = gpu.attn(*inputs.problem, w1, w2, **options)
    gpu.attn_backward(inputs.dout, None, *inputs.problem, out, lse, w1, w2, **options)


def usage_of(launch: "Launch", target: "Device") -> Usage:
    """Compile one launch for one target and read what the assembler reports."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # a cached kernel has no log
        compiled = launch.compile(
            GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
        )
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


def measure(
    targets: Iterable[str], *, is_quick: bool = False, journal: Path | None = None
) -> tuple[Usages, list[str]]:
    """Compile every launch for each target; return what they need, and what did not compile.

    Each compiles in a worker process: a compiler that aborts takes no more than its pool with it.
    What the journal holds is not compiled again, and what is compiled is written there.
    """
    # Under the interpreter triton.jit makes functions that cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    names = {target: list(launches(target, is_quick=is_quick)) for target in targets}
    usages: Usages = {target: {} for target in names}
    for target, name, usage in _read_journal(journal):
        if name in names.get(target, ()):
            usages[target][name] = usage
    failures: list[str] = []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(min(os.cpu_count() or 1, 8), mp_context=context) as pool,
        Progress(console=Console(stderr=True)) as progress,
    ):
        jobs: dict[Future[Usage], tuple[str, str]] = {
            pool.submit(_compile, target, name): (target, name)
            for target in names
            for name in names[target]
            if name not in usages[target]
        }
        task = progress.add_task("compiling", total=len(jobs))
        for job in as_completed(jobs):
            target, name = jobs[job]
            error = job.exception()
            if error is None:
                usages[target][name] = job.result()
                _append_to_journal(journal, target, name, job.result())
            elif isinstance(error, BrokenProcessPool):
                failures.append(f"{target} {name}: not compiled: a compiler process died")
            else:
                failures.append(f"{target} {name}: {type(error).__name__}: {error}")
            progress.advance(task)
    return usages, failures


def _read_journal(journal: Path | None) -> Iterator[tuple[str, str, Usage]]:
    if journal is not None and journal.exists():
        for line in journal.read_text().splitlines():
            target, name, usage = json.loads(line)
            yield target, name, Usage(**usage)


def _append_to_journal(journal: Path | None, target: str, name: str, usage: Usage) -> None:
    if journal is not None:
        journal.parent.mkdir(exist_ok=True)
        with journal.open("a") as file:
            file.write(json.dumps([target, name, asdict(usage)]) + "\n")


def digest() -> str:
    """Return sixteen hexadecimal digits that change with what decides how a kernel is compiled.

    That is the kernels' package without its comments and spacing, and of the measured tables what
    can change a choice.
    """
    from csrc_free.measured import ROOT as MEASURED
    from csrc_free.measured import read_choosing

    found = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*.py")):
        found.update(f"\0{path.relative_to(SOURCES).as_posix()}\0".encode())
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type in (tokenize.INDENT, tokenize.DEDENT):
                    found.update(bytes([token.type]))
                elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING):
                    found.update(token.string.encode())
    for path in sorted(MEASURED.glob("*.json")):
        found.update(f"\0{path.name}\0{read_choosing(path.read_text())}".encode())
    return found.hexdigest()[:16]


def complaints(
    now: Usages, table: Mapping[str, Mapping[str, Usage]], *, is_quick: bool = False
) -> list[str]:
    """Return what is wrong with `now`: growth over the table, no room, lines without a match.

    Quick, the table may have more lines.
    """
    wrong = []
    for target, kernels in now.items():
        known = table.get(target, {})
        for name, usage in kernels.items():
            limit = device_of(target).shared_limit
            if usage.shared > limit:
                wrong.append(f"{target} {name}: shared memory {usage.shared} is over {limit}")
            if name not in known:
                wrong.append(f"{target} {name}: not in the table; accept it with --update")
                continue
            for what in ("registers", "spills"):
                before, after = getattr(known[name], what), getattr(usage, what)
                if after > before:
                    wrong.append(f"{target} {name}: {what} grew from {before} to {after}")
        gone = () if is_quick else sorted(set(known) - set(kernels))
        wrong += [f"{target} {name}: in the table, but no such kernel" for name in gone]
    return wrong


def versions() -> list[str]:
    """Return the triton versions that have a committed table."""
    return sorted(_tables())


def read_table(version: str) -> dict[str, dict[str, Usage]] | None:
    """Return the committed table of a triton version, or None where there is none."""
    tables = _tables()
    if version not in tables:
        return None
    return {
        target: {name: Usage(**usage) for name, usage in kernels.items()}
        for target, kernels in tables[version]["targets"].items()
    }


def read_digest(version: str) -> str:
    """Return the digest of the sources that a version's table was compiled from."""
    return _tables()[version]["digest"]


def write_table(version: str, sources: str, usages: Usages) -> None:
    """Replace the table of a triton version, and of the targets measured.

    Other targets stay where they were compiled from the same sources, by their digest.
    """
    tables = _tables()
    before = tables.get(version)
    kept = before["targets"] if before is not None and before["digest"] == sources else {}
    for target, kernels in usages.items():
        kept[target] = {name: asdict(usage) for name, usage in sorted(kernels.items())}
    tables[version] = {"digest": sources, "targets": kept}
    text = json.dumps(tables, indent=1, sort_keys=True)
    # A kernel a line: a change of the table then reads as a table.
    text = re.sub(
        r'\{\s+("registers": \d+),\s+("shared": \d+),\s+("spills": \d+)\s+\}', r"{\1, \2, \3}", text
    )
    TABLE.write_text(text + "\n")


def _tables() -> dict[str, Any]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


_launches = functools.cache(launches)


def _compile(target: str, name: str) -> Usage:
    return usage_of(_launches(target)[name], device_of(target))


def main(
    check: Annotated[bool, typer.Option("--check", help="fail where a figure grew")] = False,
    update: Annotated[bool, typer.Option("--update", help="write the table anew")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"the named workloads on {', '.join(QUICK)}")
    ] = False,
    target: Annotated[list[str] | None, typer.Option(help="a target, again for more")] = None,
) -> None:
    """Compile every kernel offline and print its registers, spills and shared memory."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    unknown = sorted(set(target or ()) - set(TARGETS))
    if unknown:
        raise typer.BadParameter(f"no target {unknown}; there are {list(TARGETS)}")
    if quick and update:
        raise typer.BadParameter("--quick compiles a part: --update takes all of a target")
    version = metadata.version("triton")
    before = read_table(version)
    if check and before is None:
        console.print(f"{TABLE.name} has no table for triton {version}: run --update")
        raise typer.Exit(2)
    sources = digest()
    # A check compiles anew, so that it sees what the installed assembler does.
    journal = None if check else ROOT / "out" / f"registers-{version}-{sources}.jsonl"
    chosen = target or (QUICK if quick else TARGETS)
    usages, failures = measure(chosen, is_quick=quick, journal=journal)
    console.print(_rich_table(usages, before or {}, version))
    wrong = failures
    if check and before is not None:
        wrong += complaints(usages, before, is_quick=quick)
        if read_digest(version) != sources:
            wrong.append(f"{TABLE.name} was compiled from other sources: run --update")
    for line in wrong:
        console.print(line, style="red", highlight=False, soft_wrap=True)
    if update and not failures:
        write_table(version, sources, usages)
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
