"""Where a report gets its episodes: what it needs of a store, without knowing one."""

from __future__ import annotations

from typing import Protocol

from megatron_dagger.types import Trajectory


class EpisodeSource(Protocol):
    """Committed episodes by round; ``store.aggregated.DataStore`` is one."""

    def rounds(self) -> list[int]: ...
    def committed(self, round_index: int) -> set[tuple[str, int]]: ...
    def read(self, round_index: int, key: tuple[str, int]) -> Trajectory: ...


def visible(text: str) -> str:
    """Text of a model or a command, made safe to show: control characters become visible symbols.

    An escape sequence in an observation must not drive the reader's terminal.
    """
    return "".join(_symbol(character) for character in text.replace("\r\n", "\n"))


def _symbol(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or (0x20 <= code < 0x7F):
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000 or code in _DIRECTION:
        return "\ufffd"
    return character


_DIRECTION = frozenset([*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F])  # reorder what is read
