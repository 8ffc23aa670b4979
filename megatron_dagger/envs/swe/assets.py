"""Binary files that the tests of a task read, such as pictures to compare with: a row gives their addresses.

SWE-bench's multimodal rows have them in ``image_assets``, since a text patch cannot hold them. Like swebench's harness,
the judge puts them in place after the test patch, just before the tests.
"""

from __future__ import annotations

import functools
import shlex
import urllib.request
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from megatron_dagger.config.base import ConfigError
from megatron_dagger.envs.swe.pytest_script import START
from megatron_dagger.sandbox.base import EnvironmentBroken, FileSandbox
from megatron_dagger.text import parse_json

FETCH_TIMEOUT_S = 60.0
MAX_BYTES = 64 << 20
_FOLDER = "/.judge/assets"


def assets_of(value: Any) -> tuple[tuple[str, str], ...]:
    """Return the (path, address) of the files in a row's ``image_assets``. Raises ConfigError for one that is no file.

    Pictures in the problem statement are no files of the repository and are left out.
    """
    declared = parse_json(value) if isinstance(value, str) and value else value or {}
    entries = [entry for key in ("test_patch", "patch") for entry in declared.get(key) or () if entry.get("path")]
    for entry in entries:
        path, url = PurePosixPath(entry["path"]), str(entry.get("url"))
        if path.is_absolute() or ".." in path.parts or not url.startswith(("https://", "http://")):
            raise ConfigError(f"image_assets: {entry['path']} at {url} is no file of the repository with an address")
    return tuple((entry["path"], entry["url"]) for entry in entries)


def with_assets(script: str, sandbox: FileSandbox, assets: Sequence[tuple[str, str]]) -> str:
    """Bring the files into the sandbox; return the script with commands that put them in place before the tests.

    Raises EnvironmentBroken if one cannot be fetched.
    """
    commands = []
    for number, (path, url) in enumerate(assets):
        sandbox.write_file(f"{_FOLDER}/{number}", _fetch(url))
        target = shlex.quote(path)
        commands.append(f'mkdir -p "$(dirname {target})" && cp {_FOLDER}/{number} {target}\n')
    before, mark, after = script.partition(f": '{START}'")
    return before + "".join(commands) + mark + after


@functools.lru_cache(maxsize=32)
def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT_S) as answer:
            content: bytes = answer.read(MAX_BYTES + 1)
    except OSError as error:
        raise EnvironmentBroken(f"{url}, which the task's tests read, cannot be fetched: {error}") from error
    if len(content) > MAX_BYTES:
        raise EnvironmentBroken(f"{url}, which the task's tests read, is larger than {MAX_BYTES >> 20} MiB")
    return content
