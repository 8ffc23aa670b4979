"""The git repository of a task: one commit that contains the bug, with the same bytes wherever it is made."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from megatron_dagger.config.base import ConfigError
from megatron_dagger.store.atomic import publish_directory, temporary_name

GIT_TIMEOUT_S = 60.0
MAX_BYTES = 8 << 20
_WHO = "megatron-dagger"
_WHEN = "2020-01-01T00:00:00Z"


def make_repository(folder: Path, files: Mapping[str, bytes]) -> str:
    """Commit ``files`` to a new repository at ``folder``, replacing what is there; return the commit's hash."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = folder.parent / temporary_name(folder.name)
    try:
        for name, content in files.items():
            path = making / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        _git(making, "init", "--quiet", "--initial-branch=main", "--template=")
        _git(making, "add", "--all", "--force")
        _git(making, "commit", "--quiet", "--no-gpg-sign", "--message", "Initial commit")
        _git(making, "repack", "--quiet", "-a", "-d")
        commit = _git(making, "rev-parse", "HEAD").strip()
        shutil.rmtree(folder, ignore_errors=True)
        publish_directory(making, folder)
        return commit
    finally:
        shutil.rmtree(making, ignore_errors=True)


def read_repository(folder: Path) -> dict[str, bytes]:
    """Return every file of a task's repository by relative path, ``.git`` included.

    Raises ConfigError if there are none, or more than MAX_BYTES.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            files[str(path.relative_to(folder))] = path.read_bytes()
    if not files:
        raise ConfigError(f"{folder} is not a repository; delete the task cache it is in to make its tasks again")
    if sum(map(len, files.values())) > MAX_BYTES:
        raise ConfigError(f"{folder} has more than {MAX_BYTES} bytes, too many for a repair task")
    return files


def _git(folder: Path, *arguments: str) -> str:
    environment = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "GIT_AUTHOR_NAME": _WHO,
        "GIT_AUTHOR_EMAIL": f"{_WHO}@localhost",
        "GIT_AUTHOR_DATE": _WHEN,
        "GIT_COMMITTER_NAME": _WHO,
        "GIT_COMMITTER_EMAIL": f"{_WHO}@localhost",
        "GIT_COMMITTER_DATE": _WHEN,
    }
    result = subprocess.run(
        ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=GIT_TIMEOUT_S
    )
    if result.returncode:
        raise RuntimeError(f"git {' '.join(arguments)} failed in {folder}: {result.stderr.strip()}")
    return result.stdout
