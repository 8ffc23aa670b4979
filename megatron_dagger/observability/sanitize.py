"""Texts of models and commands, made safe to show: an escape sequence must not drive the reader's terminal."""

from __future__ import annotations

# Unicode's direction marks, which reorder the text around them.
_DIRECTION_MARKS = frozenset([*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F])


def sanitize(text: str) -> str:
    """Return ``text`` with control characters replaced by visible symbols; newlines and tabs stay."""
    return "".join(_symbol(character) for character in text.replace("\r\n", "\n"))


def _symbol(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or (0x20 <= code < 0x7F):
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000 or code in _DIRECTION_MARKS:
        return "\ufffd"
    return character
