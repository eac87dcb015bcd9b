"""Time the portable kernels' other tiles on a device, and write what is faster to its table.

    python -m tools.tune                               # every line of the table, and print what won
    python -m tools.tune --kernel forward --write      # and write it to csrc_free/measured/

A line of the table is tuned on the first named workload whose launches it decides. Its candidates
are the neighbours of its config in the kernel's SPACE: one field a step up or down. All of them are
timed in turn, cuDNN's forward of equal FLOPs beside them; one that errs, or gives another answer,
is left out, and one must be faster by a margin to be written. Run it again until nothing changes.
A device without a table begins with another's lines (--like).
"""

import contextlib
import copy
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

import simplex_ops  # noqa: F401  (registers the operators)
from csrc_free import measured
from csrc_free.attn import portable_alone
from csrc_free.portable import backward, forward, keys, pairs, query, wide
from csrc_free.traits import Device, device_of
from simplex_ops.devices import gpu
from simplex_ops.env import environment
from tools.bench.anchors import cudnn_forward
from tools.bench.contest import ours
from tools.bench.peers import agreement
from tools.bench.timing import Times, time_in_turn
from tools.device import device_named
from tools.workloads import WORKLOADS, Direction, Workload, meta_inputs, nominal_flops

SPACES: dict[str, dict[str, tuple[int, ...]]] = {
    "forward": forward.SPACE,
    "wide": wide.SPACE,
    "query": query.SPACE,
    "query_with_parts": query.SPACE,
    "keys": keys.SPACE,
    "pairs": pairs.SPACE,
}
MARGIN = 0.02  # of the time: less is within what two runs of one kernel differ by
_LINE = 200  # characters
CURRENT, YARDSTICK = "as it is", "cudnn fwd"


@dataclass(frozen=True)
class Line:
    """A line of a device's table, and the workload on which it is timed."""

    kernel: str
    number: int
    workload: Workload
    direction: Direction

    def config_in(self, table: Mapping[str, Any]) -> dict[str, int]:
        """Return the line's config in a table."""
        return table["lines"][self.kernel][self.number]["config"]

    def changed(self, table: Mapping[str, Any], config: Mapping[str, int]) -> dict[str, Any]:
        """Return a table in which the line has another config."""
        found = copy.deepcopy(dict(table))
        found["lines"][self.kernel][self.number]["config"] = dict(config)
        return found


def neighbours(
    config: Mapping[str, int], space: Mapping[str, tuple[int, ...]]
) -> Iterator[dict[str, int]]:
    """Yield the configs that differ in one field, by one step of the space."""
    for field, values in space.items():
        here = values.index(config[field])
        for place in (here - 1, here + 1):
            if 0 <= place < len(values):
                yield {**config, field: values[place]}


@contextlib.contextmanager
def deciding(table: Mapping[str, Any]) -> Iterator[None]:
    """Let a table decide launches inside, of the portable kernels alone."""
    choices = (forward.choose, backward.choose)
    with mock.patch.object(measured, "table", return_value=table), portable_alone():
        for choose in choices:
            choose.cache_clear()
        try:
            yield
        finally:
            for choose in choices:
                choose.cache_clear()


def lines_of(table: Mapping[str, Any], device: Device, kernels: list[str]) -> Iterator[Line]:
    """Yield the lines of some kernels that a named workload reaches, with the first of these."""
    left = [(kernel, number) for kernel in kernels for number in range(len(table["lines"][kernel]))]
    for workload in WORKLOADS.values():
        if workload.device != "cuda":
            continue
        for direction in workload.directions:
            before = _launches(table, device, workload, direction)
            for kernel, number in list(left):
                line = Line(kernel, number, workload, direction)
                other = next(neighbours(line.config_in(table), SPACES[kernel]))
                if _launches(line.changed(table, other), device, workload, direction) != before:
                    left.remove((kernel, number))
                    yield line


def _launches(
    table: Mapping[str, Any], device: Device, workload: Workload, direction: Direction
) -> list[object]:
    """Return what a workload would launch on a device under a table, on meta tensors."""
    from tools.compiled.launches import recorded

    inputs = meta_inputs(workload)
    with (
        recorded(device) as noted,
        deciding(table),
        mock.patch.object(gpu, "unserved", return_value=None),
    ):
        windows, options = (workload.w1, workload.w2), workload.options
        out, lse = gpu.attn(*inputs.problem, *windows, **options)
        if direction == "backward":
            noted.clear()
            gpu.attn_backward(inputs.dout, None, *inputs.problem, out, lse, *windows, **options)
    return list(noted)


@dataclass(frozen=True)
class Tuned:
    """What became of a line: who was timed, who could not be, and who is to stand."""

    line: Line
    times: dict[str, Times]
    left_out: dict[str, str]
    winner: str
    config: dict[str, int]

    def rate(self, name: str) -> float:
        """Return nominal TFLOP/s of one that was timed."""
        direction = "forward" if name == YARDSTICK else self.line.direction
        return nominal_flops(self.line.workload, direction) / self.times[name].typical / 1e9

    @property
    def figure(self) -> dict[str, Any]:
        """What the table says of the line: the rate of who stands, and cuDNN's beside it."""
        said: dict[str, Any] = {
            "kernel": self.line.kernel,
            "line": self.line.number,
            "workload": self.line.workload.name,
            "direction": self.line.direction,
            "unit": "nominal TFLOP/s",
            "value": round(self.rate(self.winner)),
        }
        if YARDSTICK in self.times:
            said[YARDSTICK] = round(self.rate(YARDSTICK))
        return said


def tune(line: Line, table: Mapping[str, Any], device: torch.device, seconds: float) -> Tuned:
    """Time a line's neighbours in turn with it, and return which is to stand."""
    now = line.config_in(table)
    configs = {CURRENT: now} | {
        said(now, other): other for other in neighbours(now, SPACES[line.kernel])
    }
    job = ours(line.workload, line.direction, device)
    functions, left_out = {}, {}
    right = None
    for name, config in configs.items():
        function = functools.partial(_run, line.changed(table, config), job.run)
        try:
            got = function()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001  (too large, or no program: the table says how)
            text = str(error).strip().splitlines()
            left_out[name] = f"{type(error).__name__}: {text[0][:80] if text else ''}"
            continue
        right = got if right is None else right
        verdict = agreement(got, right)
        if verdict.startswith("WRONG"):
            left_out[name] = verdict
        else:
            functions[name] = function
    if CURRENT not in functions:
        raise RuntimeError(f"{line.kernel} {line.number}: {left_out[CURRENT]}")
    contest = dict(functions)
    if device.type == "cuda":
        contest[YARDSTICK] = cudnn_forward(line.workload, "forward", device).run
    times = time_in_turn(contest, device, seconds=seconds)
    fastest = min(functions, key=lambda name: times[name].typical)
    is_faster = times[fastest].typical < (1 - MARGIN) * times[CURRENT].typical
    winner = fastest if is_faster else CURRENT
    return Tuned(line, times, left_out, winner, configs[winner])


def _run(table: Mapping[str, Any], run: Any) -> Any:
    with deciding(table):
        return run()


def said(now: Mapping[str, int], other: Mapping[str, int]) -> str:
    """Say what differs between two configs."""
    return ", ".join(f"{field} {other[field]}" for field in now if now[field] != other[field])


def written(
    table: Mapping[str, Any], tuned: list[Tuned], facts: Mapping[str, str | int]
) -> dict[str, Any]:
    """Return the table with what was tuned; a line's figure takes the place of its last one."""
    found = dict(table)
    for one in tuned:
        found = one.line.changed(found, one.config)
    lines = {(one.line.kernel, one.line.number) for one in tuned}
    kept = [f for f in table["figures"] if (f.get("kernel"), f.get("line")) not in lines]
    # A figure that says nothing of them is of the table's device, versions and day.
    of_before = {name: table[name] for name in ("device", "versions", "date")}
    of_now = {
        "device": str(facts["device"]),
        "versions": {name: str(facts[name]) for name in ("torch", "triton")},
        "date": str(facts["date"])[:10],
    }
    differs = {name: value for name, value in of_before.items() if value != of_now[name]}
    found["figures"] = [differs | figure for figure in kept] + [one.figure for one in tuned]
    found |= of_now
    return found


def text_of(value: Any, depth: int = 0) -> str:
    """Return JSON; what fits on a line is on one, unless an object lies in it."""
    flat = json.dumps(value)
    if not isinstance(value, (dict, list)):
        return flat
    inner = value.values() if isinstance(value, dict) else value
    if len(flat) < _LINE and not any(isinstance(v, dict) for v in inner):
        return flat
    pad, end = " " * (depth + 1), " " * depth
    if isinstance(value, dict):
        parts = [f"{pad}{json.dumps(k)}: {text_of(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{end}}}"
    return "[\n" + ",\n".join(pad + text_of(v, depth + 1) for v in value) + f"\n{end}]"


def table_of(one: Tuned) -> Table:
    """Return what was timed for a line, the fastest first, and what was left out."""
    line = one.line
    title = f"{line.kernel} {line.number}, {line.workload.name} {line.direction}"
    table = Table(title=title, title_justify="left")
    for heading in ("tiles", "ms", "+-", "TFLOP/s", "stands"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, times in sorted(one.times.items(), key=lambda item: item[1].typical):
        table.add_row(
            name, f"{times.typical:.3f}", f"{times.spread:.0%}", f"{one.rate(name):.0f}",
            "yes" if name == one.winner else "",
        )  # fmt: skip
    for name, reason in one.left_out.items():
        table.add_row(name, reason)
    return table


def main(
    device: Annotated[str, typer.Option(help="the device to tune for")] = "cuda",
    kernel: Annotated[list[str] | None, typer.Option(help="by name; default: all")] = None,
    line: Annotated[list[int] | None, typer.Option(help="of each kernel; default: all")] = None,
    like: Annotated[str, typer.Option(help="whose lines to begin with where none are")] = "sm_90",
    seconds: Annotated[float, typer.Option(help="timed seconds a line, about")] = 4.0,
    write: Annotated[bool, typer.Option("--write", help="write the device's table")] = False,
    root: Annotated[Path, typer.Option(help="where tables are")] = measured.ROOT,
) -> None:
    """Time the portable kernels' other tiles on a device, and write what is faster to its table."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    unknown = sorted(set(kernel or ()) - set(SPACES))
    if unknown:
        raise typer.BadParameter(f"no kernel {', '.join(unknown)}; there are: {', '.join(SPACES)}")
    where = device_named(device, kinds=("cuda",))
    known = device_of(torch.device("cuda", torch.cuda.current_device()))
    table = measured.table(known.name) or measured.table(like)
    if table is None:
        raise typer.BadParameter(f"--like {like}: there is no such table")
    facts = environment(where)
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), soft_wrap=True)
    tuned = []
    file = root / f"{known.name}.json"
    for one in lines_of(table, known, list(kernel or SPACES)):
        if line and one.number not in line:
            continue
        tuned.append(tune(one, written(table, tuned, facts), where, seconds))
        console.print(table_of(tuned[-1]))
        if write:  # at once: a run that is cut short keeps what it timed
            file.write_text(text_of(written(table, tuned, facts)) + "\n")
        torch.cuda.empty_cache()
    if not tuned:
        raise typer.BadParameter("no named workload reaches such a line")
    changed = [one for one in tuned if one.winner != CURRENT]
    console.print(f"{len(tuned)} lines timed, {len(changed)} changed")
    if write:
        console.print(f"wrote {file}")


if __name__ == "__main__":
    typer.run(main)
