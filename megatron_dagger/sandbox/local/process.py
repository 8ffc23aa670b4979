"""A sandbox server driven over a pipe, and the plain process form of it.

``ProcessSandbox`` limits time, memory, file sizes and output, and kills process groups, but it does
not isolate: the command sees the host's files and network. It stands in where bubblewrap is absent
and is the base of the one that isolates.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megatron_dagger.envs.base import CommandResult, EnvironmentBroken

SERVER = Path(__file__).with_name("server.py")
HOME_PREFIX = "megatron-dagger-sandbox-"
UNHELD_S = 60.0  # so old must a folder be that nobody holds, to count as left behind
START_TIMEOUT_S = 60.0
GRACE_S = 10.0  # beyond a command's own time, until the server itself counts as broken
PR_SET_PDEATHSIG = 1
# A child that dies with its parent dies with the parent's thread that started it: this one lives on.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sandbox-spawner")
# -B is not a detail: two edits of one line in one second give files of the same size and time, and
# Python would run the first one's bytecode for the second.
PYTHON_OPTIONS = ("-B", "-P", "-s")


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """What a command in a sandbox may use. Sizes in MiB, times in seconds."""

    timeout_s: float = 20.0
    memory_mib: int = 1024
    disk_mib: int = 128  # the work tree, and /tmp
    processes: int = 64
    output_bytes: int = 8192


class ProcessSandbox:
    """Runs commands through a sandbox server; see the Sandbox protocol.

    ``preload`` are modules in ``tool_dir`` that the server imports once; the functions in their
    ``APPLETS`` run without starting an interpreter.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        tool_dir: Path | None = None,
        preload: Sequence[str] = (),
        python: str = sys.executable,
    ):
        self.limits = limits or SandboxLimits()
        self._tool_dir = tool_dir
        self._preload = tuple(preload)
        self._python = python
        self._home = Path(tempfile.mkdtemp(prefix=HOME_PREFIX))
        self._holding = os.open(self._home, os.O_RDONLY)
        fcntl.flock(self._holding, fcntl.LOCK_EX)  # until this process ends, however it does: see remove_left
        self._buffer = b""
        self._asking = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = _spawner.submit(self._start).result(START_TIMEOUT_S)
            self._answer(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    # -- how the server is started: what the isolating sandbox overrides ----------------------
    def _start(self) -> subprocess.Popen[bytes]:
        root = self._home / "work"
        root.mkdir()
        tools = [str(self._tool_dir)] if self._tool_dir else []
        command = [self._python, *PYTHON_OPTIONS, str(SERVER), *self._server_options(str(root), tools, processes=-1)]
        return self._spawn(command)

    def _server_options(self, root: str, paths: Sequence[str], *, processes: int) -> list[str]:
        options = ["--root", root, "--memory-mib", str(self.limits.memory_mib)]
        options += ["--file-mib", str(self.limits.disk_mib), "--processes", str(processes)]
        for path in paths:
            options += ["--path", path]
        for module in self._preload:
            options += ["--preload", module]
        return options

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        environment = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
        }
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self._home / "stderr").open("wb"),
            env=environment,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )

    # -- the Sandbox protocol -----------------------------------------------------------------
    def run(self, command: str | Sequence[str], *, timeout_s: float | None = None) -> CommandResult:
        """Run a shell command, or the words of an applet without a shell; see Sandbox.run."""
        limit = timeout_s if timeout_s is not None else self.limits.timeout_s
        what = {"command": command} if isinstance(command, str) else {"argv": list(command)}
        answer = self._ask({"op": "run", "timeout_s": limit, "output_limit": self.limits.output_bytes, **what}, limit)
        fields = ("output", "exit_code", "timed_out", "duration_s")
        return CommandResult(**{name: answer[name] for name in fields})

    def write(self, files: Mapping[str, bytes | None]) -> None:
        """Write files below the work tree (None removes one)."""
        coded = {k: None if v is None else base64.b64encode(v).decode() for k, v in files.items()}
        self._ask({"op": "write", "files": coded})

    def read(self, root: str = ".", *, limit: int = 16 << 20) -> dict[str, bytes]:
        """The regular files below ``root`` of the work tree, by relative path, at most ``limit`` bytes."""
        answer = self._ask({"op": "read", "root": root, "limit": limit})
        return {name: base64.b64decode(content) for name, content in answer["files"].items()}

    def reset(self) -> None:
        """Empty the sandbox, so that another episode can have it."""
        self._ask({"op": "reset"})

    def close(self) -> None:
        """End every process in the sandbox and remove its files. May be called twice."""
        process, self._process = self._process, None
        if process is not None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                process.kill()
            process.wait(timeout=GRACE_S)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # what was not sent has no reader any more
                        pipe.close()
        shutil.rmtree(self._home, ignore_errors=True)
        holding, self._holding = self._holding, -1
        if holding >= 0:
            os.close(holding)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- the pipe -----------------------------------------------------------------------------
    def _ask(self, request: dict[str, Any], timeout_s: float = 0.0) -> dict[str, Any]:
        # An episode that was cancelled is closed while its last command still runs in another thread:
        # the two must not share the pipe.
        if not self._asking.acquire(blocking=False):
            raise EnvironmentBroken("the sandbox is still busy with another request")
        try:
            return self._exchange(request, timeout_s)
        finally:
            self._asking.release()

    def _exchange(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None:
            raise EnvironmentBroken("the sandbox is closed")
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except OSError as error:
            raise EnvironmentBroken(f"the sandbox is gone: {error}{self._last_words()}") from error
        answer = self._answer(timeout_s + GRACE_S)
        if not answer["ok"]:
            raise EnvironmentBroken(f"sandbox {request['op']} failed: {answer['error']}")
        return answer

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdout is None:
            raise EnvironmentBroken("the sandbox is closed")
        descriptor = process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        parts = [self._buffer]
        while b"\n" not in parts[-1]:
            left = deadline - time.monotonic()
            try:
                if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                    self.close()
                    raise EnvironmentBroken(f"the sandbox did not answer within {timeout_s:.0f} s")
                data = os.read(descriptor, 1 << 16)
            except OSError:  # closed by another thread
                data = b""
            if not data:
                raise EnvironmentBroken(f"the sandbox ended unexpectedly{self._last_words()}")
            parts.append(data)
        line, _, self._buffer = b"".join(parts).partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        try:
            text = (self._home / "stderr").read_text(errors="replace").strip()[-500:]
        except OSError:
            return ""
        return f": {text}" if text else ""


def remove_left() -> None:
    """Remove the folders of sandboxes whose process was killed: nobody holds their lock."""
    for home in Path(tempfile.gettempdir()).glob(f"{HOME_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, held, or just gone
            if time.time() - home.stat().st_mtime < UNHELD_S:
                continue
            holding = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(holding, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(home, ignore_errors=True)
            finally:
                os.close(holding)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
