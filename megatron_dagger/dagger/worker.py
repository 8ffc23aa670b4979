"""Which of a round's tasks are whose, when several workers collect at the same time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dagger.config import ConfigError
from megatron_dagger.config.base import require


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Worker ``index`` (from 0) of ``count``: it does every ``count``-th task, the same ones each time.

    One that ``seals`` waits then for the others' episodes and ends the stage.
    """

    index: int
    count: int
    seals: bool = False

    def __post_init__(self) -> None:
        require(
            0 <= self.index < self.count,
            f"worker {self.index}/{self.count}: of {self.count} workers the first is 0 and the last {self.count - 1}",
        )

    @classmethod
    def parse(cls, text: str) -> Worker:
        """From ``I/K``."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise ConfigError(f"worker {text!r}: expected I/K, such as 0/4 to 3/4 for four workers")
        return cls(index=int(match[1]), count=int(match[2]))

    @property
    def name(self) -> str:
        return f"worker-{self.index}"

    def share(self, tasks: Sequence[str]) -> list[str]:
        """This worker's of the round's tasks."""
        return list(tasks[self.index :: self.count])
