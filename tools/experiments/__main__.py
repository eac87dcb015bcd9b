"""Run an experiment, or write the report of all that have run.

    python -m tools.experiments hops --seeds 5
    python -m tools.experiments match3 --device cuda --minutes 9
    python -m tools.experiments language --device cuda --seeds 3 --minutes 9
    python -m tools.experiments cost --device cuda
    python -m tools.experiments report

Results are JSON lines in tools/experiments/results. A run is its setting and its device: what has
its line there is not run again, so a command that was stopped goes on when it is given again. On a
GPU runs of one kind are trained together, and each leaves its line when it ends.
"""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from simplex_ops.env import environment
from tools.device import device_named
from tools.experiments import cost, hops, language, lines, match3, train

EXPERIMENTS: dict[str, Any] = {"hops": hops, "match3": match3, "language": language, "cost": cost}
QUICK_RESULTS = Path("out/experiments")

Run = tuple[str, Any]  # part, setting


class Name(StrEnum):
    hops = "hops"
    match3 = "match3"
    language = "language"
    cost = "cost"
    report = "report"


def main(
    name: Annotated[Name, typer.Argument(help="an experiment, or the report of all")],
    device: Annotated[str, typer.Option(help="cpu, or cuda")] = "cpu",
    seeds: Annotated[int, typer.Option(min=1, help="runs of each setting")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="toy sizes, into out/experiments")] = False,
    part: Annotated[list[str] | None, typer.Option(help="a part, again for more")] = None,
    minutes: Annotated[float, typer.Option(help="start no run after so long")] = float("inf"),
    shard: Annotated[
        str, typer.Option(help="n/of: every of-th stack, from n = 0, for processes side by side")
    ] = "0/1",
    results: Annotated[Path | None, typer.Option(help="folder of the JSON lines")] = None,
    commit: Annotated[str, typer.Option(help="of this code, where it is no checkout")] = "",
) -> None:
    """Run an experiment, or write the report of all that have run."""
    folder = results or (QUICK_RESULTS if quick else lines.RESULTS)
    console = Console(highlight=False)
    if name == Name.report:
        from tools.experiments import report  # it draws, and brings matplotlib

        console.print(report.write(folder), soft_wrap=True)
        return
    experiment = EXPERIMENTS[name.value]
    unknown = sorted(set(part or ()) - set(experiment.PARTS))
    if unknown:
        parts = ", ".join(experiment.PARTS)
        raise typer.BadParameter(f"{name.value} has the parts {parts}, got {', '.join(unknown)}")
    file, where = folder / f"{name.value}.jsonl", device_named(device)
    asked = _stacks(_asked(experiment, seeds, quick, part), where)[slice(*_shard(shard))]
    left = _without_lines(asked, file, where)
    last = time.monotonic() + 60 * minutes
    facts = {**environment(where), "commit": commit or lines.commit()}
    _run(console, name.value, file, left, where, last, facts)


def _run(
    console: Console,
    name: str,
    file: Path,
    left: list[list[Run]],
    device: torch.device,
    last: float,
    facts: dict[str, Any],
) -> None:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        runs = progress.add_task(f"{name}, runs", total=sum(map(len, left)))
        present = progress.add_task("", total=None)
        for stack in left:
            if time.monotonic() > last:
                console.print("out of time: the same command goes on from here")
                break
            said = " and ".join(dict.fromkeys(part for part, _ in stack))
            total = EXPERIMENTS[name].steps(stack[0][1])
            progress.reset(present, total=total, description=f"{said}: starts")

            def watch(step: int, value: float, said: str = said) -> None:
                progress.update(present, completed=step, description=f"{said}: {value:.3f}")

            def leave(n: int, result: dict[str, Any], stack: list[Run] = stack) -> None:
                part, setting = stack[n]
                line = {
                    "experiment": name,
                    "part": part,
                    "setting": lines.plain(setting),
                    "result": result,
                    "environment": facts,
                }
                lines.append(file, line)
                console.print(EXPERIMENTS[name].say(line), soft_wrap=True, markup=False)
                progress.advance(runs)

            _measure(name, [setting for _, setting in stack], device, watch, leave)


def _measure(
    name: str,
    settings: list[Any],
    device: torch.device,
    watch: train.Watch,
    leave: train.Leave,
) -> None:
    if isinstance(settings[0], train.Setting):
        train.train(settings, device, watch, leave)
        return
    for n, setting in enumerate(settings):
        leave(n, EXPERIMENTS[name].measure(setting, device, watch))


def _stacks(asked: list[Run], device: torch.device) -> list[list[Run]]:
    """Return the runs in stacks: those of small models of one kind, and every other run alone."""
    kinds: dict[Any, list[Run]] = {}
    for part, setting in asked:
        kind = train.kind(setting) if isinstance(setting, train.Setting) else setting
        kinds.setdefault(kind, []).append((part, setting))
    most = train.MOST_TOGETHER[device.type]
    return [runs[n : n + most] for runs in kinds.values() for n in range(0, len(runs), most)]


def _asked(experiment: Any, seeds: int, quick: bool, part: list[str] | None) -> list[Run]:
    """Return (part, setting) of every run of the parts, each setting once."""
    asked = {}
    for of_part, setting in experiment.settings(seeds, quick=quick):
        if not part or of_part in part:
            asked.setdefault(setting, of_part)
    return [(of_part, setting) for setting, of_part in asked.items()]


def _without_lines(stacks: list[list[Run]], file: Path, device: torch.device) -> list[list[Run]]:
    """Leave out the runs that have their line on a device of this kind."""
    name = str(environment(device)["device"])
    done = {lines.key(line["setting"], line["environment"]["device"]) for line in lines.read(file)}
    left = [[r for r in s if lines.key(lines.plain(r[1]), name) not in done] for s in stacks]
    return [stack for stack in left if stack]


def _shard(text: str) -> tuple[int, None, int]:
    first, _, of = text.partition("/")
    if not (first.isdigit() and of.isdigit() and int(first) < int(of)):
        raise typer.BadParameter(f"--shard is n/of with n below of, as 0/4, got {text!r}")
    return int(first), None, int(of)


if __name__ == "__main__":
    typer.run(main)
