"""What a small marked layer costs the host: the time until forward and backward are queued."""

import random
import statistics
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import simplex_ops
from tools.bench.model.contestants import Contestant
from tools.bench.model.llama import Shape
from tools.bench.timing import Times

SEQ = 256  # one sequence: what runs on the device takes less time than to queue it
CALLS = 200
ROUNDS = 7


def operator(shape: Shape) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a call of the operator with something to do on either side, and its inputs."""
    window = shape.window

    def attend(q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor) -> Tensor:
        out, _ = torch.ops.simplex.attn(q * 2, k1, k2, v1, v2, *window)
        return -out

    sizes = [(1, n, SEQ, shape.width // shape.heads) for n in (shape.heads, *[shape.kv_heads] * 4)]
    return attend, [torch.randn(size) for size in sizes]


class Layer(nn.Module):
    """An attention layer as a model has it, without position embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.width // shape.heads
        kv_width = shape.kv_heads * self.head_dim
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.k_proj = nn.Linear(shape.width, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.width, kv_width, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def layer(shape: Shape) -> tuple[nn.Module, list[Tensor]]:
    """Return a marked attention layer, and its input."""
    torch.manual_seed(0)
    marked = simplex_ops.mark(Layer(shape), window=shape.window)
    return marked, [torch.randn(1, SEQ, shape.width)]


def measure(
    what: Callable[[Shape], tuple[Any, list[Tensor]]],
    contestants: Mapping[str, Contestant],
    shape: Shape,
    device: torch.device,
) -> dict[str, Times]:
    """Return the milliseconds of the host, the median call of each round."""
    runs: dict[str, tuple[Any, list[Tensor]]] = {}
    for name, contestant in contestants.items():
        function, inputs = what(shape)
        if isinstance(function, nn.Module):
            function.to(device, shape.dtype)
        else:  # Dynamo keeps what it compiled with the code: each has its own
            function = _copied(function, name)
        inputs = [t.to(device, shape.dtype).requires_grad_() for t in inputs]
        runs[name] = contestant.compiled(function), inputs
    found: dict[str, list[float]] = {name: [] for name in runs}
    draw = random.Random(0)
    for repeats in (3, *[CALLS] * ROUNDS):
        for name in draw.sample(list(runs), len(runs)):
            with contestants[name].stands():
                run, inputs = runs[name]
                found[name].append(_milliseconds(run, inputs, repeats, device))
    return {name: Times(tuple(ms[1:])) for name, ms in found.items()}


def _copied(function: Any, name: str) -> Any:
    code = function.__code__.replace(co_name=name.replace(" ", "_"))
    return types.FunctionType(code, function.__globals__, closure=function.__closure__)


def _milliseconds(run: Any, inputs: list[Tensor], calls: int, device: torch.device) -> float:
    loss, found = None, []
    for _ in range(calls):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        out = run(*inputs)
        loss = torch.ones_like(out) if loss is None else loss
        out.backward(loss)
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)
