"""Binary files that the tests of a task read, such as pictures to compare with: a row gives their addresses.

SWE-bench's multimodal rows have them in ``image_assets``, since a text patch cannot hold them. Like swebench's harness,
the judge puts them in place after the test patch, just before the tests.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import shlex
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import PurePosixPath
from typing import Any

from megatron_dagger.config.base import ConfigError
from megatron_dagger.envs.swe.pytest_script import START
from megatron_dagger.sandbox.base import EnvironmentBroken, FileSandbox
from megatron_dagger.text import parse_json

FETCH_TIMEOUT_S, FETCH_DEADLINE_S = 60.0, 300.0
MAX_BYTES = 16 << 20
_FOLDER = "/.judge/assets"


def assets_of(value: Any) -> tuple[tuple[str, str], ...]:
    """Return the (path, address) of the files in a row's ``image_assets``. Raises ConfigError for one that is no file.

    Pictures in the problem statement are no files of the repository and are left out.
    """
    declared = parse_json(value) if isinstance(value, str) and value else value or {}
    entries = [entry for key in ("test_patch", "patch") for entry in declared.get(key) or () if entry.get("path")]
    for entry in entries:
        path = PurePosixPath(entry["path"])
        if path.is_absolute() or ".." in path.parts or not _is_public(entry.get("url")):
            raise ConfigError(f"image_assets: {entry['path']} at {entry.get('url')} is no file with a public address")
    return tuple((entry["path"], entry["url"]) for entry in entries)


def with_assets(script: str, sandbox: FileSandbox, assets: Sequence[tuple[str, str]]) -> str:
    """Bring the files into the sandbox; return the script with commands that put them in place before the tests.

    Raises EnvironmentBroken if one cannot be fetched, or the script does not say where its tests begin.
    """
    if not assets:
        return script
    commands = []
    for number, (path, url) in enumerate(assets):
        sandbox.write_file(f"{_FOLDER}/{number}", _fetch(url))
        target = shlex.quote(path)
        commands.append(f'mkdir -p "$(dirname {target})" && cp {_FOLDER}/{number} {target}')
    lines = script.split("\n")
    place = next((number for number, line in enumerate(lines) if START in line), None)  # as swebench's harness does
    if place is None:
        raise EnvironmentBroken(
            f"the eval script has no line with {START!r}: the tests' pictures cannot be put in place"
        )
    return "\n".join([*lines[:place], *commands, *lines[place:]])


def _is_public(url: Any) -> bool:
    """Return whether an address can be asked, and is not this host's or its network's by number."""
    if not isinstance(url, str) or not url.isascii() or re.search(r"\s", url):
        return False
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return False
    try:
        return parts.scheme in ("http", "https") and ipaddress.ip_address(host).is_global
    except ValueError:  # a name
        return parts.scheme in ("http", "https") and "." in host


@functools.lru_cache(maxsize=32)
def _fetch(url: str) -> bytes:
    content, end = b"", time.monotonic() + FETCH_DEADLINE_S
    try:
        with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT_S) as answer:
            length = answer.headers.get("Content-Length")
            while part := answer.read(1 << 16):
                content += part
                if len(content) > MAX_BYTES or time.monotonic() > end:
                    raise OSError(f"more than {MAX_BYTES >> 20} MiB, or {FETCH_DEADLINE_S:.0f} s")
        if length is not None and int(length) != len(content):
            raise OSError(f"{len(content)} of {length} bytes have come")
    except (OSError, HTTPException, ValueError) as error:
        raise EnvironmentBroken(f"{url}, which the task's tests read, cannot be fetched: {error}") from error
    return content
