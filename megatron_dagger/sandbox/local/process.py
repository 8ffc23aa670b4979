"""A sandbox server driven over a pipe, started as a plain process.

ProcessSandbox limits time, memory, file sizes and output, and kills process groups, but it does not isolate: commands
see the host's files and network. It is the fallback on machines without bubblewrap, and the base class of the
sandbox that isolates.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from megatron_dagger.sandbox import file_scripts
from megatron_dagger.sandbox.base import (
    FILE_LIMIT,
    READ_LIMIT,
    CommandResult,
    EnvironmentBroken,
    SandboxLimits,
    as_command,
)
from megatron_dagger.signals import parent_death_hook

SERVER = Path(__file__).with_name("server.py")
HOME_PREFIX = "megatron-dagger-sandbox-"
ABANDONED_AFTER_S = 60.0  # an unlocked folder this old was left by a killed process
START_TIMEOUT_S = 60.0
GRACE_S = 10.0  # beyond a command's own timeout, until the server itself counts as broken
TRANSFER_FILE = ".sandbox-transfer"  # in the work tree, while write_file runs
# The parent-death signal comes when the *thread* that started the child ends: this one lives as long as the process.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sandbox-spawner")
# -B is essential: two edits of one line within a second give files of the same size and time, and Python would run
# the bytecode of the first for the second.
PYTHON_OPTIONS = ("-B", "-P", "-s")


class ProcessSandbox:
    """A FileSandbox without isolation. Every command starts in the root of the work tree.

    The server imports the ``preload`` modules in ``tool_dir`` once. The functions in their ``APPLETS`` then run in a
    forked child, without starting an interpreter. Only the isolating sandbox mounts ``shared_dir``, read-only.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        tool_dir: Path | None = None,
        preload: Sequence[str] = (),
        shared_dir: Path | None = None,
        python: str = sys.executable,
    ):
        self.limits = limits or SandboxLimits()
        self._tool_dir = tool_dir
        self._preload = tuple(preload)
        self._shared_dir = shared_dir
        self._python = python
        self._home = Path(tempfile.mkdtemp(prefix=HOME_PREFIX))
        self._home_lock = os.open(self._home, os.O_RDONLY)
        fcntl.flock(self._home_lock, fcntl.LOCK_EX)  # held until this process ends: see remove_abandoned
        self._buffer = b""
        self._request_lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = _spawner.submit(self._start).result(START_TIMEOUT_S)
            self._answer(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    # -- starting the server: overridden by the isolating sandbox -----------------------------
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
            preexec_fn=parent_death_hook(),
        )

    # -- the FileSandbox protocol -------------------------------------------------------------
    def run(
        self, command: str | Sequence[str], *, timeout_s: float | None = None, output_bytes: int | None = None
    ) -> CommandResult:
        """Run a shell command, or an applet (its name and arguments) without a shell; see Sandbox.run."""
        limit = timeout_s if timeout_s is not None else self.limits.timeout_s
        request: dict[str, Any] = (
            {"command": as_command(command)} if isinstance(command, str) else {"argv": list(map(as_command, command))}
        )
        request |= {"op": "run", "timeout_s": limit, "output_limit": output_bytes or self.limits.output_bytes}
        answer = self._ask(request, limit)
        fields = ("output", "exit_code", "timed_out", "duration_s")
        return CommandResult(**{name: answer[name] for name in fields})

    def write(self, files: Mapping[str, bytes | None]) -> None:
        """Write files below the work tree; see FileSandbox.write."""
        encoded = {k: None if v is None else base64.b64encode(v).decode() for k, v in files.items()}
        self._ask({"op": "write", "files": encoded})

    def read(self, root: str = ".", *, limit: int = READ_LIMIT) -> dict[str, bytes]:
        """Return the files below ``root`` of the work tree; see FileSandbox.read."""
        answer = self._ask({"op": "read", "root": root, "limit": limit})
        return {name: base64.b64decode(content) for name, content in answer["files"].items()}

    def read_file(self, path: str, *, limit: int = FILE_LIMIT) -> bytes:
        """Return the first ``limit`` bytes of any file; see FileSandbox.read_file."""
        script = f'path={shlex.quote(path)} {file_scripts.CHECK_READABLE} head -c {limit} < "$path" | base64 -w 0'
        return base64.b64decode(self._run_file_script(script, output_bytes=2 * limit + 1024))

    def write_file(self, path: str, content: bytes) -> None:
        """Write any file; see FileSandbox.write_file."""
        self.write({TRANSFER_FILE: content})
        try:
            self._run_file_script(f"exec < {TRANSFER_FILE}; path={shlex.quote(path)} {file_scripts.WRITE}")
        finally:
            self.write({TRANSFER_FILE: None})

    def reset(self) -> None:
        """Empty the sandbox, for another episode."""
        self._ask({"op": "reset"})

    def close(self) -> None:
        """End every process in the sandbox and remove its files. May be called twice, and during a command."""
        process, self._process = self._process, None
        if process is not None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                process.kill()
            process.wait(timeout=GRACE_S)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # nobody reads what is still buffered
                        pipe.close()
        shutil.rmtree(self._home, ignore_errors=True)
        descriptor, self._home_lock = self._home_lock, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run_file_script(self, script: str, *, output_bytes: int | None = None) -> str:
        result = self.run(script, output_bytes=output_bytes)
        if result.exit_code in file_scripts.EXIT_CODES:
            raise file_scripts.error(result.exit_code, result.output)
        if result.exit_code or result.timed_out:
            raise EnvironmentBroken(f"a file cannot be moved: exit code {result.exit_code} {result.output[-300:]}")
        return result.output

    # -- the pipe -----------------------------------------------------------------------------
    def _ask(self, request: dict[str, Any], timeout_s: float = 0.0) -> dict[str, Any]:
        # A cancelled episode is closed while its last command still runs in another thread: the two must not share
        # the pipe.
        if not self._request_lock.acquire(blocking=False):
            raise EnvironmentBroken("the sandbox is still busy with another request")
        try:
            return self._exchange(request, timeout_s)
        finally:
            self._request_lock.release()

    def _exchange(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None:
            raise EnvironmentBroken("the sandbox is closed")
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except OSError as error:
            raise EnvironmentBroken(f"the sandbox is gone: {error}{self._stderr_tail()}") from error
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
            remaining = deadline - time.monotonic()
            try:
                if remaining <= 0 or not select.select([descriptor], [], [], remaining)[0]:
                    self.close()
                    raise EnvironmentBroken(f"the sandbox did not answer within {timeout_s:.0f} s")
                data = os.read(descriptor, 1 << 16)
            except OSError:  # closed by another thread
                data = b""
            if not data:
                raise EnvironmentBroken(f"the sandbox ended unexpectedly{self._stderr_tail()}")
            parts.append(data)
        line, _, self._buffer = b"".join(parts).partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _stderr_tail(self) -> str:
        try:
            text = (self._home / "stderr").read_text(errors="replace").strip()[-500:]
        except OSError:
            return ""
        return f": {text}" if text else ""


def remove_abandoned() -> None:
    """Remove the folders of sandboxes whose process was killed: nobody holds their locks."""
    for home in Path(tempfile.gettempdir()).glob(f"{HOME_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, locked, or just gone
            if time.time() - home.stat().st_mtime < ABANDONED_AFTER_S:
                continue
            descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(home, ignore_errors=True)
            finally:
                os.close(descriptor)
