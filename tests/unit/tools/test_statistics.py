"""The statistics of a study: known values, and simulated studies in which coverage and power must be as claimed."""

import math

import numpy as np
import pytest

from tools.study.statistics import (
    _t_quantile,
    interval,
    paired_task_sd,
    slope,
    smallest_visible_difference,
    spread,
)

TASKS, SEED_SD, SUCCESS = 60, 0.05, 0.8
RUNS, RESAMPLES = 300, 250


def studies(seeds, difference, runs=RUNS):
    """Yield the paired differences of simulated studies: two arms that solve about 80% of each seed's tasks."""
    rng = np.random.default_rng([seeds, round(1000 * difference)])
    for _ in range(runs):
        of_seeds = difference + SEED_SD * rng.standard_normal(seeds)
        first, second = (rng.random((seeds, TASKS)) < (SUCCESS + sign * of_seeds / 2)[:, None] for sign in (-1, 1))
        yield second.astype(float) - first


@pytest.mark.parametrize("seeds", [5, 10])
def test_an_interval_holds_the_true_difference_in_95_of_100_studies(seeds):
    intervals = [interval(study, resamples=RESAMPLES, seed=n) for n, study in enumerate(studies(seeds, 0.06))]
    held = sum(result.low <= 0.06 <= result.high for result in intervals) / RUNS
    assert 0.93 <= held <= 0.97


@pytest.mark.parametrize("seeds", [5, 10])
def test_the_smallest_visible_difference_is_seen_in_80_of_100_studies(seeds):
    smallest = smallest_visible_difference(
        seeds=seeds, tasks=TASKS, seed_sd=SEED_SD, task_sd=paired_task_sd(SUCCESS, correlation=0)
    )
    intervals = [interval(study, resamples=RESAMPLES, seed=n) for n, study in enumerate(studies(seeds, smallest))]
    seen = sum(not result.low <= 0 <= result.high for result in intervals) / RUNS
    assert 0.75 <= seen <= 0.85


def test_quantiles_of_students_t():
    # Fisher and Yates, Statistical Tables, table III
    for dof, value in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert _t_quantile(dof) == pytest.approx(value, rel=2e-3)


def test_the_power_of_the_t_test():
    # Cohen, Statistical Power Analysis, 1988: one sample of 10 sees a difference of 1.0 deviations with power 0.80
    smallest = smallest_visible_difference(seeds=10, tasks=1, seed_sd=1.0, task_sd=0.0)
    assert smallest == pytest.approx(1.0, abs=0.01)
    settings = [(50, 50.0), (5000, 50.0), (5000, 0.0)]
    sizes = [smallest_visible_difference(seeds=5, tasks=n, seed_sd=8.0, task_sd=sd) for n, sd in settings]
    assert sizes[0] > sizes[1] > sizes[2] > 0.9 * sizes[1], "more tasks do not help for ever: seeds set the limit"


def test_seeds_count_and_not_their_tasks():
    rng = np.random.default_rng(0)
    few, many = ([0.1 * seed + 0.01 * rng.standard_normal(tasks) for seed in range(5)] for tasks in (10, 200))
    widths = [result.high - result.low for result in map(interval, (few, many))]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    assert interval(many).mean == pytest.approx(0.2, abs=0.01)
    half = 2.776 * np.std([np.mean(tasks) for tasks in many], ddof=1) / math.sqrt(5)
    assert widths[1] == pytest.approx(2 * half, rel=0.05), "as wide as Student's t interval of the seeds' means"


def test_an_interval_repeats_and_lies_about_its_mean():
    values = [[1, 0, 1, 1], [1, 1, 1], [0, 0, 1, 1, 0]]
    first = interval(values)
    assert first == interval(values)
    assert first.mean == pytest.approx((0.75 + 1 + 0.4) / 3)
    assert first.low < first.mean < first.high
    same = interval([[0.5, 0.5]] * 3)
    assert (same.low, same.mean, same.high) == (0.5, 0.5, 0.5)


def test_a_slope_is_the_change_when_the_horizon_doubles():
    rng = np.random.default_rng(0)
    seed_effects = rng.standard_normal(6)
    data = {
        horizon: [3 * math.log2(horizon) + effect + 0.1 * rng.standard_normal(50) for effect in seed_effects]
        for horizon in (15, 35, 70)
    }
    result = slope(data)
    assert result.low < 3 < result.high
    assert result.high - result.low < 0.2, "a seed's own level moves all horizons alike and does not widen the slope"


def test_the_spread_of_a_pilot_study():
    rng = np.random.default_rng(0)
    pilot = [seed_effect + 0.5 * rng.standard_normal(100) for seed_effect in 0.2 * rng.standard_normal(200)]
    assert spread(pilot) == pytest.approx((0.2, 0.5), rel=0.1)
    assert spread([[0, 1], [0, 1]]) == (0.0, pytest.approx(math.sqrt(0.5)))


def test_what_allows_no_conclusion_is_refused():
    for data in ([[1, 2]], [[1], []]):
        with pytest.raises(ValueError, match="two seeds"):
            interval(data)
    with pytest.raises(ValueError, match="two seeds"):
        spread([[1], [2]])
    with pytest.raises(ValueError, match="two horizons"):
        slope({15: [[1], [2]]})
    with pytest.raises(ValueError, match="same seeds"):
        slope({15: [[1], [2]], 30: [[1], [2], [3]]})
    with pytest.raises(ValueError, match="two seeds"):
        smallest_visible_difference(seeds=1, tasks=10, seed_sd=1.0, task_sd=1.0)
