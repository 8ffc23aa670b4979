"""Import vLLM early, in the background.

Importing vLLM takes longer than starting its engine, so a process imports it while it waits for something else
(``EngineThread.preload``). The import touches no device: a training that runs meanwhile has the GPUs to itself.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_dagger.config import VllmEngineConfig
from megatron_dagger.gpus import has_gpus

_ENVIRONMENT = {  # read when vLLM is imported; variables that are set already keep their values
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in this process
    # Not fork: this process has threads, whose locks and open files a fork would keep
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the sandboxes need the cores as well
}
_MODULES = (  # in the order in which the last two import the others, each a few seconds at most
    "vllm",  # and torch; vLLM sets torch's environment first
    "vllm.config",  # and transformers
    "vllm.v1.engine",
    "vllm.v1.engine.llm_engine",
    "megatron_dagger.weights.vllm.plugin",
)


def set_environment(config: VllmEngineConfig) -> None:
    """Set the environment variables that vLLM and torch read when they are imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if config.enforce_eager and not has_gpus(os.environ):
        # Without it helper functions are compiled for 10 s. Only where there are no GPUs, because trainer ranks
        # inherit the variable and compile their attention on GPUs.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def import_vllm(config: VllmEngineConfig, cancelled: Callable[[], bool] = lambda: False) -> None:
    """Import the modules an engine needs, one by one; return before the next once ``cancelled()`` is true."""
    set_environment(config)
    with _no_garbage_collection():
        for module in _MODULES:
            if cancelled():
                return
            importlib.import_module(module)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Suspend garbage collection, and exempt the objects created meanwhile from later collections.

    The imports create millions of objects that stay; vLLM's start runs five full collections over them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
