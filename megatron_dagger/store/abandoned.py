"""The tasks of a round that were abandoned: every attempt broke, so the round will have no episode of them.

Each task has a small file of its own, so writers need no lock and readers open no file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, unquote

from megatron_dagger.store.atomic import write_json
from megatron_dagger.store.fence import permitted
from megatron_dagger.types import Trajectory

FOLDER = "given_up"  # of the round's directory; the name is older than the class's, and stored runs have it


class AbandonedTasks:
    """The abandoned tasks of one round, as files in ``folder``. The folder need not exist."""

    def __init__(self, folder: Path):
        self._folder = folder

    def tasks(self) -> set[str]:
        """Return the ids of the abandoned tasks."""
        return {unquote(path.stem) for path in self._folder.glob("*.json")}

    def add(self, last: Trajectory) -> None:
        """Abandon the task of ``last``, the episode of its last attempt. The record is durable on return."""
        reason = {"stop_reason": str(last.stop_reason), "error": last.details.get("error")}
        if "last_action" in last.details:  # what the episode broke on
            reason["last_action"] = last.details["last_action"]
        write_json(self._path(last.task_id), {"task_id": last.task_id, **reason})

    def withdraw(self, tasks: Iterable[str]) -> None:
        """Take ``tasks`` off the list, so the next start of the round tries them again."""
        for path in map(self._path, tasks):
            with permitted(path):
                path.unlink(missing_ok=True)

    def _path(self, task_id: str) -> Path:
        return self._folder / f"{quote(task_id, safe='')}.json"
