"""The report's section on `match3`: both kinds of layer side by side, and the widths that do."""

import json
from typing import Any

from tools.experiments import match3
from tools.experiments.intervals import of_mean
from tools.experiments.lines import Line
from tools.experiments.tables import (
    by,
    dates,
    extremes,
    layers_of,
    learned,
    mean_with_interval,
    seeds_in_both,
    side_of_zero,
    steps,
    table,
    used,
    without_seed,
)

_HEADINGS = (
    "modulus", "numbers", "layers", "heads", "width", "parameters", "majority",
    "mean accuracy [95%]", "lowest to highest", "learned [95%]", "steps",
)  # fmt: skip
_PAIRED = (
    "modulus", "numbers", "heads", "width", "seeds", "accuracy [95%]", "lowest to highest", "came",
)  # fmt: skip
_WIDTH_PARTS = ("width", "width-of-four")


def sections(found: list[Line]) -> list[str]:
    """Return the section of one device."""
    parts = [f"{dates(found)}. {used(found)}\n"]
    for part in match3.PARTS:
        of_part = [line for line in found if line["part"] == part]
        if of_part:
            groups = sorted(by(of_part, without_seed).values(), key=_place)
            parts += [f"### {part}\n", table(_HEADINGS, [_row(group) for group in groups])]
        if part in _WIDTH_PARTS:
            parts += [f"{said}\n" for said in widths_that_learned(of_part)]
    rows = differences(found)
    if rows:
        parts.append("### One 2-simplicial layer minus one ordinary one, seed by seed\n")
        parts.append(table(_PAIRED, rows))
    return parts


def expectations(found: list[Line]) -> list[tuple[str, str]]:
    """Return (expected, came)."""
    sides = [row[-1] for row in differences(found)]
    came = ", ".join(f"{side} in {sides.count(side)}" for side in dict.fromkeys(sides))
    rows = [("match3: a 2-simplicial layer is above an ordinary one", came or "not run")]
    for part in _WIDTH_PARTS:
        said = widths_that_learned([line for line in found if line["part"] == part])
        rows += [("match3: a 2-simplicial layer succeeds at a smaller width", one) for one in said]
    return rows


def widths_that_learned(found: list[Line]) -> list[str]:
    """Say, for each task, the least width at which every seed of one layer learned."""
    said = []
    for lines in by(found, lambda line: json.dumps(line["setting"]["task"])).values():
        kinds = by(lines, lambda line: _shape(line)["layers"][0])
        least = []
        for kind in (match3.ORDINARY, match3.SIMPLICIAL):
            widths = by(kinds.get(kind, []), lambda line: str(_shape(line)["width"]))
            all_learned = [
                int(width)
                for width, group in widths.items()
                if all(line["result"]["learned"] for line in group)
            ]
            tried = ", ".join(sorted(widths, key=int))
            least.append(f"{kind} at {min(all_learned, default='none')} of {tried}")
        modulus, length = (lines[0]["setting"]["task"][name] for name in ("modulus", "length"))
        said.append(
            f"mod {modulus}, {length} numbers, the least width at which all seeds learned: "
            + "; ".join(least)
        )
    return said


def differences(found: list[Line]) -> list[list[str]]:
    """Return a row for each task, width and heads that both kinds of one layer ran at."""
    single = [line for line in found if len(_shape(line)["layers"]) == 1]
    rows = []
    for lines in sorted(by(single, _without_kind).values(), key=_place):
        kinds = by(lines, lambda line: _shape(line)["layers"][0])
        pairs = seeds_in_both(kinds.get(match3.SIMPLICIAL, []), kinds.get(match3.ORDINARY, []))
        values = [a["result"]["accuracy"] - b["result"]["accuracy"] for a, b in pairs]
        if values:
            rows.append(
                [
                    *_task(lines[0]),
                    str(_shape(lines[0])["heads"]),
                    str(_shape(lines[0])["width"]),
                    str(len(values)),
                    mean_with_interval(values, 3, sign="+"),
                    extremes(values, "+.3f"),
                    side_of_zero(of_mean(values)),
                ]
            )
    return rows


def _place(group: list[Line]) -> tuple[Any, ...]:
    shape, task = _shape(group[0]), group[0]["setting"]["task"]
    kinds = [kind == match3.SIMPLICIAL for kind in shape["layers"]]
    return task["length"], task["modulus"], shape["heads"], shape["width"], len(kinds), kinds


def _row(group: list[Line]) -> list[str]:
    shape = _shape(group[0])
    accuracies = [line["result"]["accuracy"] for line in group]
    return [
        *_task(group[0]),
        layers_of(group[0]),
        str(shape["heads"]),
        str(shape["width"]),
        f"{group[0]['result']['parameters']:,}",
        f"{group[0]['result']['majority']:.3f}",
        mean_with_interval(accuracies, 3, least=0.0, most=1.0),
        extremes(accuracies, ".3f"),
        learned(group),
        steps(group),
    ]


def _task(line: Line) -> tuple[str, str]:
    task = line["setting"]["task"]
    return str(task["modulus"]), str(task["length"])


def _without_kind(line: Line) -> str:
    shape = {k: v for k, v in _shape(line).items() if k != "layers"}
    return json.dumps([line["setting"]["task"], shape, line["setting"]["training"]])


def _shape(line: Line) -> dict[str, Any]:
    return line["setting"]["shape"]
