"""The resolve rate of graded tasks, with its confidence interval, in all and by repository."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from megatron_dagger.evaluation.success import wilson_interval


class Outcome(StrEnum):
    """What came of a task's grading. Only ``NOT_GRADED`` says nothing of the patch."""

    RESOLVED = "resolved"
    UNRESOLVED = "unresolved"
    EMPTY_PATCH = "empty_patch"
    NO_PREDICTION = "no_prediction"
    PATCH_DOES_NOT_APPLY = "patch_does_not_apply"
    TESTS_TIMED_OUT = "tests_timed_out"
    NOT_GRADED = "not_graded"


def resolve_rate(outcomes: Mapping[str, Outcome], repositories: Mapping[str, str]) -> dict[str, Any]:
    """Over all tasks of ``outcomes``, as SWE-bench counts: whatever is not resolved counts as not resolved.

    ``repositories``: of each task. tasks, resolved, rate in [0, 1] with its 95% interval, the number of each
    outcome; the same rates by repository.
    """
    by_repository: dict[str, list[Outcome]] = {}
    for task, outcome in outcomes.items():
        by_repository.setdefault(repositories[task], []).append(outcome)
    return {
        **_rate(list(outcomes.values())),
        "counts": {str(outcome): count for outcome, count in sorted(Counter(outcomes.values()).items())},
        "repositories": {name: _rate(found) for name, found in sorted(by_repository.items())},
    }


def table(rates: Mapping[str, Any]) -> str:
    """``resolve_rate``'s numbers as lines of text."""
    rows = [*rates["repositories"].items(), ("all", rates)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'repository':{width}}  resolved   tasks    rate   95% interval"]
    for name, one in rows:
        interval = f"{one['ci_low']:6.1%} to {one['ci_high']:6.1%}"
        lines.append(f"{name:{width}}  {one['resolved']:8}  {one['tasks']:6}  {one['rate']:6.1%}   {interval}")
    others = {name: count for name, count in rates["counts"].items() if name not in ("resolved", "unresolved")}
    if others:
        lines.append(f"counted as not resolved: {', '.join(f'{n} {name}' for name, n in others.items())}")
    return "\n".join(lines)


def _rate(outcomes: list[Outcome]) -> dict[str, Any]:
    resolved = outcomes.count(Outcome.RESOLVED)
    low, high = wilson_interval(resolved, len(outcomes))
    rate = resolved / len(outcomes) if outcomes else 0.0
    return {"tasks": len(outcomes), "resolved": resolved, "rate": rate, "ci_low": low, "ci_high": high}
