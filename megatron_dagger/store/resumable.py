"""A directory that is written file by file, can be resumed, and appears under its name only when it is complete.

Invariant: an unfinished directory is resumed only by the same job. The job's description is the directory's first
file. If it differs or is missing, writing starts from scratch. A lock file beside the target admits one writer at a
time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_dagger.store import atomic
from megatron_dagger.store.lock import exclusive

logger = logging.getLogger(__name__)

JOB = ".job.json"


@contextmanager
def unfinished(target: Path, job: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a directory to write in, beside ``target``. When the block succeeds the directory becomes ``target``.

    ``job`` (JSON) describes everything that the content depends on. Files that exist on entry are from an earlier try
    of the same job, and complete if they were written atomically. Raises FileExistsError if ``target`` exists, and
    LockedError, which names the other process, if one is writing ``target``.
    """
    _check_is_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.parent / f".{target.name}.lock"
    with exclusive(lock, deadline_s=0):
        _check_is_free(target)  # another process may have finished it meanwhile
        folder = _open_partial(target, job)
        yield folder
        atomic.sync_tree(folder)
        (folder / JOB).unlink()
        atomic.publish_directory(folder, target)
        lock.unlink()


def _check_is_free(target: Path) -> None:
    if target.exists():
        raise FileExistsError(f"{target} exists already; remove it, or name another target")


def _open_partial(target: Path, job: Mapping[str, Any]) -> Path:
    folder = target.parent / f".{target.name}.partial"
    if folder.exists() and _job_of(folder) != job:
        logger.warning(
            "%s was started with another source or other settings; it is removed, and writing starts from scratch",
            folder,
        )
        atomic.remove_tree(folder)
    folder.mkdir(exist_ok=True)
    for path in folder.glob(f"{atomic.TEMPORARY_PREFIX}*"):
        path.unlink()
    atomic.write_json(folder / JOB, job)
    return folder


def fingerprint(path: Path) -> dict[str, Any]:
    """Return a description of a file or directory for ``job``: its path, and size and mtime (ns) of its files.

    No file is read. Files in hidden folders do not count: an unfinished target may lie within ``path``.
    """
    paths = [path] if path.is_file() else sorted(path.rglob("*"))
    files = {}
    for file in paths:
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parent.parts):
            files[str(name)] = [file.stat().st_size, file.stat().st_mtime_ns]
    return {"path": str(path.resolve()), "files": files}


def _job_of(folder: Path) -> Any:
    try:
        return atomic.read_json(folder / JOB)
    except atomic.UnreadableFileError:
        return None
