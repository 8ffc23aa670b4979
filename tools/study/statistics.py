"""The statistics of a study with several seeds: intervals of a difference and of a slope, and power before a run.

The data are numbers by seed and task, such as "DAgger solved it minus SFT solved it". The tasks of a seed share its
weights, so they are not independent: the seeds are the sample, however many tasks each of them has.

An interval resamples seeds and, in each drawn seed, its tasks (the hierarchical bootstrap; Davison and Hinkley,
Bootstrap Methods and their Application, 1997, section 3.8). With few seeds such quantiles are too close together if the
seeds differ much, and too far apart if they hardly differ, as the tasks then vary twice. So the resampled means are
stretched about the mean until their spread is that of Student's t interval for the seeds' means, whose power is known.
In simulations of solved tasks (40 to 200 tasks, success 50 to 90%, 0 to 15 points between seeds, 1,500 studies each)
these intervals held the true difference in 93.7 to 95.5% of the studies with 5 seeds and in 94.3 to 96.0% with 10; the
plain quantiles in 84 to 98% and 90 to 99%.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

import numpy as np

LEVEL, POWER = 0.95, 0.8
RESAMPLES = 10_000
_GRID = 1000  # points of an integral
_BISECTIONS = 40

BySeed = Sequence[Sequence[float]]  # the values of each seed's tasks; the number of tasks may differ


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its 95% interval, in the unit of the data."""

    mean: float
    low: float
    high: float


def interval(by_seed: BySeed, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the mean over seeds of their tasks' means.

    For a paired comparison a value is the difference of the two arms on one task. Raises ValueError for fewer than two
    seeds or a seed without tasks.
    """
    return _interval([by_seed], [1.0], resamples, seed)


def slope(by_horizon: Mapping[int, BySeed], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the least-squares slope of the mean over log2 of the horizon: its change when the horizon doubles.

    Every horizon has the same seeds in the same order, and they are resampled together. Raises ValueError as
    ``interval``, and if there are fewer than two horizons or their seeds differ in number.
    """
    if len(by_horizon) < 2 or len({len(by_seed) for by_seed in by_horizon.values()}) != 1:
        raise ValueError("a slope needs two horizons or more, all with the same seeds")
    places = np.log2(list(by_horizon)) - np.mean(np.log2(list(by_horizon)))
    return _interval(list(by_horizon.values()), list(places / np.sum(places**2)), resamples, seed)


def _interval(parts: Sequence[BySeed], weights: Sequence[float], resamples: int, seed: int) -> Interval:
    """Return the interval of the weighted sum of the parts' means. All parts have the same seeds."""
    seeds = len(parts[0])
    if seeds < 2 or not all(len(values) for part in parts for values in part):
        raise ValueError("an interval needs two seeds or more, each with tasks")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(seeds, size=(resamples, seeds))
    of_seeds, resampled = np.zeros(seeds), np.zeros(resamples)
    for part, weight in zip(parts, weights, strict=True):
        for index, values in enumerate(part):
            of_seeds[index] += weight * fmean(values)
            rows, _ = np.nonzero(drawn == index)
            means = _resampled_means(values, len(rows), rng)
            resampled += weight / seeds * np.bincount(rows, means, minlength=resamples)
    mean, spread = float(of_seeds.mean()), float(resampled.std())
    if not spread:
        return Interval(mean=mean, low=mean, high=mean)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail]) - mean
    of_t = _t_quantile(seeds - 1) / NormalDist().inv_cdf(1 - tail) * of_seeds.std(ddof=1) / math.sqrt(seeds)
    return Interval(mean=mean, low=mean + low * of_t / spread, high=mean + high * of_t / spread)


def _resampled_means(values: Sequence[float], number: int, rng: np.random.Generator) -> np.ndarray:
    """Return the means of ``number`` samples with replacement, each as large as ``values``."""
    distinct, counts = np.unique(np.asarray(values, float), return_counts=True)
    means: np.ndarray = rng.multinomial(len(values), counts / len(values), size=number) @ distinct / len(values)
    return means


def spread(by_seed: BySeed) -> tuple[float, float]:
    """Return the standard deviations between seeds and between the tasks of a seed, as a pilot study shows them.

    The variance between seeds is what the seeds' means vary more than their tasks explain (analysis of variance, as in
    Searle, Casella and McCulloch, Variance Components, 1992, section 3.6); 0 if they vary less. Raises ValueError for
    fewer than two seeds or a seed with fewer than two tasks.
    """
    if len(by_seed) < 2 or min(map(len, by_seed)) < 2:
        raise ValueError("the spread needs two seeds or more, each with two tasks or more")
    of_tasks = fmean(float(np.var(values, ddof=1)) for values in by_seed)
    explained = of_tasks * fmean(1 / len(values) for values in by_seed)
    of_means = float(np.var([fmean(values) for values in by_seed], ddof=1))
    return math.sqrt(max(0.0, of_means - explained)), math.sqrt(of_tasks)


def paired_task_sd(success: float, correlation: float) -> float:
    """Return the standard deviation of one task's difference: two arms that each solve it with chance ``success``.

    ``correlation`` is that of the two outcomes; 0 is the cautious choice. This is the binomial part of the spread:
    the variance of a difference of two Bernoulli variables.
    """
    return math.sqrt(2 * success * (1 - success) * (1 - correlation))


def smallest_visible_difference(
    *, seeds: int, tasks: int, seed_sd: float, task_sd: float, power: float = POWER
) -> float:
    """Return the smallest true difference whose 95% interval excludes zero with probability ``power``.

    ``seed_sd``: of the true difference between seeds. ``task_sd``: of a task's difference within a seed. Both in the
    unit of the result, such as points. A seed's mean over its ``tasks`` has the variance seed_sd^2 + task_sd^2 / tasks;
    the power is that of the two-sided t test, by the noncentral t distribution (Owen, JASA 60, 1965). Raises ValueError
    for fewer than two seeds or no task.
    """
    if seeds < 2 or tasks < 1:
        raise ValueError(f"power needs two seeds or more and a task, got {seeds} and {tasks}")
    dof, critical = seeds - 1, _t_quantile(seeds - 1)
    shift = _bisect(lambda shift: _above(critical, dof, shift) + _above(critical, dof, -shift), power, 100.0)
    return shift * math.sqrt((seed_sd**2 + task_sd**2 / tasks) / seeds)


@functools.cache
def _t_quantile(dof: int) -> float:
    """Return the upper quantile of Student's t distribution at which a two-sided test has the level 1 - LEVEL."""
    return _bisect(lambda t: 1 - _above(t, dof), (1 + LEVEL) / 2, 1000.0)


def _above(critical: float, dof: int, shift: float = 0.0) -> float:
    """Return P(T > critical), T = (Z + shift) / S noncentral t: Z is standard normal, dof * S^2 is chi-squared."""
    s = (np.arange(_GRID) + 0.5) / _GRID * (1 + 12 / math.sqrt(dof))  # S is about 1
    log_density = (dof - 1) * np.log(s) - dof * s**2 / 2
    density = np.exp(log_density - log_density.max())
    given_s = [0.5 * math.erfc((critical * value - shift) / math.sqrt(2)) for value in s]
    return float(np.dot(given_s, density) / density.sum())


def _bisect(rising: Callable[[float], float], value: float, high: float) -> float:
    """Return where ``rising`` reaches ``value``, between 0 and ``high``."""
    low = 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2
