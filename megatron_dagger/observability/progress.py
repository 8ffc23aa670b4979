"""Progress of long work: a bar on a terminal, periodic log lines elsewhere, and a status file of the run."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from megatron_dagger.observability.status_file import RunProcess, StatusFile, describe_error
from megatron_dagger.store.errors import StoreError

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0  # between log lines off a terminal

_POLL_S = 2.0
_JOIN_S = 10.0


class Tracker:
    """Counts the units of work done. Made by ``track``; call ``advance`` from one thread at a time."""

    def __init__(self, description: str, total: int | None, unit: str, done: int):
        self.description, self.total, self.unit = description, total, unit
        self.done = done
        self.note = ""
        self._first = done  # units done before a resume do not count for the rate
        self._started = self._reported = time.monotonic()
        self._listeners: list[Callable[[bool], None]] = []  # called with: is a periodic report due?

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count ``count`` more units as done. ``note``, such as a loss, is shown beside the count."""
        self.done += count
        self.note = self.note if note is None else note
        now = time.monotonic()
        periodic = now - self._reported >= LOG_INTERVAL_S
        if periodic:
            self._reported = now
        for listener in self._listeners:
            listener(periodic)

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self._first) / max(1e-9, time.monotonic() - self._started)

    @property
    def remaining_s(self) -> float | None:
        """Seconds left at this rate, or None if the total or the rate is unknown."""
        if self.total is None or self.done <= self._first:
            return None
        return (self.total - self.done) / self.rate

    def text(self) -> str:
        """Return one line: units done, rate, time left, note."""
        total = "" if self.total is None else f"/{self.total}"
        rest = "" if self.remaining_s is None else f", {format_duration(self.remaining_s)} left"
        note = f", {self.note}" if self.note else ""
        return f"{self.description}: {self.done}{total} {self.unit} ({self.rate:.2f}/s{rest}){note}"

    def values(self) -> dict[str, Any]:
        """Return the fields of a status file."""
        return {name: getattr(self, name) for name in ("done", "total", "unit", "rate", "note")}


@contextmanager
def track(
    description: str,
    total: int | None,
    *,
    unit: str = "episodes",
    done: int = 0,
    count: Callable[[], int] | None = None,
    process: RunProcess | None = None,
    stage: tuple[int, str] | None = None,
    stream: TextIO | None = None,
) -> Iterator[Tracker]:
    """Show the progress of the work in the ``with`` block. ``done`` units were done before.

    If another process does the work, ``count()`` returns how many units are done; it is called every few seconds.
    With ``process`` the progress also goes to a status file of the run, of the stage ``stage`` (round, stage name) or,
    without one, of the preparation. The file records how the block ended, including an exception that leaves it. Off a
    terminal a log line is written every ``LOG_INTERVAL_S`` seconds.
    """
    stream = stream or sys.stderr
    tracker = Tracker(description, total, unit, done)
    status = None
    if process is not None:
        status = StatusFile(process, description, stage=stage, progress=tracker.values)
        status.write()
        tracker._listeners.append(lambda periodic: status.changed())

    def poll() -> None:
        try:
            if count is not None and (counted := count()) != tracker.done:
                tracker.advance(counted - tracker.done)
            if status is not None:
                status.pulse()
        except StoreError as error:  # the run was taken over; the work itself ends at its next write
            logger.warning("%s", error)

    try:
        with _every(_POLL_S, poll):
            if stream.isatty():
                with _bar(tracker, stream):
                    yield tracker
            else:
                tracker._listeners.append(lambda periodic: logger.info("%s", tracker.text()) if periodic else None)
                yield tracker
        poll()
        if not stream.isatty():
            logger.info("%s", tracker.text())
    except BaseException as error:
        poll()
        if status is not None:
            stopped = not isinstance(error, Exception)  # SystemExit, or the CancelledError that asyncio turns it into
            status.write("stopped" if stopped else "failed", None if stopped else describe_error(error))
        raise
    if status is not None:
        status.write("done")


@contextmanager
def _every(period_s: float, call: Callable[[], None]) -> Iterator[None]:
    """Call ``call`` periodically on a thread during the block."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(period_s):
            call()

    thread = threading.Thread(target=repeat, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_JOIN_S)


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


def format_duration(seconds: float) -> str:
    """Return a duration as text: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
