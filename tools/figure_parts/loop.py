"""Figure: the stages of a DAgger round."""

from __future__ import annotations

from dataclasses import dataclass

from tools.figure_parts.svg import Drawing, Theme

WIDTH, HEIGHT = 880, 356
BOX_WIDTH, BOX_HEIGHT, GAP, LEFT = 178, 110, 44, 18
ROWS = (62, 222)  # upper edges


@dataclass(frozen=True, kw_only=True)
class Box:
    """A stage: its position, name and lines of text. ``color`` is a field of the theme."""

    column: int
    row: int
    name: str
    text: tuple[str, ...]
    color: str = "ink"

    @property
    def left_edge(self) -> float:
        return LEFT + self.column * (BOX_WIDTH + GAP)

    @property
    def right_edge(self) -> float:
        return self.left_edge + BOX_WIDTH

    @property
    def middle(self) -> tuple[float, float]:
        return self.left_edge + BOX_WIDTH / 2, ROWS[self.row] + BOX_HEIGHT / 2


TASKS = Box(column=0, row=0, name="Tasks", text=("training and held-out,", "each in a sandbox"))
ROLLOUT = Box(
    column=1,
    row=0,
    name="Rollout",
    text=("vLLM student acts;", "the teacher acts", "with probability β"),
    color="student",
)
LABEL = Box(column=2, row=0, name="Label", text=("the teacher labels", "every visited state"), color="teacher")
DATA = Box(column=3, row=0, name="Aggregate", text=("all rounds' episodes", "in one zarr data set"))
TRAIN = Box(column=3, row=1, name="Train", text=("Megatron-Core,", "on trees of labels"), color="student")
SYNC = Box(column=2, row=1, name="Sync", text=("weights to vLLM,", "verified by digests", "and log-probs"))
EVALUATE = Box(column=1, row=1, name="Evaluate", text=("the student alone", "on held-out tasks"), color="heldout")
BOXES = (TASKS, ROLLOUT, LABEL, DATA, TRAIN, SYNC, EVALUATE)


def draw_loop(theme: Theme) -> Drawing:
    """Return the figure."""
    drawing = Drawing(
        WIDTH, HEIGHT, theme,
        title="One DAgger round",
        description="Tasks; rollout with the student in vLLM, where the teacher acts with probability beta; the "
        "teacher labels every visited state; episodes of all rounds in one zarr data set; Megatron-Core trains on "
        "trees of labels; the weights go to vLLM and are verified; held-out evaluation; next round.",
    )  # fmt: skip
    drawing.text(LEFT, 40, "One DAgger round", size=18, bold=True)
    top, bottom = (y + BOX_HEIGHT / 2 for y in ROWS)
    for source, target in ((TASKS, ROLLOUT), (ROLLOUT, LABEL), (LABEL, DATA)):
        drawing.arrow([(source.right_edge, top), (target.left_edge, top)], stroke=theme.soft)
    for source, target in ((TRAIN, SYNC), (SYNC, EVALUATE)):
        drawing.arrow([(source.left_edge, bottom), (target.right_edge, bottom)], stroke=theme.soft)
    x = DATA.middle[0]
    drawing.arrow([(x, ROWS[0] + BOX_HEIGHT), (x, ROWS[1])], stroke=theme.soft)
    x = EVALUATE.middle[0]
    drawing.arrow([(x, ROWS[1]), (x, ROWS[0] + BOX_HEIGHT)], stroke=theme.soft)
    drawing.text(x + 12, (ROWS[0] + BOX_HEIGHT + ROWS[1]) / 2 + 5, "next round", bold=True)
    x = TASKS.middle[0]
    drawing.arrow([(x, ROWS[0] + BOX_HEIGHT), (x, bottom), (EVALUATE.left_edge, bottom)], stroke=theme.soft)
    drawing.text(x + 8, bottom - 8, "held-out tasks", size=12, fill=theme.soft)
    for box in BOXES:
        _draw_box(drawing, box)
    return drawing


def _draw_box(drawing: Drawing, box: Box) -> None:
    theme, y = drawing.theme, ROWS[box.row]
    color = getattr(theme, box.color)
    drawing.rectangle(box.left_edge, y, BOX_WIDTH, BOX_HEIGHT, fill=theme.card, stroke=theme.line, radius=8)
    drawing.rectangle(box.left_edge, y + 14, 4, BOX_HEIGHT - 28, fill=color, radius=2)
    drawing.text(box.left_edge + 16, y + 30, box.name, size=16, bold=True, fill=color)
    for number, line in enumerate(box.text):
        drawing.text(box.left_edge + 16, y + 54 + 19 * number, line, size=13, fill=theme.ink)
