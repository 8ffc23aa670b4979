"""Tar archives of the files that enter and leave a container. An archive from a container is not trusted."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Mapping
from pathlib import PurePosixPath

from megatron_dagger.sandbox.base import EnvironmentBroken


def pack(files: Mapping[str, bytes]) -> bytes:
    """Return a tar archive of ``files``, all with mode 0644."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = len(content), 0o644, int(time.time())
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def unpack(packed: bytes, limit: int, root: str) -> dict[str, bytes]:
    """Return an archive's regular files whose names stay inside it; ``root`` is named in errors.

    Raises EnvironmentBroken if the archive is damaged or its files exceed ``limit`` bytes.
    """
    files, total = {}, 0
    try:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if not member.isreg() or path.is_absolute() or ".." in path.parts:
                    continue
                total += member.size
                if total > limit:
                    raise EnvironmentBroken(f"more than {limit} bytes below {root}")
                content = archive.extractfile(member)
                assert content is not None  # it is a regular file
                files[str(path)] = content.read()
    except tarfile.TarError as error:
        raise EnvironmentBroken(f"the container's archive cannot be read: {error}") from error
    return files
