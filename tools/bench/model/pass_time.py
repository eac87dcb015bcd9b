"""How much CPU time the passes take on a deep model, all of whose layers are marked."""

import time
from dataclasses import replace
from typing import Any

import torch

from lowering.passes.pipeline import run_passes
from tools.bench.model.llama import TOY, build, tokens

LAYERS = 32
IMPLEMENTATIONS = ("sdpa", "eager")


def measure(layers: int = LAYERS, runs: int = 3) -> dict[str, list[float]]:
    """Return the milliseconds of each run, by how the model's attention is written."""
    return {name: [_milliseconds(name, layers) for _ in range(runs)] for name in IMPLEMENTATIONS}


@torch.no_grad()
def _milliseconds(implementation: str, layers: int) -> float:
    shape = replace(TOY, layers=layers, every=1)
    cpu = torch.device("cpu")
    model = build(shape, cpu, is_marked=True, attention=implementation)
    took = []

    def backend(gm: Any, inputs: list[Any]) -> Any:
        start = time.process_time()
        run_passes(gm)
        took.append(1e3 * (time.process_time() - start))
        return gm

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(input_ids=tokens(shape, cpu))
    return took[0]
