"""Updates of a small model: on a GPU one CUDA graph, which costs the host a single launch."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]  # tokens [batch, N, fields], classes [batch, N]
Update = Callable[[Sequence[Batch], Sequence[float]], None]


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


def updates_of(model: nn.Module, example: Batch, most: int, device: torch.device) -> Update:
    """Return a function that makes an update by AdamW for each of some batches, at given rates.

    It takes at most `most` batches at once, all of the example's shape and on the CPU. On a GPU the
    host would take longer to launch an update's kernels than they to run, and several programs on
    one GPU would wait for each other at every launch: so forward, backward and AdamW are captured,
    and replayed for each batch.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if device.type == "cuda":
        return _captured(model, parameters, example, most, device)
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def update(batches: Sequence[Batch], rates: Sequence[float]) -> None:
        for batch, rate in zip(batches, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            _set_gradients(model, *batch)
            optimizer.step()

    return update


def _set_gradients(model: nn.Module, tokens: Tensor, classes: Tensor) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    F.cross_entropy(model(tokens).flatten(0, 1), classes.flatten()).backward()


def _captured(
    model: nn.Module,
    parameters: list[nn.Parameter],
    example: Batch,
    most: int,
    device: torch.device,
) -> Update:
    held = [torch.stack([part] * most).to(device) for part in example]
    rates_held = torch.zeros(most, device=device)
    turn = torch.zeros(1, dtype=torch.int64, device=device)
    rate = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(parameters, lr=rate, fused=True, capturable=True)

    def one() -> None:
        rate.copy_(rates_held.index_select(0, turn)[0])
        _set_gradients(model, *(part.index_select(0, turn)[0] for part in held))
        optimizer.step()
        turn.add_(1)

    # Kernels are compiled, libraries and moments set up before the capture, at a rate of zero.
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        for _ in range(2):
            one()
            turn.zero_()
        for moments in optimizer.state.values():
            for tensor in moments.values():
                tensor.zero_()
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one()

    def update(batches: Sequence[Batch], rates: Sequence[float]) -> None:
        for place, parts in zip(held, zip(*batches, strict=True), strict=True):
            place[: len(batches)].copy_(torch.stack(parts))
        rates_held[: len(rates)].copy_(torch.tensor(rates))
        turn.zero_()
        for _ in batches:
            graph.replay()

    return update
