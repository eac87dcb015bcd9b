"""Measure the operator on the named workloads, beside anchors and peers, in one run.

    python -m tools.bench --device cuda --json out/bench.jsonl --plot out/bench.png
    python -m tools.bench --device cpu --quick
    python -m tools.bench.report    # RESULTS.md, the picture and README's rows, of results/*.jsonl

Every figure of a row is measured in turn with the others of that row. Rates are nominal FLOPs
(4·B·H·N·D·w1·w2, backward 2.5 times that) over the time: the best on a CPU; on a GPU the median of
runs on end, at the clock that each settles at (`timing`). "after others" is the first ratio again,
to cuDNN's forward, but of runs right behind another contestant's, at the clock that this one left.
Useful rates count the pairs that a query really sees. The aims are fractions of cuDNN's forward
rate on a GPU, of torch.mm's on a CPU, or, of useful rates, of our own on another workload.
"""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import rich.box
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from simplex_ops.env import environment
from tools.bench.aims import AIMS, YARDSTICK, Aim, aim_of
from tools.bench.anchors import copy_rate
from tools.bench.contest import ANCHORS, OURS, Result, Row, field_of, measure
from tools.bench.curves import BANDWIDTH
from tools.bench.plot import Bar, plot_rates
from tools.device import device_named
from tools.workloads import SWEEPS, WORKLOADS, useful_flops


def aim_in(row: Row, rows: Iterable[Row]) -> Aim | None:
    """Return what is aimed at in a row, given the others of the run."""
    name, direction = row.workload.name, row.direction
    found = {r.workload.name: r for r in (*rows, row) if r.direction == direction}

    def useful(name: str) -> float | None:
        row = found.get(name)
        return None if row is None else _useful(row, OURS, row.results.get(OURS, Result()))

    rate = row.results.get(OURS, Result()).rate
    share = row.of(OURS, YARDSTICK[row.workload.device])
    return aim_of(name, direction, None if rate is None else rate / 1e12, share, useful)


def records(row: Row, facts: dict[str, str | int]) -> Iterator[dict[str, object]]:
    """Return one JSON object for each contestant of a row."""
    workload = row.workload
    for name, result in row.results.items():
        times, rate = result.times, result.rate
        yield {
            "workload": workload.name,
            "direction": row.direction,
            "contestant": name,
            "batch": workload.batch,
            "heads": workload.heads,
            "kv_heads": workload.kv_heads,
            "seq": workload.seq,
            "head_dim": workload.head_dim,
            "value_dim": workload.dv,
            "w1": workload.w1,
            "w2": workload.w2,
            "dtype": str(workload.dtype).removeprefix("torch."),
            "layout": workload.layout,
            "is_causal": workload.is_causal,
            "form": workload.form,
            "q_scale": workload.q_scale,
            "ms": times.typical if times else None,
            "statistic": times.statistic if times else None,
            "median_ms": times.median if times else None,
            "best_ms": times.best if times else None,
            "spread": times.spread if times else None,
            "runs": len(times.ms) if times else 0,
            "nominal_tflops": rate / 1e12 if rate else None,
            "useful_tflops": _useful(row, name, result),
            "of": {
                anchor: ratio
                for anchor in ANCHORS
                if anchor != name and (ratio := row.of(name, anchor)) is not None
            },
            "first_of": {
                anchor: ratio
                for anchor in ANCHORS
                if anchor != name and (ratio := row.first_of(name, anchor)) is not None
            },
            "workspace_bytes": result.workspace,
            "note": result.note,
            **facts,
        }


def table_of(rows: list[Row], facts: dict[str, str | int], device: torch.device) -> Table:
    """Return the final table: a line for us and for each peer, a column for each anchor."""
    unit, scale = ("TFLOP/s", 1e12) if device.type == "cuda" else ("GFLOP/s", 1e9)
    columns = ["cudnn fwd", "cudnn bwd", "matmul"] if device.type == "cuda" else ["matmul"]
    title = ", ".join(f"{key} {value}" for key, value in facts.items())
    table = Table(
        title=f"2-simplicial attention, {unit} nominal: {title}",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in ("workload", "direction", "contestant"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "+-", unit, "useful"):
        table.add_column(heading, justify="right", no_wrap=True)
    for anchor in columns:
        table.add_column(anchor, justify="right", no_wrap=True)
        table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("after others", justify="right", no_wrap=True)
    table.add_column("MiB", justify="right", no_wrap=True)
    table.add_column("aim", no_wrap=True)
    table.add_column("note", overflow="fold")
    for row in rows:
        for name, result in row.results.items():
            if name in columns:
                continue
            rates = [row.results.get(anchor, Result()).rate for anchor in columns]
            ratios = [row.of(name, anchor) for anchor in columns]
            table.add_row(
                row.workload.name,
                row.direction,
                name,
                _number(result.times.typical if result.times else None, 3),
                f"{result.times.spread:.0%}" if result.times else "",
                _number(result.rate, 1, scale),
                _number(_useful(row, name, result), 1, scale / 1e12),
                *(
                    text
                    for rate, ratio in zip(rates, ratios, strict=True)
                    for text in (_number(rate, 0, scale), _number(ratio, 2))
                ),
                _number(row.first_of(name, YARDSTICK[device.type]), 2),
                _number(result.workspace, 0, 2**20),
                aim.verdict if name == OURS and (aim := aim_in(row, rows)) else "",
                "; ".join(_notes(row, name, columns)),
            )
    return table


def _notes(row: Row, name: str, columns: list[str]) -> Iterator[str]:
    if row.results[name].note:
        yield row.results[name].note
    if name == OURS:
        for anchor in columns:
            if anchor in row.results and row.results[anchor].note:
                yield f"{anchor} {row.results[anchor].note}"


def _useful(row: Row, name: str, result: Result) -> float | None:
    if result.times is None or name in ("matmul", "cudnn fwd", "cudnn bwd"):
        return None
    return useful_flops(row.workload, row.direction) / (result.times.typical / 1e3) / 1e12


def _number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "" if value is None else f"{value / scale:.{digits}f}"


def _bars(rows: list[Row], device: torch.device) -> list[Bar]:
    scale = 1e12 if device.type == "cuda" else 1e9
    return [
        Bar(f"{row.workload.name} {row.direction}", name, result.rate / scale)
        for row in rows
        for name, result in row.results.items()
        if result.rate is not None and name != "matmul"
    ]


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu; a GPU where there is one")] = "",
    workload: Annotated[
        list[str] | None, typer.Option(help="a workload's name, again for more; default: all")
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="N, G or w1, again for more: see tools.bench.curves")
    ] = None,
    direction: Annotated[str, typer.Option(help="forward, backward or both")] = "both",
    fbgemm: Annotated[
        Path | None, typer.Option(help="a checkout of pytorch/FBGEMM, to run its kernels")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="append a JSON line for each figure here")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="write a bar chart (PNG) here")] = None,
    seconds: Annotated[float, typer.Option(help="timed seconds a row, at most about")] = 3.0,
    max_seconds: Annotated[float, typer.Option(help="start no row after this long")] = 230.0,
    quick: Annotated[bool, typer.Option("--quick", help="three rounds of the first rows")] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="time ours through torch.compile as well")
    ] = False,
) -> None:
    """Measure the operator on the named workloads, beside anchors and peers, in one run."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    where = device_named(device)
    if direction not in ("forward", "backward", "both"):
        raise typer.BadParameter(f"--direction is forward, backward or both, got {direction!r}")
    rows = _rows(workload, direction, where, quick, sweep)
    if quick:
        seconds = min(seconds, 0.3)
    facts = environment(where)
    is_swept = sweep or any(row.workload.name not in WORKLOADS for row in rows)
    if is_swept and where.type == "cuda":
        facts[BANDWIDTH] = round(copy_rate(where) / 1e9)
    started = time.monotonic()
    lines: list[dict[str, object]] = []
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console,
    ) as progress:  # fmt: skip
        task = progress.add_task("bench", total=len(rows))
        for row in rows:
            name = f"{row.workload.name} {row.direction}"
            progress.update(task, description=name)
            builds = field_of(row.workload, row.direction, where, fbgemm, is_compiled_too=compiled)
            if time.monotonic() - started > max_seconds:
                reason = f"not run: --max-seconds {max_seconds:.0f} is spent"
                row.results = {who: Result(note=reason) for who in builds}
            else:
                measure(row, builds, where, seconds, least_rounds=3 if quick else 5)
            new = list(records(row, facts))
            lines += new
            if json_file is not None:
                _append(json_file, new)
            progress.console.print(_progress_line(row, name, where), highlight=False)
            progress.advance(task)
            if where.type == "cuda":
                torch.cuda.empty_cache()
    console.print(table_of(rows, facts, where))
    if plot is not None:
        unit = "TFLOP/s" if where.type == "cuda" else "GFLOP/s"
        console.print(plot_rates(_bars(rows, where), plot, unit=unit, title=str(facts["device"])))
    if all(row.results[OURS].times is None for row in rows):
        console.print("no row of ours ran")
        raise typer.Exit(1)


def _rows(
    names: list[str] | None, direction: str, device: torch.device, quick: bool,
    sweeps: list[str] | None = None,
) -> list[Row]:  # fmt: skip
    if unswept := sorted(set(sweeps or ()) - set(SWEEPS)):
        raise typer.BadParameter(f"no sweep {', '.join(unswept)}; there are: {', '.join(SWEEPS)}")
    swept = {w.name: w for rows in SWEEPS.values() for w in rows.values()}
    known = {**WORKLOADS, **swept}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        said = f"no workload {', '.join(unknown)}; there are: {', '.join(known)}"
        raise typer.BadParameter(said)
    asked = [w.name for name in sweeps or () for w in SWEEPS[name].values()]
    chosen = [known[name] for name in dict.fromkeys([*(names or ()), *asked])]
    chosen = chosen or [w for w in WORKLOADS.values() if w.device == device.type]
    rows = [
        Row(w, d) for w in chosen for d in w.directions if direction in (d, "both")
    ]  # fmt: skip
    if quick and not (names or sweeps):
        rows = [row for row in rows if (row.workload.name, row.direction) in AIMS]
    if not rows:
        raise typer.BadParameter("no workload is left to run")
    return rows


def _progress_line(row: Row, name: str, device: torch.device) -> str:
    result = row.results[OURS]
    if result.times is None:
        return f"{name}: {result.note}"
    ratio = row.of(OURS, YARDSTICK[device.type])
    of = f", {ratio:.2f} of {YARDSTICK[device.type]}" if ratio is not None else ""
    times = result.times
    return f"{name}: {times.typical:.3f} ms, {times.statistic} of {len(times.ms)}{of}"


def _append(file: Path, lines: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    typer.run(main)
