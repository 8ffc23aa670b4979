"""The teacher of the repair tasks: test-guided search, from what the conversation shows alone.

In any state, also after mistakes that are not its own: take back what does not help, find the
suspect lines, and try the repairs of each line one after another, each with a run of the tests.
It reads the messages only; the gold patch and the place of the bug are unknown to it. The next
repair is sought from the line looked at last, so what it does depends on the near past.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from megatron_dagger.envs.repo_repair.env import plain_words
from megatron_dagger.envs.repo_repair.tools.swaps import Candidate, repairs
from megatron_dagger.types import Action, Message, State

_SUSPECT = re.compile(r"^@(\d+) (\S+:\d+)$")
_LINE = re.compile(r"^@(\d+): (.*)$", re.MULTILINE)
_EDITS = re.compile(r"^edits: (\d+)$", re.MULTILINE)


@dataclass
class _Knowledge:
    """What a conversation shows."""

    suspects: dict[int, str] = field(default_factory=dict)  # rank -> FILE:LINE
    lines: dict[str, str] = field(default_factory=dict)  # FILE:LINE -> its text with no edit open
    tried: set[tuple[str, Candidate]] = field(default_factory=set)
    open_edits: int = 0
    candidate: tuple[str, Candidate] | None = None  # the one open edit, where it is a known one
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
            self._read_test(reply)
            if words[0] == "locate":
                self._read_suspects(reply)
        elif "run locate first" in reply:
            self.suspects = {}
        elif words[0] == "view":
            self._read_line(reply)
        elif words[0] in ("edit", "undo") or self.open_edits != before:
            if "error:" in reply.split("\n", 1)[0]:
                return
            self.tested = self.passing = False
            self.candidate = None
            if words[0] == "edit" and before == 0:
                self._read_edit(words, reply)
            elif words[0] == "undo" and self.open_edits == 0:
                self._read_line(reply)

    def _read_test(self, reply: str) -> None:
        self.passing = reply.startswith("PASS")
        self.tested = self.passing or reply.startswith("FAIL") or "timed out" in reply
        if self.tested and self.candidate is not None:
            self.tried.add(self.candidate)

    def _read_suspects(self, reply: str) -> None:
        found = [match for match in map(_SUSPECT.match, reply.splitlines()) if match]
        # Located on a changed tree, the lines may be others than those of the bug.
        self.suspects = {int(m[1]): m[2] for m in found} if self.open_edits == 0 else {}
        self.rank = 1

    def _line(self, reply: str) -> tuple[str, str] | None:
        """The FILE:LINE and the text that a reply shows, remembering which suspect it is."""
        match = _LINE.match(reply)
        if match is None or int(match[1]) not in self.suspects:
            return None
        self.rank = int(match[1])
        return self.suspects[self.rank], match[2]

    def _read_line(self, reply: str) -> None:
        shown = self._line(reply)
        if shown is not None and self.open_edits == 0:
            self.lines[shown[0]] = shown[1]

    def _read_edit(self, words: list[str], reply: str) -> None:
        shown = self._line(reply)
        if shown is not None and len(words) in (4, 5):
            nth = int(words[4]) if len(words) == 5 and words[4].isdigit() else 1
            self.candidate = (shown[0], Candidate(old=words[2], new=words[3], nth=nth))

    def untried(self, rank: int) -> Candidate | None:
        place = self.suspects[rank]
        found = (c for c in repairs(self.lines[place]) if (place, c) not in self.tried)
        return next(found, None)


def next_command(messages: tuple[Message, ...]) -> str:
    """The expert's command in the state that ``messages`` show."""
    seen = _Knowledge()
    for command, reply in _exchanges(messages):
        seen.read(command, reply)
    if seen.tested and seen.passing:
        return "submit"
    if seen.open_edits:
        fresh = seen.open_edits == 1 and seen.candidate is not None and not seen.tested
        return "runtests" if fresh and seen.candidate not in seen.tried else "undo"
    if not seen.suspects:
        return "locate"
    for rank in _from(seen.rank, len(seen.suspects)):
        if seen.suspects[rank] not in seen.lines:
            return f"view @{rank}"
        candidate = seen.untried(rank)
        if candidate is not None:
            words = ["edit", f"@{rank}", candidate.old, candidate.new]
            return shlex.join(words + ([str(candidate.nth)] if candidate.nth > 1 else []))
    return "submit"  # everything was tried: there is no more to be done


def _exchanges(messages: tuple[Message, ...]) -> Iterator[tuple[str, str]]:
    for message, reply in itertools.pairwise(messages):
        if message.role == "assistant":
            yield message.content, reply.content


def _from(first: int, count: int) -> Iterator[int]:
    yield from range(first, count + 1)
    yield from range(1, first)


class RepairExpert:
    """The expert as a Policy. ``encode`` makes an action's tokens of its text (ChatRenderer.action)."""

    name = "expert"

    def __init__(self, encode: Callable[[str], np.ndarray]):
        self._encode = encode

    async def act(self, state: State) -> Action:
        text = next_command(state.messages)
        return Action(text=text, tokens=self._encode(text))
