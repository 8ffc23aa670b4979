"""A shell in a container, driven over one hijacked connection of the Docker API.

Starting a process through the API takes a tenth of a second; this shell starts once and then answers a request in a
few milliseconds. It is stateless. If an agent kills it, or it does not answer in time, a new shell replaces it and
first kills whatever the old one left running.
"""

from __future__ import annotations

import base64
import contextlib
import re
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_dagger.sandbox.base import as_command

SHELL = Path(__file__).with_name("container_shell.sh")
START_TIMEOUT_S = 60.0
POLL_S = 1.0
_HEADER = 8  # bytes before each frame of an exec's output: its stream, three zeros, its length
_TRAILER = 96  # bytes; no answer's last line is longer


class ShellLost(RuntimeError):
    """The shell ended or did not answer in time; the container itself may be fine."""


class Sink(Protocol):
    """Receives output as it arrives."""

    def add(self, data: bytes) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A script's exit code, and how many processes the kernel has killed in this container for lack of memory."""

    exit_code: int
    killed: int


class ContainerShell:
    """A shell started by exec in ``container``, an id; ``api`` is docker's APIClient."""

    def __init__(self, api: Any, container: str, workdir: str):
        command = ["bash", "-c", SHELL.read_text()]
        created = api.exec_create(container, command, stdin=True, user="0:0", workdir=workdir)
        self._stream = api.exec_start(created["Id"], socket=True)  # keep it: its finaliser closes the connection
        self._socket: socket.socket = self._stream._sock
        self._pending = b""
        self.killed = 0
        self.killed = self.ask("", "", _NullSink(), timeout_s=5.0, grace_s=START_TIMEOUT_S).killed

    def ask(
        self,
        script: str,
        stdin: str | bytes,
        output: Sink,
        *,
        timeout_s: float,
        grace_s: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> Answer:
        """Run a bash script with ``stdin`` and pass its output to ``output``.

        ``meanwhile`` is called about once a second. Raises ShellLost if the shell ends, or does not answer within
        ``timeout_s + grace_s``. After any exception, also one of ``output`` or ``meanwhile``, the shell can only be
        closed.
        """
        marker = secrets.token_hex(16).encode()
        if isinstance(stdin, str):  # bash reads no zero bytes
            kind, body = b"text", as_command(stdin).encode(errors="surrogateescape")
        else:
            kind, body = b"base64", base64.b64encode(stdin)
        code = script.encode()
        header = b"%s %.3f %s %d %d\n" % (marker, timeout_s, kind, len(code), len(body))
        ending = re.compile(rb"\n%s (\d+) (\d+)\n\Z" % marker)
        deadline = time.monotonic() + timeout_s + grace_s
        self._send(header + code + body, deadline)
        held, next_call = b"", time.monotonic() + POLL_S
        while True:
            held += self._receive(deadline)
            match = ending.search(held[-_TRAILER:])
            if match:
                output.add(held[: len(held) - len(match[0])])
                return Answer(exit_code=int(match[1]), killed=int(match[2]))
            output.add(held[:-_TRAILER])
            held = held[-_TRAILER:]
            if meanwhile is not None and time.monotonic() >= next_call:
                meanwhile()
                next_call = time.monotonic() + POLL_S

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._stream.close()

    def _send(self, data: bytes, deadline: float) -> None:
        try:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            self._socket.sendall(data)
        except OSError as error:
            raise ShellLost(f"the shell takes no request: {error}") from error

    def _receive(self, deadline: float) -> bytes:
        """Return the content of the next frames; empty if none arrives within about a second."""
        content, self._pending = _frames(self._pending)
        if content:
            return content
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise ShellLost("the shell does not answer")
        try:
            self._socket.settimeout(min(remaining, POLL_S))
            data = self._socket.recv(1 << 16)
        except TimeoutError:
            return b""
        except OSError as error:
            raise ShellLost(f"the connection to the shell broke: {error}") from error
        if not data:
            raise ShellLost("the shell ended")
        self._pending += data
        return b""


class TooMuchOutput(RuntimeError):
    """A command printed more than any command may."""


class BoundedSink:
    """Passes output on to ``sink``; raises TooMuchOutput beyond ``limit`` bytes."""

    def __init__(self, sink: Sink, limit: int):
        self._sink, self._limit, self._seen = sink, limit, 0

    def add(self, data: bytes) -> None:
        self._seen += len(data)
        if self._seen > self._limit:
            raise TooMuchOutput(f"more than {self._limit} bytes of output")
        self._sink.add(data)


class BytesSink:
    """Keeps all output."""

    def __init__(self) -> None:
        self.data = bytearray()

    def add(self, data: bytes) -> None:
        self.data += data


class _NullSink:
    def add(self, data: bytes) -> None:
        pass


def _frames(data: bytes) -> tuple[bytes, bytes]:
    """Return the contents of the complete frames in ``data``, stdout and stderr together, and the remaining bytes."""
    contents, start = [], 0
    while len(data) - start >= _HEADER:
        end = start + _HEADER + int.from_bytes(data[start + 4 : start + _HEADER], "big")
        if end > len(data):
            break
        contents.append(data[start + _HEADER : end])
        start = end
    return b"".join(contents), data[start:]
