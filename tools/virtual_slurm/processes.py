"""The processes of a virtual SLURM: find them by a mark in their environment, and end them.

Daemons, jobs and the jobs' children all have SLURM_CONF in their environment, which names a file in the cluster's
directory. This mark identifies them even after their parent has changed.

``python -m tools.virtual_slurm.processes reap FOLDER`` waits for the end of its standard input, then ends the processes
of the cluster in FOLDER and removes the directory. It cleans up after a cluster whose owner was killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tools.virtual_slurm.settings import conf_path

END_DEADLINE_S = 10.0


def cluster_processes(folder: Path) -> list[int]:
    """Return the process ids of the cluster in ``folder``: daemons and jobs."""
    mark = f"SLURM_CONF={conf_path(folder)}"
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if mark in _environment(int(entry.name))]


def environment_variable(pid: int, name: str) -> str | None:
    """Return the value with which a process was started for the environment variable ``name``; None if unset."""
    return next((text.partition("=")[2] for text in _environment(pid) if text.startswith(f"{name}=")), None)


def program_name(pid: int) -> str:
    """Return the name of a process's program; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def end_processes(find: Callable[[], list[int]]) -> None:
    """Send SIGTERM, for an orderly end, then SIGKILL to all that ``find`` returns, until it returns none.

    Raises RuntimeError if some are still alive after END_DEADLINE_S.
    """
    deadline = time.monotonic() + END_DEADLINE_S
    number = signal.SIGTERM
    while pids := find():
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise RuntimeError(f"these processes do not end: {pids}")
        time.sleep(0.5 if number == signal.SIGTERM else 0.1)
        number = signal.SIGKILL


def _environment(pid: int) -> list[str]:
    """Return the environment (NAME=VALUE) with which a process was started; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def main() -> int:
    match sys.argv[1:]:
        case ["reap", name]:
            sys.stdin.buffer.read()
            folder = Path(name)
            if folder.exists():
                end_processes(lambda: cluster_processes(folder))
                shutil.rmtree(folder, ignore_errors=True)
        case _:
            sys.exit(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
