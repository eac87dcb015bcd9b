"""Timing: several functions in turn, so that all of them meet the same machine and neighbours."""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Function = Callable[[], object]

# Seconds that a function runs on end on a GPU. At its power limit a card takes some 0.1 s to find
# the clock that suits a function; what runs before pays for, or profits from, its neighbour (H200:
# attention of cuDNN 689, 660, 624, 604, 604 TFLOP/s in the first five runs of 14 ms after others).
BLOCK = 0.2
_LEAST_OF_BLOCK = 2


@dataclass(frozen=True)
class Times:
    """Milliseconds of each run of one function that counts, and the one that stands for them.

    `first` are those of the first run of every block, at the clock that another function left: no
    part of `ms`, and empty where there are no blocks.
    """

    ms: tuple[float, ...]
    statistic: Literal["median", "best"] = "median"
    first: tuple[float, ...] = ()

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
    least_rounds: int = 5,
    most_rounds: int = 100,
) -> dict[str, Times]:
    """Time the functions in rounds, all of them once in each, in another order every round.

    Clocks and power move by tens of percent within minutes, so only what is run side by side
    compares. Two warm-up rounds come first and the second sets the number of rounds: as many as fit
    in `seconds`, at least `least_rounds`.

    On a CPU a function runs once a round, and the best stands for its runs. On a GPU it runs on end
    for `BLOCK` seconds a round, and the median of all runs in the second half of its blocks stands
    for it: its rate at the clock that it settles at. The cache is overwritten before every run;
    runs are timed with events, never by the host.
    """
    if device.type != "cuda":
        return _time_on_cpu(functions, seconds, least_rounds, most_rounds)
    once = dict.fromkeys(functions, 1)
    _cuda_rounds(functions, device, once, 1)
    ms = {name: times[0] for name, times in _cuda_rounds(functions, device, once, 1).items()}
    runs = {name: max(_LEAST_OF_BLOCK, math.ceil(BLOCK * 1e3 / each)) for name, each in ms.items()}
    round_ms = sum(runs[name] * each for name, each in ms.items())
    rounds = min(most_rounds, max(least_rounds, int(seconds * 1e3 / round_ms)))
    return {
        name: _settled(times, runs[name])
        for name, times in _cuda_rounds(functions, device, runs, rounds).items()
    }


def _settled(ms: list[float], runs: int) -> Times:
    """Return the times that count of blocks of so many runs."""
    settled = tuple(each for n, each in enumerate(ms) if n % runs >= runs // 2)
    return Times(settled, "median", tuple(ms[::runs]))


def _time_on_cpu(
    functions: Mapping[str, Function], seconds: float, least_rounds: int, most_rounds: int
) -> dict[str, Times]:
    _cpu_rounds(functions, 1)
    estimate = sum(sum(ms) for ms in _cpu_rounds(functions, 1).values()) / 1e3
    rounds = min(most_rounds, max(least_rounds, int(seconds / max(estimate, 1e-6))))
    return {name: Times(tuple(ms), "best") for name, ms in _cpu_rounds(functions, rounds).items()}


def _cuda_rounds(
    functions: Mapping[str, Function], device: torch.device, runs: Mapping[str, int], rounds: int
) -> dict[str, list[float]]:
    """Return the milliseconds of all runs of each function, block after block."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * cache, dtype=torch.int8, device=device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in functions}
    for name in _in_shuffled_rounds(functions, rounds):
        for _ in range(runs[name]):
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


def _cpu_rounds(functions: Mapping[str, Function], rounds: int) -> dict[str, list[float]]:
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
