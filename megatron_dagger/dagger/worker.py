"""Which of a round's tasks are whose, when several workers act at the same time; what they did; waiting for them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dagger.config import ConfigError
from megatron_dagger.config.base import require
from megatron_dagger.dagger.context import EpisodeStore
from megatron_dagger.store.atomic import read_json, write_json

_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Worker ``index`` (from 0) of ``count``: it does every ``count``-th task, the same ones each time.

    A ``resident`` one lives through all rounds and takes its weights from the memory of the run's trainer.
    """

    index: int
    count: int
    resident: bool = False

    def __post_init__(self) -> None:
        require(
            0 <= self.index < self.count,
            f"worker {self.index}/{self.count}: of {self.count} workers the first is 0 and the last {self.count - 1}",
        )

    @classmethod
    def parse(cls, text: str, *, resident: bool = False) -> Worker:
        """From ``I/K``."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise ConfigError(f"worker {text!r}: expected I/K, such as 0/4 to 3/4 for four workers")
        return cls(index=int(match[1]), count=int(match[2]), resident=resident)

    @property
    def name(self) -> str:
        return f"worker-{self.index}"

    @property
    def seals(self) -> bool:
        """Whether it waits for the others' episodes and ends the stage; else a process that is no worker does."""
        return self.resident and self.index == 0

    def share(self, tasks: Sequence[str]) -> list[str]:
        """This worker's of the round's tasks."""
        return list(tasks[self.index :: self.count])

    def record(self, folder: Path, *, broken_episodes: int, duration_s: float) -> None:
        """Add to what this worker has done of the round whose directory is ``folder``."""
        path = folder / f"collect-{self.name}.json"
        before = read_json(path) if path.exists() else {}
        values = {"broken_episodes": broken_episodes, "duration_s": duration_s}
        write_json(path, {name: before.get(name, 0) + value for name, value in values.items()})


def recorded_by_workers(folder: Path) -> tuple[int, float]:
    """The broken episodes of all workers of a round, and the seconds that the slowest of them took."""
    records = [read_json(path) for path in folder.glob("collect-worker-*.json")]
    return sum(r["broken_episodes"] for r in records), max((r["duration_s"] for r in records), default=0.0)


async def wait_for_workers(
    worker: Worker | None, store: EpisodeStore, round_index: int, tasks: Sequence[str], deadline_s: float
) -> bool:
    """Whether it is for this process to end the stage; if so, after all workers' episodes of ``tasks`` are there."""
    if worker is None:
        return True
    if worker.seals:
        what = f"the other workers' episodes of round {round_index}"
        await until(lambda: all_finished(store, round_index, tasks), deadline_s, what)
    return worker.seals


def finished_tasks(store: EpisodeStore, round_index: int) -> set[str]:
    """The tasks of which nothing more is to be done: they have their episode, or are given up."""
    return {task for task, _ in store.committed(round_index)} | store.given_up(round_index).tasks()


def all_finished(store: EpisodeStore, round_index: int, tasks: Sequence[str]) -> bool:
    """Whether every one of ``tasks`` is among ``ended``."""
    return finished_tasks(store, round_index).issuperset(tasks)


async def until(condition: Callable[[], bool], deadline_s: float, what: str) -> None:
    """Wait for what other processes write. Raises TimeoutError after ``deadline_s``."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not there after {deadline_s:.0f} s")
        await asyncio.sleep(_POLL_S)
