"""How processes end: asked to before a cluster takes a machine away, or with the one that started them. No engines."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = os.EX_TEMPFAIL  # 75: what was done is saved, and the same command goes on from there
_PR_SET_PDEATHSIG = 1


def dies_with_this_process() -> Callable[[], None]:
    """What a child is to call first, so that it is killed with the thread that forked it; Linux only."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def die_with_the_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # it was gone before the call

    return die_with_the_parent
