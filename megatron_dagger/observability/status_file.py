"""Status files: each process reports its work on a run in one small file per stage, in ``RUN/status``.

``status/0001-collect-worker-0.json`` is replaced every few seconds while the stage runs, and stays afterwards. It names
process, host, SLURM job and log. A live process rewrites its file at least every ``PULSE_S`` seconds; so a reader on
another host recognises a dead process by the age of its file.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dagger.store.atomic import UnreadableFileError, read_json, write_json
from megatron_dagger.store.fence import this_job

logger = logging.getLogger(__name__)

FOLDER = "status"  # of the run directory
PULSE_S = 30.0
_PERIOD_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunProcess:
    """A process that works on a run, as its status files name it."""

    run_dir: Path
    worker: str | None = None  # its name beside other workers; None for the driver
    log_file: Path | None = None  # named in the status file, for the reader to look at


class StatusFile:
    """The file in which ``process`` reports one piece of work.

    The file's name begins with ``stage`` (round and stage name), or with ``name`` for work outside of a stage.
    """

    def __init__(
        self,
        process: RunProcess,
        description: str,
        *,
        stage: tuple[int, str] | None = None,
        name: str = "prepare",
        progress: Callable[[], dict[str, Any]] = dict,
    ):
        round_index, stage_name = stage or (None, None)
        name = name if stage is None else f"{round_index:04d}-{stage_name}"
        worker, log_file = process.worker, process.log_file
        self._path = process.run_dir / FOLDER / f"{name}{f'-{worker}' if worker else ''}.json"
        self._progress = progress
        self._written = 0.0
        self._lock = threading.Lock()  # the thread of ``track`` writes too
        self._fixed = {
            "round": round_index,
            "stage": stage_name,
            "worker": worker,
            "description": description,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            **this_job(),
            "started": time.time(),
            "log": None if log_file is None else str(log_file),
        }

    def write(self, state: str = "running", error: str | None = None, *, older_than_s: float = 0.0) -> None:
        """Replace the file if it is older than ``older_than_s``. A file that cannot be written is a warning."""
        with self._lock:
            if time.monotonic() - self._written < older_than_s:
                return
            self._written = time.monotonic()
            values = {**self._fixed, "state": state, **self._progress(), "updated": time.time(), "error": error}
            try:
                write_json(self._path, values)
            except OSError as write_error:  # a report must not end the work
                logger.warning("cannot write %s: %s", self._path, write_error)

    def changed(self) -> None:
        """Report new progress, at most every few seconds."""
        self.write(older_than_s=_PERIOD_S)

    def pulse(self) -> None:
        """Report that the process is alive although nothing has changed."""
        self.write(older_than_s=PULSE_S)


@contextmanager
def failure_recorded(process: RunProcess) -> Iterator[None]:
    """Write an exception that leaves the block to a status file, unless a stage's file of this process has it."""
    try:
        yield
    except Exception as error:
        text = describe_error(error)
        states = read_all(process.run_dir)
        if text not in (state.get("error") for state in states if state.get("pid") == os.getpid()):
            StatusFile(process, "starting a stage", name="failure").write("failed", text)
        raise


def read_all(run_dir: Path) -> list[dict[str, Any]]:
    """Return the content of all status files, the newest last. Unreadable files are skipped with a warning."""
    states = []
    for path in (run_dir / FOLDER).glob("[0-9a-z]*.json"):
        try:
            state = read_json(path)
        except UnreadableFileError as error:
            logger.warning("%s", error)
        else:
            states += [state] if isinstance(state, dict) else []
    return sorted(states, key=lambda state: float(state.get("updated") or 0))


def describe_error(error: BaseException) -> str:
    """Return an exception as text: its type and its message."""
    return f"{type(error).__name__}: {error}"
