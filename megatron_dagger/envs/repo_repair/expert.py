"""The teacher of the repair tasks: test-guided search, from what the conversation shows alone.

In any state, also after mistakes that are not its own: take back what does not help, find the
suspect lines, and try the repairs of each line one after another, each with a run of the tests.
It reads the messages only; the gold patch and the place of the bug are unknown to it. The next
repair is sought from the line looked at last, so what it does depends on the near past.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from megatron_dagger.envs.repo_repair.env import plain_words
from megatron_dagger.types import Action, Message, State

_SUSPECT = re.compile(r"^@(\d+) \S+:\d+$", re.MULTILINE)
_UNTESTED = re.compile(r"^untested: (?:none|.*?(\d+)) of @(\d+)$", re.MULTILINE)
_EDITS = re.compile(r"^edits: (\d+)$", re.MULTILINE)


@dataclass
class _Knowledge:
    """What a conversation shows."""

    suspects: int = 0  # how many lines locate listed
    fixes: dict[int, str | None] = field(default_factory=dict)  # rank -> the line's next fix, as last shown
    open_edits: int = 0
    tested: bool = False  # the tests have been run on the tree as it is
    passing: bool = False
    rank: int = 1  # the suspect looked at last

    def read(self, command: str, reply: str) -> None:
        """Take in one command and the reply to it."""
        words = plain_words(command) or [""]
        before = self.open_edits
        said = _EDITS.findall(reply)
        if said:
            self.open_edits = int(said[-1])
        if words[0] in ("runtests", "locate"):
            self.passing = reply.startswith("PASS")
            self.tested = self.passing or reply.startswith("FAIL") or "timed out" in reply
            if words[0] == "locate":
                # Located on a changed tree, the lines may be others than those of the bug.
                self.suspects = len(_SUSPECT.findall(reply)) if self.open_edits == 0 else 0
                self.rank, self.fixes = 1, {}
        elif "run locate first" in reply:
            self.suspects = 0
        else:
            if words[0] in ("fix", "edit", "undo") or self.open_edits != before:
                failed = "error:" in reply.split("\n", 1)[0]
                self.tested = self.tested and failed
                self.passing = self.passing and failed
            self._look(reply)

    def _look(self, reply: str) -> None:
        """Note the line that a reply shows and, where no edit is open, what is left to try on it."""
        shown = _UNTESTED.search(reply)
        if shown is not None and 1 <= int(shown[2]) <= self.suspects:
            self.rank = int(shown[2])
            if self.open_edits == 0:
                self.fixes[self.rank] = shown[1]


def next_command(messages: tuple[Message, ...]) -> str:
    """The expert's command in the state that ``messages`` show."""
    seen = _Knowledge()
    for command, reply in _exchanges(messages):
        seen.read(command, reply)
    if seen.tested and seen.passing:
        return "submit"
    if seen.open_edits:
        return "runtests" if seen.open_edits == 1 and not seen.tested else "undo"
    if not seen.suspects:
        return "locate"
    for rank in (*range(seen.rank, seen.suspects + 1), *range(1, seen.rank)):
        if rank not in seen.fixes:
            return f"view @{rank}"
        if seen.fixes[rank] is not None:
            return f"fix @{rank} {seen.fixes[rank]}"
    return "submit"  # everything was tried: there is no more to be done


def _exchanges(messages: tuple[Message, ...]) -> Iterator[tuple[str, str]]:
    for message, reply in itertools.pairwise(messages):
        if message.role == "assistant":
            yield message.content, reply.content


class RepairExpert:
    """The expert as a Policy. ``encode`` makes an action's tokens of its text (ChatRenderer.action)."""

    name = "expert"

    def __init__(self, encode: Callable[[str], np.ndarray]):
        self._encode = encode

    async def act(self, state: State) -> Action:
        text = next_command(state.messages)
        return Action(text=text, tokens=self._encode(text))
