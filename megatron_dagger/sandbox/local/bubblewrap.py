"""A sandbox in its own Linux namespaces, made by bubblewrap.

No network, no capabilities, its own process ids, and of the host's files only system programs, libraries and the
interpreter, read-only. The work tree and /tmp are in memory, of limited size, and vanish with the sandbox. Started by
root, every sandbox runs under its own unprivileged user id, so the limit on processes counts only its own.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_dagger.sandbox.local.process import PYTHON_OPTIONS, SERVER, ProcessSandbox

BWRAP = "bwrap"
SHARED_DIR = "/sandbox/shared"
WORK_DIRS = ("/work", "/sandbox/work")  # the second where the interpreter itself is below the first
_FIRST_UID = 1_000_000  # far from any account's
_uids = itertools.count(_FIRST_UID + os.getpid() % 10_000 * 1000)


@functools.cache
def bubblewrap_works() -> bool:
    """Return whether bwrap is installed and this kernel lets it create namespaces."""
    if shutil.which(BWRAP) is None:
        return False
    probe = [BWRAP, "--unshare-all", "--ro-bind", "/", "/", "true"]
    return subprocess.run(probe, capture_output=True, timeout=30, check=False).returncode == 0


class BubblewrapSandbox(ProcessSandbox):
    """A FileSandbox that isolates. Memory is limited per process, disk per sandbox."""

    def _start(self) -> subprocess.Popen[bytes]:
        work = work_dir()
        options = self._server_options(work, ["/sandbox/tools"] if self._tool_dir else [], processes=-1)
        if os.geteuid() == 0:
            # No user namespace: real root sees paths that a mapped user could not. The server switches to an
            # unprivileged user id before it reads a request.
            command = [BWRAP, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
            command += ["--unshare-cgroup-try", "--cap-drop", "ALL"]
            for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_CHOWN"):
                command += ["--cap-add", capability]
            options += ["--uid", str(next(_uids)), "--processes", str(self.limits.processes)]
        else:  # a limit on processes would count the caller's too: no limit but the namespace
            command = [BWRAP, "--unshare-all", "--cap-drop", "ALL"]
        command += ["--die-with-parent", "--new-session"]
        size = str(self.limits.disk_mib << 20)
        command += ["--proc", "/proc", "--dev", "/dev", "--size", size, "--tmpfs", "/tmp"]
        command += ["--size", size, "--tmpfs", work, "--chdir", work]
        for path in _system_paths():
            for parent in reversed(Path(path).parents[:-1]):
                command += ["--dir", str(parent)]  # with permissions that let the unprivileged user pass
            command += ["--ro-bind", path, path]
        for link in ("bin", "sbin", "lib", "lib64"):
            if os.path.islink(f"/{link}"):
                command += ["--symlink", os.readlink(f"/{link}"), f"/{link}"]
        command += ["--dir", "/sandbox", "--ro-bind", str(SERVER), "/sandbox/server.py"]
        if self._shared_dir:
            command += ["--ro-bind", str(self._shared_dir), SHARED_DIR]
        if self._tool_dir:
            command += ["--ro-bind", str(self._tool_dir), "/sandbox/tools"]
            command += ["--dir", "/sandbox/bin"]
            command += ["--setenv", "PATH", "/sandbox/bin:/usr/local/bin:/usr/bin:/bin"]
            options += ["--stubs", "/sandbox/bin"]
        command += [self._python, *PYTHON_OPTIONS, "/sandbox/server.py", "--owns-pid-namespace", *options]
        return self._spawn(command)


@functools.cache
def work_dir() -> str:
    """Return where the work tree is mounted: no read-only path of the host may appear in it."""
    return next(work for work in WORK_DIRS if not any(Path(path).is_relative_to(work) for path in _system_paths()))


@functools.cache
def _system_paths() -> tuple[str, ...]:
    """Return the read-only paths that the interpreter and a shell need, none of them inside another."""
    wanted = {"/usr", "/etc/alternatives", "/etc/ld.so.cache", sys.prefix, sys.base_prefix, sys.exec_prefix}
    wanted |= {f"/{d}" for d in ("bin", "sbin", "lib", "lib64") if not os.path.islink(f"/{d}")}
    existing = sorted({os.path.realpath(p) for p in wanted if os.path.exists(p)} | {sys.prefix})
    return tuple(p for p in existing if not any(Path(q) in Path(p).parents for q in existing))
