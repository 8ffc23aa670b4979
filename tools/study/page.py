"""The page of a study: figures and a table over the runs that are finished, as one HTML file without scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from statistics import fmean
from typing import Any

from tools.study.figures import NAMES, error_charts, gap_charts, kind_of, success_charts
from tools.study.outcome import unmatched
from tools.study.summary import BASELINE, Results, error_share, share

STYLE = """
body { margin: 0 auto; max-width: 1180px; padding: 24px; background: #fbfaf8; color: #1d2126;
       font: 15px/1.5 system-ui, sans-serif; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 14px; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 9px; text-align: right; border-bottom: 1px solid #d8d4cc; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; }
td:nth-child(-n+4), th:nth-child(-n+4) { text-align: left; }
.wide { overflow-x: auto; }
"""
COLUMNS = (
    "horizon", "labels a round", "arm", "decoding", "seeds", "tasks", "solved", "95%", "over SFT, points", "95%",
    "student's turns", "teacher's turns", "errors on the path", "errors off it", "new states",
    "teacher solves from there", "labels trained on", "steps", "teacher's tokens: executed", "labelled",
)  # fmt: skip


def page(results: Results, heading: Sequence[str]) -> str:
    """Return the page. ``heading``: sentences about the study."""
    figures = [*success_charts(results), *gap_charts(results), *error_charts(results)]
    problems = unmatched(results.outcomes)
    lines = [*heading, "Every arm of a group was trained on the labels due, in the same number of steps."]
    if problems:
        lines[-1] = f"Not matched, so not comparable: {'; '.join(problems)}."
    paragraphs = "\n".join(f"<p>{escape(line)}</p>" for line in lines)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Methods</title>\n'
        f"<style>{STYLE}</style>\n<h1>Methods by horizon</h1>\n{paragraphs}\n"
        f'<div class="figures">{"".join(figure.svg() for figure in figures)}</div>\n<h2>All numbers</h2>\n'
        f'<div class="wide">{_table(results)}</div>\n</html>\n'
    )


def _table(results: Results) -> str:
    rows = []
    for horizon in results.horizons:
        for amount in results.amounts(horizon):
            for arm in results.arms:
                for greedy in (False, True):
                    rows.append(_row(results, arm, horizon, amount, greedy=greedy))
    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(str(v))}</td>" for v in row) + "</tr>" for row in rows if row)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _row(results: Results, arm: str, horizon: int, amount: int, *, greedy: bool) -> list[Any]:
    """Return a row of COLUMNS; nothing without a run."""
    runs = list(results.choose(arm, horizon, amount, greedy=greedy).values())
    success = results.success(arm, horizon, amount, greedy=greedy)
    if success is None:
        return []
    gap = None if arm == BASELINE else results.gap(arm, horizon, amount, greedy=greedy)
    return [
        kind_of(horizon), amount, NAMES.get(arm, arm), "greedy" if greedy else "sampled",
        len(runs), min(len(run.solved) for run in runs),
        _percent(success.mean), f"{_percent(success.low)} to {_percent(success.high)}",
        f"{gap.mean:+.1f}" if gap else "", f"{gap.low:+.1f} to {gap.high:+.1f}" if gap else "",
        f"{fmean(run.turns for run in runs):.0f}", f"{fmean(run.teacher_turns for run in runs):.0f}",
        _percent(error_share(runs, on_path=True), 2), _percent(error_share(runs, on_path=False)),
        _percent(share(runs, lambda o: o.new_states, lambda o: o.visited_states)),
        _percent(share(runs, lambda o: o.takeovers_solved, lambda o: o.takeovers)),
        _each(run.labels[-1] for run in runs), _each(sum(run.steps) for run in runs),
        f"{fmean(run.executed_tokens for run in runs):,.0f}", f"{fmean(run.labelled_tokens for run in runs):,.0f}",
    ]  # fmt: skip


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}%"


def _each(values: Iterable[int]) -> str:
    """Return the number, or all of the different numbers."""
    return ", ".join(f"{value:,}" for value in sorted(set(values)))
