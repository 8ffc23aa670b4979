"""The repair tools that show or change one line. They need no process of their own, so the driver runs them too.

view ADDRESS [COUNT]        a line, its fixes, and the fixes that no test run has failed yet; or COUNT lines
untested ADDRESS            only the fixes that no test run has failed yet
fix ADDRESS N               apply the N-th fix of a line
edit ADDRESS OLD NEW [N]    replace the N-th token OLD of a line by NEW
An ADDRESS is FILE:LINE, or @K for the K-th line of locate's list.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

if __package__:
    from megatron_dagger.envs.repo_repair.tools import swaps
else:  # in the sandbox, where this folder is on the path and megatron_dagger is not
    import swaps  # type: ignore[no-redef]

STATE = ".repair"  # task.json: the tests to run; suspects.json: locate's list; tested.json: edits that failed the tests
MAX_LINES = 40


class UsageError(Exception):
    """A command's arguments are wrong; the message tells the agent why."""


class Files(Protocol):
    """The work tree, by relative path. ``read`` raises OSError if there is no such file."""

    def read(self, path: str) -> bytes: ...
    def write(self, path: str, content: bytes) -> None: ...


class LineTools:
    """The tools on the files of one work tree. Each yields the lines that it prints, and may raise UsageError."""

    def __init__(self, files: Files):
        self._files = files
        self.commands: dict[str, Callable[..., Iterable[str]]] = {
            "view": self.view,
            "untested": self.untested,
            "fix": self.fix,
            "edit": self.edit,
        }

    def view(self, address: str, count: str = "1") -> Iterator[str]:
        path, number = self._address(address)
        lines = self.lines(path)
        if not 1 <= number <= len(lines):
            raise UsageError(f"{path} has {len(lines)} lines")
        if not count.isdigit() or not 1 <= int(count) <= MAX_LINES:
            raise UsageError(f"COUNT is 1 to {MAX_LINES}")
        for offset, line in enumerate(lines[number - 1 : number - 1 + int(count)]):
            yield f"{self._name(path, number + offset)}: {line.rstrip()}"
        if count == "1":
            yield swaps.numbered(swaps.repairs(lines[number - 1])) or "no fixes"
            yield from self.untested(address)

    def untested(self, address: str) -> Iterator[str]:
        path, number = self._address(address)
        lines = self.lines(path)
        line = lines[number - 1] if 1 <= number <= len(lines) else ""
        failed = self._tested()
        fixes = enumerate(swaps.repairs(line), 1)
        untested = [str(n) for n, fix in fixes if (path, number, swaps.replace_token(line, fix)) not in failed]
        # The lowest last: a small model first learns what is always at the same distance from the end.
        yield f"untested: {', '.join(reversed(untested)) or 'none'} of {self._name(path, number)}"

    def fix(self, address: str, number_of_fix: str) -> Iterator[str]:
        path, number = self._address(address)
        lines = self.lines(path)
        fixes = swaps.repairs(lines[number - 1]) if 1 <= number <= len(lines) else []
        if not number_of_fix.isdigit() or not 1 <= int(number_of_fix) <= len(fixes):
            raise UsageError(f"there are {len(fixes)} fixes of {self._name(path, number)}")
        yield self._replace(path, number, lines, fixes[int(number_of_fix) - 1])

    def edit(self, address: str, old: str, new: str, nth: str = "1") -> Iterator[str]:
        path, number = self._address(address)
        lines = self.lines(path)
        if not 1 <= number <= len(lines):
            raise UsageError(f"{path} has {len(lines)} lines")
        if not nth.isdigit():
            raise UsageError("N is a number")
        yield self._replace(path, number, lines, swaps.Candidate(old=old, new=new, nth=int(nth)))

    def lines(self, path: str) -> list[str]:
        """Return the lines of a text file with their ends."""
        try:
            return io.TextIOWrapper(io.BytesIO(self._files.read(path)), encoding="utf-8", newline="").readlines()
        except (OSError, UnicodeDecodeError):
            raise UsageError(f"cannot read {path}") from None

    def state(self, name: str) -> Any:
        """Return the value of a file of the tools' own."""
        try:
            return json.loads(self._files.read(f"{STATE}/{name}").decode())
        except (OSError, ValueError):
            raise UsageError(f"{STATE}/{name} is missing or broken") from None

    def _replace(self, path: str, number: int, lines: list[str], change: swaps.Candidate) -> str:
        changed = swaps.replace_token(lines[number - 1], change)
        if changed is None:
            raise UsageError(f"there are not {change.nth} tokens {change.old}")
        lines[number - 1] = changed
        self._files.write(path, "".join(lines).encode())
        return f"{self._name(path, number)}: {changed.rstrip()}"

    def _tested(self) -> set[tuple[str, int, str]]:
        """Return the lines (file, number, text) with which, as the only change, the tests have failed."""
        try:
            return {(path, number, text) for path, number, text in self.state("tested.json")}
        except UsageError:
            return set()

    def _address(self, text: str) -> tuple[str, int]:
        if text.startswith("@"):
            try:
                listed = self.state("suspects.json")
            except UsageError:
                raise UsageError("run locate first") from None
            if not text[1:].isdigit() or not 1 <= int(text[1:]) <= len(listed):
                raise UsageError(f"there are @1 to @{len(listed)}")
            path, number = listed[int(text[1:]) - 1]
            return path, number
        path, _, number = text.rpartition(":")
        if not path or not number.isdigit():
            raise UsageError("ADDRESS is FILE:LINE or @K")
        return path, int(number)

    def _name(self, path: str, number: int) -> str:
        try:
            return f"@{[tuple(line) for line in self.state('suspects.json')].index((path, number)) + 1}"
        except (UsageError, ValueError):
            return f"{path}:{number}"


def answer(
    commands: Mapping[str, Callable[..., Iterable[str]]],
    usage: str,
    name: str,
    arguments: list[str],
    show: Callable[[str], object],
) -> int:
    """Show the lines that a command prints, and return its exit code. ``usage`` has a line for each command."""
    try:
        for line in commands[name](*arguments):
            show(line)
    except UsageError as error:
        show(f"error: {error}")
        return 2
    except TypeError:
        usage = next(line for line in usage.splitlines() if line.startswith(name))
        show(f"error: usage: {' '.join(usage.split('  ')[:1])}")
        return 2
    return 0
