"""The agent's tools: bash, a string-replace editor, submit. They act in a sandbox, never on the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from megatron_dagger.envs.swe.tool_calls import Tool
from megatron_dagger.sandbox.base import FileSandbox
from megatron_dagger.text import split_lines

MAX_FILE_BYTES = 1 << 20
CRLF = "\r\n"
CONTEXT_LINES = 4  # shown around an edit

BASH = Tool(
    name="bash",
    description=(
        "Run a command in a bash shell in the repository. Working directory and exported variables are kept from "
        "one call to the next; background processes are not. There is no network and no input."
    ),
    parameters={"command": {"type": "string", "description": "The command to run."}},
    required=("command",),
)
EDITOR = Tool(
    name="str_replace_editor",
    description=(
        "View, create and edit files. view shows a file with line numbers, or a directory two levels deep. create "
        "writes a new file. str_replace replaces old_str, which must occur exactly once, by new_str. insert puts "
        "new_str after the line insert_line (0: at the beginning)."
    ),
    parameters={
        "command": {"type": "string", "enum": ["view", "create", "str_replace", "insert"]},
        "path": {"type": "string", "description": "Absolute path of a file or directory."},
        "file_text": {"type": "string", "description": "create: the file's content."},
        "old_str": {"type": "string", "description": "str_replace: the text to replace, whitespace included."},
        "new_str": {"type": "string", "description": "str_replace, insert: the new text."},
        "insert_line": {"type": "integer", "description": "insert: the number of the line."},
        "view_range": {
            "type": "array",
            "items": {"type": "integer"},
            "description": "view: first and last line, from 1; -1 is the last line of the file.",
        },
    },
    required=("command", "path"),
)
SUBMIT = Tool(name="submit", description="End the work. The changes in the repository are what is judged.")
TOOLS = (BASH, EDITOR, SUBMIT)


class EditError(ValueError):
    """An edit cannot be made; the message tells the agent why."""


class Editor:
    """The string-replace editor, over the files of one sandbox."""

    def __init__(self, sandbox: FileSandbox):
        self._sandbox = sandbox

    def answer(self, arguments: dict[str, Any]) -> str:
        """Execute one call and return the text that the agent reads. Raises EnvironmentBroken."""
        path = arguments["path"]
        actions: dict[str, Callable[..., str]] = {
            "view": self._view,
            "create": self._create,
            "str_replace": self._str_replace,
            "insert": self._insert,
        }
        try:
            if not PurePosixPath(path).is_absolute() or {"\n", "\0"} & set(path):
                raise EditError(f"{path} is no absolute path")
            return actions[arguments["command"]](path, arguments)
        except EditError as error:
            return f"error: {error}"
        except FileNotFoundError:
            return f"error: {path} does not exist"
        except IsADirectoryError:
            return f"error: {path} is a directory"
        except OSError as error:
            return f"error: {path}: {error}"
        except UnicodeDecodeError:
            return f"error: {path} is not text in UTF-8"

    def _view(self, path: str, arguments: dict[str, Any]) -> str:
        try:
            lines = self._lines(path)
        except IsADirectoryError:
            return self._list(path)
        first, last = 1, len(lines)
        if "view_range" in arguments:
            first, last = _range(arguments["view_range"], len(lines))
        return _numbered(lines, first, last) or f"{path} is empty"

    def _list(self, path: str) -> str:
        quoted = path.replace("'", "'\\''")
        return self._sandbox.run(f"find '{quoted}' -maxdepth 2 -not -path '*/.*' | sort").output.rstrip("\n")

    def _create(self, path: str, arguments: dict[str, Any]) -> str:
        text = _require(arguments, "file_text")
        try:
            self._sandbox.read_file(path, limit=1)
        except FileNotFoundError:
            self._write(path, text)
            return f"{path} was created"
        raise EditError(f"{path} is there already: edit it with str_replace, or remove it first")

    def _str_replace(self, path: str, arguments: dict[str, Any]) -> str:
        old, new = _require(arguments, "old_str"), arguments.get("new_str", "")
        text = self._text(path)
        if old not in text and CRLF in text:  # which an agent sees and writes as a line feed
            old, new = _with_ends(old, CRLF), _with_ends(new, CRLF)
        count = text.count(old) if old else 0
        if count != 1:
            raise EditError(f"old_str must occur exactly once in {path}, it occurs {count} times")
        before = text.partition(old)[0]
        self._write(path, text.replace(old, new))
        return _around(text.replace(old, new), before.count("\n") + 1, new.count("\n") + 1)

    def _insert(self, path: str, arguments: dict[str, Any]) -> str:
        number, new = _require(arguments, "insert_line"), _require(arguments, "new_str")
        lines = split_lines(self._text(path), keepends=True)
        if not 0 <= number <= len(lines):
            raise EditError(f"insert_line must lie between 0 and {len(lines)}, it is {number}")
        end = CRLF if lines and lines[max(0, number - 1)].endswith(CRLF) else "\n"  # as of the line before
        if number and not lines[number - 1].endswith("\n"):
            lines[number - 1] += end
        new = _with_ends(new.removesuffix("\n") + "\n", end)
        lines.insert(number, new)
        self._write(path, "".join(lines))
        return _around("".join(lines), number + 1, new.count("\n"))

    def _text(self, path: str) -> str:
        content = self._sandbox.read_file(path, limit=MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise EditError(f"{path} is larger than {MAX_FILE_BYTES} bytes: use bash")
        return content.decode()

    def _lines(self, path: str) -> list[str]:
        return split_lines(self._text(path))

    def _write(self, path: str, text: str) -> None:
        self._sandbox.write_file(path, text.encode())


def _with_ends(text: str, end: str) -> str:
    """Return ``text`` with ``end`` at the end of each line."""
    return text.replace(CRLF, "\n").replace("\n", end)


def _require(arguments: dict[str, Any], name: str) -> Any:
    if name not in arguments:
        raise EditError(f"{arguments['command']} needs {name}")
    return arguments[name]


def _range(view_range: list[Any], count: int) -> tuple[int, int]:
    if len(view_range) != 2 or not all(type(number) is int for number in view_range):
        raise EditError("view_range is two numbers: the first and the last line")
    first, last = view_range[0], count if view_range[1] == -1 else view_range[1]
    if not 1 <= first <= last or first > count:
        raise EditError(f"view_range must lie between 1 and {count}, it is {view_range}")
    return first, min(last, count)


def _numbered(lines: list[str], first: int, last: int) -> str:
    return "\n".join(f"{number:6}\t{lines[number - 1]}" for number in range(first, last + 1))


def _around(text: str, first: int, count: int) -> str:
    """Return the edited lines and CONTEXT_LINES on either side, numbered."""
    lines = split_lines(text)
    return _numbered(lines, max(1, first - CONTEXT_LINES), min(len(lines), first + count - 1 + CONTEXT_LINES))
