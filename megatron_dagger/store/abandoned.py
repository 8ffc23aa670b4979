"""The tasks of a round that are given up: their episodes broke each time, and none will become data.

A small file for each, named after the task: many writers need no lock, and a reader opens none.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, unquote

from megatron_dagger.store.atomic import write_json
from megatron_dagger.store.fence import permitted
from megatron_dagger.types import Trajectory


class AbandonedTasks:
    """Those of one round, in ``folder``, which need not be there."""

    def __init__(self, folder: Path):
        self._folder = folder

    def tasks(self) -> set[str]:
        """The tasks' ids."""
        return {unquote(path.stem) for path in self._folder.glob("*.json")}

    def add(self, last: Trajectory) -> None:
        """Give up the task of an episode that broke, for good; durable when this returns."""
        values = {"stop_reason": str(last.stop_reason), "error": last.details.get("error")}
        write_json(self._path(last.task_id), {"task_id": last.task_id, **values})

    def withdraw(self, tasks: Iterable[str]) -> None:
        """Let those of ``tasks`` that are given up be tried again."""
        for path in map(self._path, tasks):
            with permitted(path):
                path.unlink(missing_ok=True)

    def _path(self, task_id: str) -> Path:
        return self._folder / f"{quote(task_id, safe='')}.json"
