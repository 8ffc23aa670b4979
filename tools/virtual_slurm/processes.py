"""The processes of a virtual SLURM, found by a mark in their environment, and ended.

    tools/virtual_slurm/processes.py reap FOLDER    wait for the end of standard input, then end what belongs to FOLDER

Daemons, jobs and their children were all started with SLURM_CONF naming the cluster's directory, however they were
started and whoever's children they are now.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

END_DEADLINE_S = 10.0


def marked(folder: Path) -> list[int]:
    """All processes of the cluster in ``folder``."""
    mark = f"SLURM_CONF={folder / 'slurm.conf'}"
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if mark in _environment(int(entry.name))]


def variable(pid: int, name: str) -> str | None:
    """What a process was started with as the variable ``name``."""
    return next((text.partition("=")[2] for text in _environment(pid) if text.startswith(f"{name}=")), None)


def program(pid: int) -> str:
    """The name of a process, empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def end(find: Callable[[], list[int]]) -> None:
    """SIGTERM, so that daemons end in order, then SIGKILL, to all that ``find`` finds, until there is none."""
    deadline = time.monotonic() + END_DEADLINE_S
    number = signal.SIGTERM
    while found := find():
        for pid in found:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise RuntimeError(f"these processes do not end: {found}")
        time.sleep(0.5 if number == signal.SIGTERM else 0.1)
        number = signal.SIGKILL


def _environment(pid: int) -> list[str]:
    """The environment that a process was started with; of one that has ended, nothing."""
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
                end(lambda: marked(folder))
                shutil.rmtree(folder, ignore_errors=True)
        case _:
            sys.exit(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
