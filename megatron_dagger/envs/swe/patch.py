"""Read which files a patch in git's format changes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_dagger.text import split_lines

_PART = re.compile(r"^(?=diff --git )", re.MULTILINE)
_CONTENT = ("@@ ", "GIT binary patch", "Binary files ")
_ESCAPE = re.compile(rb"\\([0-7]{3}|.)")
_ESCAPED = {b"a": b"\a", b"b": b"\b", b"t": b"\t", b"n": b"\n", b"v": b"\v", b"f": b"\f", b"r": b"\r"}


@dataclass(frozen=True, slots=True)
class FileChange:
    """A file's names before and after a patch ("": there is none, as for a copy), and whether it has the changes.

    It does not have those of a binary file, unless ``git diff --binary`` made it; git refuses to apply it.
    """

    before: str
    after: str
    complete: bool = True


def changed_files(patch: str) -> list[FileChange]:
    """Return the change of each file, in the patch's order."""
    return [_change(split_lines(part)) for part in _PART.split(patch) if part.startswith("diff --git ")]


def file_name(text: str) -> str:
    """Return the name that a header gives; git quotes names with unusual characters as C does."""
    text = text.rstrip("\t")  # which ends a name with blanks
    if not text.startswith('"'):
        return text.partition("\t")[0]  # what other programs put behind the name
    escaped = text[1:].removesuffix('"').encode(errors="surrogateescape")
    return _ESCAPE.sub(_character, escaped).decode(errors="surrogateescape")


def _change(lines: list[str]) -> FileChange:
    """Return the change that a part of a patch makes, from its ``diff --git`` on."""
    names = lines[0].removeprefix("diff --git ")
    half = len(names) // 2  # both names are the same where no other header gives them
    before, after = _without_prefix(names[:half]), _without_prefix(names[half + 1 :])
    complete, copied = True, False
    for line in lines[1:]:
        start, _, rest = line.partition(" ")
        if line.startswith(_CONTENT):
            complete = start != "Binary"
            break
        if line.startswith("rename from "):
            before = file_name(rest.removeprefix("from "))
        elif line.startswith("copy from "):
            before, copied = "", True
        elif line.startswith(("rename to ", "copy to ")):
            after = file_name(rest.removeprefix("to "))
        elif start == "---" and not copied:
            before = _without_prefix(rest)
        elif start == "+++":
            after = _without_prefix(rest)
        elif line.startswith("new file mode "):
            before = ""
        elif line.startswith("deleted file mode "):
            after = ""
    return FileChange(before, after, complete)


def _without_prefix(text: str) -> str:
    """Return a name without its first folder (``a/`` or ``b/``), as ``git apply`` takes it; "" for /dev/null."""
    name = file_name(text)
    return "" if name == "/dev/null" else name.partition("/")[2]


def _character(escape: re.Match[bytes]) -> bytes:
    code = escape[1]
    return bytes([int(code, 8) & 0xFF]) if len(code) == 3 else _ESCAPED.get(code, code)
