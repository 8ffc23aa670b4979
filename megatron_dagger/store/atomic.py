"""Atomic, durable writes of files and directories: the commit points of the program.

A stage is done when its manifest exists. So a manifest must never be seen half written, and it must survive a
power cut.

Invariants: the content is written under a temporary name in the target's own directory (a rename is atomic
only within one file system), synced, and renamed over the target; then the directory is synced. If any step
fails, the target is unchanged and the temporary file is removed. In a run that another process has taken over
(``fence.py``) nothing is put in place; FencedError is raised instead. Temporary names begin with
``TEMPORARY_PREFIX``, so leftovers of a killed process are distinct from data.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from megatron_dagger.store.fence import permitted

TEMPORARY_PREFIX = ".tmp-"


class DiskFullError(OSError):
    """The file system or the quota is full. The file that was to be replaced is unchanged."""


class UnreadableFileError(ValueError):
    """A file of the run directory is missing or damaged."""


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace or create the file ``path`` with ``data``. A missing directory is created.

    Raises DiskFullError if the disk is full, and other OSErrors unchanged.
    """
    path = Path(path)
    temporary = path.parent / temporary_name(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with permitted(path):
            os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise explain_full_disk(error, path, len(data)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace or create the file ``path`` with ``text`` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Replace or create the file ``path`` with ``value`` as indented JSON.

    Raises ValueError for NaN and infinity, which are not JSON and which other readers refuse.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the value cannot be written as JSON: {error}") from error
    write_text(path, text + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. Raises UnreadableFileError, which names the path and the position of the fault."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnreadableFileError(f"{path}: there is no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnreadableFileError(f"{path}: not valid JSON ({error}): the file was damaged or edited by hand") from None


def sync_tree(path: str | os.PathLike[str]) -> None:
    """Sync all files and folders under a directory to the disk."""
    for folder, _, names in os.walk(path):
        for name in names:
            _sync(os.path.join(folder, name), os.O_RDONLY)
        sync_directory(folder)


def publish_directory(temporary: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Rename the synced directory ``temporary`` to ``target``.

    Raises FileExistsError if ``target`` exists, for example because another process published it first.
    """
    target = Path(target)
    try:
        with permitted(target):
            os.rename(temporary, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(errno.EEXIST, "already published", str(target)) from error
        raise
    sync_directory(target.parent)


def temporary_name(name: str) -> str:
    """Return a name that marks unfinished work and that no other process uses."""
    return f"{TEMPORARY_PREFIX}{name}-{uuid.uuid4().hex[:12]}"


def remove_tree(path: str | os.PathLike[str]) -> None:
    """Remove a directory. A reader sees all of it or nothing, because it is renamed away first."""
    path = Path(path)
    doomed = path.parent / temporary_name(path.name)
    try:
        with permitted(path):
            os.rename(path, doomed)
    except FileNotFoundError:
        return
    sync_directory(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Sync the names in a directory to the disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def explain_full_disk(error: OSError, path: str | os.PathLike[str], size: int | None = None) -> OSError:
    """Return a DiskFullError that names ``path`` if the disk or the quota is full, else ``error`` itself."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    need = f" ({size} bytes)" if size is not None else ""
    return DiskFullError(
        error.errno,
        f"no space left to write {path}{need}; nothing was changed; free some space and run the same command again",
    )


def check_disk_space(folder: str | os.PathLike[str], size: int = 1 << 20) -> None:
    """Write ``size`` bytes in ``folder`` and remove them. Raises DiskFullError if they do not fit.

    Finds the cause when a writer of another library failed without giving one.
    """
    probe = Path(folder) / temporary_name("probe")
    try:
        with probe.open("wb") as file:
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise explain_full_disk(error, folder, size) from error
    finally:
        probe.unlink(missing_ok=True)


def _sync(path: str | os.PathLike[str], flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
