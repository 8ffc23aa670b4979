"""Workers: several processes that share the tasks of a stage, record what they did and wait for each other."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dagger.config import ConfigError
from megatron_dagger.config.base import require
from megatron_dagger.store.atomic import read_json, write_json

if TYPE_CHECKING:
    from megatron_dagger.store.aggregated import DataStore

_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Worker ``index`` (from 0) of ``count``: it runs every ``count``-th task, always the same.

    A ``resident`` worker stays alive through all rounds and takes the weights from the trainer's memory.
    """

    index: int
    count: int
    resident: bool = False

    def __post_init__(self) -> None:
        require(
            0 <= self.index < self.count,
            f"worker {self.index}/{self.count}: with {self.count} workers, I runs from 0 to {self.count - 1}",
        )

    @classmethod
    def parse(cls, text: str, *, resident: bool = False) -> Worker:
        """Return the worker written as ``I/K``. Raises ConfigError."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise ConfigError(f"worker {text!r}: expected I/K, such as 0/4 to 3/4 for four workers")
        return cls(index=int(match[1]), count=int(match[2]), resident=resident)

    @property
    def name(self) -> str:
        return f"worker-{self.index}"

    @property
    def seals(self) -> bool:
        """Whether this worker seals the rounds. Without resident workers, a later call without a worker does."""
        return self.resident and self.index == 0

    def share(self, tasks: Sequence[str]) -> list[str]:
        """Return this worker's tasks."""
        return list(tasks[self.index :: self.count])

    def record(self, report: Path, *, broken_episodes: int, duration_s: float) -> None:
        """Add these numbers to the worker's own record, a file beside the stage's ``report``."""
        path = report.with_name(f"{report.stem}-{self.name}.json")
        before = read_json(path) if path.exists() else {}
        values = {"broken_episodes": broken_episodes, "duration_s": duration_s}
        write_json(path, {name: before.get(name, 0) + value for name, value in values.items()})


def recorded_by_workers(report: Path) -> tuple[int, float]:
    """Return the broken episodes of all workers of a stage, and the seconds that the slowest of them took."""
    records = [read_json(path) for path in report.parent.glob(f"{report.stem}-worker-*.json")]
    return sum(r["broken_episodes"] for r in records), max((r["duration_s"] for r in records), default=0.0)


async def wait_for_workers(
    worker: Worker, store: DataStore, round_index: int, tasks: Sequence[str], deadline_s: float
) -> bool:
    """Return whether ``worker`` seals the stage. If it does, first wait until all workers' episodes are committed.

    ``tasks`` are the stage's. Raises TimeoutError after ``deadline_s`` seconds.
    """
    if worker.seals:
        awaited = f"the other workers' episodes of round {round_index}"
        await wait_until(lambda: all_finished(store, round_index, tasks), deadline_s, awaited)
    return worker.seals


def finished_tasks(store: DataStore, round_index: int) -> set[str]:
    """Return the tasks with nothing left to do: their episode is committed, or they are abandoned."""
    return {task for task, _ in store.committed(round_index)} | store.abandoned(round_index).tasks()


def all_finished(store: DataStore, round_index: int, tasks: Sequence[str]) -> bool:
    """Return whether every one of ``tasks`` is finished."""
    return finished_tasks(store, round_index).issuperset(tasks)


async def wait_until(condition: Callable[[], bool], deadline_s: float, awaited: str) -> None:
    """Wait until ``condition`` holds, for files of other processes. Raises TimeoutError, naming ``awaited``."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{awaited}: not there after {deadline_s:.0f} s")
        await asyncio.sleep(_POLL_S)
