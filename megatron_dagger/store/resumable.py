"""A directory that is written file by file, perhaps in several goes, and appears under its name when it is whole.

Invariant: what an interrupted writer left is gone on with only by the same job. The job's description is the
first file of the unfinished directory; where it differs, or is missing, the writing begins anew. One process
writes at a time: a lock file beside the target says which.
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
    """The directory beside ``target`` to write in, which becomes ``target`` when the block ends well.

    ``job`` (JSON) says all that its content depends on; files that are there on entry are of the same job, and
    whole where they were put in place whole. Raises FileExistsError if ``target`` is there, and LockedError, which
    names the other process, if one is writing it.
    """
    _check_is_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.parent / f".{target.name}.lock"
    with exclusive(lock, deadline_s=0):
        _check_is_free(target)  # another process may just have written it
        folder = _begun(target, job)
        yield folder
        atomic.sync_tree(folder)
        (folder / JOB).unlink()
        atomic.publish_directory(folder, target)
        lock.unlink()


def _check_is_free(target: Path) -> None:
    if target.exists():
        raise FileExistsError(f"{target} is there already; remove it, or name another")


def _begun(target: Path, job: Mapping[str, Any]) -> Path:
    folder = target.parent / f".{target.name}.partial"
    if folder.exists() and _job_of(folder) != job:
        logger.warning("%s was begun with another source or other settings: it is removed, all begins anew", folder)
        atomic.remove_tree(folder)
    folder.mkdir(exist_ok=True)
    for path in folder.glob(f"{atomic.TEMPORARY_PREFIX}*"):
        path.unlink()
    atomic.write_json(folder / JOB, job)
    return folder


def fingerprint(path: Path) -> dict[str, Any]:
    """A file or directory for a job's description: where it is, and size and mtime (ns) of its files, unread."""
    found = [path] if path.is_file() else sorted(path.rglob("*"))
    files = {}
    for file in found:
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parent.parts):  # a target within it
            files[str(name)] = [file.stat().st_size, file.stat().st_mtime_ns]
    return {"path": str(path.resolve()), "files": files}


def _job_of(folder: Path) -> Any:
    try:
        return atomic.read_json(folder / JOB)
    except atomic.UnreadableFileError:
        return None
