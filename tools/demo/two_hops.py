"""The two-hop task: what one 2-simplicial layer learns and one ordinary layer does not.

Every token is an edge of a random permutation; a model names the node two hops further on. Two
models of one layer, of as many parameters, see the same batches.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from tools.experiments.hops import SHOWN, widened
from tools.experiments.plots import save
from tools.experiments.train import Setting, train
from tools.pairs.calls import calls_of
from tools.pairs.next_edges import edges_in_order
from tools.pairs.pictures import draw_query_on

ARM_2_SIMPLICIAL, ARM_ORDINARY = "2-simplicial", "ordinary"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Arm:
    """One trained model and how it came on."""

    model: nn.Module
    parameters: int
    curve: list[tuple[int, float]]  # step, accuracy on held-out batches

    @property
    def accuracy(self) -> float:
        return self.curve[-1][1]


def train_both(device: torch.device, say: Say, *, run: Setting = SHOWN) -> dict[str, Arm]:
    """Train both models to 0.99 or to the cap of steps, and say how they come on."""
    shapes = {ARM_2_SIMPLICIAL: run.shape, ARM_ORDINARY: widened(run.shape, run.task)}
    arms = {}
    for name, shape in shapes.items():

        def watch(step: int, accuracy: float, name: str = name) -> None:
            if step % 200 == 0:
                say(f"two hops, {name}, step {step}: accuracy {accuracy:.2f}")

        model, (result,) = train([replace(run, shape=shape)], device, watch)
        arms[name] = Arm(model, result["parameters"], result["curve"])
        say(
            f"two hops, one {name} layer, {result['parameters']:,} parameters: accuracy "
            f"{result['accuracy']:.2f} after {result['steps']} steps, {result['seconds']:.0f} s"
        )
    return arms


def plot(arms: dict[str, Arm], file: Path, *, device: torch.device, run: Setting = SHOWN) -> None:
    """Draw both learning curves, and the pairs that one query of the 2-simplicial model sees."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    for name, arm in arms.items():
        steps, accuracies = zip(*arm.curve, strict=True)
        left.plot(steps, accuracies, label=f"one {name} layer, {arm.parameters:,} parameters")
    left.set(xlabel="steps", ylabel="accuracy on held-out batches", ylim=(0, 1.02))
    left.set_title(f"two hops through a permutation of {run.task.nodes} nodes", fontsize=9)
    left.grid(alpha=0.3)
    left.legend(fontsize=7, loc="lower right")

    edges = edges_in_order(run.task, torch.Generator().manual_seed(run.seed))
    labels = [f"{a}→{b}" for a, b in edges[0].tolist()]
    (call,) = calls_of(arms[ARM_2_SIMPLICIAL].model, edges.to(device))
    draw_query_on(right, call.pairs(top=run.task.nodes**2), labels, query=0)
    right.set_title(f"pairs that the edge {labels[0]} attends to", fontsize=9)
    save(figure, file)
