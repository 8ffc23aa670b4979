"""The Docker daemon: a connection, labels that say which process owns a container, and removal.

Every container carries two labels: its run, and the process that made it (host, boot id, process id and start time, so
a reused process id is not mistaken for the owner). ``reap`` removes the containers of killed processes of this host.
It leaves containers of living processes and of other hosts alone. What a killed daemon has forgotten is ended
too (``forgotten.py``). The docker SDK is imported only here, when a DockerHost is made.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from megatron_dagger.sandbox.base import EnvironmentBroken
from megatron_dagger.sandbox.docker.forgotten import StartedContainers

RUN_LABEL = "megatron-dagger.run"
OWNER_LABEL = "megatron-dagger.owner"
TIMEOUT_S = 120.0  # of a request to the daemon
RESTART_S = 60.0  # how long a daemon that is being restarted may be away
PAUSE_S = 0.5
MAX_CONNECTIONS = 512  # each open sandbox holds one

logger = logging.getLogger(__name__)


class DockerHost:
    """A connection to a daemon, shared by the sandboxes of one run; safe to use from many threads.

    ``url`` is the daemon's address; None means DOCKER_HOST or the default socket.
    """

    def __init__(self, run: str, url: str | None = None, *, timeout_s: float = TIMEOUT_S):
        self.run = run
        self.labels = {RUN_LABEL: run, OWNER_LABEL: owner()}
        options: dict[str, Any] = {"timeout": timeout_s, "max_pool_size": MAX_CONNECTIONS}
        with broken_as("the Docker daemon cannot be reached"):
            docker = _sdk()
            self.client = docker.DockerClient(base_url=url, **options) if url else docker.from_env(**options)
            self.client.ping()
            about = self.client.info()  # daemons of one host may have one ID, but each has a folder of its own
            self._started = StartedContainers(f"{about.get('ID')} {about.get('DockerRootDir')}")
        self._unremoved: set[str] = set()
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Wait for a daemon that is being restarted. Raises EnvironmentBroken if it stays away for RESTART_S."""
        deadline = time.monotonic() + RESTART_S
        while True:
            try:
                with broken_as(f"the Docker daemon is away for {RESTART_S:.0f} s"):
                    self.client.ping()
                break
            except EnvironmentBroken:
                if time.monotonic() > deadline:
                    raise
                time.sleep(PAUSE_S)
        with self._lock:
            retry, self._unremoved = self._unremoved, set()
        for container in retry:
            self.discard(container)

    def start(self, container: str) -> None:
        """Start a container that was created."""
        self._started.add(container)
        self.client.api.start(container)

    def containers(self) -> list[str]:
        """Return the ids of this run's containers, running or not."""
        return [container["Id"] for container in self._containers(label=f"{RUN_LABEL}={self.run}")]

    def reap(self) -> list[str]:
        """Remove the containers, of any run, whose process on this host has ended; return their ids.

        What the daemon has forgotten is ended.
        """
        owned = self._containers(label=OWNER_LABEL)
        orphans = [container["Id"] for container in owned if is_gone(container["Labels"][OWNER_LABEL])]
        for container in orphans:
            self.remove(container)
        if orphans:
            logger.warning("removed %d containers that killed processes had left", len(orphans))
        self._end_forgotten()
        return orphans

    def remove_own(self) -> None:
        """Remove this process's containers of this run; a sandbox that still uses one gets EnvironmentBroken."""
        for container in self._containers(label=[f"{name}={value}" for name, value in self.labels.items()]):
            self.discard(container["Id"])

    def remove_named(self, part: str) -> list[str]:
        """Remove the containers whose name contains ``part``; return their ids. For programs that set no labels."""
        removed = [container["Id"] for container in self._containers(name=part)]
        for container in removed:
            self.remove(container)
        return removed

    def remove(self, container: str) -> None:
        """Kill a container and remove it with its volumes; do nothing if it is already gone."""
        with broken_as(f"container {container[:12]} cannot be removed"):
            try:
                self.client.api.remove_container(container, force=True, v=True)
                self._started.drop(container)
            except _sdk().errors.NotFound:  # removed before, or forgotten
                pass
            except _sdk().errors.APIError as error:
                if error.status_code != 409:  # its removal is already in progress
                    raise

    def discard(self, container: str) -> None:
        """Remove a container; if the daemon is away, try again when it is back. ``reap`` removes what remains."""
        try:
            self.remove(container)
        except EnvironmentBroken as error:
            logger.warning("%s; trying again later", error)
            with self._lock:
                self._unremoved.add(container)

    def close(self) -> None:
        """Retry the removals that failed, and close the connection."""
        for container in self._unremoved:
            with contextlib.suppress(EnvironmentBroken):
                self.remove(container)
        with contextlib.suppress(EnvironmentBroken):
            self._end_forgotten()
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _end_forgotten(self) -> None:
        with broken_as("containers cannot be listed"):
            self._started.end_forgotten(self._is_known)

    def _is_known(self, container: str) -> bool:
        try:
            self.client.api.inspect_container(container)
        except _sdk().errors.NotFound:
            return False
        return True

    def _containers(self, **filters: str | list[str]) -> list[dict[str, Any]]:
        """Return the daemon's records of the containers that match its API's ``filters``, running or not."""
        with broken_as("containers cannot be listed"):
            records: list[dict[str, Any]] = self.client.api.containers(all=True, filters=filters)
        return records


def owner(pid: int | None = None) -> str:
    """Return a name for a process (default: this one) that is unique across hosts and reboots."""
    pid = os.getpid() if pid is None else pid
    return f"{socket.gethostname()} {_boot()} {pid} {_start_time(pid)}"


def is_gone(name: str) -> bool:
    """Return whether the process with this ``owner`` name has ended; False for processes of other hosts."""
    host, boot, pid, started = name.rsplit(" ", 3)
    if host != socket.gethostname():
        return False
    alive = _start_time(int(pid))
    return boot != _boot() or not alive or alive != started


def is_missing(error: Exception) -> bool:
    """Return whether an error, or its cause, is the daemon's "no such container" or "no such image"."""
    return any(isinstance(exception, _sdk().errors.NotFound) for exception in (error, error.__cause__))


@contextlib.contextmanager
def broken_as(message: str) -> Iterator[None]:
    """Turn every error of the daemon or the connection into EnvironmentBroken; ``message`` begins its text."""
    try:
        yield
    except ImportError as error:
        raise EnvironmentBroken(f"{message}: the docker package is missing (pip install 'docker>=7')") from error
    except (_sdk().errors.DockerException, OSError) as error:  # requests' errors are OSErrors
        raise EnvironmentBroken(f"{message}: {error}") from error


def _sdk() -> Any:
    import docker

    return docker


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_time(pid: int) -> str:
    """Return a process's start time in clock ticks since boot; empty if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]
