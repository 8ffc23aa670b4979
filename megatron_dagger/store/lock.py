"""Locks between processes, with a deadline, that die with their holder.

The kernel releases ``flock`` when its holder is killed, so a crash never leaves a round locked. ``flock`` also works
between hosts, on NFS and on Lustre mounted with the option ``flock``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_dagger.store.errors import StoreError

_POLL_S = 0.005


class LockedError(StoreError):
    """Another process still holds the lock. ``holder`` names the process, or is "unknown"."""

    def __init__(self, message: str, *, holder: str):
        super().__init__(message)
        self.holder = holder


@contextmanager
def exclusive(path: Path, *, deadline_s: float = 300.0) -> Iterator[None]:
    """Hold the lock file ``path`` exclusively. Raises LockedError, which names the holder, after ``deadline_s``."""
    with flocked(path, deadline_s=deadline_s) as descriptor:
        name_holder(descriptor)
        yield


@contextmanager
def flocked(path: Path, *, shared: bool = False, deadline_s: float = 300.0) -> Iterator[int]:
    """Hold the file ``path`` exclusively or ``shared``, creating it if necessary. Yield its file descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(descriptor, path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, deadline_s)
        yield descriptor
    finally:
        os.close(descriptor)


def name_holder(descriptor: int) -> None:
    """Write this process's name into a lock file, for the error message of a process that finds it locked."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, this_process().encode(), 0)


def this_process() -> str:
    """Return pid, host and SLURM job of this process, as text."""
    job = f" (SLURM job {os.environ['SLURM_JOB_ID']})" if "SLURM_JOB_ID" in os.environ else ""
    return f"process {os.getpid()} on {socket.gethostname()}{job}"


def _acquire(descriptor: int, path: Path, mode: int, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while True:
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
                raise StoreError(
                    f"{path}: the file system supports no locks ({error.strerror}); keep the run "
                    "directory on one that does (on Lustre, mount it with the option flock)"
                ) from error
        if time.monotonic() > end:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "unknown"
            raise LockedError(f"{path}: still locked after {deadline_s:g} s; the holder is {holder}", holder=holder)
        time.sleep(_POLL_S)
