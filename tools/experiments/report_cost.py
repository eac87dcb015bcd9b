"""The report's section on `cost`: a training step of one layer beside one of ordinary attention."""

from pathlib import Path

from tools.experiments import plots
from tools.experiments.lines import Line
from tools.experiments.tables import by, dates, of_one_device, table, where

FIGURE = "cost.png"

_HEADINGS = (
    "N", "batch", "windows", "ordinary, ms", "2-simplicial, ms", "ratio", "peak, MiB", "note",
)  # fmt: skip


def sections(found: list[Line]) -> list[str]:
    """Return the section of one device."""
    return [
        f"{dates(found)}. {_about(found[0]['setting'])}",
        table(_HEADINGS, [_row(line) for line in sorted(found, key=_order)]),
    ]


def figures(found: list[Line]) -> list[str]:
    return [f"![cost by length]({FIGURE})\n"] if found else []


def draw(found: list[Line], folder: Path) -> None:
    """Draw the ratio of a 2-simplicial step to an ordinary one by length, a line a window."""
    lines = sorted(of_one_device(found), key=_order)
    if not lines:
        return
    curves = by(lines, lambda line: "{w1} x {w2}".format(**line["setting"]))
    points = {
        windows: [(line["setting"]["seq"], r) for line in group if (r := ratio(line))]
        for windows, group in curves.items()
    }
    plots.ratios(points, folder / FIGURE, title=where(lines[0]))


def expectations(found: list[Line]) -> list[tuple[str, str]]:
    """Return (expected, came)."""
    ratios = [r for r in map(ratio, found) if r]
    if not ratios:
        return []
    less = sum(r < 1 for r in ratios)
    said = f"{min(ratios):.2f} to {max(ratios):.2f}, below 1 in {less} of {len(ratios)}"
    return [("cost: more than 1 of an ordinary layer's step", said)]


def ratio(line: Line) -> float | None:
    """Return the time of a 2-simplicial step over that of an ordinary one, where both ran."""
    ordinary, simplicial = (line["result"][arm].get("ms") for arm in ("ordinary", "2-simplicial"))
    return simplicial / ordinary if ordinary and simplicial else None


def _order(line: Line) -> tuple[int, int, int]:
    setting = line["setting"]
    return setting["seq"], setting["w1"], setting["w2"]


def _about(setting: dict[str, object]) -> str:
    return (
        f"Forward and backward of one layer with its projections, {setting['dtype']}, width "
        f"{setting['width']}, {setting['heads']} heads, {setting['kv_heads']} of keys, causal; "
        "ordinary attention sees the whole sequence. Medians ± the distance between quartiles; "
        "peak is what a step allocates beyond its input and weights, ordinary and 2-simplicial. "
        "Times are those of the kernels at that commit, which later ones need not share.\n"
    )


def _row(line: Line) -> list[str]:
    setting, result = line["setting"], line["result"]
    both = [result["ordinary"], result["2-simplicial"]]
    peaks = [one.get("peak_bytes") for one in both]
    times = ratio(line)
    return [
        f"{setting['seq']:,}",
        str(setting["batch"]),
        f"{setting['w1']}x{setting['w2']}",
        *(f"{one['ms']:.3f} ± {one['spread']:.0%}" if "ms" in one else "" for one in both),
        f"{times:.2f}" if times else "",
        " and ".join("?" if peak is None else f"{peak / 2**20:,.0f}" for peak in peaks),
        "; ".join(one["note"] for one in both if "note" in one),
    ]
