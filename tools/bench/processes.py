"""The sides of a benchmark: processes of their own that work when they are told to."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


class Side:
    """A running side. It says a line ``READY`` first, then answers each line of its stdin with one."""

    def __init__(self, process: subprocess.Popen[str], deadline_s: float):
        self._process = process
        self._deadline_s = deadline_s

    def go(self, word: str, order: str = "go") -> str:
        """Let it work once; returns what ``answer`` does."""
        self.tell(order)
        return self.answer(word)

    def tell(self, order: str) -> None:
        """Let it begin to work."""
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()

    def answer(self, word: str) -> str:
        """The rest of the next line that begins with ``word``; TimeoutError after the deadline."""
        output = self._process.stdout
        assert output is not None
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            end = time.monotonic() + self._deadline_s
            while selector.select(max(0.0, end - time.monotonic())):
                line = output.readline()
                if not line:
                    raise RuntimeError(f"a side ended with exit code {self._process.wait()}; its error is above")
                if line.startswith(word):
                    return line.removeprefix(word).strip()
        raise TimeoutError(f"no answer within {self._deadline_s:.0f} s")


@contextmanager
def side(arguments: Sequence[str], deadline_s: float, variables: Mapping[str, str]) -> Iterator[Side]:
    """This script once more, with ``arguments``; it is ended with the block."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", sys.argv[0], *arguments],
        env={**os.environ, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Side(process, deadline_s)
    finally:
        process.kill()
        process.wait()
