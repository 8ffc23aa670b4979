"""A sandbox in a Docker container.

No network, no capabilities, no new privileges; limits on memory, processors, processes, disk and output. Commands run
one at a time, as the container's root user, through a shell in the container (see shell.py). Working directory,
exported variables and functions persist from command to command. Processes do not: when a command ends, all processes
it started are killed.

A command that fails, hangs or prints endlessly is an observation. Exceeded memory or disk limits, a dead container and
a lost daemon raise EnvironmentBroken: later observations would say nothing about the agent's actions.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Self

from megatron_dagger.sandbox.base import FILE_LIMIT, READ_LIMIT, CommandResult, EnvironmentBroken, SandboxLimits
from megatron_dagger.sandbox.docker import scripts
from megatron_dagger.sandbox.docker.archives import pack, unpack
from megatron_dagger.sandbox.docker.daemon import DockerHost, broken_as, is_missing
from megatron_dagger.sandbox.docker.images import ImageStore
from megatron_dagger.sandbox.docker.shell import (
    Answer,
    BoundedSink,
    BytesSink,
    ContainerShell,
    ShellLost,
    Sink,
    TooMuchOutput,
)
from megatron_dagger.sandbox.local.server import TruncatedOutput
from megatron_dagger.types import StopReason

GRACE_S = 10.0  # beyond a command's own timeout, until its shell counts as lost
TRANSFER_TIMEOUT_S = 120.0
MAX_OUTPUT_BYTES = 64 << 20  # a command that prints more is killed
DISK_CHECK_AFTER_S = 0.25  # a shorter command cannot have written much
LIFETIME_S = 24 * 3600  # a container that nobody removes stops after this time
SETTLE_S, SETTLE_PAUSE_S = 2.0, 0.1  # how long a busy daemon may show a dead container as running
KEEPER = "65534:65534"  # user of the container's main process: root without capabilities cannot kill it


@dataclass(frozen=True, kw_only=True)
class DockerLimits(SandboxLimits):
    """The limits of a container. ``disk_mib`` limits its writes, checked every second and after long commands."""

    timeout_s: float = 120.0
    memory_mib: int = 4096
    disk_mib: int = 4096
    processes: int = 512
    cpus: float = 2.0


class DockerSandbox:
    """A FileSandbox. ``root`` is the work tree in the container, created if missing.

    With an ImageStore, a missing image is pulled, and kept as long as the sandbox is open.
    """

    def __init__(
        self,
        host: DockerHost,
        image: str,
        limits: DockerLimits | None = None,
        *,
        root: str = "/testbed",
        images: ImageStore | None = None,
    ):
        self.limits = limits or DockerLimits()
        self.image, self.root = image, root
        self._host = host
        self._container: str | None = None
        self._shell: ContainerShell | None = None
        self._killed = 0
        self._request_lock = threading.Lock()
        self._closed = False
        self._image_hold = contextlib.ExitStack()
        if images is not None:
            self._image_hold.enter_context(images.hold(image))
        try:
            self._start()
        except BaseException:
            self._image_hold.close()
            raise

    # -- the FileSandbox protocol -------------------------------------------------------------
    def run(self, command: str, *, timeout_s: float | None = None, output_bytes: int | None = None) -> CommandResult:
        """Run a shell command in the directory where the last one ended; see Sandbox.run.

        A command that kills its own shell, or prints more than MAX_OUTPUT_BYTES, has exit code 137.
        """
        limit = timeout_s if timeout_s is not None else self.limits.timeout_s
        output = TruncatedOutput(output_bytes or self.limits.output_bytes)
        started = time.monotonic()
        with self._exclusively():
            try:
                answer = self._ask(scripts.RUN, command, BoundedSink(output, MAX_OUTPUT_BYTES), limit)
            except (TooMuchOutput, ShellLost) as error:
                # It is the command's fault if the container accepts a new shell.
                if isinstance(error, TooMuchOutput):
                    output.add(f"\n[killed: {error}]\n".encode())
                self._new_shell()
                answer = Answer(exit_code=137, killed=self._killed)
            duration_s = time.monotonic() - started
            if duration_s > DISK_CHECK_AFTER_S:
                self._check_disk()
        timed_out = answer.exit_code in (124, 137) and duration_s >= limit
        return CommandResult(
            output=output.text(), exit_code=answer.exit_code, timed_out=timed_out, duration_s=duration_s
        )

    def write(self, files: Mapping[str, bytes | None]) -> None:
        """Write files below the work tree; see FileSandbox.write."""
        for name in files:
            if "\n" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise EnvironmentBroken(f"{name!r} leads out of the work tree")
        with self._exclusively():
            self._transfer(scripts.CLEAR, "\n".join(files))
            content = {name: data for name, data in files.items() if data is not None}
            if content:
                self._transfer(scripts.UNPACK, pack(content))

    def read(self, root: str = ".", *, limit: int = READ_LIMIT) -> dict[str, bytes]:
        """Return the files below ``root`` of the work tree; see FileSandbox.read."""
        with self._exclusively():
            return unpack(self._transfer(scripts.PACK, root, limit=2 * limit + (1 << 20)), limit, root)

    def read_file(self, path: str, *, limit: int = FILE_LIMIT) -> bytes:
        """Return the first ``limit`` bytes of any file; see FileSandbox.read_file."""
        with self._exclusively():
            return self._transfer(scripts.READ, f"{limit}\n{path}\n", limit=limit + 1024)

    def write_file(self, path: str, content: bytes) -> None:
        """Write any file; see FileSandbox.write_file."""
        with self._exclusively():
            self._transfer(scripts.WRITE, os.fsencode(path) + b"\n" + content)

    def reset(self) -> None:
        """Replace the container by a new one of the same image, for another episode."""
        with self._exclusively():
            self._remove()
            self._start()

    def close(self) -> None:
        """End every process in the container and remove it. May be called twice, and during a command."""
        self._closed = True
        self._remove()
        self._image_hold.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- the container ------------------------------------------------------------------------
    def _start(self) -> None:
        api, limits = self._host.client.api, self.limits
        memory = limits.memory_mib << 20
        self._host.wait()
        try:
            with broken_as(f"no container of image {self.image} can be started"):
                created = api.create_container(
                    self.image,
                    entrypoint=["sleep"],
                    command=[str(LIFETIME_S)],
                    user=KEEPER,
                    working_dir=self.root,
                    labels=self._host.labels,
                    host_config=api.create_host_config(
                        network_mode="none",
                        mem_limit=memory,
                        memswap_limit=memory,
                        nano_cpus=int(limits.cpus * 1e9),
                        pids_limit=limits.processes,
                        cap_drop=["ALL"],
                        security_opt=["no-new-privileges"],
                        init=True,
                        log_config={"Type": "none"},
                        ulimits=[
                            {"Name": "core", "Soft": 0, "Hard": 0},
                            {"Name": "fsize", "Soft": limits.disk_mib << 20, "Hard": limits.disk_mib << 20},
                            {"Name": "nofile", "Soft": 4096, "Hard": 4096},
                        ],
                    ),
                )
                self._container = created["Id"]
                self._host.start(self._container)
            self._killed = 0
            self._new_shell()
        except BaseException as error:
            self._remove()
            if isinstance(error, EnvironmentBroken) and is_missing(error):
                raise EnvironmentBroken(f"image {self.image} is not on this machine: pull or build it first") from error
            raise

    def _remove(self) -> None:
        shell, self._shell = self._shell, None
        if shell is not None:
            shell.close()
        container, self._container = self._container, None
        if container is not None:
            self._host.discard(container)

    def _new_shell(self) -> None:
        """Replace the shell; the new one kills the old one's processes. Raises EnvironmentBroken if none starts."""
        if self._shell is not None:
            self._shell.close()
        if self._closed or self._container is None:
            raise EnvironmentBroken("the sandbox is closed")
        try:
            with broken_as("the container accepts no command"):
                self._shell = ContainerShell(self._host.client.api, self._container, self.root)
        except (ShellLost, EnvironmentBroken) as error:
            raise self._cause(error) from error
        self._count_killed(self._shell.killed)

    def _cause(self, error: Exception) -> EnvironmentBroken:
        """Return the reason why the container no longer accepts commands."""
        if self._closed or self._container is None:
            return EnvironmentBroken("the sandbox is closed")
        with broken_as("the Docker daemon is lost"):
            try:
                state = self._settled_state(self._container)
            except Exception as missing:
                if is_missing(missing):
                    return EnvironmentBroken("the container was removed by somebody else")
                raise
        if state["OOMKilled"]:
            return self._out_of_memory()
        if not state["Running"]:
            return EnvironmentBroken(f"the container ended: exit code {state['ExitCode']} {state['Error']}".rstrip())
        return EnvironmentBroken(f"the container accepts no command: {error}")

    def _settled_state(self, container: str) -> Mapping[str, Any]:
        """Return the container's state. A busy daemon learns of a container's end late: wait up to SETTLE_S for it."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            state: Mapping[str, Any] = self._host.client.api.inspect_container(container)["State"]
            if not state["Running"] or time.monotonic() > deadline:
                return state
            time.sleep(SETTLE_PAUSE_S)

    def _out_of_memory(self) -> EnvironmentBroken:
        return EnvironmentBroken(
            f"more than {self.limits.memory_mib} MiB of memory were needed", StopReason.OUT_OF_MEMORY
        )

    def _count_killed(self, killed: int) -> None:
        before, self._killed = self._killed, killed
        if killed > before:
            raise self._out_of_memory()

    def _check_disk(self) -> None:
        container = self._container
        if container is None:
            return
        with broken_as("the container's disk use cannot be read"):
            records = self._host.client.api.containers(all=True, size=True, filters={"id": container})
        used = max((record.get("SizeRw", 0) for record in records), default=0)
        if used > self.limits.disk_mib << 20:
            raise EnvironmentBroken(f"{used >> 20} MiB were written where {self.limits.disk_mib} MiB are allowed")

    # -- requests to the shell ----------------------------------------------------------------
    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Allow one request at a time: a cancelled episode is closed while its last command still runs."""
        if self._closed:
            raise EnvironmentBroken("the sandbox is closed")
        if not self._request_lock.acquire(blocking=False):
            raise EnvironmentBroken("the sandbox is still busy with another request")
        try:
            yield
        finally:
            self._request_lock.release()

    def _ask(self, script: str, stdin: str | bytes, output: Sink, timeout_s: float) -> Answer:
        shell = self._shell
        if shell is None:
            raise EnvironmentBroken("the sandbox is closed")
        answer = shell.ask(script, stdin, output, timeout_s=timeout_s, grace_s=GRACE_S, meanwhile=self._check_disk)
        self._count_killed(answer.killed)
        return answer

    def _transfer(self, script: str, stdin: str | bytes, limit: int = 1 << 16) -> bytes:
        """Run a script that reads or writes files, and return its output. Raises the exception of its exit code."""
        output = BytesSink()
        try:
            answer = self._ask(script, stdin, BoundedSink(output, limit), TRANSFER_TIMEOUT_S)
        except (TooMuchOutput, ShellLost) as error:
            self._new_shell()
            raise EnvironmentBroken(f"files could not be moved: {error}") from error
        content = bytes(output.data)
        if answer.exit_code:
            raise scripts.failure(answer.exit_code, content.decode(errors="replace").strip())
        return content
