"""The report's section on `hops`: the maps, the accuracies of every part, what was expected."""

import statistics
from pathlib import Path
from typing import Any

from tools.experiments import hops, plots
from tools.experiments.intervals import of_mean
from tools.experiments.lines import Line
from tools.experiments.small_models import (
    accuracies,
    layers_of,
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
    mean_with_interval,
    of_one_device,
    seeds_in_both,
    side_of_zero,
    table,
    where,
    without_seed,
)

MAPS = {4: "hops_map.png", 1: "hops_map_one_head.png"}  # by heads
_HEADINGS = (
    "hops", "layers", "heads", "width", "parameters", "mean accuracy [95%]", "lowest to highest",
    "learned [95%]", "steps", "expected",
)  # fmt: skip
_AHEAD = "hops: none learns more than 2^L − 1, or 3^L − 1 if 2-simplicial"
_HEADS_BACK = (
    "hops: nor, with several heads, more than (3^L − 1)/2, or (5^L − 1)/2; with one head as above "
    "(said after several heads refuted the row above)"
)
_BOTH_WAYS = (
    "hops: nor, with any number of heads, more than (3^L − 1)/2, or (5^L − 1)/2 "
    "(said after one head refuted the row above)"
)


def sections(found: list[Line]) -> list[str]:
    """Return the section of one device."""
    majority = max(line["result"]["majority"] for line in found)
    about = (
        f"Naming the most frequent node always gives at most {majority:.3f}. The wider ordinary "
        "models have about as many parameters as the 2-simplicial ones."
    )
    parts = [f"{dates(found)}. {used(found)} {about}\n"]
    for heads in MAPS:
        mapped = [line for line in found if _is_of_map(line, heads)]
        if mapped:
            parts.append(f"Hops at width 64, heads {heads}: mean accuracy, runs that learned\n")
            parts.append(_map(mapped))
    for said in of_parts(found, hops.PARTS, _HEADINGS, _row, _place).values():
        parts += said
    return parts


def figures(found: list[Line]) -> list[str]:
    """Return the figures of all devices, as `draw` writes them."""
    said = [
        f"![hops by layers, heads {heads}]({file})\n"
        for heads, file in MAPS.items()
        if any(_is_of_map(line, heads) for line in found)
    ]
    if any(line["part"] == "one-layer" for line in found):
        said.append("![two hops, one layer](two_hops.png)\n")
    return said


def expectations(found: list[Line]) -> list[tuple[str, str]]:
    """Return (expected, came) of what none reaches, and of what only 2-simplicial layers do."""
    judged = [(line, within_reach(line)) for line in found]
    beyond = [line for line, within in judged if within is False]
    between = [line for line, within in judged if within and _beyond_ordinary(line)]
    farther = [line for line in beyond if not _within_both_ways(line)]
    of_one_head = [line for line in beyond if shape_of(line)["heads"] == 1 and line not in farther]
    return [
        (_AHEAD, _tally(beyond)),
        (_HEADS_BACK, _tally(farther + of_one_head)),
        (_BOTH_WAYS, _tally(farther)),
        ("hops: 2-simplicial layers learn what is in their reach alone", _tally(between)),
        ("hops: a layer frozen at its zero start does what an ordinary one does", _frozen(found)),
    ]


def draw(found: list[Line], folder: Path) -> None:
    """Draw the learning curves of two hops in one layer, and the maps that have run.

    Each is of the device that has most lines of it.
    """
    two = of_one_device(
        [
            line
            for line in found
            if line["part"] == "one-layer" and line["setting"]["task"]["hops"] == 2
        ]
    )
    if two:
        arms = by(two, lambda line: "{0[layers][0]}, width {0[width]}".format(shape_of(line)))
        plots.curves(
            {arm: [line["result"]["curve"] for line in group] for arm, group in arms.items()},
            folder / "two_hops.png",
            title=f"two hops, one layer: a line for each seed\n{where(two[0])}",
        )
    for heads, name in MAPS.items():
        mapped = of_one_device([line for line in found if _is_of_map(line, heads)])
        if mapped:
            plots.heat_map(
                {
                    kind: {cell: _accuracy(group) for cell, group in cells.items()}
                    for kind, cells in _cells(mapped).items()
                },
                folder / name,
                title=f"mean accuracy over seeds, width 64, heads {heads}; {where(mapped[0])}",
            )


def within_reach(line: Line) -> bool | None:
    """Say whether the argument of `hops` lets a run reach its hops; None where windows are cut."""
    shape = shape_of(line)
    if shape["w1"] is not None or shape["w2"] is not None:
        return None
    return line["setting"]["task"]["hops"] <= hops.reach(tuple(shape["layers"]))


def _within_both_ways(line: Line) -> bool:
    """Say the same of whole windows, where heads may look back."""
    return line["setting"]["task"]["hops"] <= hops.reach_both_ways(tuple(shape_of(line)["layers"]))


def _beyond_ordinary(line: Line) -> bool:
    """Say whether ordinary layers, as many as the run's, are out of reach of its hops."""
    layers: tuple[hops.Kind, ...] = ("ordinary",) * len(shape_of(line)["layers"])
    return line["setting"]["task"]["hops"] > hops.reach(layers)


def _is_of_map(line: Line, heads: int) -> bool:
    """Say whether a run is of the map, whatever part it was first asked for."""
    shape, task = shape_of(line), line["setting"]["task"]
    return (
        task["graph"] == "permutation"
        and (shape["width"], shape["heads"]) == (64, heads)
        and (shape["w1"], shape["w2"]) == (None, None)
        and len(set(shape["layers"])) == 1
        and shape["layers"][0] != "frozen"
    )


def _cells(found: list[Line]) -> dict[str, dict[tuple[int, int], list[Line]]]:
    """Return the runs of each kind of layer, by depth and hops, ordinary first."""
    kinds: dict[str, dict[tuple[int, int], list[Line]]] = {}
    for line in sorted(found, key=lambda line: line["setting"]["task"]["hops"]):
        cell = (len(shape_of(line)["layers"]), line["setting"]["task"]["hops"])
        kinds.setdefault(shape_of(line)["layers"][0], {}).setdefault(cell, []).append(line)
    return dict(sorted(kinds.items(), reverse=True))


def _map(found: list[Line]) -> str:
    across = sorted({line["setting"]["task"]["hops"] for line in found})
    rows = []
    for cells in _cells(found).values():
        for depth in sorted({depth for depth, _ in cells}):
            groups = [cells.get((depth, hop), []) for hop in across]
            name = layers_of(next(group for group in groups if group)[0])
            rows.append([name, *map(_cell, groups)])
    return table(["layers", *(f"{hop}" for hop in across)], rows)


def _cell(group: list[Line]) -> str:
    if not group:
        return ""
    count = sum(line["result"]["learned"] for line in group)
    return f"{_accuracy(group):.2f}, {count}/{len(group)}"


def _accuracy(group: list[Line]) -> float:
    return statistics.fmean(line["result"]["accuracy"] for line in group)


def _tally(found: list[Line]) -> str:
    if not found:
        return "not run"
    rows = by(found, without_seed).values()
    some = sum(any(line["result"]["learned"] for line in group) for group in rows)
    return f"{learned(found, 'runs ')}, in {some} of {len(rows)} settings"


def _frozen(found: list[Line]) -> str:
    """Return the accuracy of frozen layers minus that of ordinary ones, seed by seed."""
    frozen = [line for line in found if shape_of(line)["layers"] == ["frozen"]]
    alike = [_but_layers(line) for line in frozen]
    ordinary = [
        line
        for line in found
        if shape_of(line)["layers"] == ["ordinary"] and _but_layers(line) in alike
    ]
    values = [
        a["result"]["accuracy"] - b["result"]["accuracy"]
        for a, b in seeds_in_both(frozen, ordinary)
    ]
    if not values:
        return "not run"
    return f"{mean_with_interval(values, 3, sign='+')}: {side_of_zero(of_mean(values))}"


def _but_layers(line: Line) -> list[Any]:
    shape = {k: v for k, v in shape_of(line).items() if k != "layers"}
    return [line["setting"]["task"], line["setting"]["training"], shape]


def _place(group: list[Line]) -> tuple[Any, ...]:
    """Return where a row stands: by graph, depth, heads and hops, 2-simplicial last."""
    shape, task = shape_of(group[0]), group[0]["setting"]["task"]
    kinds = [kind == hops.SIMPLICIAL for kind in shape["layers"]]
    sizes = (shape["width"], shape["w1"] or 0, shape["w2"] or 0)
    return task["graph"], len(kinds), shape["heads"], task["hops"], kinds, *sizes


def _row(group: list[Line]) -> list[str]:
    task = group[0]["setting"]["task"]
    return [
        f"{task['hops']}" + (", function" if task["graph"] == "function" else ""),
        *sizes(group[0]),
        *accuracies(group),
        learned(group),
        steps(group),
        _expected(group),
    ]


def _expected(group: list[Line]) -> str:
    within = within_reach(group[0])
    if within is None:
        return ""
    if within:
        return "in reach"
    refuted = "; refuted" if any(line["result"]["learned"] for line in group) else ""
    back = "; in reach looking back" if _within_both_ways(group[0]) else ""
    return "out of reach" + refuted + back
