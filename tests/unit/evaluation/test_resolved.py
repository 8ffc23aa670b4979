"""Resolve rates over graded tasks."""

import pytest

from megatron_dagger.evaluation.resolved import Outcome, resolve_rate, table


def test_every_outcome_but_resolved_counts_as_not_resolved():
    outcomes = {f"a-{n}": Outcome.RESOLVED for n in range(3)} | {"a-3": Outcome.UNRESOLVED, "b-0": Outcome.RESOLVED}
    outcomes |= {"b-1": Outcome.EMPTY_PATCH, "b-2": Outcome.NO_PREDICTION, "b-3": Outcome.PATCH_DOES_NOT_APPLY}
    rates = resolve_rate(outcomes, {task: f"org/{task[0]}" for task in outcomes})
    assert (rates["tasks"], rates["resolved"], rates["rate"]) == (8, 4, 0.5)
    # Wilson's interval of 4 of 8, of 3 of 4: statsmodels' proportion_confint(method="wilson")
    assert (rates["ci_low"], rates["ci_high"]) == pytest.approx((0.215214, 0.784786), abs=1e-5)
    assert rates["repositories"]["org/a"]["ci_low"] == pytest.approx(0.300642, abs=1e-5)
    assert {name: rate["resolved"] for name, rate in rates["repositories"].items()} == {"org/a": 3, "org/b": 1}
    assert rates["counts"]["empty_patch"] == 1
    lines = table(rates).splitlines()
    assert lines[1].split() == ["org/a", "3", "4", "75.0%", "30.1%", "to", "95.4%"]
    assert lines[3].startswith("all ")
    assert lines[4] == "counted as not resolved: 1 empty_patch, 1 no_prediction, 1 patch_does_not_apply"
