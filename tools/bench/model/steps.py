"""Training steps and compile times: each contestant's model in a process, told to step in turn.

All compile at once, each with caches of its own in a folder.
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
IN_A_ROW = 3  # what ran before sets the clocks: of these the last one counts


@dataclass(frozen=True)
class Steps:
    """A contestant's steps: their times, and the most bytes that one held."""

    times: Times
    peak: int


def compile_all(
    contestants: dict[str, Contestant], shape: Shape, device: torch.device, caches: Path
) -> dict[str, float]:
    """Return the seconds that each takes to compile, with the caches as they are."""
    compiled = {n: c for n, c in contestants.items() if c.compiler != "none"}
    with _all(compiled, shape, device, caches) as workers:
        return {name: worker.compile_seconds() for name, worker in workers.items()}


def measure(
    contestants: dict[str, Contestant], shape: Shape, device: torch.device, caches: Path
) -> dict[str, Steps]:
    """Return everyone's steps, in turn, an optimizer's included."""
    with _all(contestants, shape, device, caches) as workers:
        for worker in workers.values():
            worker.compile_seconds()
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

    def compile_seconds(self) -> float:
        first, second = self.answer()
        print(f"{self.name}: compiled in {first - second:.1f} s", file=sys.stderr)  # noqa: T201
        return first - second

    def step(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


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
