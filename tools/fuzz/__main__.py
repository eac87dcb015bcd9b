"""Fuzz the operator on a device: hypothesis draws problems over the whole contract.

    python -m tools.fuzz --device cuda --minutes 5
    python -m tools.fuzz --device cpu --minutes 1 --backend aot_eager
    python -m tools.fuzz --device cuda --case "Case(seq=3, w1=2, seed=7)"
    python -m tools.fuzz --hopper families --cases 2000 --at-least 50 --record out/fuzz.json
    python -m tools.fuzz --hopper constants --cases 300

Each case runs forward and backward against the reference in float64, on the device, within the
error budget of `simplex_ops.testing`, and twice, bit for bit. It goes on after a failure, prints a
line that reproduces each, and ends with exit code 1 where there was one.

With --hopper, problems are drawn for the Hopper kernels: "families" from few compile-time
constants, so that there are thousands of cases to a few dozen compilations, "constants" with these
drawn too. The branches that the cases took are counted, and too few of one are a failure. A record
lets such a run go on where another ended.
"""

import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import simplex_ops  # noqa: F401  (registers the operators)
from simplex_ops.contract.checks import FORMS
from simplex_ops.env import environment
from simplex_ops.rules.cache_key import sources
from simplex_ops.testing import Case
from tools.device import device_named
from tools.fuzz.worker import Message, Settings, describe, quieten, run_case, work

GRACE_SECONDS = 60.0  # for the case in hand, a first compilation included


@dataclass
class Failure:
    """One kind of failure: how often it came, and the smallest case that makes it."""

    text: str
    case: Case | None
    count: int = 1

    def offer(self, text: str, case: Case | None) -> None:
        """Keep the case if it is smaller than the one known."""
        if len(repr(case)) < len(repr(self.case)):
            self.text, self.case = text, case


@dataclass
class Tally:
    """What the workers have said so far."""

    passed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    failures: dict[str, Failure] = field(default_factory=dict)
    features: Counter[str] = field(default_factory=Counter)
    branches: Counter[str] = field(default_factory=Counter)
    compiled: set[str] = field(default_factory=set)

    @property
    def failed(self) -> int:
        return sum(failure.count for failure in self.failures.values())

    @property
    def cases(self) -> int:
        return self.passed + self.skipped.total() + self.failed

    def fail(self, kind: str, text: str, case: Case | None) -> bool:
        """Count a failure; return whether its kind is new."""
        known = self.failures.get(kind)
        if known is None:
            self.failures[kind] = Failure(text, case)
            return True
        known.count += 1
        known.offer(text, case)
        return False


def features(case: Case) -> Iterator[str]:
    """Name what a case exercises, for the counts at the end."""
    value_dim = case.head_dim if case.value_dim is None else case.value_dim
    yield f"dtype {str(case.dtype).removeprefix('torch.')}"
    yield f"form {case.form}"
    yield "causal" if case.is_causal else "not causal"
    yield f"layout {case.layout}"
    yield f"bounds {case.bounds}"
    yield f"q_start {case.starts}"
    yield f"group {case.group}"
    yield f"gradient through {case.through}"
    named = {
        "D above 64": case.head_dim > 64,
        "D not a power of two": case.head_dim & (case.head_dim - 1) != 0,
        "Dv not D": value_dim != case.head_dim,
        "N not M": case.seq != max(case.m1, case.m2),
        "M1 not M2": case.m1 != case.m2,
        "w1 below w2": case.w1 is not None and (case.w2 is None or case.w1 < case.w2),
        "w1 above w2": case.w2 is not None and (case.w1 is None or case.w1 > case.w2),
        "an unbounded window": case.w1 is None or case.w2 is None,
        "biases": case.k2_bias != 0 or case.v2_bias != 0,
        "nothing to do": 0 in (case.batch, case.seq, case.m1, case.m2),
        "some gradients only": not all(case.grad_mask),
        "large logits": case.amplitude > 1,
        "N above 64": case.seq > 64,
    }
    yield from (name for name, holds in named.items() if holds)


def fuzz(
    settings: Settings, workers: int, max_failures: int, console: Console,
    tally: Tally | None = None, most_cases: int = 0,
) -> Tally:  # fmt: skip
    """Run the workers until their time is up, or until there are failures or cases enough."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    tally = Tally() if tally is None else tally
    doing: dict[Connection, Case | None] = {}
    processes = []
    for number in range(workers):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(settings, number, there, stop), daemon=True)
        process.start()
        there.close()
        doing[here] = None
        processes.append(process)
    started = time.monotonic()
    limit = started + settings.seconds + settings.shrink_seconds + GRACE_SECONDS
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("fuzz", total=settings.seconds)
        while doing and time.monotonic() < limit:
            for pipe in wait(list(doing), timeout=0.5):
                if isinstance(pipe, Connection):
                    _hear(pipe, doing, tally, progress.console)
            elapsed = time.monotonic() - started
            progress.update(
                task,
                completed=min(elapsed, settings.seconds),
                description=f"{tally.cases} cases, {tally.cases / elapsed:.1f}/s, "
                f"{tally.failed} failed",
            )
            is_enough = 0 < most_cases <= tally.passed
            if (is_enough or tally.failed >= max_failures) and not stop.is_set():
                if not is_enough:
                    progress.console.print(f"{max_failures} failures: no new cases")
                stop.set()
                limit = time.monotonic() + settings.shrink_seconds + GRACE_SECONDS
    for case in doing.values():
        tally.fail("hung", "hung: no answer in time", case)
    for process in processes:
        process.join(timeout=5)
        process.terminate()
    return tally


def _hear(
    pipe: Connection, doing: dict[Connection, Case | None], tally: Tally, console: Console
) -> None:
    """Take one message of a worker into the tally."""
    try:
        message: Message = pipe.recv()
    except EOFError:
        message = Message("lost", text="the process died", failure="the process died")
    case = message.case
    if message.kind == "start":
        doing[pipe] = case
    elif message.kind == "passed" and case is not None:
        tally.passed += 1
        tally.features.update(features(case))
        tally.branches.update(message.branches)
        tally.compiled |= message.compiled
    elif message.kind == "skipped":
        tally.skipped[message.text] += 1
    elif message.kind == "shrunk":
        tally.failures[message.failure].offer(message.text, case)
    elif message.kind in ("failed", "lost"):
        case = doing[pipe] if case is None else case
        if tally.fail(message.failure, message.text, case):
            console.print(f"FAILED {message.text}", style="red", highlight=False, soft_wrap=True)
            console.print(f"  {case!r}", highlight=False, soft_wrap=True, markup=False)
    if message.kind in ("lost", "done"):
        del doing[pipe]


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu; a GPU where there is one")] = "",
    minutes: Annotated[float, typer.Option(min=0, help="how long to draw cases")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="draw the same cases again; default: new")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="eager, or a torch.compile backend: aot_eager, inductor, simplex")
    ] = "eager",
    workers: Annotated[int, typer.Option(min=0, help="processes; 0 is as many as are useful")] = 0,
    max_seq: Annotated[
        int, typer.Option(min=0, help="longest sequence; 0 is 160 on a GPU, else 24")
    ] = 0,
    max_failures: Annotated[int, typer.Option(min=1, help="stop after so many")] = 20,
    shrink_seconds: Annotated[float, typer.Option(min=0, help="for each kind of failure")] = 20.0,
    case: Annotated[str, typer.Option(help="run this one case, a Case(...) expression")] = "",
    hopper: Annotated[str, typer.Option(help="families or constants: see above")] = "",
    most_cases: Annotated[
        int, typer.Option("--cases", min=0, help="stop when so many passed; 0 is never")
    ] = 0,
    at_least: Annotated[int, typer.Option(min=0, help="cases that must take each branch")] = 0,
    record: Annotated[Path | None, typer.Option(help="what earlier runs counted, and this")] = None,
) -> None:
    """Fuzz the operator on a device: hypothesis draws problems over the whole contract."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    where = str(device_named(device))
    is_cpu = where == "cpu"
    if hopper not in ("", "families", "constants"):
        raise typer.BadParameter(f"--hopper is families or constants, got {hopper!r}")
    if backend != "eager" and backend not in torch._dynamo.list_backends(exclude_tags=()):
        raise typer.BadParameter(f"--backend {backend}: torch.compile knows no such backend")
    if case:
        _run_one(case, where, backend, console)
        return
    cores = os.cpu_count() or 1
    # On a GPU most of a case is compiling its kernels, on one core; each context takes about 1 GB.
    workers = workers or (1 if is_cpu else max(1, min(12, cores - 1)))
    settings = Settings(
        device=where,
        backend=backend,
        seconds=60 * minutes,
        shrink_seconds=shrink_seconds,
        max_seq=max_seq or (24 if is_cpu else 160),
        max_work=1_000_000 if is_cpu else 40_000_000 if hopper else 20_000_000,
        seed=int.from_bytes(os.urandom(4), "little") if seed is None else seed,
        threads=max(1, min(4, cores // workers)),
        workers=workers,
        hopper=hopper,
    )
    facts = ", ".join(f"{key} {value}" for key, value in environment(torch.device(where)).items())
    again = f"--seed {settings.seed} --workers {workers}"
    console.print(f"{facts}\n{again}", highlight=False, soft_wrap=True)
    tally = fuzz(settings, workers, max_failures, console, read(record), most_cases)
    if record is not None:
        write(record, tally)
    few = too_few(tally, at_least) if at_least else []
    _say(console, tally, settings)
    for name in few:
        count = (tally.branches + tally.features)[name]
        console.print(f"FAILED {name}: {count} cases, fewer than {at_least}")
    if tally.failures or few:
        raise typer.Exit(1)
    if not tally.passed:
        console.print("no case passed")
        raise typer.Exit(1)


def _say(console: Console, tally: Tally, settings: Settings) -> None:
    """Print what the cases took, how many there were, and a line that reproduces each failure."""
    console.print(_counts("cases that passed, by feature", tally.features))
    if settings.hopper:
        console.print(_counts("cases that passed, by branch of the Hopper kernels", tally.branches))
        kernels = Counter(program.split()[0] for program in tally.compiled)
        counts = ", ".join(f"{count} {name}" for name, count in sorted(kernels.items()))
        console.print(f"{len(tally.compiled)} compilations: {counts}", soft_wrap=True)
    skipped = ", ".join(f"{count} {reason}" for reason, count in tally.skipped.items())
    console.print(
        f"{tally.cases} cases: {tally.passed} passed, {tally.failed} failed"
        + (f", skipped: {skipped}" if skipped else "")
    )
    for failure in tally.failures.values():
        console.print(
            f"FAILED {failure.count} times, {failure.text}; the smallest case:\n"
            f"python -m tools.fuzz --device {settings.device} --backend {settings.backend} "
            f'--case "{failure.case!r}"',
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip


def _run_one(expression: str, device: str, backend: str, console: Console) -> None:
    quieten()
    try:
        case = eval(expression, {"Case": Case, "torch": torch})  # noqa: S307  (the user's own words)
    except Exception as error:
        raise typer.BadParameter(f"--case {expression}: {type(error).__name__}: {error}") from error
    try:
        run_case(case, device, backend)
    except Exception as error:
        console.print(f"FAILED {describe(error)}", highlight=False, soft_wrap=True, markup=False)
        raise
    console.print("passed")


def too_few(tally: Tally, at_least: int) -> list[str]:
    """Return the branches of the Hopper kernels that fewer cases took, forms and strides too."""
    from tools.fuzz.branches import BRANCHES
    from tools.fuzz.families import LAYOUTS

    asked = (*BRANCHES, *(f"form {form}" for form in FORMS), *(f"layout {of}" for of in LAYOUTS))
    counts = tally.branches + tally.features
    return [name for name in asked if counts[name] < at_least]


def read(record: Path | None) -> Tally:
    """Return what earlier runs over the same sources counted."""
    if record is None or not record.exists():
        return Tally()
    found = json.loads(record.read_text())
    if found["sources"] != sources():
        raise typer.BadParameter(f"--record {record}: of other sources; take another file")
    return Tally(
        passed=found["passed"],
        skipped=Counter(found["skipped"]),
        features=Counter(found["features"]),
        branches=Counter(found["branches"]),
        compiled=set(found["compiled"]),
    )


def write(record: Path, tally: Tally) -> None:
    """Write what this run and the ones before it counted; failures are not carried on."""
    said = {
        "sources": sources(),
        "passed": tally.passed,
        "skipped": tally.skipped,
        "features": tally.features,
        "branches": tally.branches,
        "compiled": sorted(tally.compiled),
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(said, indent=1))


def _counts(title: str, found: Counter[str]) -> Table:
    table = Table(title=title)
    columns = 3 if max(map(len, found), default=0) < 30 else 2
    for _ in range(columns):
        table.add_column("feature", no_wrap=True)
        table.add_column("cases", justify="right")
    counts = sorted(found.items())
    height = -(-len(counts) // columns)
    for line in range(height):
        cells = (counts[line + n * height : line + n * height + 1] for n in range(columns))
        table.add_row(
            *(text for c in cells for text in ((c[0][0], str(c[0][1])) if c else ("", "")))
        )
    return table


if __name__ == "__main__":
    typer.run(main)
