"""The contract of a sandbox: an isolated file system and process space for the commands of an untrusted agent.

A sandbox is synchronous and serves one request at a time; the rollout runs many sandboxes in threads. Whoever opens
one closes it, also after an error (sandboxes are context managers). A command that fails, hangs or prints too much is
a result. Everything that is the sandbox's fault raises EnvironmentBroken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from megatron_dagger.types import StopReason

READ_LIMIT = 16 << 20  # bytes of a tree
FILE_LIMIT = 1 << 20  # bytes of a file


class EnvironmentBroken(RuntimeError):
    """The sandbox itself failed, not the command in it; the episode must not become data."""

    def __init__(self, message: str, reason: StopReason = StopReason.ENVIRONMENT_ERROR):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandResult:
    """The result of a shell command. ``output`` is stdout and stderr in order, truncated in the middle."""

    output: str
    exit_code: int
    timed_out: bool = False
    duration_s: float = 0.0


_UNENCODABLE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def as_command(text: str) -> str:
    """Return what a shell can be told of a command: without NUL characters, which it drops, and encodable.

    What stands for the bytes of a file's name that is no UTF-8 (``os.fsdecode``) stays.
    """
    return _UNENCODABLE.sub("?", text.replace("\0", ""))


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """The limits of a command in a sandbox. Sizes are in MiB, times in seconds."""

    timeout_s: float = 20.0
    memory_mib: int = 1024
    disk_mib: int = 128  # the work tree, and /tmp
    processes: int = 64
    output_bytes: int = 8192  # of one result; longer output is truncated in the middle


class Sandbox(Protocol):
    """Runs shell commands."""

    def run(self, command: str, *, timeout_s: float | None = None, output_bytes: int | None = None) -> CommandResult:
        """Run a shell command; the first one starts in the root of the work tree.

        Whether the directory and exported variables persist for the next command depends on the engine.
        ``timeout_s`` and ``output_bytes`` replace the sandbox's limits for this command. When a command ends or its
        time is over (``timed_out``), every process it started is killed. Raises EnvironmentBroken if the sandbox is
        closed, busy with another request, or no longer usable.
        """
        ...

    def close(self) -> None:
        """End every process in the sandbox and remove its files. May be called twice, and during a command."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc_info: object) -> None: ...


class FileSandbox(Sandbox, Protocol):
    """A sandbox whose files the driver reads and writes: the contract that every engine fulfils.

    ``write`` and ``read`` are confined to the work tree and follow no link. ``read_file`` and ``write_file`` reach any
    file that a command reaches, with a command's rights; their paths have no line feeds and no NULs. All raise
    EnvironmentBroken as ``run`` does.
    """

    @property
    def limits(self) -> SandboxLimits:
        """The limits of every command."""
        ...

    def write(self, files: Mapping[str, bytes | None]) -> None:
        """Write files below the work tree, by relative path; None removes one.

        What is in the place of a file is replaced: a link, a directory, and a file in the place of a directory above.

        Raises EnvironmentBroken if a path, or a link in it, leads out of the work tree.
        """
        ...

    def read(self, root: str = ".", *, limit: int = READ_LIMIT) -> dict[str, bytes]:
        """Return the regular files below ``root`` by their paths relative to the work tree.

        Links, special files, ``.git`` and ``__pycache__`` are left out. Raises EnvironmentBroken if there are more
        than ``limit`` bytes.
        """
        ...

    def read_file(self, path: str, *, limit: int = FILE_LIMIT) -> bytes:
        """Return the first ``limit`` bytes of a file.

        Raises FileNotFoundError, IsADirectoryError, or another OSError with the reason why the file system refuses it.
        """
        ...

    def write_file(self, path: str, content: bytes) -> None:
        """Write a file and the directories above it; links are followed. Raises OSError as ``read_file`` does."""
        ...

    def reset(self) -> None:
        """Bring the sandbox back to its first state, for another episode."""
        ...
