"""What differs between the Megatron-Core releases that this project runs on (0.16 to 0.19), in one place.

0.16.1 is the newest for Python 3.11, 0.19 wants Python 3.12. Everybody else in ``training`` calls
Megatron-Core only in ways that both know.
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

with warnings.catch_warnings():  # "Apex is not installed", and the like: nothing a user could act on
    warnings.simplefilter("ignore")
    import megatron.core as megatron_core
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.transformer_config import TransformerConfig


def version() -> str:
    return str(megatron_core.__version__)


def quiet() -> None:
    """Leave out what Megatron-Core and torch.distributed log and warn of in every run that goes well."""
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    for module in ("megatron", "torch.distributed", "torch.optim"):
        warnings.filterwarnings("ignore", module=module)


def transformer_config(**settings: Any) -> TransformerConfig:
    """A TransformerConfig from ``settings``, less those that this release no longer has."""
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    return TransformerConfig(**{name: value for name, value in settings.items() if name in known})


def save_sharded(state: dict[str, Any], directory: Path) -> None:
    """Write a sharded state as a Megatron distributed checkpoint, on all ranks together."""
    _write_without_a_manager_process()
    extra = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        extra["async_strategy"] = "mcore"  # the default needs nvidia-resiliency-ext
    dist_checkpointing.save(state, str(directory), **extra)


def _write_without_a_manager_process() -> None:
    """Megatron hands the results of a save over in a queue of a process that it spawns (3 s, once a rank,
    and it stays). Ours are synchronous, in this process: a plain queue does."""
    writer: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    if getattr(writer, "_results_queue", False) is None:
        writer._results_queue = queue.Queue()


def load_sharded(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Read what ``state`` asks for from a Megatron distributed checkpoint, on all ranks together."""
    return dict(dist_checkpointing.load(state, str(directory)))
