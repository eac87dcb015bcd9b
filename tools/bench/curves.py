"""Plots of a sweep: rates against N, G and the wide window, and beside the device's measured roof.

    python -m tools.bench --device cuda --sweep N --sweep G --sweep w1 --json out/sweeps.jsonl
    python -m tools.bench.curves out/sweeps.jsonl --png out/sweeps.png

A step is forward and backward: their FLOPs over the sum of their times. Rates of ours count the
pairs that queries see: the first ones see short windows.
"""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tools.bench.contest import OURS
from tools.workloads import BACKWARD_FLOPS, BOTH, SWEEPS, Workload, useful_flops

YARDSTICK, ROOF, BANDWIDTH = "cudnn fwd", "matmul", "copy_gb_s"
LABELS = {
    "N": "N, with B·N = 131072 (H8 Hkv1, 512 x 32)",
    "G": "heads to a key-value head (B4 N4096 H64, 512 x 32)",
    "w1": "wide window (B4 N4096 H64 Hkv1, w1 x 32)",
}
STYLES = {"forward": "o-", "backward": "s-", "step": "^-", YARDSTICK: "--"}


@dataclass(frozen=True)
class Point:
    """One figure: of a sweep, at a size, whose it is, and its TFLOP/s."""

    sweep: str
    size: int
    owner: str  # a direction, "step", or an anchor
    rate: float


def points(lines: Iterable[dict[str, Any]]) -> Iterator[Point]:
    """Yield our rates by direction, those of a step, and the anchors' of the forward rows."""
    read = list(lines)
    for sweep, rows in SWEEPS.items():
        for size, workload in rows.items():
            yield from _points_of(sweep, size, workload, read)


def _points_of(
    sweep: str, size: int, workload: Workload, lines: list[dict[str, Any]]
) -> Iterator[Point]:
    times: dict[str, float] = {}
    for line in lines:
        direction, who, rate = line["direction"], line["contestant"], line["nominal_tflops"]
        if line["workload"] != workload.name or rate is None:
            continue
        if who == OURS:
            yield Point(sweep, size, direction, line["useful_tflops"])
            times[direction] = line["ms"]
        elif who in (YARDSTICK, ROOF) and direction == "forward":
            yield Point(sweep, size, who, rate)
    if len(times) == len(BOTH):
        flops = (1 + BACKWARD_FLOPS) * useful_flops(workload)
        yield Point(sweep, size, "step", flops / sum(times.values()) / 1e9)


def intensity(workload: Workload, *, is_backward: bool = False) -> float:
    """Return FLOPs to a byte, where every tensor is read or written once."""
    queries = workload.batch * workload.heads * workload.seq
    keys = 2 * workload.batch * workload.kv_heads * workload.seq
    width = workload.head_dim + workload.dv
    size = workload.dtype.itemsize
    forward = size * width * (queries + keys) + 4 * queries
    if not is_backward:
        return useful_flops(workload) / forward
    moved = size * width * (2 * queries + 2 * keys) + 4 * queries
    return useful_flops(workload, "backward") / moved


def draw(found: list[Point], facts: dict[str, Any], file: Path) -> None:
    """Draw a panel for each sweep, and the roof with our points under it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    colors = dict(zip(STYLES, mpl.colormaps["tab10"].colors, strict=False))  # pyright: ignore[reportAttributeAccessIssue]
    for axes, sweep in zip(panels.flat, SWEEPS, strict=False):
        for owner, style in STYLES.items():
            own = sorted((p.size, p.rate) for p in found if (p.sweep, p.owner) == (sweep, owner))
            if own:
                label = {YARDSTICK: "cuDNN SDPA forward"}.get(owner, owner)
                axes.plot(*zip(*own, strict=True), style, label=label, color=colors[owner])
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(LABELS[sweep])
        axes.set_ylabel("TFLOP/s")
        axes.legend(fontsize=8)
    _draw_roof(panels[1, 1], found, facts, colors)
    figure.suptitle(", ".join(f"{k} {facts[k]}" for k in ("device", "torch", "triton", "date")))
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    # A palette: a third of the bytes, for a file that is committed.
    Image.open(drawn).convert("RGB").quantize(64).save(file, optimize=True)


def _draw_roof(axes: Any, found: list[Point], facts: dict[str, Any], colors: Any) -> None:
    """Draw rates against FLOPs a byte, under the best matrix product and the copy's bandwidth."""
    roof = max((p.rate for p in found if p.owner == ROOF), default=None)
    bandwidth = facts.get(BANDWIDTH, 0) / 1e3
    for owner in ("forward", "backward"):
        own = [p for p in found if p.owner == owner]
        at = [
            intensity(SWEEPS[p.sweep][p.size], is_backward=owner == "backward") for p in own
        ]  # fmt: skip
        axes.plot(at, [p.rate for p in own], STYLES[owner][0], label=owner, color=colors[owner])
    if roof and bandwidth:
        ridge = roof / bandwidth
        axes.plot([ridge / 8, ridge, 1e6], [roof / 8, roof, roof], "k-", label=(
            f"measured: {bandwidth:.1f} TB/s, {roof:.0f} TFLOP/s"
        ))  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs to a byte, each tensor moved once")
    axes.set_ylabel("TFLOP/s")
    axes.legend(fontsize=8)


def main(
    lines: Annotated[list[Path], typer.Argument(help="JSON lines of tools.bench")],
    file: Annotated[Path, typer.Option("--png", help="the PNG to write")],
) -> None:
    """Draw rates against N, G and the wide window, and beside the device's measured roof."""
    read = [json.loads(line) for one in lines for line in one.read_text().splitlines()]
    found = list(points(read))
    if not found:
        raise typer.BadParameter(f"{lines} has no line of a sweep")
    draw(found, read[-1], file)
    typer.echo(f"wrote {file}")


if __name__ == "__main__":
    typer.run(main)
