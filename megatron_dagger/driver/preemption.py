"""SIGTERM and SIGUSR1, which a cluster sends before it takes a machine away: end soon and in order.

What is finished is committed, a training saves after the step at hand, children are ended. The exit code
says that the same command goes on from there: a job's script requeues its job on it.
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
def stops_when_asked() -> Iterator[None]:
    """Within the block the first of the signals raises SystemExit(STOPPED) in the main thread; later ones do nothing.

    SystemExit and no error of our own, because asyncio lets it through at once and cancels what runs.
    """
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            logger.warning("%s: stopping; the same command goes on from here", signal.Signals(number).name)
            raise SystemExit(STOPPED)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    except Exception as error:
        if not asked:
            raise
        logger.warning("while stopping: %s: %s", type(error).__name__, error)
        raise SystemExit(STOPPED) from error
    finally:
        if not asked:  # else the process is about to end, and must do so with its code
            for number, handler in before.items():
                signal.signal(number, handler)
