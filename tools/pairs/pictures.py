"""Pictures of attended pairs, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from simplex_ops import AttendedPairs
from tools.experiments.plots import save


def draw(
    layers: Sequence[AttendedPairs], labels: Sequence[str], file: Path, *, title: str, row: int = 0
) -> None:
    """Draw one batch row: queries down, keys across, a picture for each layer and head.

    A pair is two triangles, j pointing right and k pointing left, joined by a line, all as dark as
    the pair's weight.
    """
    from matplotlib.figure import Figure

    heads = max(pairs.weight.shape[1] for pairs in layers)
    size = 1.2 + 0.26 * len(labels)
    figure = Figure(figsize=(size * heads, size * len(layers)), layout="constrained")
    panels = figure.subplots(len(layers), heads, squeeze=False)
    for n, pairs in enumerate(layers):
        for h in range(heads):
            axes = panels[n][h]
            if h >= pairs.weight.shape[1]:
                axes.set_axis_off()
                continue
            for i, (j, k, weight) in enumerate(_rows(pairs, row, h)):
                for first, second, w in zip(j, k, weight, strict=True):
                    if first >= 0 and w >= 0.02:
                        axes.plot([first, second], [i, i], color="gray", alpha=w, linewidth=1)
                        axes.plot(first, i, ">", color="tab:blue", alpha=w, markersize=6)
                        axes.plot(second, i, "<", color="tab:orange", alpha=w, markersize=6)
            _name_tokens(axes, labels)
            axes.set(title=f"layer {n}, head {h}", xlabel="keys: j ▶, k ◀", ylabel="query")
            axes.grid(alpha=0.2)
    figure.suptitle(title, fontsize=9)
    save(figure, file)


def draw_query(
    pairs: AttendedPairs, labels: Sequence[str], query: int, file: Path, *, title: str, row: int = 0
) -> None:
    """Draw the pairs of one query: j across, k down, a picture for each head."""
    from matplotlib.figure import Figure

    heads = pairs.weight.shape[1]
    size = 1.5 + 0.26 * len(labels)
    figure = Figure(figsize=(size * heads, size), layout="constrained")
    for h, axes in enumerate(figure.subplots(1, heads, squeeze=False)[0]):
        draw_query_on(axes, pairs, labels, query, row=row, head=h)
        axes.set_title(f"head {h}, query {labels[query]}")
    figure.suptitle(title, fontsize=9)
    save(figure, file)


def draw_query_on(
    axes: Any,
    pairs: AttendedPairs,
    labels: Sequence[str],
    query: int,
    *,
    row: int = 0,
    head: int = 0,
) -> None:
    """Draw the pairs of one query of one head on axes of matplotlib: j across, k down."""
    table = torch.zeros(len(labels), len(labels))
    for j, k, weight in zip(*_rows(pairs, row, head)[query], strict=True):
        if j >= 0:
            table[k, j] = weight
    axes.imshow(table.tolist(), cmap="Blues", vmin=0, vmax=max(0.01, table.max().item()))
    _name_tokens(axes, labels)
    axes.set(xlabel="j", ylabel="k")


def _rows(pairs: AttendedPairs, row: int, head: int) -> list[tuple[list, list, list]]:
    """Return (j, k, weight) of each query."""
    return list(zip(*(t[row, head].tolist() for t in pairs), strict=True))


def _name_tokens(axes: Any, labels: Sequence[str]) -> None:
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)
