"""The results of a study from the outcomes of its finished runs, however many of them there are yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from megatron_dagger.evaluation.success import wilson_interval
from tools.study.outcome import Outcome
from tools.study.plan import SHORT_KIND
from tools.study.statistics import Interval, interval, paired_task_sd, slope, smallest_visible_difference, spread

BASELINE, METHOD = "sft", "dagger"
USUAL_SUCCESS = 0.5  # for the power; a task's outcome varies most there


class Results:
    """The outcomes of a study, grouped. Differences and their intervals are in points."""

    def __init__(self, outcomes: Iterable[Outcome]):
        self.outcomes = list(outcomes)
        self._by_cell = {outcome.cell: outcome for outcome in self.outcomes}
        self._successes: dict[tuple[str, int, int, bool], Interval | None] = {}  # an interval takes long
        self._gaps: dict[tuple[str, int, int, bool], Interval | None] = {}
        all_cells = list(self._by_cell)
        self.arms = list(dict.fromkeys(cell.arm for cell in all_cells))
        self.horizons = sorted({cell.horizon for cell in all_cells})

    def amounts(self, horizon: int) -> list[int]:
        return sorted({cell.amount for cell in self._by_cell if cell.horizon == horizon})

    def choose(self, arm: str, horizon: int, amount: int, *, greedy: bool = False) -> dict[int, Outcome]:
        """Return the outcomes of an arm by seed."""
        key = (arm, horizon, amount, greedy)
        chosen = {c.seed: o for c, o in self._by_cell.items() if (c.arm, c.horizon, c.amount, c.greedy) == key}
        return dict(sorted(chosen.items()))

    def success(self, arm: str, horizon: int, amount: int, *, greedy: bool = False) -> Interval | None:
        """Return the share of solved tasks over seeds; None without a run.

        With a single seed the interval is Wilson's, of its tasks alone.
        """
        key = (arm, horizon, amount, greedy)
        if key not in self._successes:
            self._successes[key] = _success(list(self.choose(arm, horizon, amount, greedy=greedy).values()))
        return self._successes[key]

    def differences(self, arm: str, horizon: int, amount: int, *, greedy: bool = False) -> dict[int, list[float]]:
        """Return, by seed, each task's success under ``arm`` minus that under SFT, in points."""
        first, second = (self.choose(name, horizon, amount, greedy=greedy) for name in (BASELINE, arm))
        return {
            seed: [100.0 * (second[seed].solved[t] - first[seed].solved[t]) for t in first[seed].solved
                   if t in second[seed].solved]
            for seed in first if seed in second
        }  # fmt: skip

    def gap(self, arm: str, horizon: int, amount: int, *, greedy: bool = False) -> Interval | None:
        """Return the difference over seeds in points; None with fewer than two seeds."""
        key = (arm, horizon, amount, greedy)
        if key not in self._gaps:
            by_seed = list(self.differences(arm, horizon, amount, greedy=greedy).values())
            self._gaps[key] = _within(interval(by_seed), -100.0, 100.0) if len(by_seed) > 1 else None
        return self._gaps[key]

    def gap_slope(self, arm: str) -> Interval | None:
        """Return by how many points the gap grows as the bugs double, with the smaller amount; None if unknown.

        Only seeds that have every horizon count. The short kind is another task, so it does not.
        """
        by_horizon = {
            horizon: self.differences(arm, horizon, self.amounts(horizon)[0])
            for horizon in self.horizons
            if horizon != SHORT_KIND
        }
        by_horizon = {horizon: by_seed for horizon, by_seed in by_horizon.items() if by_seed}
        common = sorted(set.intersection(*map(set, by_horizon.values()))) if by_horizon else []
        if len(by_horizon) < 2 or len(common) < 2:
            return None
        return slope({horizon: [by_seed[seed] for seed in common] for horizon, by_seed in by_horizon.items()})

    def measured_visible(self, arm: str, horizon: int, amount: int) -> float | None:
        """Return the smallest visible difference by the spread that the runs show; None with fewer than two seeds."""
        by_seed = list(self.differences(arm, horizon, amount).values())
        if len(by_seed) < 2 or min(map(len, by_seed)) < 2:
            return None
        seed_sd, task_sd = spread(by_seed)
        tasks = min(map(len, by_seed))
        return smallest_visible_difference(seeds=len(by_seed), tasks=tasks, seed_sd=seed_sd, task_sd=task_sd)


def visible_difference(seeds: int, tasks: int, seed_sd: float) -> float:
    """Return which difference, in points, a study of this size sees, as can be said before it."""
    task_sd = 100 * paired_task_sd(USUAL_SUCCESS, correlation=0.0)
    return smallest_visible_difference(seeds=seeds, tasks=tasks, seed_sd=seed_sd, task_sd=task_sd)


def error_share(outcomes: Iterable[Outcome], *, on_path: bool) -> float | None:
    """Return the share of errors in the turns on or off the teacher's path, of all the outcomes together."""
    return share(outcomes, lambda o: o.errors(on_path=on_path)[1], lambda o: o.errors(on_path=on_path)[0])


def share(outcomes: Iterable[Outcome], part: Callable[[Outcome], int], whole: Callable[[Outcome], int]) -> float | None:
    """Return the sum of ``part`` over the sum of ``whole``; None if that is 0."""
    chosen = list(outcomes)
    total = sum(map(whole, chosen))
    return sum(map(part, chosen)) / total if total else None


def numbers(results: Results) -> dict[str, Any]:
    """Return the study's numbers for its RESULT; those that no finished run gives are None.

    The difference, the errors on the path and the power are those of the longest horizon with the smaller amount.
    """
    horizons, outcomes = results.horizons, results.outcomes
    sampled = [outcome for outcome in outcomes if not outcome.cell.greedy]
    long = [outcome for outcome in sampled if outcome.cell.horizon != SHORT_KIND]
    longest = max(horizons, default=SHORT_KIND)
    amount = results.amounts(longest)[0] if horizons else 0
    gap, of_slope = results.gap(METHOD, longest, amount), results.gap_slope(METHOD)
    measured = results.measured_visible(METHOD, longest, amount)
    return {
        "seeds": min((len(results.choose(arm, longest, amount)) for arm in results.arms), default=0),
        "heldout_tasks": min((len(outcome.solved) for outcome in outcomes), default=0),
        "horizons_median_turns": {
            horizon: fmean(outcome.teacher_turns for outcome in sampled if outcome.cell.horizon == horizon)
            for horizon in sorted({outcome.cell.horizon for outcome in sampled})
        },
        "success": _success_table(results, greedy=False),
        "success_greedy": _success_table(results, greedy=True),
        "on_path_error_sft": error_share(results.choose(BASELINE, longest, amount).values(), on_path=True),
        "new_states_share": share(long, lambda o: o.new_states, lambda o: o.visited_states),
        "expert_from_student_states": share(long, lambda o: o.takeovers_solved, lambda o: o.takeovers),
        "longest_horizon": longest,
        "smaller_amount": amount,
        **_named(gap, "difference_points", "ci_low", "ci_high"),
        **_named(of_slope, "gap_slope", "gap_slope_low", "gap_slope_high"),
        "smallest_visible_difference_measured": measured,
    }


def _success(runs: Sequence[Outcome]) -> Interval | None:
    if len(runs) > 1:
        return _within(interval([[float(solved) for solved in run.solved.values()] for run in runs]), 0.0, 1.0)
    if not runs:
        return None
    low, high = wilson_interval(sum(runs[0].solved.values()), len(runs[0].solved))
    return Interval(mean=runs[0].success, low=low, high=high)


def _named(values: Interval | None, mean: str, low: str, high: str) -> dict[str, float | None]:
    if values is None:
        return {mean: None, low: None, high: None}
    return {mean: values.mean, low: values.low, high: values.high}


def _success_table(results: Results, *, greedy: bool) -> dict[str, dict[int, dict[int, float]]]:
    """Return the mean success by arm, horizon and amount."""
    table: dict[str, dict[int, dict[int, float]]] = {}
    for arm in results.arms:
        for horizon in results.horizons:
            for amount in results.amounts(horizon):
                runs = results.choose(arm, horizon, amount, greedy=greedy).values()
                if runs:
                    table.setdefault(arm, {}).setdefault(horizon, {})[amount] = fmean(run.success for run in runs)
    return table


def _within(values: Interval, low: float, high: float) -> Interval:
    """Return the interval cut to the possible values, which two seeds' interval may leave."""
    return Interval(mean=values.mean, low=max(low, values.low), high=min(high, values.high))
