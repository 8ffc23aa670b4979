"""A probe in a vLLM worker process: the peak memory and the packing time of a weight update.

vLLM's ``collective_rpc`` calls these functions in each worker, with the worker as their argument: ``time_packing``
once, then ``start_probe`` and ``read_probe`` around every update.
"""

from __future__ import annotations

import functools
import gc
import threading
import time
from collections.abc import Callable
from typing import Any


class _Probe:
    """The seconds that vLLM spends packing layers, and the process's peak of anonymous memory."""

    def __init__(self) -> None:
        gc.collect()
        self.packing_s = 0.0
        self._before = self._peak = _anonymous_bytes()
        self._running = True
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while self._running:
            self._peak = max(self._peak, _anonymous_bytes())
            time.sleep(0.002)

    def stop(self) -> dict[str, float]:
        self._running = False
        self._thread.join()
        return {"packing": self.packing_s, "peak_bytes": float(self._peak - self._before)}


_probe: _Probe | None = None


def time_packing(_: Any) -> None:
    """Wrap vLLM's function that packs a layer for the CPU, so that the probe counts its time."""
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = _timed(utils.dispatch_cpu_unquantized_gemm)


def start_probe(_: Any) -> None:
    global _probe
    _probe = _Probe()


def read_probe(_: Any) -> dict[str, float]:
    """Stop the probe; return the seconds of packing and the peak rise of memory since the start, in bytes."""
    assert _probe is not None
    return _probe.stop()


def _timed(pack: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(pack)
    def timed(*args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        pack(*args, **kwargs)
        if _probe is not None:
            _probe.packing_s += time.perf_counter() - began

    return timed


def _anonymous_bytes() -> int:
    """Return this process's anonymous memory, which excludes mapped files and shared buffers."""
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith("RssAnon:")]
    return int(line.split()[1]) << 10
