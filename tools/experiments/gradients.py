"""Gradients of a small model for a batch: on a GPU as one CUDA graph, which is one launch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]  # tokens [batch, N, fields], classes [batch, N]


def gradients_of(model: nn.Module, example: Batch, device: torch.device) -> Callable[[Batch], None]:
    """Return a function that sets the model's gradients to those of its mean cross-entropy.

    It takes batches of the example's shape, on the CPU. On a GPU the host would take longer to
    launch the model's kernels than they to run: forward and backward are captured, and replayed.
    """

    def compute(tokens: Tensor, classes: Tensor) -> None:
        for parameter in model.parameters():
            parameter.grad = None
        F.cross_entropy(model(tokens).flatten(0, 1), classes.flatten()).backward()

    if device.type != "cuda":
        return lambda batch: compute(*batch)
    held = [part.to(device) for part in example]
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        for _ in range(2):  # kernels are compiled and libraries set up before the capture
            compute(*held)
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute(*held)

    def replay(batch: Batch) -> None:
        for place, part in zip(held, batch, strict=True):
            place.copy_(part)
        graph.replay()

    return replay
