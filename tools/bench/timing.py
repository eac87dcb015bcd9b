"""Timing: several functions in turn, so that all of them meet the same clocks and neighbours."""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Function = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Milliseconds of each run of one function, and the run that stands for them all."""

    ms: tuple[float, ...]
    statistic: Literal["median", "best"] = "median"

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def best(self) -> float:
        return min(self.ms)

    @property
    def typical(self) -> float:
        """The median; or the best, where other programs share the cores and only ever slow us."""
        return self.median if self.statistic == "median" else self.best

    @property
    def spread(self) -> float:
        """The distance between the quartiles, as a fraction of the median."""
        if len(self.ms) < 4:
            return (max(self.ms) - min(self.ms)) / self.median
        low, _, high = statistics.quantiles(self.ms, n=4)
        return (high - low) / self.median


def time_in_turn(
    functions: Mapping[str, Function],
    device: torch.device,
    *,
    seconds: float,
    least_runs: int = 10,
    most_runs: int = 100,
) -> dict[str, Times]:
    """Time the functions in rounds: one run of each, in another order every round.

    Clocks and power move by tens of percent within minutes, so only runs made side by side compare;
    and what runs right after a heavy one finds the power cap reached, so nobody always does.
    Two warm-up rounds come first and the second sets the number of rounds: as many as fit in
    `seconds`, at least `least_runs`. On a GPU the cache is overwritten before every run, runs are
    timed with events, never by the host, and the median stands for them; on a CPU the best.
    """
    measure = _cuda_round if device.type == "cuda" else _cpu_round
    measure(functions, device, 1)
    estimate = sum(sum(ms) for ms in measure(functions, device, 1).values()) / 1e3
    rounds = min(most_runs, max(least_runs, int(seconds / max(estimate, 1e-6))))
    statistic = "median" if device.type == "cuda" else "best"
    times = measure(functions, device, rounds)
    return {name: Times(tuple(ms), statistic) for name, ms in times.items()}


def _cuda_round(
    functions: Mapping[str, Function], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * cache, dtype=torch.int8, device=device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in functions}
    for name in _in_shuffled_rounds(functions, rounds):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        # The host queues the function while the flush runs: launch costs stay out of the time.
        flush.zero_()
        start.record()
        functions[name]()
        end.record()
        events[name].append((start, end))
    torch.cuda.synchronize(device)
    return {name: [s.elapsed_time(e) for s, e in pairs] for name, pairs in events.items()}


def _cpu_round(
    functions: Mapping[str, Function], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    del device
    ms: dict[str, list[float]] = {name: [] for name in functions}
    for name in _in_shuffled_rounds(functions, rounds):
        start = time.perf_counter()
        functions[name]()
        ms[name].append((time.perf_counter() - start) * 1e3)
    return ms


def _in_shuffled_rounds(functions: Mapping[str, Function], rounds: int) -> Iterator[str]:
    draw = random.Random(rounds)
    for _ in range(rounds):
        yield from draw.sample(list(functions), len(functions))
