"""Training of small models on fresh batches until they can do their tasks, or to a cap of steps."""

import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.experiments.model import Model, Shape
from tools.experiments.stack import keep, stacked
from tools.experiments.updates import AdamW, Moments, Updates, one_cycle, updates_of

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
Leave = Callable[[int, dict[str, Any]], None]  # place among the settings, result
Curve = list[tuple[int, float]]  # step, accuracy


def kind(setting: Setting) -> Hashable:
    """Return what runs share that can be trained in one stack."""
    task: Task = setting.task
    return setting.shape, setting.training, task.fields, task.classes, task.length


def train(
    settings: Sequence[Setting],
    device: torch.device,
    watch: Watch | None = None,
    leave: Leave | None = None,
) -> tuple[Model, list[dict[str, Any]]]:
    """Train runs of one kind in a stack; return the stack at its end, and what came of each run.

    A run's model and its data are drawn from its seed, and every step sees a fresh batch. Accuracy
    is that of all tokens of 8 held-out batches, the same for all runs of a task. A run ends where
    it was at least 0.99 in 3 evaluations in a row, and is handed to `leave`; where a quarter of a
    stack has ended, the stack goes on without. Seconds are shared evenly by the runs that go on.
    """
    training = settings[0].training
    stack = _Stack(settings, device)
    rates = one_cycle(training.learning_rate, training.steps)
    curves: list[Curve] = [[] for _ in settings]
    seconds = [0.0] * len(settings)
    results: list[dict[str, Any]] = [{} for _ in settings]
    inside = going = list(range(len(settings)))  # places in `settings`: in the stack, not ended
    done, start = 0, time.perf_counter()
    while going:
        next_ = min(done + training.evaluate_every, training.steps)
        stack.update(rates[done:next_])
        done = next_
        found = dict(zip(inside, stack.accuracies(), strict=True))
        taken, start = time.perf_counter() - start, time.perf_counter()
        for n in going:
            curves[n].append((done, found[n]))
            seconds[n] += taken / len(going)
        if watch is not None:
            watch(done, statistics.fmean(curve[-1][1] for curve in curves))
        for n in going:
            if done == training.steps or learned(curves[n]):
                results[n] = {
                    "accuracy": found[n],
                    "learned": learned(curves[n]),
                    "steps": done,
                    "parameters": stack.parameters,
                    "majority": stack.majority(inside.index(n)),
                    "seconds": round(seconds[n], 1),
                    "together": len(settings),
                    "curve": curves[n],
                }
                if leave is not None:
                    leave(n, results[n])
        going = [n for n in going if not results[n]]
        if going and 4 * len(going) <= 3 * len(inside):
            stack.keep([inside.index(n) for n in going])
            inside = going
    return stack.model, results


class _Stack:
    """Runs of one kind as one model, each with its data and its held-out batches."""

    def __init__(self, settings: Sequence[Setting], device: torch.device) -> None:
        self.settings, self.device = list(settings), device
        self.training = settings[0].training
        self.model = stacked([_start(setting) for setting in settings]).to(device)
        self.data = [torch.Generator(device).manual_seed(setting.seed) for setting in settings]
        held_out = [torch.Generator().manual_seed(HELD_OUT_SEED) for _ in settings]
        test = _drawn(settings, held_out, 1, HELD_OUT_BATCHES * self.training.batch)
        self.tokens, self.classes = (part[0].to(device) for part in test)
        self.updates = self._updates()

    @property
    def parameters(self) -> int:
        """The number of a run's trained parameters."""
        return sum(p.numel() for p in self._trained()) // len(self.settings)

    def update(self, rates: Sequence[float]) -> None:
        """Make an update at each rate, of a batch of every run."""
        self.updates(_drawn(self.settings, self.data, len(rates), self.training.batch), rates)

    def accuracies(self) -> list[float]:
        """Return for each run the fraction of its held-out tokens whose class it names."""
        with torch.no_grad():
            right = self._of_runs(self.model(self.tokens).argmax(-1) == self.classes)
        return [round(share, 5) for share in right.flatten(1).double().mean(1).tolist()]

    def majority(self, place: int) -> float:
        """Return the accuracy of naming a run's most frequent class always."""
        counts = self._of_runs(self.classes)[place].flatten().bincount()
        return round((counts.max() / counts.sum()).item(), 5)

    def keep(self, places: list[int]) -> None:
        """Go on with some of the runs alone."""
        index = torch.tensor(places, device=self.device)
        self.tokens, self.classes = (
            self._of_runs(part)[index].flatten(0, 1) for part in (self.tokens, self.classes)
        )
        self.settings = [self.settings[place] for place in places]
        self.data = [self.data[place] for place in places]
        keep(self.model, index)
        self.updates = self._updates(
            [
                {name: m[index] if m.dim() else m for name, m in moments.items()}
                for moments in self.updates.moments
            ]
        )

    def _updates(self, moments: Sequence[Moments] = ()) -> Updates:
        most = self.training.evaluate_every
        return updates_of(self._loss, self._trained(), most, self.device, AdamW(), moments)

    def _loss(self, tokens: Tensor, classes: Tensor) -> Tensor:
        mean = F.cross_entropy(self.model(tokens).flatten(0, 1), classes.flatten())
        return mean * len(self.settings)  # the sum of those of the runs

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _of_runs(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (len(self.settings), -1))


def learned(curve: Curve) -> bool:
    """Say whether the last evaluations in a row were all good enough."""
    return len(curve) >= IN_A_ROW and all(a >= ENOUGH for _, a in curve[-IN_A_ROW:])


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
