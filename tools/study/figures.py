"""The figures of a study over its finished runs: success and gap by horizon, errors by depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from tools.figure_parts.svg import LIGHT, Drawing
from tools.study.charts import Axes, Series, Value, draw_chart
from tools.study.outcome import Outcome
from tools.study.plan import SHORT_KIND
from tools.study.statistics import Interval
from tools.study.summary import BASELINE, Results

COLOURS = {"sft": LIGHT.teacher, "dagger": LIGHT.student, "prefix": LIGHT.heldout}
NAMES = {"sft": "SFT", "dagger": "DAgger", "prefix": "prefix"}
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
TOPS = (0.01, 0.02, 0.04, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # of an axis of shares
FEWEST_TURNS = 20  # of a point of the errors by depth
MAX_LABELS = 12  # of an axis of turns


def success_charts(results: Results) -> list[Drawing]:
    """Return success by horizon and arm, one chart for the smaller amounts and one for the larger."""
    charts = []
    for rank, title in _ranks(results):
        lines = []
        for arm, colour in _coloured(results):
            points = {h: _point(results.success(arm, h, a)) for h, a in _amounts(results, rank).items()}
            lines.append(_series(arm, colour, points))
        axes = _axes(results, SHARES, lambda value: f"{value:.0%}")
        subtitle = "held-out tasks solved by the student alone, temperature 0.7, mean over seeds with 95% interval"
        charts.append(draw_chart(f"Success by horizon, {title}", subtitle, axes, lines, LIGHT))
    return charts


def gap_charts(results: Results) -> list[Drawing]:
    """Return the difference of each arm over SFT by horizon, one chart for each rank of the amounts."""
    charts = []
    for rank, title in _ranks(results):
        lines = []
        for arm, colour in _coloured(results):
            points = {h: _point(results.gap(arm, h, a)) for h, a in _amounts(results, rank).items()}
            if arm != BASELINE and any(points.values()):
                lines.append(_series(arm, colour, points))
        if lines:
            ends = [abs(end) for line in lines for point in line.points.values() for end in point if end is not None]
            marks = [100 * _top(max(ends) / 100) * part for part in (-1, -0.5, 0, 0.5, 1)]
            axes = _axes(results, marks, lambda value: f"{value:+.3g}" if value else "0")
            subtitle = "points over SFT with equal labels and steps, paired by task, with 95% interval over seeds"
            charts.append(draw_chart(f"Gap by horizon, {title}", subtitle, axes, lines, LIGHT))
    return charts


def error_charts(results: Results) -> list[Drawing]:
    """Return the errors by depth with the smaller amounts, two charts for each horizon: on the path and off it."""
    charts = []
    for horizon in results.horizons:
        for on_path in (True, False):
            lines = []
            for arm, colour in _coloured(results):
                outcomes = results.choose(arm, horizon, results.amounts(horizon)[0]).values()
                if points := _by_depth(outcomes, on_path=on_path):
                    lines.append(Series(name=NAMES[arm], colour=colour, points=points))
            if lines:
                title = f"Errors {'on' if on_path else 'off'} the teacher's path, {kind_of(horizon)}"
                subtitle = "share of turns that differ from the teacher's label, by turn of the episode"
                charts.append(draw_chart(title, subtitle, _depth_axes(lines), lines, LIGHT))
    return charts


def kind_of(horizon: int) -> str:
    """Return the words for a horizon."""
    return "short kind" if horizon == SHORT_KIND else f"{horizon} bug{'s' if horizon > 1 else ''}"


def _depth_axes(lines: Sequence[Series]) -> Axes:
    places = sorted(set().union(*(line.points for line in lines)))
    labelled = places[:: -(-len(places) // MAX_LABELS)]
    top = _top(max(point[0] for line in lines for point in line.points.values()))
    return Axes(
        places=places,
        labels={place: str(place) for place in labelled},
        marks=[top * part for part in SHARES],
        mark=lambda value: f"{100 * value:.3g}%",
    )


def _top(highest: float) -> float:
    """Return the end of an axis on which the share ``highest`` has room."""
    return next(top for top in TOPS if top >= highest)


def _by_depth(outcomes: Iterable[Outcome], *, on_path: bool) -> dict[int, Value]:
    turns: Counter[int] = Counter()
    errors: Counter[int] = Counter()
    first = 1 if on_path else 3
    for outcome in outcomes:
        for row in outcome.by_depth:
            turns[row[0]] += row[first]
            errors[row[0]] += row[first + 1]
    return {depth: (errors[depth] / n, None, None) for depth, n in sorted(turns.items()) if n >= FEWEST_TURNS}


def _ranks(results: Results) -> list[tuple[int, str]]:
    """Return (rank, title) of the amounts: 0 is the smaller of each horizon, -1 the larger, if there are two."""
    several = any(len(results.amounts(horizon)) > 1 for horizon in results.horizons)
    return [(0, "fewer labels"), (-1, "more labels")] if several else [(0, "one amount of labels")]


def _amounts(results: Results, rank: int) -> dict[int, int]:
    return {horizon: results.amounts(horizon)[rank] for horizon in results.horizons}


def _axes(results: Results, marks: Sequence[float], mark: Callable[[float], str]) -> Axes:
    labels = {}
    for horizon in results.horizons:
        turns = [o.teacher_turns for o in results.outcomes if o.cell.horizon == horizon]
        labels[horizon] = f"{kind_of(horizon)}\n{fmean(turns):.0f} turns"
    return Axes(places=results.horizons, labels=labels, marks=marks, mark=mark)


def _coloured(results: Results) -> list[tuple[str, str]]:
    """Return the arms that are drawn, with their colours; the ablations are in the table only."""
    return [(arm, colour) for arm, colour in COLOURS.items() if arm in results.arms]


def _series(arm: str, colour: str, points: dict[int, Value | None]) -> Series:
    return Series(name=NAMES.get(arm, arm), colour=colour, points={h: p for h, p in points.items() if p is not None})


def _point(values: Interval | None) -> Value | None:
    return None if values is None else (values.mean, values.low, values.high)
