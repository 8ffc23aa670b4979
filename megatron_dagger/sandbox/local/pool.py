"""Local sandboxes kept warm between episodes.

Starting one costs a quarter of a second, nearly all of it the imports in its server. A sandbox whose episode ended
normally is emptied and lent again; after any exception it is closed. Commands cannot trace the server that runs them
(see server.py), so nothing of an episode remains.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from megatron_dagger.sandbox.base import EnvironmentBroken
from megatron_dagger.sandbox.local.process import ProcessSandbox, remove_abandoned


class SandboxPool:
    """Lends sandboxes made by ``factory``; safe to use from many threads. Removes folders of killed processes."""

    def __init__(self, factory: Callable[[], ProcessSandbox]):
        remove_abandoned()
        self._factory = factory
        self._idle: list[ProcessSandbox] = []
        self._lock = threading.Lock()
        self._closed = False

    def take(self) -> ProcessSandbox:
        """Return an idle sandbox, or a new one; ``give`` takes it back."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._factory()

    def give(self, sandbox: ProcessSandbox) -> None:
        """Take a sandbox back for another episode."""
        try:
            sandbox.reset()
        except EnvironmentBroken:
            sandbox.close()
            return
        with self._lock:
            if not self._closed:
                self._idle.append(sandbox)
                return
        sandbox.close()

    @contextmanager
    def lend(self, *, fresh: bool = False) -> Iterator[ProcessSandbox]:
        """Yield a sandbox, newly made if ``fresh``. It is closed if the block raises, else given back."""
        sandbox = self._factory() if fresh else self.take()
        try:
            yield sandbox
        except BaseException:
            sandbox.close()
            raise
        self.give(sandbox)

    def close(self) -> None:
        """Close the idle sandboxes; those still lent are closed when they are given back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for sandbox in idle:
            sandbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
