"""The part of a data store that the report and ``status`` read."""

from __future__ import annotations

from typing import Protocol

from megatron_dagger.types import Trajectory


class EpisodeSource(Protocol):
    """Committed episodes by round. ``store.aggregated.DataStore`` is one."""

    def rounds(self) -> list[int]:
        """Return the rounds that hold episodes, in order."""
        ...

    def committed(self, round_index: int) -> set[tuple[str, int]]:
        """Return (task_id, attempt) of the round's episodes."""
        ...

    def read(self, round_index: int, key: tuple[str, int]) -> Trajectory:
        """Return one episode by (task_id, attempt)."""
        ...
