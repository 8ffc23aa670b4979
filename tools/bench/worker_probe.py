"""What a vLLM worker needs for new weights, seen within the worker: vLLM's ``collective_rpc`` calls these functions.

Each is given the worker, and speaks of the process that the worker is.
"""

from __future__ import annotations

import functools
import gc
import threading
import time
from collections.abc import Callable
from typing import Any


class _Watch:
    """The seconds in which vLLM packs layers in this process, and the most anonymous memory that it has."""

    def __init__(self) -> None:
        gc.collect()
        self.packing = 0.0
        self._before = self._most = _anonymous()
        self._running = True
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while self._running:
            self._most = max(self._most, _anonymous())
            time.sleep(0.002)

    def end(self) -> dict[str, float]:
        self._running = False
        self._thread.join()
        return {"packing": self.packing, "peak_bytes": float(self._most - self._before)}


_watch: _Watch | None = None


def count_packing(_: Any) -> None:
    """Once: let what packs layers be timed."""
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = _timed(utils.dispatch_cpu_unquantized_gemm)


def watch(_: Any) -> None:
    global _watch
    _watch = _Watch()


def seen(_: Any) -> dict[str, float]:
    """What there was since ``watch``; the memory over what there was before, in bytes."""
    assert _watch is not None
    return _watch.end()


def _timed(process: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(process)
    def timed(*given: Any, **named: Any) -> None:
        began = time.perf_counter()
        process(*given, **named)
        if _watch is not None:
            _watch.packing += time.perf_counter() - began

    return timed


def _anonymous() -> int:
    """The anonymous memory of this process, in bytes: not the files and the trainers' buffers that it maps."""
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith("RssAnon:")]
    return int(line.split()[1]) << 10
