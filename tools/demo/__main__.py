"""Two hops through a graph in one layer; then a small Llama with every fourth layer 2-simplicial.

    python -m tools.demo
    python -m tools.demo --part two-hops
    python -m tools.demo --part llama --device cuda --minutes 10

Two hops: one 2-simplicial layer beside one ordinary layer of as many parameters, their accuracy
while they train, and the pairs of edges that one query attends to.

The Llama: trained on real text, as it is and marked. Both runs start from the same weights, see the
same bytes in the same order, and are compiled: the one by torch.compile's own backend, the other by
backend="simplex", whose pass rewrites the attention of the marked modules. The text is the source
of Python's standard library.
"""

import os
import shutil
import sysconfig
import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

try:
    import matplotlib as mpl  # noqa: F401  (said to be missing here, not after the training)
    import transformers
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    raise SystemExit(
        f"tools.demo needs {error.name}, which is not installed: pip install -e '.[tools]'"
    ) from error
import torch

import lowering
from simplex_ops import mark
from simplex_ops.env import device_name
from tools.demo import corpus, two_hops
from tools.demo.curves import plot_curves
from tools.demo.llama import CPU, CUDA, Setting, build, parameter_count
from tools.demo.train import VALIDATION_BATCHES, Curve, Trainer
from tools.device import device_named

PLAIN, MARKED = "as it is", "marked"
# backend="simplex" is the same function by its entry point, which only an installed package has.
BACKENDS = {PLAIN: "inductor", MARKED: lowering.simplex}
PROMPTS = ["import ", "    def __init__(self, ", "    return "]
LINE = 40  # bytes
EVALUATIONS = 8
_FEWEST_STEPS = 16


class Part(StrEnum):
    two_hops = "two-hops"
    llama = "llama"
    both = "both"


def main(
    device: Annotated[str, typer.Option(help="cpu, or cuda")] = "cpu",
    part: Annotated[Part, typer.Option(help="what to show")] = Part.both,
    minutes: Annotated[float, typer.Option(help="about how long the Llama may take in all")] = 2.5,
    steps: Annotated[int | None, typer.Option(min=1, help="updates at most, of each model")] = None,
    plot: Annotated[Path, typer.Option(help="the Llama's figure")] = Path("out/demo.png"),
    two_hops_plot: Annotated[Path, typer.Option(help="the figure of two hops")] = Path(
        "out/two_hops.png"
    ),
    prompt: Annotated[list[str] | None, typer.Option(help="a line to continue")] = None,
    seed: Annotated[int, typer.Option(help="of the weights and the data")] = two_hops.SHOWN.seed,
) -> None:
    """Show two hops in one layer; train a small Llama with and without 2-simplicial layers."""
    console = Console(highlight=False)
    where = _device(device, compiles=part != Part.two_hops)
    setting = CUDA if where.type == "cuda" else CPU
    setting = replace(setting, steps=steps or setting.steps)
    prompts = (prompt or PROMPTS)[: setting.batch]
    if any(len(p.encode()) + LINE > setting.seq or not p for p in prompts):
        raise typer.BadParameter(f"a prompt must have 1 to {setting.seq - LINE} bytes")
    _say(console, f"{device_name(where)}, torch {torch.__version__}")
    if part != Part.llama:
        run = replace(two_hops.SHOWN, seed=seed)
        arms = two_hops.train_both(where, lambda text: _say(console, text), run=run)
        two_hops.plot(arms, two_hops_plot, device=where, run=run)
        _say(console, f"plot: {two_hops_plot.resolve()}")
    if part != Part.two_hops:
        _show_llama(console, where, setting, prompts, minutes, plot, seed)


def _show_llama(
    console: Console,
    where: torch.device,
    setting: Setting,
    prompts: list[str],
    minutes: float,
    plot: Path,
    seed: int,
) -> None:
    deadline = time.monotonic() + 60 * minutes
    transformers.logging.set_verbosity_error()
    data = corpus.load()
    _say(
        console,
        f"a Llama of transformers {transformers.__version__}, and Python's standard library: "
        f"{data[0].numel() / 1e6:.1f} MB to train on, "
        f"{data[1].numel() / 1e6:.1f} MB in other files to validate",
    )

    trainers: dict[str, Trainer] = {}
    step_seconds = 0.0
    for name in (PLAIN, MARKED):
        model = build(setting, seed=seed).to(where)
        if name == MARKED:
            for layer in setting.marked_layers:
                mark(model.get_submodule(f"model.layers.{layer}.self_attn"), window=setting.window)
        compiled = torch.compile(model, backend=BACKENDS[name])
        trainers[name] = Trainer(compiled, model, setting, data, where)
        step_seconds += _compile(console, name, trainers[name])
    _say(console, f"of the marked model's attention, {lowering.last_report()}")

    last = deadline - seconds_for_forwards(step_seconds, VALIDATION_BATCHES + LINE)
    affordable = affordable_steps(last - time.monotonic(), step_seconds)
    if affordable < setting.steps:
        _say(console, f"{minutes:g} minutes are enough for {affordable} of {setting.steps} steps")
    _train(console, trainers, min(affordable, setting.steps), seed, last)
    curves = {name: trainer.curve for name, trainer in trainers.items()}
    console.print(_table(curves))
    title = f"{setting.layers} layers, {len(setting.marked_layers)} marked, w = {setting.window}"
    plot_curves(curves, plot, title=title)
    _say(console, f"plot: {plot.resolve()}")
    for name, trainer in trainers.items():
        for text, line in zip(prompts, trainer.complete(prompts, length=LINE), strict=True):
            _say(console, f"{name}: {text!r} goes on {line[len(text) :]!r}")


def seconds_for_forwards(step_seconds: float, count: int) -> float:
    """Estimate `count` forwards of both models: two fifths of a step each."""
    return 0.4 * step_seconds * count


def affordable_steps(seconds: float, step_seconds: float) -> int:
    """Return how many steps of both models fit in `seconds`, with the validation between them."""
    between = seconds_for_forwards(step_seconds, EVALUATIONS * VALIDATION_BATCHES)
    return max(_FEWEST_STEPS, int((0.9 * seconds - between) / step_seconds))


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, markup=False)


def _compile(console: Console, name: str, trainer: Trainer) -> float:
    """Compile by running once, say what that took, and return the seconds of a step."""
    with console.status(f"compiling the model {name}"):
        to_compile, to_step = trainer.warm_up()
    _say(
        console,
        f"{name}: {parameter_count(trainer.model):,} parameters, compiled in {to_compile:.0f} s, "
        f"{trainer.setting.tokens_per_step:,} tokens forward and backward in {to_step:.3f} s",
    )
    return to_step


def _train(
    console: Console, trainers: dict[str, Trainer], steps: int, seed: int, last: float
) -> None:
    """Train all models in step, so that they share what the machine does meanwhile.

    Should it slow down, training ends at the time `last`, after as many steps for each.
    """
    evaluated = {round(steps * n / EVALUATIONS) for n in range(1, EVALUATIONS + 1)}
    for trainer in trainers.values():
        trainer.begin(steps, seed=seed)
        trainer.validate()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=steps)
        for step in range(1, steps + 1):
            losses = {name: trainer.step() for name, trainer in trainers.items()}
            said = ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items())
            progress.update(task, advance=1, description=f"training, loss {said}")
            out_of_time = time.monotonic() > last
            if step in evaluated or out_of_time:
                held_out = {name: trainer.validate() for name, trainer in trainers.items()}
                said = ", ".join(f"{name} {loss:.3f}" for name, loss in held_out.items())
                _say(progress.console, f"step {step} of {steps}, loss on held-out files: {said}")
            if out_of_time:
                break


def _table(curves: dict[str, Curve]) -> Table:
    plain, marked = curves[PLAIN], curves[MARKED]
    table = Table(title="loss on held-out files, nats per byte")
    for heading in ("tokens", PLAIN, MARKED, "difference"):
        table.add_column(heading, justify="right")
    for tokens, a, b in zip(plain.tokens, plain.loss, marked.loss, strict=True):
        table.add_row(f"{tokens:,}", f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}")
    table.add_section()
    paces = [curve.tokens_per_second for curve in (plain, marked)]
    table.add_row("tokens/s", *(f"{p:,.0f}" for p in paces), f"{paces[1] / paces[0]:.2f} x")
    return table


def _device(name: str, *, compiles: bool) -> torch.device:
    """Return the device, or say what is missing there.

    Raises:
        typer.BadParameter: no such device, or torch.compile lacks what it needs to serve it.
    """
    device = device_named(name)
    if not compiles:
        return device
    compilers = [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"]
    if not any(map(shutil.which, compilers)):
        raise typer.BadParameter("torch.compile needs a C++ compiler: install g++, or set CXX")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise typer.BadParameter(
            "torch.compile needs Python's headers: install python3-dev, or another Python"
        )
    return device


if __name__ == "__main__":
    typer.run(main)
