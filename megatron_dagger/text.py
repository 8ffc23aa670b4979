"""Text from outside: what cannot be encoded, JSON that is too deep, and one notion of a line."""

from __future__ import annotations

import json
import re
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"


def encodable(text: str) -> str:
    """Return ``text`` with U+FFFD for each lone surrogate; all other characters can be encoded in UTF-8.

    JSON's escapes (``"\\ud83d"``) and undecodable file names bring them; tokenizers and HTTP clients fail on them.
    """
    return _SURROGATE.sub(REPLACEMENT, text)


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Return the value of a JSON text, with strings that can all be encoded; ``options`` are those of ``json.loads``.

    Raises ValueError, also for a text that is nested too deeply.
    """
    try:
        return _encodable_strings(json.loads(text, **options))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def split_lines(text: str, *, keepends: bool = False) -> list[str]:
    """Return the lines of ``text``, as git and grep count them: only a line feed ends one.

    ``str.splitlines`` also breaks at form feeds, at the separators of U+2028 and at others. A carriage return before
    the line feed is part of the end.
    """
    lines = text.split("\n")
    last = lines.pop()
    if keepends:
        return [f"{line}\n" for line in lines] + ([last] if last else [])
    return [line.removesuffix("\r") for line in lines] + ([last] if last else [])


def _encodable_strings(value: Any) -> Any:
    """Return a JSON value with all its strings made encodable, the names of objects too."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list):
        return [_encodable_strings(item) for item in value]
    if isinstance(value, dict):
        return {encodable(name): _encodable_strings(item) for name, item in value.items()}
    return value
