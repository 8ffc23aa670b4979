"""The resolve rate of graded tasks with its confidence interval, overall and by repository."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from megatron_dagger.evaluation.success import wilson_interval


class Outcome(StrEnum):
    """The outcome of a task's grading. Only ``NOT_GRADED`` says nothing about the patch."""

    RESOLVED = "resolved"
    UNRESOLVED = "unresolved"
    EMPTY_PATCH = "empty_patch"
    NO_PREDICTION = "no_prediction"
    PATCH_DOES_NOT_APPLY = "patch_does_not_apply"
    TESTS_TIMED_OUT = "tests_timed_out"
    NOT_GRADED = "not_graded"


def resolve_rate(outcomes: Mapping[str, Outcome], repositories: Mapping[str, str]) -> dict[str, Any]:
    """Return the resolve rate over all tasks of ``outcomes``; as in SWE-bench, every other outcome is unresolved.

    ``repositories``: by task. Keys of the result: tasks, resolved, rate in [0, 1], ci_low and ci_high (95%), counts by
    outcome, and ``repositories``, the same rates by repository.
    """
    by_repository: dict[str, list[Outcome]] = {}
    for task, outcome in outcomes.items():
        by_repository.setdefault(repositories[task], []).append(outcome)
    return {
        **_rate(list(outcomes.values())),
        "counts": {str(outcome): count for outcome, count in sorted(Counter(outcomes.values()).items())},
        "repositories": {name: _rate(group) for name, group in sorted(by_repository.items())},
    }


def table(rates: Mapping[str, Any]) -> str:
    """Return ``resolve_rate``'s result as a text table."""
    rows = [*rates["repositories"].items(), ("all", rates)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'repository':{width}}  resolved   tasks    rate   95% interval"]
    for name, rate in rows:
        interval = f"{rate['ci_low']:6.1%} to {rate['ci_high']:6.1%}"
        lines.append(f"{name:{width}}  {rate['resolved']:8}  {rate['tasks']:6}  {rate['rate']:6.1%}   {interval}")
    others = {name: count for name, count in rates["counts"].items() if name not in ("resolved", "unresolved")}
    if others:
        lines.append(f"counted as not resolved: {', '.join(f'{n} {name}' for name, n in others.items())}")
    return "\n".join(lines)


def _rate(outcomes: list[Outcome]) -> dict[str, Any]:
    resolved = outcomes.count(Outcome.RESOLVED)
    low, high = wilson_interval(resolved, len(outcomes))
    rate = resolved / len(outcomes) if outcomes else 0.0
    return {"tasks": len(outcomes), "resolved": resolved, "rate": rate, "ci_low": low, "ci_high": high}
