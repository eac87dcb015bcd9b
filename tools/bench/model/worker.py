"""One contestant's model in a process of its own: compiled at the first step, then run when told.

    python -m tools.bench.model.worker DEVICE SHAPE-AS-JSON CONTESTANT

It prints that its model is built. Sent a line, it prints one of JSON with the seconds of the first
two losses and gradients, then one with the most bytes that a step holds; and for each line more the
milliseconds of one step.
"""

import json
import sys
import time
from collections.abc import Callable

import torch

from tools.bench.model.contestants import field_of
from tools.bench.model.llama import Step, build, shape_from, tokens

WARM_UP = 3


def main(device: str, given: str, name: str) -> None:
    """Answer the parent process until it closes the pipe."""
    shape, where = shape_from(given), torch.device(device)
    contestant = field_of(where)[name]
    model = build(shape, where, is_marked=contestant.is_marked)
    step = Step(model, contestant.compiled(model), tokens(shape, where))
    _wait(where)
    _say("built")
    sys.stdin.readline()
    with contestant.stands():
        _say([_seconds(step.gradients, where) for _ in range(2)])
        for _ in range(WARM_UP):
            step()
        _say(_peak(step, where))
        for _ in sys.stdin:
            _say(1e3 * _seconds(step, where))


def _say(figure: object) -> None:
    print(json.dumps(figure), flush=True)  # noqa: T201


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _peak(step: Step, device: torch.device) -> int:
    """Return the most bytes that a step holds, weights and optimizer included; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    step.optimizer.zero_grad()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(*sys.argv[1:])
