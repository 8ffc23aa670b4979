"""What a paid-for teacher has answered: kept on disk, so that a resumed round asks nothing twice.

One append-only file of JSON lines for each process that writes; all are read at the start. A line that
a crash cut short is ignored. No key and no header is ever written.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An endpoint's answer: its text, its tool calls as (name, JSON text of the arguments), and what was counted."""

    text: str
    tool_calls: tuple[tuple[str, str], ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0


class MalformedResponse(ValueError):
    """A reply holds no action; raised by what reads replies."""


def request_key(request: dict[str, Any]) -> str:
    """The name of a request: equal requests, equal names."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class ResponseCache:
    """The replies in a directory, by ``request_key``. Safe to use from several threads and processes."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._replies: dict[str, Reply] = {}
        self.prompt_tokens = self.completion_tokens = 0  # of all replies
        for path in sorted(directory.glob("*.jsonl")):
            self._read(path)

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> Reply | None:
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; it is on the disk when this returns."""
        line = json.dumps({"key": key, **asdict(reply)}).encode() + b"\n"
        with self._lock:
            self._keep(key, reply)
            if self._file is None:
                self._directory.mkdir(parents=True, exist_ok=True)
                name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
                self._file = open(self._directory / name, "ab", buffering=0)  # noqa: SIM115 - closed in close
            self._file.write(line)
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _keep(self, key: str, reply: Reply) -> None:
        self.prompt_tokens += reply.prompt_tokens  # also where two processes have asked the same
        self.completion_tokens += reply.completion_tokens
        self._replies[key] = reply

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().splitlines():
            try:
                values = json.loads(line)
                key = values.pop("key")
                calls = tuple((name, arguments) for name, arguments in values.pop("tool_calls"))
                self._keep(key, Reply(**values, tool_calls=calls))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # cut short
