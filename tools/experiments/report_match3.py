"""The report's section on `match3`: both kinds of layer side by side, and the widths that do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.experiments import match3, plots
from tools.experiments.intervals import of_mean
from tools.experiments.lines import Line
from tools.experiments.small_models import (
    accuracies,
    learned,
    of_parts,
    shape_of,
    sizes,
    steps,
    used,
)
from tools.experiments.tables import (
    by,
    dates,
    extremes,
    mean_with_interval,
    of_one_device,
    seeds_in_both,
    side_of_zero,
    table,
    where,
    without_seed,
)
from tools.experiments.train import ENOUGH

_HEADINGS = (
    "modulus", "numbers", "layers", "heads", "width", "parameters", "majority",
    "mean accuracy [95%]", "lowest to highest", "learned [95%]", "steps",
)  # fmt: skip
_PAIRED = (
    "modulus", "numbers", "heads", "width", "seeds", "accuracy [95%]", "lowest to highest", "came",
)  # fmt: skip
_MAJORITY = "the more frequent answer"
_AXES: dict[str, tuple[str, Callable[[Line], int]]] = {
    "modulus": ("modulus, 8 numbers", lambda line: line["setting"]["task"]["modulus"]),
    "length": (
        "numbers, about as many pairs as residues",
        lambda line: line["setting"]["task"]["length"],
    ),
    "heads": ("heads, 8 numbers mod 37", lambda line: shape_of(line)["heads"]),
    "width": ("width, 8 numbers mod 37", lambda line: shape_of(line)["width"]),
    "width-of-four": ("width, 4 numbers mod 11", lambda line: shape_of(line)["width"]),
}
_WIDTH_PARTS = ("width", "width-of-four")
FIGURE = "match3.png"


def sections(found: list[Line]) -> list[str]:
    """Return the section of one device."""
    parts = [f"{dates(found)}. {used(found)}\n"]
    for part, said in of_parts(found, match3.PARTS, _HEADINGS, _row, _place).items():
        parts += said
        if part in _WIDTH_PARTS:
            parts.append(f"{widths_that_learned(found, part)}.\n")
    rows = differences(found)
    if rows:
        parts.append("### One 2-simplicial layer minus one ordinary one, seed by seed\n")
        parts.append(table(_PAIRED, rows))
    return parts


def figures(found: list[Line]) -> list[str]:
    return [f"![accuracy by modulus, length, heads and width]({FIGURE})\n"] if found else []


def draw(found: list[Line], folder: Path) -> None:
    """Draw the accuracy of one layer by modulus, length, heads and width, a panel each."""
    single = [line for line in of_one_device(found) if len(shape_of(line)["layers"]) == 1]
    if not single:
        return
    pilot = [line for line in single if line["part"] == "pilot"]  # is of all but the last panel
    panels = {}
    for part, (axis, read) in _AXES.items():
        lines = [line for line in single if line["part"] == part]
        lines += pilot if lines and part != "width-of-four" else []
        groups = by(lines, without_seed).values()
        curves: dict[str, dict[int, list[float]]] = {}
        for group in sorted(groups, key=lambda group: read(group[0])):
            kind, at = shape_of(group[0])["layers"][0], read(group[0])
            curves.setdefault(kind, {})[at] = [line["result"]["accuracy"] for line in group]
            curves.setdefault(_MAJORITY, {})[at] = [group[0]["result"]["majority"]]
        if curves:
            panels[axis] = curves
    plots.with_intervals(panels, folder / FIGURE, title=where(single[0]))


def expectations(found: list[Line]) -> list[tuple[str, str]]:
    """Return (expected, came)."""
    sides = [row[-1] for row in differences(found)]
    came = ", ".join(f"{side} in {sides.count(side)}" for side in dict.fromkeys(sides))
    rows = [("match3: a 2-simplicial layer is above an ordinary one", came or "not run")]
    rows += [
        ("match3: a 2-simplicial layer succeeds at a smaller width", widths_that_learned(found, p))
        for p in _WIDTH_PARTS
        if any(line["part"] == p for line in found)
    ]
    return rows


def widths_that_learned(found: list[Line], part: str) -> str:
    """Say the least width at which every seed of one layer learned, of each kind."""
    first = next(line for line in found if line["part"] == part)
    alike = [
        line
        for line in found
        if (line["setting"]["task"], line["setting"]["training"])
        == (first["setting"]["task"], first["setting"]["training"])
        and (len(shape_of(line)["layers"]), shape_of(line)["heads"]) == (1, 1)
    ]
    said = []
    for kind, lines in sorted(by(alike, lambda line: shape_of(line)["layers"][0]).items()):
        widths = by(lines, lambda line: str(shape_of(line)["width"]))
        tried = sorted(map(int, widths))
        succeed = [w for w in tried if all(a["result"]["learned"] for a in widths[str(w)])]
        at = f"at {succeed[0]}" if succeed else "at none"
        said.append(f"{kind} {at} of {', '.join(map(str, tried))}")
    task = first["setting"]["task"]
    return (
        f"{task['length']} numbers mod {task['modulus']}, the least width at which all seeds "
        f"learned: {'; '.join(said)}"
    )


def differences(found: list[Line]) -> list[list[str]]:
    """Return a row for each task, width and heads that both kinds of one layer ran at."""
    single = [line for line in found if len(shape_of(line)["layers"]) == 1]
    rows = []
    for lines in sorted(by(single, _without_kind).values(), key=_place):
        kinds = by(lines, lambda line: shape_of(line)["layers"][0])
        pairs = seeds_in_both(kinds.get(match3.SIMPLICIAL, []), kinds.get(match3.ORDINARY, []))
        values = [a["result"]["accuracy"] - b["result"]["accuracy"] for a, b in pairs]
        if values:
            rows.append(
                [
                    *_task(lines[0]),
                    str(shape_of(lines[0])["heads"]),
                    str(shape_of(lines[0])["width"]),
                    str(len(values)),
                    mean_with_interval(values, 3, sign="+"),
                    extremes(values, "+.3f"),
                    side_of_zero(of_mean(values)),
                ]
            )
    return rows


def _place(group: list[Line]) -> tuple[Any, ...]:
    shape, task = shape_of(group[0]), group[0]["setting"]["task"]
    kinds = [kind == match3.SIMPLICIAL for kind in shape["layers"]]
    return task["length"], task["modulus"], shape["heads"], shape["width"], len(kinds), kinds


def _row(group: list[Line]) -> list[str]:
    majority = group[0]["result"]["majority"]
    return [
        *_task(group[0]),
        *sizes(group[0]),
        f"{majority:.3f}",
        *accuracies(group),
        learned(group) if majority < ENOUGH else "as the majority",
        steps(group),
    ]


def _task(line: Line) -> tuple[str, str]:
    task = line["setting"]["task"]
    return str(task["modulus"]), str(task["length"])


def _without_kind(line: Line) -> str:
    shape = {k: v for k, v in shape_of(line).items() if k != "layers"}
    return json.dumps([line["setting"]["task"], shape, line["setting"]["training"]])
