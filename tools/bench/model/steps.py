"""Training steps and compile times: each contestant's model in a process, told to step in turn.

Each has caches of its own in a folder. With empty ones all compile at once, which takes minutes;
with full ones each alone, in seconds that others on the same cores would move.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.bench.model.contestants import Contestant
from tools.bench.model.llama import Shape
from tools.bench.timing import Times

ROUNDS = 7
COMPILED_IN_TURN = 3
IN_A_ROW = 3  # what ran before sets the clocks: of these the last one counts


@dataclass(frozen=True)
class Steps:
    """A contestant's steps: their times, and the most bytes that one held."""

    times: Times
    peak: int


def compile_at_once(
    contestants: dict[str, Contestant], shape: Shape, device: torch.device, caches: Path
) -> dict[str, Times]:
    """Return the milliseconds that each takes to compile beside the others."""
    with _all(contestants, shape, device, caches) as workers:
        return {name: Times((ms,)) for name, ms in _compiled(workers).items()}


def compile_in_turn(
    contestants: dict[str, Contestant], shape: Shape, device: torch.device, caches: Path
) -> dict[str, Times]:
    """Return the milliseconds that each takes to compile alone, a new process every time."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    draw = random.Random(0)
    for _ in range(COMPILED_IN_TURN):
        with _all(contestants, shape, device, caches) as workers:
            for worker in workers.values():
                worker.wait_until_built()
            for name in draw.sample(list(workers), len(workers)):
                workers[name].start_to_compile()
                found[name].append(workers[name].compile_ms())
                workers[name].end()  # or it would step beside the next
    return {name: Times(tuple(ms)) for name, ms in found.items()}


def measure(
    contestants: dict[str, Contestant], shape: Shape, device: torch.device, caches: Path
) -> dict[str, Steps]:
    """Return everyone's steps, in turn, an optimizer's included."""
    with _all(contestants, shape, device, caches) as workers:
        _compiled(workers)
        peaks = {name: worker.answer() for name, worker in workers.items()}
        times: dict[str, list[float]] = {name: [] for name in workers}
        draw = random.Random(0)
        for _ in range(ROUNDS):
            for name in draw.sample(list(workers), len(workers)):
                times[name].append([workers[name].step() for _ in range(IN_A_ROW)][-1])
    return {name: Steps(Times(tuple(times[name])), peaks[name]) for name in contestants}


class _Worker:
    """A process, and what it says."""

    def __init__(self, name: str, shape: Shape, device: torch.device, caches: Path) -> None:
        command = [sys.executable, "-m", "tools.bench.model.worker", str(device), shape.as_json()]
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "TRITON_CACHE_DIR": f"{caches}/triton",
        }
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
        self.process = subprocess.Popen(
            [*command, name], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.name}: {self.errors.read().strip()[-2000:]}")
        return json.loads(line)

    def wait_until_built(self) -> None:
        assert self.answer() == "built"

    def start_to_compile(self) -> None:
        self._tell("compile")

    def compile_ms(self) -> float:
        first, second = self.answer()
        print(f"{self.name}: compiled in {first - second:.1f} s", file=sys.stderr)  # noqa: T201
        return 1e3 * (first - second)

    def step(self) -> float:
        self._tell("step")
        return self.answer()

    def _tell(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


def _compiled(workers: dict[str, _Worker]) -> dict[str, float]:
    """Have all compile at once; return the milliseconds."""
    for worker in workers.values():
        worker.wait_until_built()
        worker.start_to_compile()
    return {name: worker.compile_ms() for name, worker in workers.items()}


@contextlib.contextmanager
def _all(
    contestants: dict[str, Contestant], shape: Shape, device: torch.device, caches: Path
) -> Iterator[dict[str, _Worker]]:
    workers = {
        name: _Worker(name, shape, device, caches / name.replace(" ", "-")) for name in contestants
    }
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.end()
