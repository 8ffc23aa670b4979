"""Figure: one episode as a trunk of turns with label branches, and the attention mask that the tree needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_dagger.observability.sanitize import sanitize
from megatron_dagger.types import ActedBy, Trajectory
from tools.figure_parts.svg import Drawing, Theme

MAX_TURNS = 14
ROW, TOP, LEFT = 27, 118, 24
MASK_LEFT, MASK_TOP, MAX_MASK_SIZE = 504, 118, 330
LINE_CHARACTERS = 18  # of a command in the trunk or in a label


def choose_episode(episodes: Iterable[Trajectory]) -> Trajectory:
    """Return the shortest solved episode that has 2 to 6 branches, and turns of student and teacher.

    If there is none, return the episode that comes closest. Raises ValueError if there is no episode.
    """

    def rank(episode: Trajectory) -> tuple[bool, bool, bool, bool, int]:
        count = len(branch_turns(episode))
        mixed = {turn.acted_by for turn in episode.turns} == set(ActedBy)
        return (len(episode.turns) > MAX_TURNS, not 2 <= count <= 6, not mixed, not episode.solved, len(episode.turns))

    chosen = min(episodes, key=rank, default=None)
    if chosen is None:
        raise ValueError("the run has no committed episode; collect a round first")
    return chosen


def branch_turns(episode: Trajectory) -> list[int]:
    """Return the turns whose label differs from the executed action: there a branch leaves the trunk."""
    return [depth for depth, turn in enumerate(episode.turns) if turn.label is not None and not turn.agrees]


@dataclass(frozen=True)
class Block:
    """A run of tokens in the mask: a turn's observation or action on the trunk, or the label of a branch."""

    kind: str  # observation, action or label
    depth: int

    def attends_to(self, key: Block) -> bool:
        """Return whether the tokens of this block see tokens of ``key``: those of their prefix and their own."""
        if key.kind == "label":
            return key == self
        if self.kind == "label":
            return key.depth < self.depth or (key.depth == self.depth and key.kind == "observation")
        return (key.depth, key.kind == "action") <= (self.depth, self.kind == "action")


def mask_blocks(episode: Trajectory, turns: int) -> list[Block]:
    """Return the blocks in the order of their tokens in a training row: the trunk, then the branches."""
    trunk = [Block(kind, depth) for depth in range(turns) for kind in ("observation", "action")]
    return [*trunk, *(Block("label", depth) for depth in branch_turns(episode) if depth < turns)]


def draw_tree(episode: Trajectory, theme: Theme) -> Drawing:
    """Return the figure. Of a long episode the first ``MAX_TURNS`` turns are shown."""
    turns = min(len(episode.turns), MAX_TURNS)
    count = len(branch_turns(episode))
    blocks = mask_blocks(episode, turns)
    size = MAX_MASK_SIZE // len(blocks)  # whole pixels: no seams between rows
    height = max(TOP + ROW * turns, MASK_TOP + size * len(blocks) + 44) + 22
    drawing = Drawing(
        860, height, theme,
        title="An episode as a tree of labels, and its attention mask",
        description=f"An episode of {len(episode.turns)} turns is the trunk. In {count} turns the teacher's label "
        "differs from the executed action and is a branch. A branch attends to its prefix on the trunk and to itself.",
    )  # fmt: skip
    drawing.text(LEFT, 36, "One episode is one tree", size=18, bold=True)
    details = f"round {episode.round_index}, {'solved' if episode.solved else 'not solved'}"
    drawing.text(LEFT, 58, f"{len(episode.turns)} turns, {count} branches ({details})", fill=theme.soft)
    _draw_trunk(drawing, episode, turns)
    _draw_mask(drawing, blocks, size)
    return drawing


def _draw_trunk(drawing: Drawing, episode: Trajectory, turns: int) -> None:
    theme, x = drawing.theme, LEFT + 38
    drawing.circle(LEFT + 6, 82, 5, fill=theme.student)
    drawing.text(LEFT + 17, 86, "student acts", size=12, fill=theme.soft)
    drawing.circle(LEFT + 106, 82, 5, fill=theme.teacher)
    drawing.text(LEFT + 117, 86, "teacher acts", size=12, fill=theme.soft)
    drawing.rectangle(LEFT + 203, 75, 14, 14, fill=theme.differ, radius=3)
    drawing.text(LEFT + 223, 86, "teacher's label: a branch", size=12, fill=theme.soft)
    drawing.line([(x, TOP + ROW / 2), (x, TOP + ROW * (turns - 0.5))], stroke=theme.line, width=3)
    for depth, turn in enumerate(episode.turns[:turns]):
        y = TOP + ROW * (depth + 0.5)
        color = theme.student if turn.acted_by is ActedBy.STUDENT else theme.teacher
        drawing.text(LEFT + 20, y + 4, str(depth + 1), size=12, fill=theme.soft, anchor="end")
        if turn.label is not None and not turn.agrees:
            start = (x, y - ROW / 2)  # before the action: the branch leaves the trunk at the state
            drawing.line([start, (x + 196, start[1]), (x + 206, y)], stroke=theme.differ, width=1.5)
            drawing.rectangle(x + 206, y - 10, 180, 20, fill=theme.card, stroke=theme.differ, radius=4)
            drawing.text(x + 215, y + 4, _command(turn.label.text), size=12.5, mono=True, fill=theme.differ)
        drawing.circle(x, y, 6.5, fill=color, stroke=theme.paper)
        drawing.text(x + 16, y + 5, _command(turn.action.text), size=12.5, mono=True)
    if len(episode.turns) > turns:
        rest = f"… {len(episode.turns) - turns} more turns"
        drawing.text(x + 16, TOP + ROW * turns + 12, rest, size=12, fill=theme.soft)


def _draw_mask(drawing: Drawing, blocks: list[Block], size: int) -> None:
    theme, side = drawing.theme, size * len(blocks)
    trunk = sum(block.kind != "label" for block in blocks)
    drawing.text(MASK_LEFT, 36, "The attention that it needs", size=18, bold=True)
    drawing.text(MASK_LEFT, 58, "A branch sees its prefix and itself.", fill=theme.soft)
    drawing.text(MASK_LEFT, 106, "trunk, turn by turn", size=12, fill=theme.soft)
    drawing.text(MASK_LEFT + side, 106, "branches", size=12, fill=theme.differ, anchor="end")
    drawing.rectangle(MASK_LEFT, MASK_TOP, side, side, fill=theme.card)
    for row, start, stop in _runs(blocks):
        fill = theme.differ if blocks[row].kind == "label" else theme.student
        start_x, stop_x, y = MASK_LEFT + size * start, MASK_LEFT + size * stop, MASK_TOP + size * row
        top_x = stop_x - size if stop == row + 1 else stop_x  # within a block attention is causal
        drawing.area([(start_x, y), (top_x, y), (stop_x, y + size), (start_x, y + size)], fill=fill)
    for row, block in enumerate(blocks):
        if block.kind == "label":
            y = MASK_TOP + size * (row + 1) - 2
            drawing.text(MASK_LEFT - 6, y, str(block.depth + 1), size=10, fill=theme.differ, anchor="end")
    border = MASK_LEFT + size * trunk
    drawing.line([(border, MASK_TOP), (border, MASK_TOP + side)], stroke=theme.soft, dashed=True)
    border = MASK_TOP + size * trunk
    drawing.line([(MASK_LEFT, border), (MASK_LEFT + side, border)], stroke=theme.soft, dashed=True)
    drawing.rectangle(MASK_LEFT, MASK_TOP, side, side, fill="none", stroke=theme.line)
    below = MASK_TOP + side
    drawing.text(MASK_LEFT, below + 22, "Rows are queries, columns are keys; not to scale.", size=12, fill=theme.soft)
    drawing.text(MASK_LEFT, below + 40, "All labels share one computation of the trunk.", size=12, fill=theme.soft)


def _runs(blocks: list[Block]) -> Iterator[tuple[int, int, int]]:
    """Yield (row, start, stop) of the neighbouring blocks that each row attends to."""
    for row, block in enumerate(blocks):
        start: int | None = None
        for column in range(len(blocks) + 1):
            sees = column < len(blocks) and block.attends_to(blocks[column])
            if sees and start is None:
                start = column
            elif not sees and start is not None:
                yield row, start, column
                start = None


def _command(text: str) -> str:
    line = sanitize(text).strip().split("\n")[0]
    return line if len(line) <= LINE_CHARACTERS else line[: LINE_CHARACTERS - 1] + "…"
