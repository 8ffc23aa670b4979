"""The time that an episode takes, without the time that it waits for a server that does not answer.

A teacher that is still starting, or is started again, must not use up the time limit of every episode. The clock is a
context variable: an episode is a task, and its requests are made in that task or in its children.
"""

from __future__ import annotations

import time
from contextvars import ContextVar

_clock: ContextVar[EpisodeClock | None] = ContextVar("episode_clock", default=None)


class EpisodeClock:
    """Seconds since it was made, without those that were excluded."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()

    def elapsed_s(self) -> float:
        return time.monotonic() - self._start_s

    def exclude(self, seconds: float) -> None:
        self._start_s += seconds


def start_clock() -> EpisodeClock:
    """Start the clock of the episode that runs in this task, and return it."""
    clock = EpisodeClock()
    _clock.set(clock)
    return clock


def exclude(seconds: float) -> None:
    """Do not count ``seconds`` that this task's episode has waited; outside an episode do nothing."""
    if (clock := _clock.get()) is not None:
        clock.exclude(seconds)
