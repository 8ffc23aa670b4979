"""Files on their way into a container and out of it, as tar archives. What comes out is not trusted."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Mapping
from pathlib import PurePosixPath

from megatron_dagger.envs.base import EnvironmentBroken


def packed(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = len(content), 0o644, int(time.time())
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def unpacked(packed: bytes, limit: int, root: str) -> dict[str, bytes]:
    """The files of an archive that a container made: only regular ones, only names that stay inside."""
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
