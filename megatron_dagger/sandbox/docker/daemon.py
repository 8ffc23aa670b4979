"""The Docker daemon as sandboxes see it: a connection, the run that owns the containers, their removal.

Every container carries two labels: the run, and the process that made it (host, boot, process number
and its start time, so that a number given out again is no mistake). ``reap`` removes what killed
processes of this host left behind; containers of living processes and of other hosts are not touched.
The docker SDK is imported here, when a DockerHost is made, and nowhere else.
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

from megatron_dagger.envs.base import EnvironmentBroken

RUN_LABEL = "megatron-dagger.run"
OWNER_LABEL = "megatron-dagger.owner"
TIMEOUT_S = 120.0  # of a request to the daemon
RESTART_S = 60.0  # as long a daemon may be away, being started again
PAUSE_S = 0.5
MOST_CONNECTIONS = 512  # each open sandbox holds one

logger = logging.getLogger(__name__)


class DockerHost:
    """A connection to a daemon, shared by the sandboxes of one run; safe to use from many threads.

    ``url`` is the daemon's address; None takes DOCKER_HOST or the usual socket.
    """

    def __init__(self, run: str, url: str | None = None, *, timeout_s: float = TIMEOUT_S):
        self.run = run
        self.labels = {RUN_LABEL: run, OWNER_LABEL: owner()}
        options: dict[str, Any] = {"timeout": timeout_s, "max_pool_size": MOST_CONNECTIONS}
        with broken_as("the Docker daemon cannot be reached"):
            docker = _sdk()
            self.client = docker.DockerClient(base_url=url, **options) if url else docker.from_env(**options)
            self.client.ping()
        self._undead: set[str] = set()
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Wait for a daemon that is being started again; EnvironmentBroken when it does not come back."""
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
            again, self._undead = self._undead, set()
        for container in again:
            self.discard(container)

    def containers(self) -> list[str]:
        """The ids of all containers of this run that are there, running or not."""
        with broken_as("containers cannot be listed"):
            found = self.client.api.containers(all=True, filters={"label": f"{RUN_LABEL}={self.run}"})
        return [container["Id"] for container in found]

    def reap(self) -> list[str]:
        """Remove the containers, of any run, whose process is gone from this host; their ids."""
        with broken_as("containers cannot be listed"):
            found = self.client.api.containers(all=True, filters={"label": OWNER_LABEL})
        doomed = [one["Id"] for one in found if is_gone(one["Labels"][OWNER_LABEL])]
        for container in doomed:
            self.remove(container)
        if doomed:
            logger.warning("removed %d containers that killed processes had left", len(doomed))
        return doomed

    def remove_own(self) -> None:
        """Remove what containers of this run this process has still: whoever works in one meets EnvironmentBroken."""
        labels = [f"{name}={value}" for name, value in self.labels.items()]
        with broken_as("containers cannot be listed"):
            found = self.client.api.containers(all=True, filters={"label": labels})
        for container in found:
            self.discard(container["Id"])

    def remove_named(self, part: str) -> list[str]:
        """Remove the containers with ``part`` in their name, which programs that set no labels made; their ids."""
        with broken_as("containers cannot be listed"):
            found = self.client.api.containers(all=True, filters={"name": part})
        for container in found:
            self.remove(container["Id"])
        return [container["Id"] for container in found]

    def remove(self, container: str) -> None:
        """Kill a container and remove it with its volumes; one that is gone already is well."""
        with broken_as(f"container {container[:12]} cannot be removed"):
            try:
                self.client.api.remove_container(container, force=True, v=True)
            except _sdk().errors.NotFound:
                pass
            except _sdk().errors.APIError as error:
                if error.status_code != 409:  # somebody else is removing it
                    raise

    def discard(self, container: str) -> None:
        """Remove a container, now or, where the daemon is away, when it is back; ``reap`` has the last word."""
        try:
            self.remove(container)
        except EnvironmentBroken as error:
            logger.warning("%s; it will be tried again", error)
            with self._lock:
                self._undead.add(container)

    def close(self) -> None:
        """Remove what could not be removed before, and end the connection."""
        for container in self._undead:
            with contextlib.suppress(EnvironmentBroken):
                self.remove(container)
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def owner(pid: int | None = None) -> str:
    """Names a process of this host for as long as the host runs, and no other one."""
    pid = os.getpid() if pid is None else pid
    return f"{socket.gethostname()} {_boot()} {pid} {_start_time(pid)}"


def is_gone(name: str) -> bool:
    """Whether the process that ``owner`` named so has ended; False for those of other hosts."""
    host, boot, pid, started = name.rsplit(" ", 3)
    if host != socket.gethostname():
        return False
    alive = _start_time(int(pid))
    return boot != _boot() or not alive or alive != started


def is_missing(error: Exception) -> bool:
    """Whether the daemon said that a container or an image is not there."""
    return any(isinstance(one, _sdk().errors.NotFound) for one in (error, error.__cause__))


@contextlib.contextmanager
def broken_as(what: str) -> Iterator[None]:
    """Raise EnvironmentBroken, beginning with ``what``, for whatever the daemon or the way to it fails with."""
    try:
        yield
    except ImportError as error:
        raise EnvironmentBroken(f"{what}: the docker package is missing (pip install 'docker>=7')") from error
    except (_sdk().errors.DockerException, OSError) as error:  # requests' errors are OSErrors
        raise EnvironmentBroken(f"{what}: {error}") from error


def _sdk() -> Any:
    import docker

    return docker


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_time(pid: int) -> str:
    """In clock ticks since the boot; empty when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]
