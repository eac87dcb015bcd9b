"""Training of one small model on fresh batches until it can do its task, or to a cap of steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tools.experiments.model import Model, Shape
from tools.experiments.updates import Batch, one_cycle, updates_of

HELD_OUT_SEED = 2**32  # beyond every seed of a run
HELD_OUT_BATCHES = 8
ENOUGH, IN_A_ROW = 0.99, 3  # accuracy, evaluations: then a run stops


class Task(Protocol):
    """What is to be learned."""

    @property
    def fields(self) -> tuple[int, ...]:
        """The number of values of each field of a token."""
        ...

    @property
    def classes(self) -> int: ...

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return tokens [batch, N, fields] and the class of each [batch, N]."""
        ...


@dataclass(frozen=True)
class Training:
    """How long, and how: AdamW, a one-cycle rate over `steps`."""

    steps: int  # the cap
    batch: int = 64
    learning_rate: float = 2e-3
    evaluate_every: int = 50


Watch = Callable[[int, float], None]  # step, accuracy or loss at the last evaluation


def train(
    shape: Shape,
    task: Task,
    training: Training,
    seed: int,
    device: torch.device,
    watch: Watch | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Train a model drawn from `seed` on data drawn from `seed`; return it and what came of it.

    Every step sees a fresh batch. Accuracy is that of all tokens of 8 held-out batches, the same
    for all runs of a task. The run stops where it was at least 0.99 in 3 evaluations in a row.
    """
    torch.manual_seed(seed)
    model = Model(shape, task.fields, task.classes).to(device)
    data = torch.Generator().manual_seed(seed)
    held_out = torch.Generator().manual_seed(HELD_OUT_SEED)
    drawn = [task.draw(training.batch, held_out) for _ in range(HELD_OUT_BATCHES)]
    tokens, classes = (torch.cat(part).to(device) for part in zip(*drawn, strict=True))
    update = updates_of(model, drawn[0], training.evaluate_every, device)
    rates = one_cycle(training.learning_rate, training.steps)

    def next_batches(done: int) -> list[Batch]:
        count = min(training.evaluate_every, training.steps - done)
        return [task.draw(training.batch, data) for _ in range(count)]

    curve: list[tuple[int, float]] = []
    done, start = 0, time.perf_counter()
    batches = next_batches(done)
    while batches:
        update(batches, rates[done : done + len(batches)])
        done += len(batches)
        batches = next_batches(done)  # while a GPU works
        curve.append((done, accuracy(model, (tokens, classes))))
        if watch is not None:
            watch(*curve[-1])
        if learned(curve):
            break
    return model, {
        "accuracy": curve[-1][1],
        "learned": learned(curve),
        "steps": curve[-1][0],
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "majority": majority(classes),
        "seconds": round(time.perf_counter() - start, 1),
        "curve": curve,
    }


def learned(curve: list[tuple[int, float]]) -> bool:
    """Say whether the last evaluations in a row were all good enough."""
    return len(curve) >= IN_A_ROW and all(a >= ENOUGH for _, a in curve[-IN_A_ROW:])


@torch.no_grad()
def accuracy(model: Model, test: Batch) -> float:
    """Return the fraction of tokens whose class the model names."""
    tokens, classes = test
    return round((model(tokens).argmax(-1) == classes).double().mean().item(), 5)


def majority(classes: Tensor) -> float:
    """Return the accuracy of naming the most frequent class always."""
    return round(classes.flatten().bincount().max().item() / classes.numel(), 5)
