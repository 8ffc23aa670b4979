"""Processes of a benchmark, each of which works only when it is asked to.

The things that a benchmark compares run in processes of their own and take turns, so that a busy machine slows all of
them alike. A process is the benchmark's own module, started again with other arguments. Once it is set up it prints a
line that begins with a keyword, such as ``READY``. After that it answers each line of its standard input with one line.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class BenchProcess:
    """The parent's end of a running benchmark process."""

    def __init__(self, process: subprocess.Popen[str], deadline_s: float):
        self._process = process
        self._deadline_s = deadline_s

    def ask(self, keyword: str, order: str = "go") -> str:
        """Send an order and return its answer, as ``answer`` does."""
        self.send(order)
        return self.answer(keyword)

    def send(self, order: str) -> None:
        """Send an order, a line of text, without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()

    def answer(self, keyword: str) -> str:
        """Return the rest of the next line that begins with ``keyword``; other lines are dropped.

        Raises RuntimeError if the process ends, TimeoutError if it does not answer before the deadline.
        """
        output = self._process.stdout
        assert output is not None
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            end = time.monotonic() + self._deadline_s
            while selector.select(max(0.0, end - time.monotonic())):
                line = output.readline()
                if not line:
                    code = self._process.wait()
                    raise RuntimeError(f"a benchmark process ended with exit code {code}; its error is above")
                if line.startswith(keyword):
                    return line.removeprefix(keyword).strip()
        raise TimeoutError(f"a benchmark process did not answer within {self._deadline_s:.0f} s")


@contextmanager
def bench_process(
    module: str, argv: Sequence[str], deadline_s: float, variables: Mapping[str, str]
) -> Iterator[BenchProcess]:
    """Run ``python -m module argv`` with further environment variables; kill it when the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", module, *argv],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield BenchProcess(process, deadline_s)
    finally:
        process.kill()
        process.wait()
