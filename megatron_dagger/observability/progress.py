"""Live progress of long work: a bar on a terminal, a log line now and then elsewhere, and ``status.json``.

``status.json`` of the run directory says what the run is doing, for ``megatron-dagger status``: it is
replaced every few seconds, and holds the process that wrote it, so that a reader can tell a running stage
from one whose process was killed.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron_dagger.store.atomic import write_json

logger = logging.getLogger(__name__)


class Tracker:
    """Counts work that is done. ``track`` makes it; call ``advance`` from one thread at a time."""

    def __init__(self, description: str, total: int | None, unit: str, done: int, interval_s: float):
        self.description, self.total, self.unit = description, total, unit
        self.done = done
        self.note = ""
        self._first = done  # what a resumed stage found done does not count for the rate
        self._started = self._said = time.monotonic()
        self._interval_s = interval_s
        self._listeners: list[Any] = []

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """``count`` more units are done; ``note`` is shown beside them (a loss, a success rate)."""
        self.done += count
        self.note = self.note if note is None else note
        now = time.monotonic()
        if now - self._said >= self._interval_s:
            self._said = now
            self._tell(periodic=True)
        else:
            self._tell(periodic=False)

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self._first) / max(1e-9, time.monotonic() - self._started)

    @property
    def remaining_s(self) -> float | None:
        """Seconds left at this rate, or None where nothing can be said."""
        if self.total is None or self.done <= self._first:
            return None
        return (self.total - self.done) / self.rate

    def text(self) -> str:
        """One line: what is done, how fast, how long it still takes."""
        total = "" if self.total is None else f"/{self.total}"
        rest = "" if self.remaining_s is None else f", {format_duration(self.remaining_s)} left"
        note = f", {self.note}" if self.note else ""
        return f"{self.description}: {self.done}{total} {self.unit} ({self.rate:.2f}/s{rest}){note}"

    def _tell(self, *, periodic: bool) -> None:
        for listener in self._listeners:
            listener(periodic)


@contextmanager
def track(
    description: str,
    total: int | None,
    *,
    unit: str = "episodes",
    done: int = 0,
    run_dir: Path | None = None,
    round_index: int | None = None,
    stage: str | None = None,
    log_file: Path | None = None,
    interval_s: float = 10.0,
    stream: TextIO | None = None,
) -> Iterator[Tracker]:
    """Show the progress of the work in the ``with`` block; ``done`` units were done before.

    With ``run_dir`` the state goes to ``status.json`` too, and an exception that leaves the block is
    recorded there as the failure, with ``log_file`` as the place to look.
    """
    stream = stream or sys.stderr
    tracker = Tracker(description, total, unit, done, interval_s)
    status = _StatusFile(run_dir, tracker, round_index, stage, log_file) if run_dir is not None else None
    if status is not None:
        tracker._listeners.append(lambda periodic: status.write("running", periodic))
        status.write("running", True)
    try:
        if stream.isatty():
            with _bar(tracker, stream):
                yield tracker
        else:
            tracker._listeners.append(lambda periodic: logger.info("%s", tracker.text()) if periodic else None)
            yield tracker
            logger.info("%s", tracker.text())
    except BaseException as error:
        if status is not None:
            status.write("failed", True, f"{type(error).__name__}: {error}")
        raise
    if status is not None:
        status.write("done", True)


@contextmanager
def _bar(tracker: Tracker, stream: TextIO) -> Iterator[None]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
    )
    with Progress(*columns, console=Console(file=stream)) as progress:
        task = progress.add_task(tracker.description, total=tracker.total, completed=tracker.done, rate="")

        def show(_: bool) -> None:
            note = f"  {tracker.note}" if tracker.note else ""
            progress.update(task, completed=tracker.done, rate=f"{tracker.rate:.2f} {tracker.unit}/s{note}")

        tracker._listeners.append(show)
        yield


class _StatusFile:
    """Writes ``status.json``, at most every ``PERIOD_S`` while the stage runs."""

    PERIOD_S = 2.0

    def __init__(
        self,
        run_dir: Path,
        tracker: Tracker,
        round_index: int | None,
        stage: str | None,
        log_file: Path | None,
    ):
        self._path, self._tracker, self._written = run_dir / "status.json", tracker, 0.0
        self._fixed = {
            "round": round_index,
            "stage": stage,
            "description": tracker.description,
            "unit": tracker.unit,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": time.time(),
            "log": None if log_file is None else str(log_file),
        }

    def write(self, state: str, force: bool, error: str | None = None) -> None:
        now = time.monotonic()
        if not force and now - self._written < self.PERIOD_S:
            return
        self._written = now
        t = self._tracker
        values = {"state": state, "done": t.done, "total": t.total, "rate": t.rate, "note": t.note}
        try:
            write_json(self._path, {**self._fixed, **values, "updated": time.time(), "error": error})
        except OSError as problem:  # progress must not end the work it reports
            logger.warning("cannot write %s: %s", self._path, problem)


def format_duration(seconds: float) -> str:
    """Seconds in words: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
