"""The report's section on `language`: losses, paired differences, and the fit where it is due."""

from collections.abc import Sequence
from pathlib import Path

from tools.experiments import plots, scaling
from tools.experiments.intervals import of_mean
from tools.experiments.language import ARMS
from tools.experiments.lines import Line
from tools.experiments.tables import (
    by,
    dates,
    extremes,
    mean_with_interval,
    of_one_device,
    seeds_in_both,
    side_of_zero,
    table,
)

FIGURE = "language.png"
_PAIRS = (("2-simplicial", "ordinary"), ("2-simplicial", "windowed"), ("windowed", "ordinary"))
_EXPECTED = {
    "2-simplicial − ordinary": "no gain: the paper has one from 2B active parameters on",
    "2-simplicial − windowed": "no gain, likewise",
    "windowed − ordinary": "no gain: it sees less",
}
_CAVEAT = """Files with the content of another are left out; files that are nearly alike may stand
on both sides. Where passes are at most 1, no byte is trained on twice.
"""
_DIFFERENCES = """Paired differences, first minus second, of runs with one seed: the same starting
weights, the same text in the same order, the same FLOPs. Below zero the first is better.
"""
_HEADINGS = (
    "size", "arm", "parameters", "tokens", "PFLOP", "passes", "seeds", "nats a byte [95%]",
    "lowest to highest",
)  # fmt: skip
_PAIRED = ("size", "difference", "seeds", "nats a byte [95%]", "lowest to highest", "came")


def sections(found: list[Line]) -> list[str]:
    """Return the section of one device."""
    return [
        f"{dates(found)}.\n",
        *(_about(text) for text in _texts(found)),
        _CAVEAT,
        table(_HEADINGS, _rows(found)),
        _DIFFERENCES,
        table(_PAIRED, paired_rows(found)),
        *_fits(found),
    ]


def figures(found: list[Line]) -> list[str]:
    return [f"![loss by tokens]({FIGURE})\n"] if found else []


def expectations(found: list[Line]) -> list[tuple[str, str]]:
    """Return (expected, came)."""
    return [
        (f"language, {size}, {pair}: {_EXPECTED[pair]}", f"{mean}: {came}")
        for size, pair, _, mean, _, came in paired_rows(found)
    ]


def paired_rows(found: list[Line]) -> list[list[str]]:
    """Return a row for each size and pair of arms."""
    rows = []
    for size, lines in by(found, _part).items():
        arms = by(lines, _arm)
        for first, second in _PAIRS:
            differences = differences_of(arms.get(first, []), arms.get(second, []))
            if differences:
                rows.append(
                    [
                        size,
                        f"{first} − {second}",
                        str(len(differences)),
                        mean_with_interval(differences, 4, sign="+"),
                        extremes(differences, "+.4f"),
                        side_of_zero(of_mean(differences)),
                    ]
                )
    return rows


def differences_of(first: list[Line], second: list[Line]) -> list[float]:
    """Return the differences of loss, first minus second, of seeds that both have in one text."""
    results = [(a["result"], b["result"]) for a, b in seeds_in_both(first, second)]
    return [a["loss"] - b["loss"] for a, b in results if a["text"]["digest"] == b["text"]["digest"]]


def draw(found: list[Line], folder: Path) -> None:
    """Draw loss by tokens, a panel for each size, of the device that has most lines."""
    if not found:
        return
    panels = {
        size: {
            arm: [line["result"]["curve"] for line in group]
            for arm, group in by(lines, _arm).items()
        }
        for size, lines in by(of_one_device(found), _part).items()
    }
    plots.losses(panels, folder / FIGURE)


def _part(line: Line) -> str:
    return line["part"]


def _arm(line: Line) -> str:
    return line["setting"]["arm"]


def _rows(found: list[Line]) -> list[list[str]]:
    return [
        _row(arms[arm])
        for of_size in by(found, _part).values()
        if (arms := by(of_size, _arm))
        for arm in ARMS
        if arm in arms
    ]


def _texts(found: Sequence[Line]) -> list[dict[str, object]]:
    """Return the listing of each text that was read, once."""
    return list(
        {line["result"]["text"]["digest"]: line["result"]["text"] for line in found}.values()
    )


def _about(text: dict[str, object]) -> str:
    packages = text["packages"]
    assert isinstance(packages, dict)
    listed = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in packages.items())
    return (
        f"Text {text['digest']}: {text['files']:,} files, {text['training_bytes']:,} bytes to "
        f"train on and {text['held_out_bytes']:,} in other files; in MB: {listed}.\n"
    )


def _row(group: list[Line]) -> list[str]:
    results = [line["result"] for line in group]
    losses = [result["loss"] for result in results]
    return [
        group[0]["part"],
        group[0]["setting"]["arm"],
        f"{results[0]['parameters']:,}",
        f"{results[0]['tokens']:,}",
        f"{results[0]['flops'] / 1e15:.3f}",
        f"{results[0]['passes']:.2f}",
        str(len(group)),
        mean_with_interval(losses, 4, least=0.0),
        extremes(losses, ".4f"),
    ]


def _fits(found: list[Line]) -> list[str]:
    """Return the fit of each arm that ran at enough sizes, or why there is none."""
    rows, most = [], 0
    for arm, lines in by(found, _arm).items():
        runs: dict[float, list[float]] = {}
        for line in lines:
            runs.setdefault(float(line["result"]["parameters"]), []).append(line["result"]["loss"])
        most = max(most, len(runs))
        if len(runs) >= scaling.FEWEST_SIZES:
            rows.append([arm, *_fitted(scaling.fit(runs))])
    if not rows:
        few = f"{most} sizes ran, {scaling.FEWEST_SIZES} are needed"
        return [f"L(N) = E + A/N^alpha is not fitted: {few}.\n"]
    headings = ("arm", "E [95%]", "A [95%]", "alpha [95%]", "R²", "residuals by size")
    return ["L(N) = E + A/N^alpha:\n", table(headings, rows)]


def _fitted(fit: scaling.Fit) -> list[str]:
    values = zip(fit[:3], fit[3:6], strict=True)
    return [
        *(f"{value:.4g} [{around.low:.4g}, {around.high:.4g}]" for value, around in values),
        f"{fit.r2:.5f}",
        ", ".join(f"{n:,.0f}: {r:+.4f}" for n, r in fit.residuals.items()),
    ]
