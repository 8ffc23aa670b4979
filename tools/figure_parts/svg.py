"""A small SVG writer: shapes and text in the colours of a theme, with a title and a description for screen readers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

SANS = "system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans','DejaVu Sans',sans-serif"
MONO = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
Anchor = Literal["start", "middle", "end"]
Corner = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours, those of the report page."""

    name: str
    paper: str
    card: str
    ink: str
    soft: str
    line: str
    heldout: str
    student: str
    teacher: str
    differ: str


LIGHT = Theme(
    name="light", paper="#fbfaf8", card="#ffffff", ink="#1d2126", soft="#5b6470", line="#d8d4cc",
    heldout="#0b7a75", student="#2563c9", teacher="#b4690e", differ="#b3245a",
)  # fmt: skip
DARK = Theme(
    name="dark", paper="#14171b", card="#1f242b", ink="#e6e8ea", soft="#9aa4b0", line="#39414b",
    heldout="#3fbdb3", student="#6fa3f5", teacher="#e3a34d", differ="#f07ba4",
)  # fmt: skip


class Drawing:
    """An SVG image that is drawn from back to front, on a rounded background."""

    def __init__(self, width: int, height: int, theme: Theme, *, title: str, description: str):
        self.theme = theme
        self._size = (width, height)
        self._head = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
        self._elements: list[str] = []
        self.rectangle(0.5, 0.5, width - 1, height - 1, fill=theme.paper, stroke=theme.line, radius=10)

    def rectangle(
        self, x: float, y: float, width: float, height: float, *, fill: str, stroke: str = "none", radius: float = 0
    ) -> None:
        """Draw a rectangle with its upper left corner at (x, y)."""
        position = f'x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}"'
        corners = f' rx="{_number(radius)}"' if radius else ""
        self._elements.append(f'<rect {position}{corners} fill="{fill}" stroke="{stroke}"/>')

    def circle(self, x: float, y: float, radius: float, *, fill: str, stroke: str = "none") -> None:
        """Draw a circle around (x, y)."""
        position = f'cx="{_number(x)}" cy="{_number(y)}" r="{_number(radius)}"'
        self._elements.append(f'<circle {position} fill="{fill}" stroke="{stroke}" stroke-width="2"/>')

    def line(self, points: Iterable[Corner], *, stroke: str, width: float = 1, dashed: bool = False) -> None:
        """Draw a line through ``points``."""
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._elements.append(
            f'<polyline points="{_points(points)}" fill="none" stroke="{stroke}" stroke-width="{_number(width)}"'
            f'{dashes} stroke-linejoin="round" stroke-linecap="round"/>'
        )

    def area(self, points: Iterable[Corner], *, fill: str, opacity: float = 1) -> None:
        """Fill the polygon with the corners ``points``."""
        self._elements.append(f'<polygon points="{_points(points)}" fill="{fill}" fill-opacity="{opacity}"/>')

    def arrow(self, points: list[Corner], *, stroke: str, width: float = 1.5) -> None:
        """Draw a line through ``points``, whose segments are horizontal or vertical, with a head at its end."""
        self.line(points, stroke=stroke, width=width)
        (x0, y0), (x, y) = points[-2:]
        length = max(abs(x - x0), abs(y - y0))
        dx, dy = (x - x0) / length, (y - y0) / length
        back = (x - 8 * dx, y - 8 * dy)
        self.area([(x, y), (back[0] + 4 * dy, back[1] + 4 * dx), (back[0] - 4 * dy, back[1] - 4 * dx)], fill=stroke)

    def text(
        self, x: float, y: float, text: str, *, size: float = 13, fill: str | None = None, anchor: Anchor = "start",
        bold: bool = False, mono: bool = False, halo: bool = False,
    ) -> None:  # fmt: skip
        """Write one line of text with its baseline at ``y``. ``halo`` keeps it readable over lines."""
        style = f'font-size="{_number(size)}"' + (' font-weight="600"' if bold else "")
        style += f" font-family={quoteattr(MONO)}" if mono else ""
        style += f' text-anchor="{anchor}"' if anchor != "start" else ""
        style += f' stroke="{self.theme.paper}" stroke-width="5" paint-order="stroke"' if halo else ""
        position = f'x="{_number(x)}" y="{_number(y)}"'
        self._elements.append(f'<text {position} {style} fill="{fill or self.theme.ink}">{escape(text)}</text>')

    def svg(self) -> str:
        """Return the image as an SVG document."""
        width, height = self._size
        elements = "\n".join(self._elements)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            f' role="img" font-family={quoteattr(SANS)}>\n{self._head}\n{elements}\n</svg>\n'
        )


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _points(points: Iterable[Corner]) -> str:
    return " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
