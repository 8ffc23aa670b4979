"""Text from outside: what cannot be encoded, JSON that is too deep, and one notion of a line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"


def encodable(text: str) -> str:
    """Return ``text`` with U+FFFD for each lone surrogate; all other characters can be encoded in UTF-8.

    JSON's escapes (``"\\ud83d"``) and undecodable file names bring them; tokenizers and HTTP clients fail on them.
    """
    return _SURROGATE.sub(REPLACEMENT, text)


def parse_json(text: str, **options: Any) -> Any:
    """Return the value of a JSON text whose strings can all be encoded; ``options`` are those of ``json.loads``.

    Raises ValueError, also for a text that is nested too deeply.
    """
    try:
        return _strings(json.loads(text, **options), encodable)
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


def _strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with all its strings changed, the names of objects too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {change(name): _strings(item, change) for name, item in value.items()}
    return value
