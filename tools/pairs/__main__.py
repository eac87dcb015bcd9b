"""Draw which pairs of keys each query of a trained model attends to most.

    python -m tools.pairs --plot out/pairs.png
    python -m tools.pairs --heads 2 --query 3
    python -m tools.pairs --model path/to/saved --text "def add(a, b):"

Without a model it trains the two-hop one of tools.experiments, one 2-simplicial layer, draws it on
a graph whose edges stand in the order in which they follow each other, and says for how many
queries the heaviest pair is the next two edges. A model is a folder that `save_pretrained` of a
marked one wrote; its tokens are those of the tokenizer there, or else the text's bytes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import nn

import simplex_ops
from simplex_ops import AttendedPairs
from tools.device import device_named
from tools.experiments.hops import SHOWN, SIMPLICIAL, Hops
from tools.experiments.model import Shape
from tools.experiments.train import Setting, train
from tools.pairs.calls import calls_of
from tools.pairs.next_edges import edges_in_order, heaviest_is_next_two, weight_by_steps
from tools.pairs.pictures import draw, draw_query

GRAPHS = 20  # to say what is attended to


def main(
    model: Annotated[
        Path | None, typer.Option(help="a saved marked model, instead of hops")
    ] = None,
    text: Annotated[str, typer.Option(help="what the saved model reads")] = "",
    hops: Annotated[int, typer.Option(min=1, help="what the hop model learns")] = SHOWN.task.hops,
    nodes: Annotated[int, typer.Option(min=2, help="of the graph")] = SHOWN.task.nodes,
    layers: Annotated[int, typer.Option(min=1, help="all 2-simplicial")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="of each layer")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="updates at most")] = SHOWN.training.steps,
    seed: Annotated[
        int, typer.Option(min=0, help="of the hop model, its data and graph")
    ] = SHOWN.seed,
    query: Annotated[int | None, typer.Option(min=0, help="draw this query alone")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda")] = "cpu",
    plot: Annotated[Path, typer.Option(help="the figure to write")] = Path("out/pairs.png"),
) -> None:
    """Draw the pairs of keys that each query of a model attends to most."""
    console = Console(highlight=False)
    if (model is None) == bool(text):
        raise typer.BadParameter("--model and --text go together: a saved model, and what it reads")
    where = device_named(device)
    if model is not None:
        labels, found = _of_text(model, text, where)
        title = f"{model.name}: {text!r}"
    else:
        task, shape = Hops(hops, nodes), Shape((SIMPLICIAL,) * layers, heads=heads)
        run = Setting(task, shape, replace(SHOWN.training, steps=steps), seed)
        labels, found, accuracy = _of_hops(console, run, where)
        title = f"{hops} hops through a permutation of {nodes} nodes, accuracy {accuracy:.2f}"
    if query is None:
        draw(found, labels, plot, title=title)
    elif query < len(labels):
        draw_query(found[-1], labels, query, plot, title=title)
    else:
        raise typer.BadParameter(f"--query must be below {len(labels)} tokens, got {query}")
    console.print(f"wrote {plot}")


def _of_text(
    folder: Path, text: str, device: torch.device
) -> tuple[list[str], Sequence[AttendedPairs]]:
    """Return the tokens of a text, and what each marked layer of a saved model attends to there."""
    import transformers

    transformers.logging.set_verbosity_error()
    model = simplex_ops.from_pretrained(transformers.AutoModelForCausalLM, folder).to(device)
    if (folder / "tokenizer_config.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer(text)["input_ids"]
        labels = tokenizer.convert_ids_to_tokens(tokens)
    else:
        tokens = list(text.encode())
        labels = [repr(chr(token))[1:-1] for token in tokens]
    ids = torch.tensor([tokens], device=device)
    calls = calls_of(model.eval(), input_ids=ids, use_cache=False)
    return labels, [call.pairs() for call in calls]


def _of_hops(
    console: Console, run: Setting, device: torch.device
) -> tuple[list[str], Sequence[AttendedPairs], float]:
    """Train a hop model; return a graph's edges, what each layer attends to, and its accuracy."""
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("training", total=run.training.steps)

        def watch(step: int, accuracy: float) -> None:
            said = f"training, accuracy {accuracy:.3f}"
            progress.update(bar, completed=step, description=said)

        model, (result,) = train([run], device, watch)
    console.print(f"accuracy {result['accuracy']:.3f} after {result['steps']} steps")
    _say_what_is_attended_to(console, model, run, device)
    edges = edges_in_order(run.task, torch.Generator().manual_seed(run.seed))
    labels = [f"{a}→{b}" for a, b in edges[0].tolist()]
    found = [call.pairs() for call in calls_of(model, edges.to(device))]
    return labels, found, result["accuracy"]


def _say_what_is_attended_to(
    console: Console, model: nn.Module, run: Setting, device: torch.device
) -> None:
    nodes = run.task.nodes
    edges = run.task.draw(GRAPHS, torch.Generator().manual_seed(run.seed))[0]
    for n, call in enumerate(calls_of(model, edges.to(device))):
        pairs = call.pairs(top=nodes**2)
        shares = heaviest_is_next_two(pairs, edges).float().mean((0, 2)).tolist()
        for h, (share, by_steps) in enumerate(
            zip(shares, weight_by_steps(pairs, edges), strict=True)
        ):
            next_two = by_steps[1, 2] + by_steps[2, 1]
            by_steps[1, 2] = by_steps[2, 1] = 0.0
            console.print(
                f"layer {n}, head {h}, over {GRAPHS} graphs: the heaviest pair is the next two "
                f"edges for {share:.0%} of the queries; those have weight {next_two:.3f} on "
                f"average, no other pair of steps more than {by_steps.max():.3f}"
            )


if __name__ == "__main__":
    typer.run(main)
