"""An episode turn by turn, for a terminal: observation, action and who acted, the teacher's label, the outcome."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from megatron_dagger.observability.sanitize import sanitize
from megatron_dagger.types import ActedBy, Trajectory, Turn

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {ActedBy.STUDENT: "bold blue", ActedBy.TEACHER: "bold yellow"}


def show(trajectory: Trajectory, *, stream: TextIO | None = None, max_lines: int = 30) -> None:
    """Print an episode to ``stream`` (default: stdout), in colour on a terminal only.

    Observations of more than ``max_lines`` lines are cut in the middle; 0 shows all lines.
    """
    from rich.console import Console
    from rich.text import Text

    stream = stream or sys.stdout
    width = None if stream.isatty() else 100
    console = Console(file=stream, width=width, highlight=False, markup=False, emoji=False)
    t = trajectory
    console.print(Text(sanitize(t.task_id), style="bold"), end="")
    console.print(Text(f"  round {t.round_index}, attempt {t.attempt}, beta {t.beta:g}, {t.duration_s:.1f} s", "dim"))
    for depth, turn in enumerate(t.turns):
        _show_turn(console, depth, turn, max_lines)
    outcome = "solved" if t.solved else "not solved"
    compared = [turn for turn in t.turns if turn.acted_by is ActedBy.STUDENT and turn.label is not None]
    agreeing = sum(turn.agrees for turn in compared)
    console.rule(style="dim")
    console.print(Text(outcome, style="bold green" if t.solved else "bold red"), end="")
    agreeing_turns = f"the student agreed with the teacher in {agreeing} of {len(compared)} of its turns"
    console.print(Text(f"  ({t.stop_reason.value}, {len(t.turns)} turns; {agreeing_turns})"))
    if t.details:
        console.print(Text("  ".join(f"{k}={sanitize(str(v))}" for k, v in t.details.items()), style="dim"))


def _show_turn(console: Console, depth: int, turn: Turn, max_lines: int) -> None:
    from rich.text import Text

    console.rule(Text(f"turn {depth + 1}"), style="dim", align="left")
    console.print(Text(_clip(sanitize(turn.observation).rstrip(), max_lines), style="dim"))
    console.print(Text(f"{turn.acted_by.value:>8} > ", style=STYLES[turn.acted_by]), end="")
    console.print(Text(sanitize(turn.action.text).strip()))
    if turn.label is None:
        console.print(Text("   (no label)", style="dim"))
    elif not turn.agrees:
        console.print(Text("teacher would ", style="bold magenta"), end="")
        console.print(Text("> " + sanitize(turn.label.text).strip(), style="magenta"))


def _clip(text: str, max_lines: int) -> str:
    lines = text.split("\n")
    if max_lines <= 0 or len(lines) <= max_lines:
        return text
    head = max_lines * 2 // 3
    tail = max_lines - head
    return "\n".join([*lines[:head], f"... lines left out: {len(lines) - max_lines} ...", *lines[-tail:]])
