"""Updates of a small model: on a GPU one CUDA graph, which costs the host a single launch."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batches = tuple[Tensor, Tensor]  # tokens [steps, batch, N, fields], classes [steps, batch, N]
Update = Callable[[Batches, Sequence[float]], None]


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


def updates_of(model: nn.Module, runs: int, device: torch.device) -> Update:
    """Return a function that makes updates by AdamW, one for each step of batches, at given rates.

    The loss is summed over the runs that the model stacks. Batches come on the CPU, the first of
    them the longest. On a GPU the host would take longer to launch an update's kernels than they to
    run, and several programs on one GPU would wait for each other at every launch: so forward,
    backward and AdamW are captured, and replayed for each step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if device.type == "cuda":
        return _Captured(model, parameters, runs, device)
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def update(batches: Batches, rates: Sequence[float]) -> None:
        for tokens, classes, rate in zip(*batches, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            _set_gradients(model, tokens, classes, runs)
            optimizer.step()

    return update


def _set_gradients(model: nn.Module, tokens: Tensor, classes: Tensor, runs: int) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    loss = F.cross_entropy(model(tokens).flatten(0, 1), classes.flatten())
    (loss * runs).backward()


class _Captured:
    """Updates that are captured at the first call."""

    def __init__(
        self, model: nn.Module, parameters: list[nn.Parameter], runs: int, device: torch.device
    ) -> None:
        self.model, self.runs, self.device = model, runs, device
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(parameters, lr=self.rate, fused=True, capturable=True)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.held: list[Tensor] = []  # tokens, classes, rates

    def __call__(self, batches: Batches, rates: Sequence[float]) -> None:
        given = [*batches, torch.tensor(rates)]
        if self.graph is None:
            self.held = [part.to(self.device) for part in given]
            self.graph = self._capture()
        for place, part in zip(self.held, given, strict=True):
            place[: len(rates)].copy_(part)
        self.turn.zero_()
        graph = self.graph
        for _ in rates:
            graph.replay()

    def _one(self) -> None:
        tokens, classes, rate = (part.index_select(0, self.turn)[0] for part in self.held)
        self.rate.copy_(rate)
        _set_gradients(self.model, tokens, classes, self.runs)
        self.optimizer.step()
        self.turn.add_(1)

    def _capture(self) -> torch.cuda.CUDAGraph:
        # Kernels are compiled, libraries and moments set up before the capture, at a rate of zero.
        self.held[-1].zero_()
        beside = torch.cuda.Stream(self.device)
        beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(beside):
            for _ in range(2):
                self._one()
                self.turn.zero_()
            for moments in self.optimizer.state.values():
                for tensor in moments.values():
                    tensor.zero_()
        torch.cuda.current_stream(self.device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._one()
        return graph
