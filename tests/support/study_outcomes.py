"""Outcomes of a study's runs, made by hand."""

from __future__ import annotations

from tools.study.outcome import Outcome
from tools.study.plan import Cell


def make_outcome(cell: Cell, solved: int, *, tasks: int = 20, **changes: object) -> Outcome:
    """Return the outcome of a run that solves the first ``solved`` of its tasks."""
    turns = 8 * cell.horizon + 2
    values: dict[str, object] = {
        "cell": cell,
        "seconds": 60.0,
        "solved": {f"task-{index:03d}": index < solved for index in range(tasks)},
        "turns": turns + 1.0,
        "teacher_turns": float(turns),
        "labels": (cell.amount, 2 * cell.amount, 3 * cell.amount),
        "labels_due": (cell.amount, 2 * cell.amount, 3 * cell.amount),
        "steps": (50, 50, 50),
        "executed_tokens": 1000,
        "labelled_tokens": 3000,
        "by_depth": ((0, 400, 4, 0, 0), (4, 300, 6, 100, 50)),
        "visited_states": 500,
        "new_states": 100,
        "takeovers": 10,
        "takeovers_solved": 9,
    }
    return Outcome(**{**values, **changes})  # type: ignore[arg-type]
