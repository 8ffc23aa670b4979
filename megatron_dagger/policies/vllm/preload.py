"""vLLM's modules, which take longer to import than the engine then takes to start.

So they may be imported before an engine is wanted, in the background and while the process waits for others
(``EngineThread.prepare``). No device is touched by that: where there are GPUs, a training still has all of them.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_dagger.config import VllmEngineConfig
from megatron_dagger.gpus import has_gpus

_ENVIRONMENT = {  # read when vLLM is imported; whoever has set one already is obeyed
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the sandboxes need the cores as well
}


class AbandonedTasks(BaseException):
    """The import was given up; no Exception, since many a module tries an import and goes on without."""


def set_environment(config: VllmEngineConfig) -> None:
    """Set what vLLM and torch read when they are imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if config.enforce_eager and not has_gpus(os.environ):
        # Else helpers are compiled for 10 s. A trainer's ranks inherit it, and compile their attention on GPUs.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def import_vllm(config: VllmEngineConfig, given_up: Callable[[], bool] = lambda: False) -> None:
    """Import what an engine needs, or raise AbandonedTasks, before the next module, as soon as that is so."""
    set_environment(config)
    with _no_garbage_collection(), _asking(given_up):
        from vllm.v1.engine import llm_engine  # noqa: F401

        from megatron_dagger.weights.vllm import plugin as vllm_transfer  # noqa: F401


@contextmanager
def _asking(given_up: Callable[[], bool]) -> Iterator[None]:
    """In the block this thread's imports of further modules raise AbandonedTasks once it is so."""
    thread = threading.get_ident()

    class Asking:
        @staticmethod
        def find_spec(*_: object) -> None:
            if threading.get_ident() == thread and given_up():
                raise AbandonedTasks

    sys.meta_path.insert(0, Asking)
    try:
        yield
    finally:
        sys.meta_path.remove(Asking)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For the imports: they make millions of objects that stay, and vLLM's start walks them five times."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
