"""Registers, spills and shared memory of every kernel, compiled offline, in a table.

    python -m tools.compiled.registers            # print what the kernels need now
    python -m tools.compiled.registers --check    # fail where they need more than the table says
    python -m tools.compiled.registers --update   # write the table anew, for the installed triton
    python -m tools.compiled.registers --check --quick    # what CI compiles

It needs triton and no GPU: the launchers run on meta tensors, with the launch choices of each
target, and every kernel that they would launch is compiled instead, on all cores. The table is kept
for each triton version, since a compiler release moves every figure: for the pinned one, and for
the one that a device's figures are quoted for. Each line has the fingerprint of the program that
was compiled: what is still the same is compiled by --check alone, and by that of CI one workload's,
for the assembler's sake. A run that was cut short goes on where it stopped.
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
from dataclasses import asdict, dataclass, fields, replace
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
TABLE = Path(__file__).with_suffix(".json")
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
QUICK = ("sm_80", "sm_90", "gfx942")
# Every kernel, at each tile size, dtype and form that makes it another program: the named
# workloads, and others of the same sizes.
NAMED = ("llama-mqa", "gqa8-2k", "mha", "fp16", "determinant")
_LIKE = WORKLOADS["gqa8-2k"]
OTHERS = (
    replace(_LIKE, name="strassen", form="strassen"),
    WORKLOADS["mqa-fp16"],
    WORKLOADS["fp32"],
    replace(_LIKE, name="d256", head_dim=256),
    replace(_LIKE, name="d256-fp32", head_dim=256, dtype=torch.float32),
)
SAMPLE = "gqa8-2k"  # of NAMED, what a quick check compiles though its programs are known
# Where no table was measured, groups change numbers in a kernel and not its tiles.
_SAME_TILES = ("llama-mqa", "mha")


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs: registers a thread, bytes spilled a thread, shared bytes."""

    registers: int
    spills: int
    shared: int


Usages = dict[str, dict[str, Usage]]  # by target, by kernel and workload
Known = dict[tuple[str, str], Usage]  # by target and fingerprint


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


def fingerprints(target: str) -> dict[str, str]:
    """Return which program each launch on a target is, by its name in the table."""
    from tools.compiled.fingerprint import fingerprint

    return {name: fingerprint(launch) for name, launch in _launches(target).items()}


def measure(
    targets: Iterable[str], *, is_quick: bool = False, known: Known | None = None,
    journal: Path | None = None,
) -> tuple[Usages, list[str]]:  # fmt: skip
    """Compile every launch for each target; return what they need, and what did not compile.

    Each compiles in a worker process: a compiler that aborts takes no more than its pool with it.
    What is known is not compiled again, and what is compiled is written to the journal.
    """
    usages: Usages = {}
    to_compile: list[tuple[str, str]] = []
    for target in targets:
        usages[target] = {}
        for name in launches(target, is_quick=is_quick):
            found = known.get((target, fingerprints(target)[name])) if known else None
            if found is not None:
                usages[target][name] = found
            else:
                to_compile.append((target, name))
    failures: list[str] = []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(min(os.cpu_count() or 1, 8), mp_context=context) as pool,
        Progress(console=Console(stderr=True)) as progress,
    ):
        jobs: dict[Future[Usage], tuple[str, str]] = {
            pool.submit(_compile, target, name): (target, name) for target, name in to_compile
        }
        task = progress.add_task("compiling", total=len(jobs))
        for job in as_completed(jobs):
            target, name = jobs[job]
            error = job.exception()
            if error is None:
                usages[target][name] = job.result()
                if journal is not None:
                    _append(journal, target, fingerprints(target)[name], job.result())
            elif isinstance(error, BrokenProcessPool):
                failures.append(f"{target} {name}: not compiled: a compiler process died")
            else:
                failures.append(f"{target} {name}: {type(error).__name__}: {error}")
            progress.advance(task)
    return usages, failures


def _append(journal: Path, target: str, program: str, usage: Usage) -> None:
    journal.parent.mkdir(exist_ok=True)
    with journal.open("a") as file:
        file.write(json.dumps([target, program, asdict(usage)]) + "\n")


def known_of(version: str, journal: Path) -> Known:
    """Return what a version's table and its journal say, by target and fingerprint."""
    found: Known = {}
    for target, kernels in _tables().get(version, {}).items():
        for line in kernels.values():
            found[target, line["program"]] = _usage_in(line)
    if journal.exists():
        for text in journal.read_text().splitlines():
            target, program, usage = json.loads(text)
            found[target, program] = Usage(**usage)
    return found


def without_sample(known: Known, targets: Iterable[str]) -> Known:
    """Leave out one workload's programs: an assembler that does otherwise than before is seen."""
    sample = {
        (target, program)
        for target in targets
        for name, program in fingerprints(target).items()
        if SAMPLE in name.split()
    }
    return {key: usage for key, usage in known.items() if key not in sample}


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


def read_table(version: str) -> Usages | None:
    """Return the committed table of a triton version, or None where there is none."""
    tables = _tables()
    if version not in tables:
        return None
    return {
        target: {name: _usage_in(line) for name, line in rows.items()}
        for target, rows in tables[version].items()
    }


def _usage_in(line: Mapping[str, Any]) -> Usage:
    return Usage(**{field.name: line[field.name] for field in fields(Usage)})


def read_fingerprints(version: str) -> dict[str, dict[str, str]]:
    """Return which programs a version's table was compiled from, by target and name."""
    return {
        target: {name: line["program"] for name, line in rows.items()}
        for target, rows in _tables()[version].items()
    }


def write_table(version: str, usages: Usages, programs: Mapping[str, Mapping[str, str]]) -> None:
    """Replace the lines of a triton version for the targets measured; others stay."""
    tables = _tables()
    kept = tables.setdefault(version, {})
    for target, kernels in usages.items():
        kept[target] = {
            name: asdict(usage) | {"program": programs[target][name]}
            for name, usage in sorted(kernels.items())
        }
    text = json.dumps(tables, indent=1, sort_keys=True)
    # A kernel a line: a change of the table then reads as a table.
    text = re.sub(r"\{\s+(\"program\"[^{}]*?)\s+\}", _on_one_line, text)
    TABLE.write_text(text + "\n")


def _on_one_line(line: re.Match[str]) -> str:
    return "{" + re.sub(r",\s+", ", ", line[1]) + "}"


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
    # Under the interpreter triton.jit makes functions that cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
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
    journal = ROOT / "out" / f"registers-{version}.jsonl"
    chosen = target or (QUICK if quick else TARGETS)
    known = known_of(version, journal)
    if check:  # compiles anew, so that it sees what the installed assembler does
        known = without_sample(known, chosen) if quick else None
    usages, failures = measure(
        chosen, is_quick=quick, known=known, journal=None if check else journal
    )
    console.print(_rich_table(usages, before or {}, version))
    wrong = failures
    if check and before is not None:
        wrong += complaints(usages, before, is_quick=quick)
    for line in wrong:
        console.print(line, style="red", highlight=False, soft_wrap=True)
    if update and not failures:
        write_table(version, usages, {name: fingerprints(name) for name in usages})
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
