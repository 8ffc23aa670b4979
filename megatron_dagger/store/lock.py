"""An exclusive lock between processes, with a deadline, that dies with its holder.

``flock`` is released by the kernel when the holder is killed, so a crash never leaves a round locked,
and it works between the hosts of NFS and of Lustre mounted with ``flock``.
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


@contextmanager
def exclusive(path: Path, *, deadline_s: float = 300.0) -> Iterator[None]:
    """Hold the lock file ``path``; StoreError names its holder when ``deadline_s`` passes."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(descriptor, path, time.monotonic() + deadline_s, deadline_s)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, deadline: float, deadline_s: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
                raise StoreError(
                    f"{path}: the file system takes no locks ({error.strerror}); keep the run "
                    "directory on one that does (on Lustre: mount it with the option flock)"
                ) from error
        if time.monotonic() > deadline:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "unknown"
            raise StoreError(f"{path}: still locked after {deadline_s:g} s; the holder is {holder}")
        time.sleep(_POLL_S)
