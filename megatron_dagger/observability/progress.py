"""Live progress of long work: a bar on a terminal, a log line now and then elsewhere, and a status file."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megatron_dagger.observability.status_file import StatusFile, describe_error
from megatron_dagger.store.errors import StoreError

logger = logging.getLogger(__name__)

_LOOK_S = 2.0
_END_S = 10.0


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

    def values(self) -> dict[str, Any]:
        """What a status file says of it."""
        return {name: getattr(self, name) for name in ("done", "total", "unit", "rate", "note")}

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
    worker: str | None = None,
    log_file: Path | None = None,
    count: Callable[[], int] | None = None,
    interval_s: float = 10.0,
    stream: TextIO | None = None,
) -> Iterator[Tracker]:
    """Show the progress of the work in the ``with`` block; ``done`` units were done before.

    Where another process does the work, ``count`` says how many units are done, and is asked every few seconds.
    With ``run_dir`` a status file (see ``status_file``) tells it too, and how the block ended: an exception that
    leaves it is recorded as the failure, with ``log_file`` as the place to look.
    """
    stream = stream or sys.stderr
    tracker = Tracker(description, total, unit, done, interval_s)
    status = None
    if run_dir is not None:
        name = "prepare" if round_index is None else f"{round_index:04d}-{stage}"
        where: dict[str, Any] = {"round_index": round_index, "stage": stage, "worker": worker, "log_file": log_file}
        status = StatusFile(run_dir, name, description=description, progress=tracker.values, **where)
        status.write()
        tracker._listeners.append(lambda periodic: status.changed())

    def look() -> None:
        try:
            if count is not None and (found := count()) != tracker.done:
                tracker.advance(found - tracker.done)
            if status is not None:
                status.pulse()
        except StoreError as problem:  # the run was taken over: the work itself ends at its next write
            logger.warning("%s", problem)

    try:
        with _every(_LOOK_S, look):
            if stream.isatty():
                with _bar(tracker, stream):
                    yield tracker
            else:
                tracker._listeners.append(lambda periodic: logger.info("%s", tracker.text()) if periodic else None)
                yield tracker
        look()
        if not stream.isatty():
            logger.info("%s", tracker.text())
    except BaseException as error:
        look()
        if status is not None:
            stopped = not isinstance(error, Exception)  # SystemExit, or what asyncio makes of it
            status.write("stopped" if stopped else "failed", None if stopped else describe_error(error))
        raise
    if status is not None:
        status.write("done")


@contextmanager
def _every(period_s: float, call: Callable[[], None]) -> Iterator[None]:
    """Within the block a thread calls ``call`` again and again."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(period_s):
            call()

    thread = threading.Thread(target=repeat, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_END_S)


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
    """Seconds in words: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
