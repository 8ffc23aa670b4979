"""The process inside a sandbox that runs the agent's commands. Standard library only.

A sandbox starts this file as a program; the package imports only ``TruncatedOutput`` from it. The server reads one
JSON request per line from stdin and answers each with one JSON line on stdout. Every command runs in a child with
its own session and resource limits. When the command ends or its time is over, everything it started is killed. An
applet's child is a fork, which inherits the modules that the server imported once (``--preload``): a test run then
starts in milliseconds instead of half a second. A shell is spawned instead: the fork of so large a process takes longer
than most commands.

Requests: {"op": "run", "argv": [...] | "command": "...", "timeout_s": 5.0, "output_limit": 8192},
{"op": "write", "files": {path: base64 or null}}, {"op": "read", "root": path, "limit": bytes},
{"op": "reset"}. Answers: {"ok": true, ...} or {"ok": false, "error": "..."}.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import gc
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
MAX_ARGUMENT_BYTES = 100_000  # Linux allows 131,071 (MAX_ARG_STRLEN)


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
        gc.freeze()  # a collection in a forked child does not copy the pages of what is loaded here

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
        applet = self.applets.get((request.get("argv") or [""])[0])
        if applet is None:
            child = self._spawn_shell(request, writer)
        else:
            child = os.fork()
            if child == 0:
                self._become(applet, request, writer)  # never returns
        os.close(writer)
        output = TruncatedOutput(request["output_limit"])
        pidfd = os.pidfd_open(child)
        timed_out = not _drain(reader, output, pidfd, deadline)
        os.close(reader)
        status = self._end(child, pidfd, deadline)
        os.close(pidfd)
        code = os.waitstatus_to_exitcode(status) if status is not None else -signal.SIGKILL
        return {
            "ok": True,
            "output": output.text(),
            "exit_code": code,
            "timed_out": timed_out or status is None,
            "duration_s": time.monotonic() - started,
        }

    def _spawn_shell(self, request: dict, writer: int) -> int:
        """Start a shell that waits for its limits, then runs the command; return its process id."""
        gate, opener = os.pipe()  # the command starts when the limits are set
        command = request["command"]
        script, arguments = 'read -r go <&3; exec /bin/sh -c "$1" 3<&-', ["sh", command]
        file_actions: list[tuple] = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, writer, 1),
            (os.POSIX_SPAWN_DUP2, writer, 2),
            (os.POSIX_SPAWN_DUP2, gate, 3),
        ]
        text = None
        if len(os.fsencode(command)) > MAX_ARGUMENT_BYTES:
            script, arguments = 'read -r go <&3; text=$(cat <&4); exec 3<&- 4<&-; eval "$text"', []
            text = os.memfd_create("command")
            with open(os.dup(text), "wb") as file:
                file.write(os.fsencode(command))
            os.lseek(text, 0, os.SEEK_SET)
            file_actions.append((os.POSIX_SPAWN_DUP2, text, 4))
        child = os.posix_spawn(
            "/bin/sh", ["/bin/sh", "-c", script, *arguments], os.environ, file_actions=file_actions, setsid=True
        )
        if text is not None:
            os.close(text)
        for limit, value in self._limits(request["timeout_s"]):
            resource.prlimit(child, limit, (value, value))
        os.close(gate)
        os.write(opener, b"\n")
        os.close(opener)
        return child

    def _become(self, applet: Callable[[list[str]], int | None], request: dict, writer: int) -> None:
        code = 126
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.closerange(3, 256)
            os.chdir(self.root)
            for limit, value in self._limits(request["timeout_s"]):
                resource.setrlimit(limit, (value, value))
            sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="replace", closefd=False)
            sys.stderr = sys.stdout
            code = applet(request["argv"][1:]) or 0
            sys.stdout.flush()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException as error:  # the child's outermost frame: report and exit
            with contextlib.suppress(OSError):
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(code & 0xFF)

    def _limits(self, timeout_s: float) -> list[tuple[int, int]]:
        limits = [
            (resource.RLIMIT_AS, self.memory_bytes),
            (resource.RLIMIT_FSIZE, self.file_bytes),
            (resource.RLIMIT_NPROC, self.processes),
            (resource.RLIMIT_CPU, int(timeout_s) + 2),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NOFILE, 256),
        ]
        return [(limit, value) for limit, value in limits if value >= 0]

    def _end(self, child: int, pidfd: int, deadline: float) -> int | None:
        """Kill the processes that the command left; return the child's wait status, or None if it had to be killed.

        The child may have closed its output and be about to exit.
        """
        in_time, _, _ = select.select([pidfd], [], [], max(0, deadline - time.monotonic()))
        self._kill_all(child)
        _, status = os.waitpid(child, 0)
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break
        return status if in_time else None

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
            self._make_way(name)
            if content is not None:
                path = self._inside(name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "xb") as file:
                    file.write(base64.b64decode(content))
        return {"ok": True}

    def _make_way(self, name: str) -> None:
        """Remove what has this name, and what is in the place of a directory above it without being one."""
        above = self.root
        for part in os.path.dirname(name).split(os.sep):
            above = os.path.join(above, part)
            if os.path.lexists(above) and not os.path.isdir(above):
                os.unlink(above)
            elif os.path.isdir(above):
                self._open(self._inside(os.path.relpath(above, self.root)), 0o700)
        path = os.path.join(self._inside(os.path.dirname(name)), os.path.basename(name))
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)  # a link of the agent's is removed instead of followed

    def read(self, root: str, limit: int) -> dict:
        """Return the regular files below ``root``, at most ``limit`` bytes, without links and special files."""
        files, total = {}, 0
        for folder, names, leaves in os.walk(self._inside(root)):
            names[:] = sorted(n for n in names if n not in (".git", "__pycache__"))
            for name in names:
                self._open(os.path.join(folder, name), 0o500)
            for leaf in sorted(leaves):
                path = os.path.join(folder, leaf)
                if not stat.S_ISREG(os.lstat(path).st_mode):
                    continue
                self._open(path, 0o400)
                with open(path, "rb") as file:
                    content = file.read(limit - total + 1)
                total += len(content)
                if total > limit:
                    return {"ok": False, "error": f"more than {limit} bytes below {root}"}
                files[os.path.relpath(path, self.root)] = base64.b64encode(content).decode()
        return {"ok": True, "files": files}

    def _open(self, path: str, rights: int) -> None:
        """Give this process the ``rights`` to a file or directory that the agent may have closed; not through links."""
        mode = os.lstat(path).st_mode
        if not stat.S_ISLNK(mode) and mode & rights != rights:
            os.chmod(path, stat.S_IMODE(mode) | rights)

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


def _drain(reader: int, output: TruncatedOutput, pidfd: int, deadline: float) -> bool:
    """Read until the end of output; return False if the deadline came first.

    A background process may hold the pipe open when the command is over, and its pidfd readable: then stop at what is
    written so far.
    """
    while True:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        ready, _, _ = select.select([reader, pidfd], [], [], remaining)
        if reader in ready:
            data = os.read(reader, 65536)
            if not data:
                return True
            output.add(data)
        elif pidfd in ready:
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
    os.chdir(options.root)  # where every command starts: a preloaded module may prepare for it
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
