"""Updates of a model: on a GPU one CUDA graph, which costs the host a single launch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

Loss = Callable[..., Tensor]  # of the parts of one batch
Moments = dict[str, Tensor]  # what AdamW keeps of one parameter


@dataclass(frozen=True)
class AdamW:
    """What an update is, but for its rate."""

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    clip: float | None = None  # the norm of all gradients


def one_cycle(peak: float, steps: int) -> list[float]:
    """Return the rate of every step: up to the peak over three tenths, down to nearly nothing.

    It is that of torch.optim.lr_scheduler.OneCycleLR as it comes.
    """
    start = peak / 25
    last, turn = steps - 1, max(0.3 * steps - 1, 1e-9)
    rates = []
    for step in range(steps):
        if step <= turn:
            begin, end, part = start, peak, step / turn
        else:
            begin, end, part = peak, start / 1e4, (step - turn) / (last - turn)
        rates.append(end + (begin - end) / 2 * (1 + math.cos(math.pi * part)))
    return rates


class Updates(Protocol):
    """Makes updates by AdamW."""

    @property
    def moments(self) -> list[Moments]:
        """What the optimizer keeps of every parameter."""
        ...

    def __call__(self, batches: Sequence[Tensor], rates: Sequence[float]) -> None:
        """Make an update for each batch, of parts [updates, ...], at its rate."""
        ...


def updates_of(
    loss: Loss,
    parameters: Sequence[nn.Parameter],
    most: int,
    device: torch.device,
    how: AdamW,
    moments: Sequence[Moments] = (),
) -> Updates:
    """Return what makes updates, for at most `most` batches a call, from `moments` or from zero.

    On a GPU the host would take longer to launch an update's kernels than they to run, and several
    programs on one GPU would wait for each other at every launch: so forward, backward and AdamW
    are captured, and replayed for each batch.
    """
    if device.type == "cuda":
        return _Captured(loss, parameters, most, device, how, moments)
    return _Launched(loss, parameters, how, moments)


class _Launched:
    """Updates whose operations run one by one."""

    def __init__(
        self,
        loss: Loss,
        parameters: Sequence[nn.Parameter],
        how: AdamW,
        moments: Sequence[Moments],
    ) -> None:
        self.loss, self.parameters, self.how = loss, parameters, how
        self.optimizer = torch.optim.AdamW(
            parameters, fused=True, betas=how.betas, weight_decay=how.weight_decay
        )
        for parameter, known in zip(parameters, moments, strict=bool(moments)):
            self.optimizer.state[parameter].update(known)

    @property
    def moments(self) -> list[Moments]:
        return [self.optimizer.state[parameter] for parameter in self.parameters]

    def __call__(self, batches: Sequence[Tensor], rates: Sequence[float]) -> None:
        for *parts, rate in zip(*batches, rates, strict=True):
            self.optimizer.param_groups[0]["lr"] = rate
            _set_gradients(self.loss(*parts), self.parameters, self.how)
            self.optimizer.step()


def _set_gradients(loss: Tensor, parameters: Sequence[nn.Parameter], how: AdamW) -> None:
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    if how.clip is not None:
        nn.utils.clip_grad_norm_(parameters, how.clip)


class _Captured:
    """Updates that are captured at the first call."""

    def __init__(
        self,
        loss: Loss,
        parameters: Sequence[nn.Parameter],
        most: int,
        device: torch.device,
        how: AdamW,
        moments: Sequence[Moments],
    ) -> None:
        self.loss, self.parameters, self.most, self.how = loss, parameters, most, how
        self.device, self.start = device, moments
        self.rate = torch.zeros((), device=device)
        self.rates = torch.zeros(most, device=device)
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)
        self.held: list[Tensor] = []  # the parts of the batches, [most, ...]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=self.rate,
            fused=True,
            capturable=True,
            betas=how.betas,
            weight_decay=how.weight_decay,
        )

    @property
    def moments(self) -> list[Moments]:
        return [self.optimizer.state[parameter] for parameter in self.parameters]

    def __call__(self, batches: Sequence[Tensor], rates: Sequence[float]) -> None:
        if self.graph is None:
            shapes = [(self.most, *part.shape[1:]) for part in batches]
            self.held = [
                part[0].to(self.device).expand(shape).clone()
                for part, shape in zip(batches, shapes, strict=True)
            ]
            self.graph = self._capture()
        for place, part in zip(self.held, batches, strict=True):
            place[: len(rates)].copy_(part)
        self.rates[: len(rates)].copy_(torch.tensor(rates))
        self.turn.zero_()
        graph = self.graph
        for _ in rates:
            graph.replay()

    def _one(self) -> None:
        self.rate.copy_(self.rates.index_select(0, self.turn)[0])
        parts = [part.index_select(0, self.turn)[0] for part in self.held]
        _set_gradients(self.loss(*parts), self.parameters, self.how)
        self.optimizer.step()
        self.turn.add_(1)

    def _capture(self) -> torch.cuda.CUDAGraph:
        # Kernels are compiled, libraries and moments set up before the capture, at a rate of zero.
        beside = torch.cuda.Stream(self.device)
        beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(beside):
            for _ in range(2):
                self._one()
                self.turn.zero_()
            for place, moments in enumerate(self.moments):
                for name, tensor in moments.items():
                    tensor.copy_(self.start[place][name] if self.start else torch.zeros(()))
        torch.cuda.current_stream(self.device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._one()
        return graph
