"""95% intervals over a few runs: of a mean (Student's t) and of a share (Clopper and Pearson)."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

LEVEL = 0.95


class Interval(NamedTuple):
    low: float
    high: float


def of_mean(
    values: Sequence[float], *, least: float = -math.inf, most: float = math.inf
) -> Interval | None:
    """Return the t interval of the mean of values that lie in [least, most]; None for one value.

    It takes the values for draws of a normal distribution, which those of runs that either learn
    or do not are not: read it beside the count of those that learned. Values that are all equal
    give no width, which says that these runs agree.
    """
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    reach = t_quantile(len(values) - 1) * error
    return Interval(max(least, mean - reach), min(most, mean + reach))


def of_share(successes: int, trials: int) -> Interval:
    """Return the exact (Clopper and Pearson) interval of a probability."""
    tail = (1 - LEVEL) / 2

    def at_least(p: float) -> float:  # rises with p
        return sum(_binomial(trials, n, p) for n in range(successes, trials + 1))

    def at_most(p: float) -> float:  # falls with p
        return sum(_binomial(trials, n, p) for n in range(successes + 1))

    low = 0.0 if successes == 0 else _bisect(lambda p: at_least(p) - tail, 0.0, 1.0)
    high = 1.0 if successes == trials else _bisect(lambda p: tail - at_most(p), 0.0, 1.0)
    return Interval(low, high)


def t_quantile(freedom: int) -> float:
    """Return t with P(|T| < t) = 0.95 for Student's T."""
    return _bisect(lambda t: _t_between(t, freedom) - LEVEL, 0.0, 1e3)


def _t_between(t: float, freedom: int) -> float:
    """Return P(|T| < t), by Simpson's rule over T = sqrt(freedom) tan(angle)."""
    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    end, steps = math.atan(t / math.sqrt(freedom)), 200
    heights = [math.cos(end * n / steps) ** (freedom - 1) for n in range(steps + 1)]
    inside = 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    return 2 * norm * (heights[0] + inside + heights[-1]) * end / steps / 3


def _binomial(trials: int, successes: int, p: float) -> float:
    return math.comb(trials, successes) * p**successes * (1 - p) ** (trials - successes)


def _bisect(rising: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2
