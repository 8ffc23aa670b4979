"""The process inside a sandbox that runs the agent's commands. Standard library only.

A sandbox starts this file as a program; the package imports only ``TruncatedOutput`` from it. The server reads one
JSON request per line from stdin and answers each with one JSON line on stdout. Every command runs in a forked child
with its own session and resource limits. When the command ends or its time is over, everything it started is killed.
The server forks because children inherit the modules it imported once (``--preload``): a test run then starts in
milliseconds instead of half a second.

Requests: {"op": "run", "argv": [...] | "command": "...", "timeout_s": 5.0, "output_limit": 8192},
{"op": "write", "files": {path: base64 or null}}, {"op": "read", "root": path, "limit": bytes},
{"op": "reset"}. Answers: {"ok": true, ...} or {"ok": false, "error": "..."}.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import shlex
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable

PR_SET_DUMPABLE = 4


class Server:
    """Runs commands below ``root``, one at a time, for the process at the other end of a pipe."""

    def __init__(self, options: argparse.Namespace):
        self.root: str = options.root
        self.memory_bytes: int = options.memory_mib << 20
        self.file_bytes: int = options.file_mib << 20
        self.processes: int = options.processes
        # kill(-1) kills every visible process: only safe in the server's own PID namespace.
        self.owns_namespace: bool = options.owns_pid_namespace and os.getppid() == 1
        self.applets: dict[str, Callable[[list[str]], int | None]] = {}
        for name in options.preload:
            self.applets.update(getattr(importlib.import_module(name), "APPLETS", {}))

    def handle(self, request: dict) -> dict:
        operation = request["op"]
        if operation == "run":
            return self.run(request)
        if operation == "write":
            return self.write(request["files"])
        if operation == "read":
            return self.read(request["root"], request["limit"])
        if operation == "reset":
            return self.reset()
        raise ValueError(f"unknown operation {operation!r}")

    # -- commands ---------------------------------------------------------------------------
    def run(self, request: dict) -> dict:
        started = time.monotonic()
        deadline = started + request["timeout_s"]
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            self._become(request, reader, writer)  # never returns
        os.close(writer)
        output = TruncatedOutput(request["output_limit"])
        timed_out = not _drain(reader, output, child, deadline)
        os.close(reader)
        status = self._end(child, deadline)
        code = os.waitstatus_to_exitcode(status) if status is not None else -signal.SIGKILL
        return {
            "ok": True,
            "output": output.text(),
            "exit_code": code,
            "timed_out": timed_out or status is None,
            "duration_s": time.monotonic() - started,
        }

    def _become(self, request: dict, reader: int, writer: int) -> None:
        code = 126
        try:
            os.setsid()
            os.close(reader)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.closerange(3, 256)
            os.chdir(self.root)
            self._limit(request["timeout_s"])
            argv = request.get("argv") or [""]
            applet = self.applets.get(argv[0])
            if applet is not None:
                sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="replace", closefd=False)
                sys.stderr = sys.stdout
                code = applet(argv[1:]) or 0
                sys.stdout.flush()
            else:
                command = ["/bin/sh", "-c", request["command"]]
                os.execv(command[0], command)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException as error:  # the child's outermost frame: report and exit
            with contextlib.suppress(OSError):
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(code & 0xFF)

    def _limit(self, timeout_s: float) -> None:
        for limit, value in (
            (resource.RLIMIT_AS, self.memory_bytes),
            (resource.RLIMIT_FSIZE, self.file_bytes),
            (resource.RLIMIT_NPROC, self.processes),
            (resource.RLIMIT_CPU, int(timeout_s) + 2),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NOFILE, 256),
        ):
            if value >= 0:
                resource.setrlimit(limit, (value, value))

    def _end(self, child: int, deadline: float) -> int | None:
        """Kill the processes that the command left; return the child's wait status, or None if it had to be killed."""
        status = None
        while True:
            pid, wait_status = os.waitpid(child, os.WNOHANG)
            if pid:
                status = wait_status
                break
            if time.monotonic() >= deadline:
                break
            time.sleep(0.001)  # it closed its output and is about to exit
        self._kill_all(child)
        if status is None:
            os.waitpid(child, 0)
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break
        return status

    def _kill_all(self, group: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        if self.owns_namespace:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all but pid 1 and this process

    # -- files ------------------------------------------------------------------------------
    def reset(self) -> dict:
        """Empty the work tree and every other place a command can write to."""
        for folder in (self.root, "/tmp") if self.owns_namespace else (self.root,):
            for entry in os.scandir(folder):
                if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                    continue  # a mount point of the sandbox, not written by a command
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
        return {"ok": True}

    def write(self, files: dict) -> dict:
        for name, content in files.items():
            path = self._inside(name)
            if content is None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                continue
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # remove a link of the agent's instead of following it
            with open(path, "xb") as file:
                file.write(base64.b64decode(content))
        return {"ok": True}

    def read(self, root: str, limit: int) -> dict:
        """Return the regular files below ``root``, at most ``limit`` bytes, without links and special files."""
        files, total = {}, 0
        for folder, names, leaves in os.walk(self._inside(root)):
            names[:] = sorted(n for n in names if n not in (".git", "__pycache__"))
            for leaf in sorted(leaves):
                path = os.path.join(folder, leaf)
                if not stat.S_ISREG(os.lstat(path).st_mode):
                    continue
                with open(path, "rb") as file:
                    content = file.read(limit - total + 1)
                total += len(content)
                if total > limit:
                    return {"ok": False, "error": f"more than {limit} bytes below {root}"}
                files[os.path.relpath(path, self.root)] = base64.b64encode(content).decode()
        return {"ok": True, "files": files}

    def _inside(self, name: str) -> str:
        path = os.path.realpath(os.path.join(self.root, name))
        root = os.path.realpath(self.root)
        if path != root and not path.startswith(root + os.sep):
            raise ValueError(f"{name!r} leads out of the work tree")
        return path


class TruncatedOutput:
    """At most ``limit`` bytes of output: its head, its tail, and between them a line that counts the cut bytes."""

    def __init__(self, limit: int):
        self.half = limit // 2
        self.head = b""
        self.tail = b""
        self.cut = 0

    def add(self, data: bytes) -> None:
        free = self.half - len(self.head)
        self.head += data[:free]
        self.tail += data[free:] if free > 0 else data
        if len(self.tail) > self.half:
            self.cut += len(self.tail) - self.half
            self.tail = self.tail[-self.half :]

    def text(self) -> str:
        middle = f"\n... {self.cut} bytes cut ...\n".encode() if self.cut else b""
        return (self.head + middle + self.tail).decode("utf-8", errors="replace")


def _drain(reader: int, output: TruncatedOutput, child: int, deadline: float) -> bool:
    """Read until the end of output; return False if the deadline came first.

    A background process may hold the pipe open after the command has ended: then stop at what is written so far.
    """
    while True:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        ready, _, _ = select.select([reader], [], [], min(remaining, 0.05))
        if ready:
            data = os.read(reader, 65536)
            if not data:
                return True
            output.add(data)
        elif os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True


def write_stubs(folder: str, paths: list[str], modules: list[str]) -> None:
    """Write one executable per applet to ``folder``, for a shell to call."""
    for module in modules:
        for name in getattr(importlib.import_module(module), "APPLETS", {}):
            program = f"import sys; sys.path[:0] = {paths!r}; from {module} import APPLETS; "
            program += f"sys.exit(APPLETS[{name!r}](sys.argv[1:]))"
            path = os.path.join(folder, name)
            with open(path, "w") as file:
                file.write(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -B -P -s -c {shlex.quote(program)} "$@"\n')
            os.chmod(path, 0o755)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--memory-mib", type=int, default=1024)
    parser.add_argument("--file-mib", type=int, default=64)
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--uid", type=int, help="run as this unprivileged user")
    parser.add_argument("--owns-pid-namespace", action="store_true")
    parser.add_argument("--path", action="append", default=[], help="added to sys.path")
    parser.add_argument("--stubs", help="folder for executables that run the applets from a shell")
    parser.add_argument("--preload", action="append", default=[], help="module with APPLETS")
    options = parser.parse_args()
    sys.path[:0] = options.path
    if options.stubs:
        write_stubs(options.stubs, options.path, options.preload)
    if options.uid is not None:
        for folder in (options.root, "/tmp"):
            os.chown(folder, options.uid, options.uid)
        os.setgroups([])
        os.setresgid(options.uid, options.uid, options.uid)
        os.setresuid(options.uid, options.uid, options.uid)
    # The agent's processes have this process's uid, but cannot trace or modify an undumpable process.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    server = Server(options)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    answers.write(json.dumps({"ok": True, "ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        try:
            answer = server.handle(json.loads(line))
        except Exception as error:  # every request is answered
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
