"""The differences between the Megatron-Core releases that this project runs on (0.16 to 0.19).

0.16.1 is the newest release for Python 3.11; 0.19 needs Python 3.12. All other modules of ``training`` call
Megatron-Core only in ways that both support. ``save_sharded`` also replaces one private queue of Megatron's; the other
patches are listed in ``cpu_shim``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import queue
import warnings
from pathlib import Path
from typing import Any

with warnings.catch_warnings():  # "Apex is not installed" and the like, which a user cannot act on
    warnings.simplefilter("ignore")
    import megatron.core as megatron_core
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.transformer_config import TransformerConfig


def version() -> str:
    """Return the installed Megatron-Core's version."""
    return str(megatron_core.__version__)


def quiet() -> None:
    """Silence the logs and warnings of Megatron-Core and torch.distributed that every successful run would show."""
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    for module in ("megatron", "torch.distributed", "torch.optim"):
        warnings.filterwarnings("ignore", module=module)


def transformer_config(**settings: Any) -> TransformerConfig:
    """Return a TransformerConfig from ``settings``, without those that this release does not have."""
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    return TransformerConfig(**{name: value for name, value in settings.items() if name in known})


def save_sharded(state: dict[str, Any], directory: Path) -> None:
    """Write a sharded state as a Megatron distributed checkpoint. Called on all ranks together."""
    _write_without_a_manager_process()
    extra = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        extra["async_strategy"] = "mcore"  # the default needs nvidia-resiliency-ext
    dist_checkpointing.save(state, str(directory), **extra)


def _write_without_a_manager_process() -> None:
    """Replace Megatron's queue for the results of a save by a plain one.

    Megatron's belongs to a manager process, which takes 3 s to spawn on each rank and stays. Our saves are
    synchronous, in this process.
    """
    writer: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    if getattr(writer, "_results_queue", False) is None:
        writer._results_queue = queue.Queue()


def load_sharded(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return the tensors of ``state`` from a Megatron distributed checkpoint. Called on all ranks together."""
    return dict(dist_checkpointing.load(state, str(directory)))
