"""Figures of the experiments, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Cells = Mapping[tuple[int, int], float]  # (depth, hops): mean accuracy


# Hops in reach of L layers looking ahead, and where heads look back too; a line's style.
_AHEAD = {
    "2^L − 1": (lambda depth: 2**depth - 1, "k--"),
    "3^L − 1": (lambda depth: 3**depth - 1, "r-"),
}
_BOTH_WAYS = {
    "(3^L − 1) / 2": (lambda depth: (3**depth - 1) / 2, "k:"),
    "(5^L − 1) / 2": (lambda depth: (5**depth - 1) / 2, "r:"),
}


def heat_map(arms: Mapping[str, Cells], file: Path, *, title: str, both_ways: bool = False) -> None:
    """Draw accuracy by hops and depth, a panel for each arm, and the curves of what is in reach."""
    figure = Figure(figsize=(4.6 * len(arms), 3.2), layout="constrained")
    panels = figure.subplots(1, len(arms), squeeze=False)[0]
    depths = sorted({depth for cells in arms.values() for depth, _ in cells})
    hops = sorted({hop for cells in arms.values() for _, hop in cells})
    image = None
    for axes, (name, cells) in zip(panels, arms.items(), strict=True):
        table = [[cells.get((d, h), float("nan")) for h in hops] for d in depths]
        image = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", origin="lower", aspect="auto")
        for label, (reach, style) in {**_AHEAD, **(_BOTH_WAYS if both_ways else {})}.items():
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


def save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version in the file: the same lines give the same bytes.
    figure.savefig(file, dpi=110, metadata={"Software": None})
