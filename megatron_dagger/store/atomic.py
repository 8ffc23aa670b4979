"""Files that are either wholly there or not there, and directories that are put in place at once.

Purpose: the commit points of the program. A stage is done when its manifest exists, so a manifest
must never be seen half written, and must still be there after a power cut.

Invariants: the content is written under a temporary name in the target's own directory (a rename
is atomic only within one file system), synced to the disk, renamed over the target, and the
directory is synced. Whatever fails in between, the target is untouched and no temporary file stays.
In a run that another incarnation has taken over (``fence.py``) nothing is put in place: FencedError.
Names of temporary files begin with ``TEMPORARY_PREFIX``: what a killed process left can be told from data.
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
    """The file system (or the quota) has no room for a file; what was there before is unchanged."""


class UnreadableFileError(ValueError):
    """A file of the run directory is missing or is not what it should be."""


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace or create the file ``path`` with ``data``; its directory is made if it is missing.

    Raises DiskFullError when there is no room, other OSErrors as they come.
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

    NaN and infinity are no JSON: a ValueError, so that no reader chokes on them later.
    """
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the value cannot be written as JSON: {error}") from error
    write_text(path, text + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; UnreadableFileError names the path and the place of the fault."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnreadableFileError(f"{path}: there is no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnreadableFileError(
            f"{path}: not valid JSON ({error}); the file was damaged or edited by hand: "
            "delete it to let its stage run again"
        ) from None


def sync_tree(path: str | os.PathLike[str]) -> None:
    """Make all files under a directory, and their names in it, durable."""
    for folder, _, names in os.walk(path):
        for name in names:
            _sync(os.path.join(folder, name), os.O_RDONLY)
        sync_directory(folder)


def publish_directory(temporary: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Rename the (synced) directory ``temporary`` to ``target``, which must not exist.

    FileExistsError when ``target`` is there already (somebody else published it first).
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
    """A new name that marks unfinished work and that no other process uses."""
    return f"{TEMPORARY_PREFIX}{name}-{uuid.uuid4().hex[:12]}"


def remove_tree(path: str | os.PathLike[str]) -> None:
    """Remove a directory so that a reader sees all of it or nothing: rename it away first."""
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
    """Make the names in a directory durable."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def explain_full_disk(error: OSError, path: str | os.PathLike[str], size: int | None = None) -> OSError:
    """``error`` itself, or a DiskFullError that names ``path`` when the disk or the quota is full."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    need = f" ({size} bytes)" if size is not None else ""
    return DiskFullError(
        error.errno,
        f"no space left to write {path}{need}; nothing was changed: free some space and run the same command again",
    )


def check_room(folder: str | os.PathLike[str], size: int = 1 << 20) -> None:
    """Try to write ``size`` bytes in ``folder``: DiskFullError where there is no room for them.

    For the failures of writers that do not say why they failed.
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
