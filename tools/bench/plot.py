"""Figures: PNG files, by matplotlib where it is installed."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Bar:
    """One bar: the group it stands in, whose it is, and its height."""

    group: str
    owner: str
    height: float


def plot_rates(bars: list[Bar], file: Path, *, unit: str, title: str) -> str:
    """Draw bars, grouped, longest group names readable, and return a line that says where."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no plot: {error}"
    groups = list(dict.fromkeys(bar.group for bar in bars))
    owners = list(dict.fromkeys(bar.owner for bar in bars))
    if not bars:
        return "no plot: nothing was measured"
    thickness = 0.8 / len(owners)
    figure = Figure(figsize=(9, 1 + 0.22 * len(groups) * len(owners)), layout="constrained")
    axes = figure.subplots()
    for place, owner in enumerate(owners):
        own = [bar for bar in bars if bar.owner == owner]
        drawn = axes.barh(
            [groups.index(bar.group) + place * thickness for bar in own],
            [bar.height for bar in own],
            thickness,
            label=owner,
            color=mpl.colormaps["tab10"](place),
        )
        axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=7)
    middle = (len(owners) - 1) * thickness / 2
    axes.set_yticks([n + middle for n in range(len(groups))], groups)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title)
    axes.legend(loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    return f"wrote {file}"
