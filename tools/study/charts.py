"""Line charts with intervals, for the page of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tools.figure_parts.svg import Drawing, Theme

WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 104, 58  # margins of the plot
FEWEST_IN_LEGEND = 5  # lines for which there is room, at least

Value = tuple[float, float | None, float | None]  # value, low and high end of its interval


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line: its values by place on the horizontal axis. A missing place is a gap without a point."""

    name: str
    colour: str
    points: Mapping[int, Value]
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The horizontal axis has equally spaced places, some of them labelled; the vertical one has marks."""

    places: Sequence[int]
    labels: Mapping[int, str]
    marks: Sequence[float]
    mark: Callable[[float], str]  # a mark's text

    def x(self, place: int) -> float:
        step = (WIDTH - LEFT - RIGHT) / len(self.places)
        return LEFT + step * (self.places.index(place) + 0.5)

    def y(self, value: float) -> float:
        low, high = self.marks[0], self.marks[-1]
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)


def draw_chart(title: str, subtitle: str, axes: Axes, lines: Sequence[Series], theme: Theme) -> Drawing:
    """Return a chart; its description lists the values."""
    values = [
        f"{line.name}: " + ", ".join(f"{axes.labels.get(place, place)} {axes.mark(point[0])}"
                                     for place, point in line.points.items())
        for line in lines
    ]  # fmt: skip
    drawing = Drawing(WIDTH, HEIGHT, theme, title=title, description=f"{subtitle}. {'; '.join(values)}.")
    drawing.text(24, 34, title, size=17, bold=True)
    drawing.text(24, 55, subtitle, fill=theme.soft)
    for value in axes.marks:
        stroke = theme.soft if value == 0 else theme.line
        drawing.line([(LEFT, axes.y(value)), (WIDTH - RIGHT, axes.y(value))], stroke=stroke)
        drawing.text(LEFT - 10, axes.y(value) + 4, axes.mark(value), size=12, fill=theme.soft, anchor="end")
    for place, label in axes.labels.items():
        for row, text in enumerate(label.split("\n")):
            y, fill = HEIGHT - BOTTOM + 22 + 17 * row, theme.soft if row else theme.ink
            drawing.text(axes.x(place), y, text, size=12, anchor="middle", fill=fill)
    for number, line in enumerate(lines):
        _draw_line(drawing, axes, line, shift=7 * (number - (len(lines) - 1) / 2))
        x = 24 + (WIDTH - 48) / max(FEWEST_IN_LEGEND, len(lines)) * number
        drawing.line([(x, 80), (x + 26, 80)], stroke=line.colour, width=2.5, dashed=line.dashed)
        drawing.text(x + 33, 84, line.name, fill=theme.soft)
    return drawing


def _draw_line(drawing: Drawing, axes: Axes, line: Series, shift: float) -> None:
    """Draw a line, its points and their intervals, which ``shift`` keeps apart from those of other lines."""
    with_intervals = any(low is not None for _, low, _ in line.points.values())
    shift = shift if with_intervals else 0.0
    corners = {place: (axes.x(place) + shift, axes.y(point[0])) for place, point in line.points.items()}
    drawing.line(corners.values(), stroke=line.colour, width=2, dashed=line.dashed)
    for place, (x, y) in corners.items():
        _, low, high = line.points[place]
        if low is not None and high is not None:
            drawing.line([(x, axes.y(low)), (x, axes.y(high))], stroke=line.colour, width=1.5)
        if with_intervals or len(corners) == 1:
            drawing.circle(x, y, 4, fill=line.colour, stroke=drawing.theme.paper)
