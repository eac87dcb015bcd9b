"""Figures of the experiments, as PNG files."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.experiments.intervals import of_mean

Cells = Mapping[tuple[int, int], float]  # (depth, hops): mean accuracy


# Hops in reach of L layers looking ahead, and looking back too; a line's style.
_REACH = {
    "2^L − 1": (lambda depth: 2**depth - 1, "k--"),
    "3^L − 1": (lambda depth: 3**depth - 1, "r-"),
    "(3^L − 1) / 2": (lambda depth: (3**depth - 1) / 2, "k:"),
    "(5^L − 1) / 2": (lambda depth: (5**depth - 1) / 2, "r:"),
}


def heat_map(arms: Mapping[str, Cells], file: Path, *, title: str) -> None:
    """Draw accuracy by hops and depth, a panel for each arm, and the curves of what is in reach."""
    figure = Figure(figsize=(4.6 * len(arms), 3.2), layout="constrained")
    panels = figure.subplots(1, len(arms), squeeze=False)[0]
    depths = sorted({depth for cells in arms.values() for depth, _ in cells})
    hops = sorted({hop for cells in arms.values() for _, hop in cells})
    image = None
    for axes, (name, cells) in zip(panels, arms.items(), strict=True):
        table = [[cells.get((d, h), float("nan")) for h in hops] for d in depths]
        image = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", origin="lower", aspect="auto")
        for label, (reach, style) in _REACH.items():
            edges = [sum(h <= reach(d) for h in hops) - 0.5 for d in depths]
            heights = [n + half for n in range(len(depths)) for half in (-0.5, 0.5)]
            axes.plot([edge for edge in edges for _ in (0, 1)], heights, style, label=label)
        for (d, h), value in cells.items():
            place = (hops.index(h), depths.index(d))
            ink = "black" if value > 0.6 else "white"
            axes.annotate(f"{value:.2f}", place, ha="center", va="center", fontsize=7, color=ink)
        axes.set_xticks(range(len(hops)), [str(h) for h in hops])
        axes.set_yticks(range(len(depths)), [str(d) for d in depths])
        axes.set(xlabel="hops", ylabel="layers, L", title=name)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=list(panels), label="accuracy")
    figure.suptitle(title, fontsize=9)
    save(figure, file)


def curves(
    lines: Mapping[str, Sequence[Sequence[tuple[int, float]]]], file: Path, *, title: str
) -> None:
    """Draw accuracy by steps: a colour for each arm, a line for each seed."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes: Axes = figure.subplots()
    for place, (name, seeds) in enumerate(lines.items()):
        for n, curve in enumerate(seeds):
            axes.plot(
                [step for step, _ in curve],
                [accuracy for _, accuracy in curve],
                color=mpl.colormaps["tab10"](place),
                linewidth=1.2,
                label=name if n == 0 else None,
            )
    axes.set(xlabel="steps", ylabel="accuracy on held-out batches", ylim=(0, 1.02))
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, file)


def losses(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[tuple[int, float]]]]], file: Path
) -> None:
    """Draw loss by tokens: a panel for each size, a colour for each arm, a line for each seed."""
    figure = Figure(figsize=(3.4 * len(panels), 3.2), layout="constrained")
    places = sorted({arm for arms in panels.values() for arm in arms})
    for axes, (size, arms) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for arm, seeds in sorted(arms.items()):
            for n, curve in enumerate(seeds):
                axes.plot(
                    [tokens / 1e6 for tokens, _ in curve],
                    [loss for _, loss in curve],
                    color=mpl.colormaps["tab10"](places.index(arm)),
                    linewidth=0.8,
                    label=arm if n == 0 else None,
                )
        axes.set(xlabel="tokens, millions", ylabel="held-out loss, nats a byte", title=size)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    save(figure, file)


def with_intervals(
    panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]], file: Path, *, title: str
) -> None:
    """Draw mean accuracy with its interval over seeds, a panel for each axis, a colour an arm."""
    figure = Figure(figsize=(3.1 * len(panels), 3.2), layout="constrained")
    for axes, (name, arms) in zip(
        figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels.items(), strict=True
    ):
        for arm, points in arms.items():
            means = [statistics.fmean(values) for values in points.values()]
            around = [of_mean(values, least=0.0, most=1.0) for values in points.values()]
            reach = [
                (mean - i.low, i.high - mean) if i else (0.0, 0.0)
                for mean, i in zip(means, around, strict=True)
            ]
            low_and_high = list(zip(*reach, strict=True))
            axes.errorbar(list(points), means, low_and_high, capsize=2, linewidth=1, label=arm)
        axes.set(xlabel=name, ylim=(0.45, 1.02), xscale="log")
        ticks = sorted({at for points in arms.values() for at in points})
        axes.set_xticks(ticks, [str(at) for at in ticks], fontsize=7)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy, mean and 95% interval")
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    save(figure, file)


def ratios(lines: Mapping[str, Sequence[tuple[int, float]]], file: Path, *, title: str) -> None:
    """Draw the time of a 2-simplicial step, in those of an ordinary one, by sequence length."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes: Axes = figure.subplots()
    for windows, points in lines.items():
        lengths, times = zip(*points, strict=True)
        axes.plot(lengths, times, marker="o", markersize=3, linewidth=1.2, label=windows)
    axes.axhline(1.0, color="black", linestyle="--", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="N", ylabel="time of a step, ordinary is 1")
    lengths = sorted({length for points in lines.values() for length, _ in points})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=7)
    axes.set_xticks([], minor=True)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="windows")
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version in the file: the same lines give the same bytes.
    figure.savefig(file, dpi=110, metadata={"Software": None})
