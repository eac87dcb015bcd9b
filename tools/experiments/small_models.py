"""What the reports on `hops` and `match3` share: how runs of small models are told in words."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tools.experiments.intervals import of_share
from tools.experiments.lines import Line
from tools.experiments.tables import by, extremes, mean_with_interval, table, without_seed

Group = list[Line]  # the runs of one setting, a line for each seed


def shape_of(line: Line) -> dict[str, Any]:
    return line["setting"]["shape"]


def of_parts(
    found: Sequence[Line],
    parts: Iterable[str],
    headings: Sequence[str],
    row: Callable[[Group], list[str]],
    place: Callable[[Group], tuple[Any, ...]],
) -> dict[str, list[str]]:
    """Return a heading and a table for each part that has run, its settings in order of place."""
    said = {}
    for part in parts:
        of_part = [line for line in found if line["part"] == part]
        if of_part:
            groups = sorted(by(of_part, without_seed).values(), key=place)
            said[part] = [f"### {part}\n", table(headings, [row(group) for group in groups])]
    return said


def sizes(line: Line) -> list[str]:
    """Return the cells layers, heads, width and parameters."""
    shape = shape_of(line)
    parameters = f"{line['result']['parameters']:,}"
    return [layers_of(line), str(shape["heads"]), str(shape["width"]), parameters]


def accuracies(group: Group) -> list[str]:
    """Return the cells mean accuracy [95%], and lowest to highest."""
    values = [line["result"]["accuracy"] for line in group]
    return [mean_with_interval(values, 3, least=0.0, most=1.0), extremes(values, ".3f")]


def layers_of(line: Line) -> str:
    """Return a small model's layers, as "2 ordinary", and their windows where they are cut."""
    shape = shape_of(line)
    layers = shape["layers"]
    same = len(set(layers)) == 1
    said = f"{len(layers)} {layers[0]}" if same else ", ".join(layers)
    if (shape["w1"], shape["w2"]) == (None, None):
        return said
    return f"{said}, windows {shape['w1'] or 'all'} and {shape['w2'] or 'all'}"


def learned(group: Sequence[Line], of: str = "") -> str:
    """Return "3 of 3 [0.29, 1.00]"."""
    count = sum(line["result"]["learned"] for line in group)
    share = of_share(count, len(group))
    return f"{count} of {len(group)} {of}[{share.low:.2f}, {share.high:.2f}]"


def steps(group: Sequence[Line]) -> str:
    """Return the steps at which runs ended, and their cap."""
    ended = [line["result"]["steps"] for line in group]
    cap = group[0]["setting"]["training"]["steps"]
    if set(ended) == {cap}:
        return f"cap {cap}"
    return f"{', '.join(map(str, ended))}; cap {cap}"


def used(found: Sequence[Line]) -> str:
    """Say how many runs were capped, and what all took."""
    results = [line["result"] for line in found]
    capped = sum(not result["learned"] for result in results)
    minutes = sum(result["seconds"] for result in results) / 60
    return f"{len(results)} runs in {minutes:.1f} minutes; {capped} stopped at their cap of steps."
