"""Wait for a condition with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
    """Poll until ``condition()`` is true. Raises AssertionError after ``deadline_s``."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"the condition is still false after {deadline_s:g} s"
        time.sleep(0.02)
