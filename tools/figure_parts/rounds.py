"""Figure: held-out success after each round with its 95% interval, beside it the SFT arm or the agreement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_dagger.observability.rundir import RunFiles
from tools.figure_parts.svg import Corner, Drawing, Theme

WIDTH, HEIGHT = 760, 392
LEFT, RIGHT, TOP, BOTTOM = 66, 30, 112, 50  # margins of the plot


@dataclass(frozen=True, kw_only=True)
class Curves:
    """By round of the weights: (success, low, high, solved, tasks) on held-out tasks, and the agreement."""

    success: dict[int, tuple[float, float, float, int, int]]
    agreement_rates: dict[int, float]


def read_curves(run: RunFiles) -> Curves:
    """Read the curves from the rounds' evaluate.json and collect.json. Raises ValueError without an evaluation.

    A collection shows the weights of the round before it, so its agreement belongs to that round's weights.
    """
    success, agreement_rates = {}, {}
    for files in run.rounds:
        heldout: dict[str, Any] | None = (files.evaluate or {}).get("heldout")
        if heldout:
            success[files.index] = tuple(heldout[name] for name in ("success", "ci_low", "ci_high", "solved", "tasks"))
        collect = files.collect or {}
        if collect.get("agreement") is not None and collect.get("weight_version", -1) >= 0:
            agreement_rates[collect["weight_version"]] = collect["agreement"]
    if not success:
        raise ValueError(f"{run.path}: no round has held-out results (rounds/*/evaluate.json)")
    return Curves(success=success, agreement_rates=agreement_rates)


def draw_rounds(curves: Curves, theme: Theme, sft: Curves | None = None) -> Drawing:
    """Return the figure, with the success of the arm ``sft`` or, without one, the agreement with the teacher."""
    rounds = sorted(curves.success)
    tasks = curves.success[rounds[-1]][4]
    results = ", ".join(f"round {index}: {_percent(curves.success[index][0])}" for index in rounds)
    drawing = Drawing(
        WIDTH, HEIGHT, theme,
        title="Held-out success after each DAgger round",
        description=f"Share of {tasks} held-out tasks solved by the student alone: {results}.",
    )  # fmt: skip
    drawing.text(24, 36, "Held-out tasks solved by the student alone", size=18, bold=True)
    drawing.text(24, 58, f"{tasks} tasks that are not trained on; the teacher does not act", fill=theme.soft)
    if sft is None:
        dashed, legend = curves.agreement_rates, "student agrees with the teacher, in the next collection"
    else:
        shared = {index: values for index, values in curves.success.items() if index == 0}  # round 0 of both
        dashed = {index: values[0] for index, values in (shared | sft.success).items()}
        legend = "SFT: the teacher acts in every round; same tasks, same steps"
    _legend(drawing, legend if dashed else "")
    step = (WIDTH - LEFT - RIGHT - 120) / max(1, len(rounds) - 1)
    x_of = {index: LEFT + 60 + step * i for i, index in enumerate(rounds)}
    for share in (0, 0.25, 0.5, 0.75, 1):
        drawing.line([(LEFT, _y(share)), (WIDTH - RIGHT, _y(share))], stroke=theme.line)
        drawing.text(LEFT - 10, _y(share) + 4, f"{share:.0%}", size=12, fill=theme.soft, anchor="end")
    for index in rounds:
        name = "after round 0 (SFT)" if index == 0 else f"after round {index}"
        drawing.text(x_of[index], HEIGHT - BOTTOM + 24, name, anchor="middle", bold=True)
    _draw_success(drawing, curves, x_of)
    _draw_dashed(drawing, dashed, x_of)
    return drawing


def _legend(drawing: Drawing, dashed: str) -> None:
    theme, y = drawing.theme, 86
    drawing.rectangle(24, y - 10, 26, 12, fill=theme.paper, stroke=theme.paper)
    drawing.area([(24, y - 11), (50, y - 11), (50, y + 3), (24, y + 3)], fill=theme.heldout, opacity=0.18)
    drawing.line([(24, y - 4), (50, y - 4)], stroke=theme.heldout, width=2.5)
    drawing.text(58, y, "solved, with 95% interval", fill=theme.soft)
    if dashed:
        drawing.line([(248, y - 4), (274, y - 4)], stroke=theme.student, width=2, dashed=True)
        drawing.text(282, y, dashed, fill=theme.soft)


def _draw_success(drawing: Drawing, curves: Curves, x_of: dict[int, float]) -> None:
    theme, values = drawing.theme, curves.success
    upper: list[Corner] = [(x, _y(values[index][2])) for index, x in x_of.items()]
    lower: list[Corner] = [(x, _y(values[index][1])) for index, x in x_of.items()]
    drawing.area([*upper, *reversed(lower)], fill=theme.heldout, opacity=0.18)
    for (x, high), (_, low) in zip(upper, lower, strict=True):
        drawing.line([(x, high), (x, low)], stroke=theme.heldout)
    drawing.line([(x, _y(values[index][0])) for index, x in x_of.items()], stroke=theme.heldout, width=2.5)
    for index, x in x_of.items():
        share, low, _, solved, tasks = values[index]
        drawing.circle(x, _y(share), 5, fill=theme.heldout, stroke=theme.paper)
        y = _y(low) + 22
        drawing.text(x, y, _percent(share), size=17, bold=True, anchor="middle", halo=True)
        drawing.text(x, y + 17, f"{solved} of {tasks}", size=12, fill=theme.soft, anchor="middle", halo=True)


def _draw_dashed(drawing: Drawing, rates: dict[int, float], x_of: dict[int, float]) -> None:
    theme = drawing.theme
    points = {index: (x, _y(rates[index])) for index, x in x_of.items() if index in rates}
    drawing.line(points.values(), stroke=theme.student, width=2, dashed=True)
    for index, (x, y) in points.items():
        drawing.circle(x, y, 4.5, fill=theme.paper, stroke=theme.student)
        drawing.text(x - 11, y - 7, f"{rates[index]:.0%}", bold=True, fill=theme.student, anchor="end", halo=True)


def _y(share: float) -> float:
    return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + "%"
