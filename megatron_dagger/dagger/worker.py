"""Which of a round's tasks are whose, when several workers act at the same time; and waiting for the others."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_dagger.config import ConfigError
from megatron_dagger.config.base import require
from megatron_dagger.dagger.world import EpisodeStore

_POLL_S = 0.5


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


async def ends_stage(
    worker: Worker | None, store: EpisodeStore, round_index: int, tasks: Sequence[str], deadline_s: float
) -> bool:
    """Whether it is for this process to end the stage; if so, after all workers' episodes of ``tasks`` are there."""
    if worker is None:
        return True
    if worker.seals:
        what = f"the other workers' episodes of round {round_index}"
        await until(lambda: are_committed(store, round_index, tasks), deadline_s, what)
    return worker.seals


def are_committed(store: EpisodeStore, round_index: int, tasks: Sequence[str]) -> bool:
    """Whether every task has its episode."""
    return {task for task, _ in store.committed(round_index)}.issuperset(tasks)


async def until(condition: Callable[[], bool], deadline_s: float, what: str) -> None:
    """Wait for what other processes write. Raises TimeoutError after ``deadline_s``."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not there after {deadline_s:.0f} s")
        await asyncio.sleep(_POLL_S)
