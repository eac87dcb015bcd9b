"""A figure of losses by tokens."""

from pathlib import Path

from matplotlib.figure import Figure

from tools.demo.train import Curve


def plot_curves(curves: dict[str, Curve], file: Path, *, title: str) -> None:
    """Draw validation loss by tokens seen, a line for each run, into a PNG file.

    The untrained models' loss, the first of each curve, is left out: it would flatten the rest.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(curve.tokens[1:], curve.loss[1:], marker="o", markersize=3, label=name)
    axes.set_xlabel("tokens (bytes) seen")
    axes.set_ylabel("loss on held-out files, nats per byte")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
