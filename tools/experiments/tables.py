"""What the sections of the report share: groups of lines, where and when they ran, tables."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from math import inf

from tools.experiments.intervals import Interval, of_mean
from tools.experiments.lines import Line


def by(found: Iterable[Line], key: Callable[[Line], str]) -> dict[str, list[Line]]:
    """Return lines in groups of equal keys, in the order of their first ones."""
    groups: dict[str, list[Line]] = {}
    for line in found:
        groups.setdefault(key(line), []).append(line)
    return groups


def where(line: Line) -> str:
    facts = line["environment"]
    return f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}"


def dates(found: Sequence[Line]) -> str:
    days = sorted({line["environment"]["date"][:10] for line in found})
    commits = sorted({line["environment"]["commit"][:12] for line in found})
    return f"{days[0]} to {days[-1]}, commit {', '.join(commits)}"


def table(headings: Iterable[str], rows: list[list[str]]) -> str:
    heads = list(headings)
    every = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in every) + "\n"


def seeds_in_both(first: Iterable[Line], second: Iterable[Line]) -> list[tuple[Line, Line]]:
    """Return the pairs of lines that have one seed."""
    others = {line["setting"]["seed"]: line for line in second}
    return [(a, others[a["setting"]["seed"]]) for a in first if a["setting"]["seed"] in others]


def mean_with_interval(
    values: Sequence[float], digits: int, *, least: float = -inf, most: float = inf, sign: str = ""
) -> str:
    """Return "mean [low, high]", as "0.123 [0.120, 0.126]"."""
    form = f"{sign}.{digits}f"
    around = of_mean(values, least=least, most=most)
    said = f"[{around.low:{form}}, {around.high:{form}}]" if around else "[one seed]"
    return f"{statistics.fmean(values):{form}} {said}"


def side_of_zero(around: Interval | None) -> str:
    """Say on which side of zero an interval of a mean lies, if on one."""
    if around is None:
        return "one seed"
    if around.low > 0:
        return "above zero"
    return "below zero" if around.high < 0 else "zero is within"


def without_seed(line: Line) -> str:
    """Return what the runs of one setting share."""
    return json.dumps({k: v for k, v in line["setting"].items() if k != "seed"}, sort_keys=True)


def of_one_device(found: list[Line]) -> list[Line]:
    """Return the lines of the device that has most of them."""
    return max(by(found, where).values(), key=len, default=[])


def extremes(values: Sequence[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"
