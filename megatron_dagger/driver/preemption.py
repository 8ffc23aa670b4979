"""Stop cleanly on SIGTERM and SIGUSR1, which a cluster sends before it takes a machine away.

Finished episodes are committed, a training saves after the current step, and child processes end. The exit code tells
a job's script to requeue the job: the repeated command resumes.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_dagger.signals import STOP_SIGNALS, STOPPED

logger = logging.getLogger(__name__)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raise SystemExit(STOPPED) in the main thread on the first of the signals; ignore the later ones.

    SystemExit rather than an error of our own, because asyncio lets it through at once and cancels its tasks.
    """
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            logger.warning("%s: stopping; repeat the command to resume", signal.Signals(number).name)
            raise SystemExit(STOPPED)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    except Exception as error:
        if not stopping:
            raise
        logger.warning("while stopping: %s: %s", type(error).__name__, error)
        raise SystemExit(STOPPED) from error
    finally:
        if not stopping:  # else the process is about to end with its exit code, and a later signal must not change that
            for number, handler in before.items():
                signal.signal(number, handler)
