"""The report's sections on `hops` and `match3`: accuracies, and what was expected of them."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.experiments import hops, intervals, plots
from tools.experiments.lines import Line
from tools.experiments.tables import (
    by,
    dates,
    mean_with_interval,
    seeds_in_both,
    side_of_zero,
    table,
    where,
)

_HEADINGS = (
    "task", "layers", "width", "heads", "windows", "parameters", "mean accuracy [95%]",
    "lowest to highest", "majority", "learned [95%]", "steps, cap", "minutes", "expected",
)  # fmt: skip
MAPS = {4: "hops_map.png", 1: "hops_map_one_head.png"}  # by heads
_PAIRED = ("task", "width", "heads", "seeds", "accuracy [95%]", "lowest to highest", "came")


def sections(name: str, found: list[Line]) -> list[str]:
    """Return the section of an experiment, a part for each device."""
    if not found:
        return [f"## {name}\n\nNot run.\n"]
    parts = []
    for place, on_device in by(found, where).items():
        parts.append(f"## {name}: {place}\n\n{dates(on_device)}\n")
        parts.append(_used(on_device))
        rows = [_row(name, group) for group in by(on_device, without_seed).values()]
        parts.append(table(_HEADINGS, rows))
        differences = match3_differences(on_device) if name == "match3" else []
        if differences:
            parts.append("One 2-simplicial layer minus one ordinary one, seed by seed:\n")
            parts.append(table(_PAIRED, differences))
    if name == "hops":
        if any(line["part"] == "one-layer" for line in found):
            parts.append("![two hops, one layer](two_hops.png)\n")
        parts += [
            f"![hops by layers, heads {heads}]({file})\n"
            for heads, file in MAPS.items()
            if any(_is_of_map(line, heads) for line in found)
        ]
    return parts


def draw(found: list[Line], folder: Path) -> None:
    """Draw the learning curves of two hops in one layer, and the maps that have run.

    Each is of the device that has most lines of it.
    """
    two = _of_one_device(
        [
            line
            for line in found
            if line["part"] == "one-layer" and line["setting"]["task"]["hops"] == 2
        ]
    )
    if two:
        arms = by(two, lambda line: "{0[layers][0]}, width {0[width]}".format(_shape(line)))
        plots.curves(
            {arm: [line["result"]["curve"] for line in group] for arm, group in arms.items()},
            folder / "two_hops.png",
            title=f"two hops, one layer: a line for each seed\n{where(two[0])}",
        )
    for heads, name in MAPS.items():
        mapped = _of_one_device([line for line in found if _is_of_map(line, heads)])
        if mapped:
            plots.heat_map(
                _cells(mapped),
                folder / name,
                title=f"mean accuracy over seeds, width 64, heads {heads}; {where(mapped[0])}",
                both_ways=heads > 1,
            )


def _is_of_map(line: Line, heads: int) -> bool:
    """Say whether a run is of the map, whatever part it was first asked for."""
    shape, task = _shape(line), line["setting"]["task"]
    return (
        task["graph"] == "permutation"
        and (shape["width"], shape["heads"]) == (64, heads)
        and (shape["w1"], shape["w2"]) == (None, None)
        and len(set(shape["layers"])) == 1
        and shape["layers"][0] != "frozen"
    )


def _cells(found: list[Line]) -> dict[str, dict[tuple[int, int], float]]:
    """Return the mean accuracies of each kind of layer, by depth and hops."""
    panels = {}
    for kind, of_kind in sorted(by(found, lambda line: _shape(line)["layers"][0]).items()):
        cells: dict[tuple[int, int], list[float]] = {}
        for line in of_kind:
            cell = (len(_shape(line)["layers"]), line["setting"]["task"]["hops"])
            cells.setdefault(cell, []).append(line["result"]["accuracy"])
        panels[kind] = {cell: statistics.fmean(values) for cell, values in cells.items()}
    return dict(reversed(panels.items()))  # ordinary first


def within_reach(line: Line) -> bool | None:
    """Say whether the argument of `hops` lets a run reach its hops; None where windows are cut."""
    shape = _shape(line)
    if shape["w1"] is not None or shape["w2"] is not None:
        return None
    return line["setting"]["task"]["hops"] <= hops.reach(tuple(shape["layers"]))


def within_both_ways(line: Line) -> bool | None:
    """Say the same where heads may look back, which one head does not do beside looking ahead."""
    shape, within = _shape(line), within_reach(line)
    if within is None or shape["heads"] == 1:
        return within
    return line["setting"]["task"]["hops"] <= hops.reach_both_ways(tuple(shape["layers"]))


def beyond_ordinary(line: Line) -> bool:
    """Say whether ordinary layers, as many as the run's, are out of reach of its hops."""
    layers: tuple[hops.Kind, ...] = ("ordinary",) * len(_shape(line)["layers"])
    return line["setting"]["task"]["hops"] > hops.reach(layers)


def match3_differences(found: list[Line]) -> list[list[str]]:
    """Return a row for each task, width and heads that both kinds of one layer ran at."""
    single = [line for line in found if len(_shape(line)["layers"]) == 1]
    rows = []
    for lines in by(single, _without_kind).values():
        kinds = by(lines, lambda line: _shape(line)["layers"][0])
        pairs = seeds_in_both(kinds.get("2-simplicial", []), kinds.get("ordinary", []))
        values = [a["result"]["accuracy"] - b["result"]["accuracy"] for a, b in pairs]
        if values:
            shape = _shape(lines[0])
            rows.append(
                [
                    _task("match3", lines[0]),
                    str(shape["width"]),
                    str(shape["heads"]),
                    str(len(values)),
                    mean_with_interval(values, 3, sign="+"),
                    f"{min(values):+.3f} to {max(values):+.3f}",
                    side_of_zero(intervals.of_mean(values)),
                ]
            )
    return rows


def without_seed(line: Line) -> str:
    return json.dumps({k: v for k, v in line["setting"].items() if k != "seed"}, sort_keys=True)


def _without_kind(line: Line) -> str:
    shape = {k: v for k, v in _shape(line).items() if k != "layers"}
    return json.dumps([line["setting"]["task"], shape, line["setting"]["training"]])


def _used(found: list[Line]) -> str:
    """Say how many runs were capped, and what all took."""
    results = [line["result"] for line in found]
    capped = sum(not result["learned"] for result in results)
    minutes = sum(result["seconds"] for result in results) / 60
    return (
        f"{len(results)} runs in {minutes:.1f} minutes; {capped} stopped at their cap. Runs that "
        "were trained together share their time evenly.\n"
    )


def _of_one_device(found: list[Line]) -> list[Line]:
    """Return the lines of the device that has most of them."""
    return max(by(found, where).values(), key=len, default=[])


def _shape(line: Line) -> dict[str, Any]:
    return line["setting"]["shape"]


def _task(name: str, line: Line) -> str:
    task = line["setting"]["task"]
    if name == "hops":
        return f"{task['hops']} hops, {task['graph']} of {task['nodes']}"
    return f"mod {task['modulus']}, {task['length']} numbers"


def _row(name: str, group: Sequence[Line]) -> list[str]:
    setting = group[0]["setting"]
    shape = setting["shape"]
    results = [line["result"] for line in group]
    accuracies = [result["accuracy"] for result in results]
    learned = sum(result["learned"] for result in results)
    share = intervals.of_share(learned, len(group))
    within = within_reach(group[0]) if name == "hops" else None
    expected = ""
    if within is not None:
        refuted = "; refuted" if learned and not within else ""
        back = "; in reach looking back" if within_both_ways(group[0]) and not within else ""
        expected = ("in reach" if within else "out of reach") + refuted + back
    return [
        _task(name, group[0]),
        ", ".join(shape["layers"]),
        str(shape["width"]),
        str(shape["heads"]),
        f"{shape['w1'] or 'all'}, {shape['w2'] or 'all'}",
        f"{results[0]['parameters']:,}",
        mean_with_interval(accuracies, 3, least=0.0, most=1.0),
        f"{min(accuracies):.3f} to {max(accuracies):.3f}",
        f"{results[0]['majority']:.3f}",
        f"{learned} of {len(group)} [{share.low:.2f}, {share.high:.2f}]",
        f"{', '.join(str(r['steps']) for r in results)}; {setting['training']['steps']}",
        f"{sum(r['seconds'] for r in results) / 60:.1f}",
        expected,
    ]
