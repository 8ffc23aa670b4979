"""The teacher of the repair tasks: a test-guided search that uses only the conversation.

It can act in any state, including those that another policy's mistakes lead to: undo useless edits, find the
suspect lines, and try the fixes of each line one after another, each with a test run. It does not know the gold patch
or the place of the bug. Except for giving up once everything was tried, its action follows from the last command and
observation, so a student that reads these can learn it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from megatron_dagger.envs.repo_repair.env import RUNS_TESTS, plain_words
from megatron_dagger.types import Message

_SUSPECT = re.compile(r"^@(\d+) \S+:\d+$", re.MULTILINE)
_UNTESTED = re.compile(r"^untested: (?:none|.*?(\d+)) of @(\d+)$", re.MULTILINE)
_EDITS = re.compile(r"^edits: (\d+)$", re.MULTILINE)


def next_command(messages: tuple[Message, ...]) -> str:
    """Return the expert's command for the state that ``messages`` show."""
    exchanges = list(turns(messages))
    if not exchanges:
        return "locate"
    command, reply = exchanges[-1]
    tool = (plain_words(command) or [""])[0]
    if tool in RUNS_TESTS and reply.startswith("PASS"):
        return "submit"
    counts = _EDITS.findall(reply)
    edits = int(counts[-1]) if counts else 0
    if edits:
        untested = edits == 1 and tool not in RUNS_TESTS
        return "runtests" if untested else "undo"
    if tool == "locate" and _SUSPECT.search(reply):
        return "view @1"
    shown = _UNTESTED.findall(reply)
    if not shown:
        return "locate"
    fix, line = shown[-1]
    return f"fix @{line} {fix}" if fix else _next_line(exchanges, int(line))


def _next_line(exchanges: list[tuple[str, str]], line: int) -> str:
    """Return the command that views the suspect after ``line``, or ``submit`` if no suspect has an untested fix."""
    suspects = 0
    untested: dict[int, bool] = {}  # line -> whether it had an untested fix when it was last shown
    for command, reply in exchanges:
        if (plain_words(command) or [""])[0] == "locate" and _SUSPECT.search(reply):
            suspects, untested = len(_SUSPECT.findall(reply)), {}
        untested |= {int(line): bool(fix) for fix, line in _UNTESTED.findall(reply)}
    if not suspects:
        return "locate"
    if all(untested.get(rank) is False for rank in range(1, suspects + 1)):
        return "submit"
    return f"view @{line % suspects + 1}"


def turns(messages: tuple[Message, ...]) -> Iterator[tuple[str, str]]:
    """Yield a conversation's commands, each with its observation."""
    for message, reply in itertools.pairwise(messages):
        if message.role == "assistant":
            yield message.content, reply.content
