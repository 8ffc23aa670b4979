"""The signals that ask a process to stop, its exit code then, and a hook that binds a child to its parent.

``driver.preemption`` reacts to these signals in the driver, ``training.ranks.stop_signal`` in a rank.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # a cluster sends one before it takes a machine away
STOPPED = os.EX_TEMPFAIL  # 75: progress is saved, and the same command resumes
_PR_SET_PDEATHSIG = 1


def parent_death_hook() -> Callable[[], None]:
    """Return a function that a child calls first: the kernel then kills it when the thread that forked it ends.

    Call ``parent_death_hook`` in the parent, before the fork. The setting survives an exec. Linux only.
    """
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # the parent ended before the call

    return die_with_parent
