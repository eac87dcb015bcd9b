"""The report's section on `cost`: a training step of one layer beside one of ordinary attention."""

from tools.experiments.lines import Line
from tools.experiments.tables import by, dates, table, where

_HEADINGS = (
    "N", "batch", "windows", "ordinary, ms", "2-simplicial, ms", "ratio", "peak, MiB", "note",
)  # fmt: skip


def sections(found: list[Line]) -> list[str]:
    """Return the section, a part for each device."""
    if not found:
        return ["## cost\n\nNot run.\n"]
    parts = []
    for place, lines in by(found, where).items():
        parts.append(f"## cost: {place}\n\n{dates(lines)}\n")
        parts.append(_about(lines[0]["setting"]))
        parts.append(table(_HEADINGS, [_row(line) for line in sorted(lines, key=_order)]))
    return parts


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
        "peak is what a step allocates beyond its input and weights, ordinary and 2-simplicial.\n"
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
