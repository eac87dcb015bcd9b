"""The fit of a loss to model sizes, L(N) = E + A / N^alpha, with bootstrap intervals."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.experiments.intervals import LEVEL, Interval

FEWEST_SIZES = 5  # three unknowns, and something left to judge them by
_ALPHAS = np.geomspace(0.01, 3.0, 600)
_RESAMPLED = 1000

Runs = Mapping[float, Sequence[float]]  # by number of parameters: the loss of each seed
Array = NDArray[np.float64]


class Fit(NamedTuple):
    """The law that is nearest in squares to all runs; residuals are of each size's mean."""

    floor: float  # E
    factor: float  # A
    alpha: float
    floor_interval: Interval
    factor_interval: Interval
    alpha_interval: Interval
    r2: float
    residuals: dict[float, float]

    def __call__(self, parameters: float) -> float:
        return self.floor + self.factor * parameters**-self.alpha


def fit(runs: Runs, *, seed: int = 0) -> Fit:
    """Fit the law; the intervals are percentiles over runs drawn anew, with repetition, each size.

    Raises:
        ValueError: there are fewer than `FEWEST_SIZES` sizes, or a size without runs.
    """
    if len(runs) < FEWEST_SIZES or not all(runs.values()):
        raise ValueError(
            f"a fit needs {FEWEST_SIZES} sizes with runs, got {sum(map(bool, runs.values()))}"
        )
    sizes = np.array(sorted(runs), dtype=np.float64)
    means = np.array([[statistics.fmean(runs[size]) for size in sizes]])
    weights = np.array([float(len(runs[size])) for size in sizes])
    ((floor, factor, alpha),) = _nearest(sizes, means, weights)
    drawn = np.random.default_rng(seed)
    again: Array = np.stack(
        [
            drawn.choice(runs[size], (_RESAMPLED, len(runs[size]))).mean(1, dtype=np.float64)
            for size in sizes
        ],
        axis=1,
    )
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(_nearest(sizes, again, weights), [tail, 100 - tail], axis=0)
    law = floor + factor * sizes**-alpha
    every = np.concatenate([np.asarray(runs[size]) for size in sizes])
    missed = np.concatenate(
        [np.asarray(runs[size]) - at for size, at in zip(sizes, law, strict=True)]
    )
    spread = np.square(every - every.mean()).sum()
    bounds = [Interval(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    return Fit(
        float(floor),
        float(factor),
        float(alpha),
        *bounds,
        r2=float(1 - np.square(missed).sum() / spread),
        residuals={float(n): float(r) for n, r in zip(sizes, means[0] - law, strict=True)},
    )


def _nearest(sizes: Array, losses: Array, weights: Array) -> Array:
    """Return (E, A, alpha) [many, 3] for losses [many, sizes].

    Given alpha, E and A are a weighted straight line through (N^-alpha, L): alpha is the best of a
    fine grid, then of the parabola through its neighbours.
    """
    weights = weights / weights.sum()
    x = (sizes / sizes[0]) ** -_ALPHAS[:, None]  # [alphas, sizes], of one order
    x_mean = x @ weights
    x_spread = np.square(x - x_mean[:, None]) @ weights
    y_mean = losses @ weights
    together = ((losses - y_mean[:, None]) * weights) @ (x - x_mean[:, None]).T  # [many, alphas]
    error = (np.square(losses - y_mean[:, None]) @ weights)[:, None] - np.square(
        together
    ) / x_spread
    best = error.argmin(1)
    inner = best.clip(1, len(_ALPHAS) - 2)
    many = np.arange(len(losses))
    left, here, right = (error[many, inner + step] for step in (-1, 0, 1))
    bend = left - 2 * here + right
    flat = (bend <= 0) | (best != inner)
    shift = np.where(flat, 0.0, 0.5 * (left - right) / np.where(flat, 1.0, bend))
    step = np.log(_ALPHAS[1] / _ALPHAS[0])
    alpha = _ALPHAS[best] * np.exp(step * shift)
    x = (sizes / sizes[0]) ** -alpha[:, None]  # [many, sizes]
    x_mean = x @ weights
    away = x - x_mean[:, None]
    slope = ((losses - y_mean[:, None]) * away) @ weights / (np.square(away) @ weights)
    return np.stack((y_mean - slope * x_mean, slope * sizes[0] ** alpha, alpha), axis=1)
