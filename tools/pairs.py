"""Draw which pairs of keys each query of a trained model attends to most.

    python -m tools.pairs --plot out/pairs.png
    python -m tools.pairs --heads 2 --query 3

trains the two-hop model of tools.experiments, one 2-simplicial layer, and draws it on one graph
whose edges stand in the order in which they follow each other, and says for how many queries the
heaviest pair is the next two edges. `calls_of` and `draw` do the same for any model, run eagerly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simplex_ops import AttendedPairs, attended_pairs
from tools.experiments.hops import SIMPLICIAL, Hops
from tools.experiments.model import Shape
from tools.experiments.train import Setting, Training, train


@dataclass(frozen=True)
class Call:
    """What one layer gave the operator."""

    q: Tensor  # [B, H, N, D]
    k1: Tensor
    k2: Tensor
    window: tuple[int | None, int | None]
    options: dict[str, Any] = field(default_factory=dict)

    def pairs(self, *, top: int = 8) -> AttendedPairs:
        return attended_pairs(self.q, self.k1, self.k2, window=self.window, top=top, **self.options)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.simplex.attn.default:
            q, k1, k2, _, _, *windows = args
            options = {k: v for k, v in (kwargs or {}).items() if k != "v2_bias"}
            w1 = options.pop("w1", None) if not windows else windows[0]
            w2 = options.pop("w2", None) if len(windows) < 2 else windows[1]
            q, k1, k2 = (t.detach().clone() for t in (q, k1, k2))
            self.calls.append(Call(q, k1, k2, (w1, w2), options))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def calls_of(model: nn.Module, *args: Any, **kwargs: Any) -> list[Call]:
    """Run a model, not compiled, and return what each of its 2-simplicial layers asked, in order.

    Raises:
        ValueError: it has no such layer, or what runs is compiled and calls something else.
    """
    with _Recorder() as recorder:
        model(*args, **kwargs)
    if not recorder.calls:
        raise ValueError(
            "model must call simplicial_attention, but torch.ops.simplex.attn was not reached: "
            "give the model itself, not what torch.compile made of it, with a 2-simplicial layer"
        )
    return recorder.calls


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
    _save(figure, file)


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
    _save(figure, file)


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


def edges_in_order(task: Hops, generator: torch.Generator) -> Tensor:
    """Return one graph's edges [1, nodes, 2], each followed by the one that it leads to.

    A permutation is walked cycle after cycle.
    """
    edges = task.draw(1, generator)[0][0]
    target = dict(edges.tolist())
    order: list[int] = []
    for start in range(task.nodes):
        node = start
        while node not in order:
            order.append(node)
            node = target[node]
    return torch.tensor([[[node, target[node]] for node in order]])


def next_two(edges: Tensor) -> Tensor:
    """Return [B, N, 2]: where the next edge of each edge stands, and the one after that."""
    place = edges[..., 0].argsort(-1)  # of the edge that leaves a node
    following = place.gather(-1, edges[..., 1])
    return torch.stack((following, following.gather(-1, following)), -1)


def heaviest_is_next_two(pairs: AttendedPairs, edges: Tensor) -> Tensor:
    """Return [B, H, N]: is each query's heaviest pair its next two edges, in either order?"""
    found = torch.stack((pairs.j[..., 0], pairs.k[..., 0]), -1).sort(-1).values
    return (found == next_two(edges).sort(-1).values[:, None]).all(-1)


def main(
    hops: Annotated[int, typer.Option(min=1, help="what the model learns")] = 2,
    nodes: Annotated[int, typer.Option(min=2, help="of the graph")] = 16,
    layers: Annotated[int, typer.Option(min=1, help="all 2-simplicial")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="of each layer")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="updates at most")] = 2400,
    seed: Annotated[int, typer.Option(min=0, help="of the model, its data and the graph")] = 0,
    query: Annotated[int | None, typer.Option(min=0, help="draw this query alone")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda")] = "cpu",
    plot: Annotated[Path, typer.Option(help="the figure to write")] = Path("out/pairs.png"),
) -> None:
    """Train a hop model and draw the pairs of edges that each edge attends to."""
    console = Console(highlight=False)
    if query is not None and query >= nodes:
        raise typer.BadParameter(f"--query must be below the number of nodes {nodes}, got {query}")
    task, shape = Hops(hops, nodes), Shape((SIMPLICIAL,) * layers, heads=heads)
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("training", total=steps)

        def watch(step: int, accuracy: float) -> None:
            said = f"training, accuracy {accuracy:.3f}"
            progress.update(bar, completed=step, description=said)

        run = Setting(task, shape, Training(steps), seed)
        model, (result,) = train([run], torch.device(device), watch)
    console.print(f"accuracy {result['accuracy']:.3f} after {result['steps']} steps")
    edges = edges_in_order(task, torch.Generator().manual_seed(seed))
    labels = [f"{a}→{b}" for a, b in edges[0].tolist()]
    found = [call.pairs() for call in calls_of(model, edges.to(device))]
    found = [AttendedPairs(*(t.cpu() for t in pairs)) for pairs in found]
    title = f"{hops} hops through a permutation of {nodes} nodes, accuracy {result['accuracy']:.2f}"
    if query is None:
        draw(found, labels, plot, title=title)
    else:
        draw_query(found[-1], labels, query, plot, title=title)
    for n, pairs in enumerate(found):
        for h, share in enumerate(heaviest_is_next_two(pairs, edges).float().mean((0, 2)).tolist()):
            weight = pairs.weight[:, h, :, 0].mean().item()
            console.print(
                f"layer {n}, head {h}: the heaviest pair, of weight {weight:.2f} on average, "
                f"is the next two edges for {share:.0%} of the queries"
            )
    console.print(f"wrote {plot}")


def _rows(pairs: AttendedPairs, row: int, head: int) -> list[tuple[list, list, list]]:
    """Return (j, k, weight) of each query."""
    return list(zip(*(t[row, head].tolist() for t in pairs), strict=True))


def _name_tokens(axes: Any, labels: Sequence[str]) -> None:
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    typer.run(main)
