"""Containers that a killed Docker daemon has forgotten: found by a list of those started here, and ended.

A daemon that is killed while it removes a container may not know it when it comes back, and leave its parent process
(containerd's shim) and what runs below it. The list is a folder of this host, with a file for each container that was
started and is not removed yet. Ending processes needs the daemon's rights. A folder that others can write in is not
used: it could name what is not ours.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


class StartedContainers:
    """The list of containers that were started on the daemon with this id, by any process of this user."""

    def __init__(self, daemon: str, folder: Path | None = None):
        self._daemon = daemon
        # Not TMPDIR, which differs from job to job
        self._folder = folder or Path(f"/tmp/megatron-dagger-containers-{os.getuid()}")

    def add(self, container: str) -> None:
        """List a container that is about to be started."""
        with contextlib.suppress(OSError):  # a list that cannot be kept is no reason to start no container
            if self._is_private():
                (self._folder / container).write_text(self._daemon)

    def drop(self, container: str) -> None:
        """Forget a container that was removed."""
        with contextlib.suppress(OSError):
            if self._is_private():
                (self._folder / container).unlink()

    def end_forgotten(self, is_known: Callable[[str], bool]) -> list[str]:
        """End what remains of the containers that the daemon no longer knows; return their ids."""
        containers = []
        for path in self._ours():
            if not is_known(path.name):
                shims = list(_shims(path.name))
                if all(_end(shim) for shim in shims):
                    self.drop(path.name)
                    containers += [path.name] if shims else []
        if containers:
            logger.warning("ended %d containers that a killed Docker daemon had forgotten", len(containers))
        return containers

    def _is_private(self) -> bool:
        """Make the folder if it is missing; return whether it is this user's, and no other can write in it."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.lstat(self._folder)
        own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        return own and not status.st_mode & 0o022

    def _ours(self) -> Iterator[Path]:
        """Yield the files of this daemon's containers."""
        paths: list[Path] = []
        with contextlib.suppress(OSError):
            paths = list(self._folder.iterdir()) if self._is_private() else []
        for path in paths:
            with contextlib.suppress(OSError):  # another process may have removed the container
                if path.read_text() == self._daemon:
                    yield path


def _shims(container: str) -> Iterator[int]:
    """Yield the ids of the container's parent processes on this host."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            program, *arguments = (process / "cmdline").read_bytes().split(b"\0")
            if b"containerd-shim" in program and container.encode() in arguments:
                yield int(process.name)


def _end(process: int) -> bool:
    """Kill a process after those below it; return whether this was allowed."""
    for task in Path(f"/proc/{process}/task").glob("*"):
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                _end(int(child))
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(process, signal.SIGKILL)
        except PermissionError:
            return False
    return True
