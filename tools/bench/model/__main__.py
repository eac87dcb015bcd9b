"""Measure a whole model: a Llama-like one, unmarked and with every fourth layer marked.

    python -m tools.bench.model --device cuda --json out/model.jsonl

Parts: the time to compile, with empty caches all at once, and with full ones each alone (the median
of three processes); training steps of everyone in turn (the median of seven rounds); the host's
time for forward and backward of a small layer; the CPU time of the passes on 32 layers.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from simplex_ops.env import environment
from tools.bench.model import host, pass_time, steps
from tools.bench.model.contestants import (
    EXTERN,
    OURS,
    PLAIN,
    WRITTEN,
    WRITTEN_EXTERN,
    Contestant,
    field_of,
)  # fmt: skip
from tools.bench.model.llama import TOY, Shape
from tools.bench.timing import Times
from tools.device import device_named

Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What is measured, and where; `caches` is the folder of the compile caches."""

    shape: Shape
    device: torch.device
    field: dict[str, Contestant]
    caches: Path


# What each is a part of, and the most of it that we aim at.
STEP_AIM, HOST_AIM, COMPILE_AIMS, PASS_AIM = 1.01, 0.5, {"cold": 1.6, "warm": 1.2}, 50.0
BESIDE = {OURS: EXTERN, WRITTEN: WRITTEN_EXTERN}


def of_compiling(run: Run) -> Iterator[Line]:
    """Return a line for each compiled contestant with empty caches, and for some with full ones."""
    compiled = {name: one for name, one in run.field.items() if one.compiler != "none"}
    given = run.shape, run.device, run.caches
    if not any(run.caches.iterdir()):
        yield from _compiled("cold", compiled, steps.compile_at_once(compiled, *given))
    judged = {name: one for name, one in compiled.items() if not one.is_called}
    yield from _compiled("warm", judged, steps.compile_in_turn(judged, *given))


def _compiled(state: str, who: dict[str, Contestant], found: dict[str, Times]) -> Iterator[Line]:
    for name, times in found.items():
        line: Line = {"part": f"compile, caches {state}", "who": name, "ms": times.median}
        if who[name].compiler == "simplex" and PLAIN in found:
            ratio = times.median / found[PLAIN].median
            line |= {"of": PLAIN, "ratio": ratio, "aim": COMPILE_AIMS[state]}
        yield line


def of_steps(run: Run) -> Iterator[Line]:
    """Return a line for each contestant's training steps."""
    found = steps.measure(run.field, run.shape, run.device, run.caches)
    for name, one in found.items():
        yield {
            "part": "step",
            "who": name,
            "ms": one.times.median,
            "spread": one.times.spread,
            "tokens_per_second": run.shape.tokens / one.times.median * 1e3,
            "peak_bytes": one.peak,
            **_beside(name, {n: s.times.median for n, s in found.items()}, STEP_AIM),
        }


def of_host(run: Run) -> Iterator[Line]:
    """Return a line for each contestant's small call of the operator, and small layer."""
    marked = {name: one for name, one in run.field.items() if one.is_marked}
    for part, what in (("host, operator", host.operator), ("host, layer", host.layer)):
        found = host.measure(what, marked, run.shape, run.device)
        for name, times in found.items():
            yield {
                "part": part, "who": name, "ms": times.median, "spread": times.spread,
                **_beside(name, {n: t.median for n, t in found.items()}, HOST_AIM),
            }  # fmt: skip


def _beside(name: str, medians: dict[str, float], aim: float) -> Line:
    other = BESIDE.get(name)
    if other not in medians:
        return {}
    return {"of": other, "ratio": medians[name] / medians[other], "aim": aim}


def of_passes(run: Run) -> Iterator[Line]:
    """Return a line for each way in which attention is written."""
    for name, ms in pass_time.measure().items():
        yield {"part": "passes, 32 layers", "who": f"attention by {name}", "ms": min(ms),
               "of": "50 ms", "ratio": min(ms) / PASS_AIM, "aim": 1.0}  # fmt: skip


PARTS: dict[str, Callable[[Run], Iterator[Line]]] = {
    "compile": of_compiling,
    "step": of_steps,
    "host": of_host,
    "passes": of_passes,
}


def table_of(lines: list[Line], facts: dict[str, str | int], shape: Shape) -> str:
    """Return the figures as a table of Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in facts.items())
    sizes = ", ".join(f"{key} {value}" for key, value in shape.plain().items())
    head = ("what", "who", "ms", "tokens/s", "peak GiB", "ratio (at most)")
    rows = [head, ("---",) * len(head)]
    for line in lines:
        ratio = f"{line['ratio']:.3f} ({line['aim']:g}) of {line['of']}" if "ratio" in line else ""
        speed, peak = line.get("tokens_per_second"), line.get("peak_bytes")
        rows.append((
            line["part"], line["who"], f"{line['ms']:.4g}",
            f"{speed:,.0f}" if speed else "", f"{peak / 2**30:.2f}" if peak else "", ratio,
        ))  # fmt: skip
    return "\n".join((f"{about}; {sizes}", "", *(f"| {' | '.join(row)} |" for row in rows)))


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu; a GPU where there is one")] = "",
    part: Annotated[
        list[str] | None, typer.Option(help="compile, step, host or passes, again for more")
    ] = None,
    caches: Annotated[
        Path | None, typer.Option(help="keep compile caches here; default: a new folder")
    ] = None,
    who: Annotated[
        list[str] | None, typer.Option(help="a contestant's name, again for more; default: all")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="append a JSON line for each figure here")
    ] = None,
    layers: Annotated[int, typer.Option(help="of the model")] = Shape.layers,
    toy: Annotated[
        bool, typer.Option("--toy", help="a model that two cores train at once")
    ] = False,
) -> None:
    """Measure a Llama-like model, unmarked and with every fourth layer marked."""
    console = Console(width=200, soft_wrap=True)
    where = device_named(device)
    unknown = sorted(set(part or ()) - set(PARTS))
    if unknown:
        raise typer.BadParameter(f"no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    field = {n: one for n, one in field_of(where).items() if n in (who or (n,))}
    if not field:
        raise typer.BadParameter(f"no such contestant; there are: {', '.join(field_of(where))}")
    shape = TOY if toy else Shape(layers=layers)
    facts, lines, failed = environment(where), [], False
    with tempfile.TemporaryDirectory() as folder:
        kept = caches or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        run = Run(shape, where, field, kept)
        for name in part or PARTS:
            try:
                for line in PARTS[name](run):
                    lines.append(line)
                    if json_file is not None:
                        _append(json_file, {**line, **shape.plain(), **facts})
            except Exception as error:  # noqa: BLE001 (the other parts have their figures)
                console.print(f"{name}: {type(error).__name__}: {error}", highlight=False)
                failed = True
    console.print(table_of(lines, facts, shape), highlight=False)
    if failed:
        raise typer.Exit(1)


def _append(file: Path, line: Line) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    typer.run(main)
