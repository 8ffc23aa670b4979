"""What a process says of its work on a run: one small file for each stage and worker, in ``RUN/status``.

``status/0001-collect-worker-0.json`` is replaced every few seconds while the stage runs and stays when it has
ended. It names process, host, SLURM job and log. Whoever writes one keeps it younger than ``PULSE_S``, so that
a reader on another host can tell work under way from work whose process is gone.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dagger.store.atomic import UnreadableFileError, read_json, write_json
from megatron_dagger.store.fence import this_job

logger = logging.getLogger(__name__)

FOLDER = "status"  # of the run directory
PULSE_S = 30.0
_PERIOD_S = 2.0


class StatusFile:
    """The file ``name`` of the driver, or of one worker beside others."""

    def __init__(
        self,
        run_dir: Path,
        name: str,
        *,
        description: str,
        progress: Callable[[], dict[str, Any]] = dict,
        round_index: int | None = None,
        stage: str | None = None,
        worker: str | None = None,
        log_file: Path | None = None,
    ):
        self._path = run_dir / FOLDER / f"{name}{f'-{worker}' if worker else ''}.json"
        self._progress = progress
        self._written = 0.0
        self._lock = threading.Lock()  # the pulse comes from a thread of its own
        self._fixed = {
            "round": round_index,
            "stage": stage,
            "worker": worker,
            "description": description,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            **this_job(),
            "started": time.time(),
            "log": None if log_file is None else str(log_file),
        }

    def write(self, state: str = "running", error: str | None = None, *, older_than_s: float = 0.0) -> None:
        """Replace the file, if what it says is older than ``older_than_s``; a full disk is a warning."""
        with self._lock:
            if time.monotonic() - self._written < older_than_s:
                return
            self._written = time.monotonic()
            values = {**self._fixed, "state": state, **self._progress(), "updated": time.time(), "error": error}
            try:
                write_json(self._path, values)
            except OSError as problem:  # progress must not end the work it reports
                logger.warning("cannot write %s: %s", self._path, problem)

    def changed(self) -> None:
        """There is progress: tell it, but not more often than every few seconds."""
        self.write(older_than_s=_PERIOD_S)

    def pulse(self) -> None:
        """Say that the work goes on although nothing has changed."""
        self.write(older_than_s=PULSE_S)


@contextmanager
def failure_recorded(run_dir: Path, *, worker: str | None, log_file: Path) -> Iterator[None]:
    """An exception that leaves the block gets a status file of its own, where no stage's file has it already."""
    try:
        yield
    except Exception as error:
        text = describe_error(error)
        if text not in (state.get("error") for state in read_all(run_dir) if state.get("pid") == os.getpid()):
            file = StatusFile(run_dir, "failure", description="starting a stage", worker=worker, log_file=log_file)
            file.write("failed", text)
        raise


def read_all(run_dir: Path) -> list[dict[str, Any]]:
    """What all files say, the last that was written last; one that cannot be read is left out."""
    found = []
    for path in (run_dir / FOLDER).glob("[0-9a-z]*.json"):
        try:
            state = read_json(path)
        except UnreadableFileError as problem:
            logger.warning("%s", problem)
        else:
            found += [state] if isinstance(state, dict) else []
    return sorted(found, key=lambda state: float(state.get("updated") or 0))


def describe_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
