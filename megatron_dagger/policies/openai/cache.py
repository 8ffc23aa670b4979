"""Responses of a paid endpoint, cached on disk: a resumed round repeats no request.

Each writing process appends JSON lines to a file of its own; all files are read when the cache is opened. A line that
a crash cut short is ignored. Neither API keys nor headers are written.
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

from megatron_dagger.text import parse_json


@dataclass(frozen=True, kw_only=True)
class Response:
    """An endpoint's response: text, tool calls as (name, arguments as JSON text), and the tokens it was billed for.

    Raises ValueError for fields of other types: a response is cached for as long as the run exists.
    """

    text: str
    tool_calls: tuple[tuple[str, str], ...] = ()
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        calls = [part for call in self.tool_calls for part in call]
        texts = [self.text, self.finish_reason, *calls]
        counts = [self.prompt_tokens, self.completion_tokens]
        if not (
            all(isinstance(text, str) for text in texts)
            and len(calls) == 2 * len(self.tool_calls)
            and all(type(count) is int and count >= 0 for count in counts)
        ):
            raise ValueError(f"not a response: {self!r}"[:500])


class MalformedResponse(ValueError):
    """A response contains no action; raised by the functions that read actions from responses."""


def request_key(request: dict[str, Any]) -> str:
    """Return the SHA-256 of a request's JSON: equal requests have equal keys."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class ResponseCache:
    """The responses in a directory, by ``request_key``. Safe to use from several threads and processes.

    ``prompt_tokens`` and ``completion_tokens`` count the tokens of all responses.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._responses: dict[str, Response] = {}
        self.prompt_tokens = self.completion_tokens = 0
        for path in sorted(directory.glob("*.jsonl")):
            self._read(path)

    def __len__(self) -> int:
        return len(self._responses)

    def get(self, key: str) -> Response | None:
        """Return the cached response, or None."""
        return self._responses.get(key)

    def put(self, key: str, response: Response) -> None:
        """Cache a response; it is on disk when this returns."""
        line = json.dumps({"key": key, **asdict(response)}).encode() + b"\n"
        with self._lock:
            self._add(key, response)
            if self._file is None:
                self._directory.mkdir(parents=True, exist_ok=True)
                name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
                self._file = open(self._directory / name, "ab", buffering=0)  # noqa: SIM115 - closed in close
            self._file.write(line)
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file this process writes to."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _add(self, key: str, response: Response) -> None:
        self.prompt_tokens += response.prompt_tokens  # twice if two processes asked the same: both were billed
        self.completion_tokens += response.completion_tokens
        self._responses[key] = response

    def _read(self, path: Path) -> None:
        for line in path.read_bytes().splitlines():
            try:
                values = parse_json(line)
                key = values.pop("key")
                calls = tuple((name, arguments) for name, arguments in values.pop("tool_calls"))
                self._add(key, Response(**values, tool_calls=calls))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # cut short, or not a response
