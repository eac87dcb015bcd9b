"""Training of small models on fresh batches until they can do their tasks, or to a cap of steps."""

import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.experiments.model import Model, Shape
from tools.experiments.stack import stacked
from tools.experiments.updates import AdamW, one_cycle, updates_of

HELD_OUT_SEED = 2**32  # beyond every seed of a run
HELD_OUT_BATCHES = 8
ENOUGH, IN_A_ROW = 0.99, 3  # accuracy, evaluations: then a run ends
# Runs in a stack. A GPU takes little longer for many than for one; two cores, as long as for each.
MOST_TOGETHER = {"cpu": 1, "cuda": 64}


class Task(Protocol):
    """What is to be learned."""

    @property
    def fields(self) -> tuple[int, ...]:
        """The number of values of each field of a token."""
        ...

    @property
    def classes(self) -> int: ...

    @property
    def length(self) -> int:
        """The number of tokens."""
        ...

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return tokens [batch, length, fields] and the class of each [batch, length]."""
        ...


@dataclass(frozen=True)
class Training:
    """How long, and how: AdamW, a one-cycle rate over `steps`."""

    steps: int  # the cap
    batch: int = 64
    learning_rate: float = 2e-3
    evaluate_every: int = 50


@dataclass(frozen=True)
class Setting:
    """A run."""

    task: Any  # a Task
    shape: Shape
    training: Training
    seed: int


Batches = tuple[Tensor, Tensor]  # tokens [steps, rows, N, fields], classes [steps, rows, N]
Watch = Callable[[int, float], None]  # step, accuracy or loss at the last evaluation
Curve = list[tuple[int, float]]  # step, accuracy


def kind(setting: Setting) -> Hashable:
    """Return what runs share that can be trained in one stack."""
    task: Task = setting.task
    return setting.shape, setting.training, task.fields, task.classes, task.length


def train(
    settings: Sequence[Setting], device: torch.device, watch: Watch | None = None
) -> tuple[Model, list[dict[str, Any]]]:
    """Train runs of one kind in a stack; return it, and what came of each.

    A run's model and its data are drawn from its seed, and every step sees a fresh batch. Accuracy
    is that of all tokens of 8 held-out batches, the same for all runs of a task. A run ends where
    it was at least 0.99 in 3 evaluations in a row; the stack goes on until all have ended, and its
    seconds are shared out evenly.
    """
    training = settings[0].training
    model = stacked([_start(setting) for setting in settings]).to(device)
    data = [torch.Generator(device).manual_seed(setting.seed) for setting in settings]
    held_out = [torch.Generator().manual_seed(HELD_OUT_SEED) for _ in settings]
    test = _drawn(settings, held_out, 1, HELD_OUT_BATCHES * training.batch)
    tokens, classes = (part[0].to(device) for part in test)
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss(tokens: Tensor, classes: Tensor) -> Tensor:
        mean = F.cross_entropy(model(tokens).flatten(0, 1), classes.flatten())
        return mean * len(settings)  # the sum of those of the runs

    update = updates_of(loss, trained, training.evaluate_every, device, AdamW())
    rates = one_cycle(training.learning_rate, training.steps)

    curves: list[Curve] = [[] for _ in settings]
    done, start = 0, time.perf_counter()
    while done < training.steps and not all(map(learned, curves)):
        count = min(training.evaluate_every, training.steps - done)
        batches = _drawn(settings, data, count, training.batch)
        update(batches, rates[done : done + count])
        done += count
        found = accuracies(model, tokens, classes, len(settings))
        for curve, accuracy in zip(curves, found, strict=True):
            if not learned(curve):
                curve.append((done, accuracy))
        if watch is not None:
            watch(done, statistics.fmean(curve[-1][1] for curve in curves))
    parameters = sum(p.numel() for p in trained) // len(settings)
    seconds = round((time.perf_counter() - start) / len(settings), 1)
    return model, [
        {
            "accuracy": curve[-1][1],
            "learned": learned(curve),
            "steps": curve[-1][0],
            "parameters": parameters,
            "majority": majority(of_run),
            "seconds": seconds,
            "together": len(settings),
            "curve": curve,
        }
        for curve, of_run in zip(curves, classes.chunk(len(settings)), strict=True)
    ]


def learned(curve: Curve) -> bool:
    """Say whether the last evaluations in a row were all good enough."""
    return len(curve) >= IN_A_ROW and all(a >= ENOUGH for _, a in curve[-IN_A_ROW:])


@torch.no_grad()
def accuracies(model: Model, tokens: Tensor, classes: Tensor, runs: int) -> list[float]:
    """Return for each run the fraction of its tokens whose class it names."""
    right = (model(tokens).argmax(-1) == classes).view(runs, -1)
    return [round(share, 5) for share in right.double().mean(1).tolist()]


def majority(classes: Tensor) -> float:
    """Return the accuracy of naming the most frequent class always."""
    return round(classes.flatten().bincount().max().item() / classes.numel(), 5)


def _start(setting: Setting) -> Model:
    torch.manual_seed(setting.seed)
    return Model(setting.shape, setting.task.fields, setting.task.classes)


def _drawn(
    settings: Sequence[Setting], sources: Sequence[torch.Generator], count: int, batch: int
) -> Batches:
    """Draw `count` batches of each run, and join those of a step."""
    drawn = [
        s.task.draw(count * batch, source) for s, source in zip(settings, sources, strict=True)
    ]
    tokens, classes = zip(*drawn, strict=True)

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([p.unflatten(0, (count, batch)) for p in parts], 1).flatten(1, 2)

    return joined(tokens), joined(classes)
