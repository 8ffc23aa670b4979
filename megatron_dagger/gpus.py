"""The GPUs of this host, seen without an engine and without a driver being asked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

_DEVICES = Path("/dev")
_CONTROL = "nvidiactl"  # NVIDIA's
_OTHERS = ("kfd", "dxg")  # AMD's, and those of a Windows host


def has_gpus(environ: Mapping[str, str], devices: Path = _DEVICES) -> bool:
    """Whether NVIDIA's driver is here and a process with that environment is not kept from it."""
    return (devices / _CONTROL).exists() and environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def visible_gpus(environ: Mapping[str, str], devices: Path = _DEVICES) -> int | None:
    """How many of NVIDIA's GPUs a process with that environment sees; None where it has none."""
    if not (devices / _CONTROL).exists():
        return None
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return sum(re.match(r"\d|GPU-|MIG-", name.strip()) is not None for name in visible.split(",")) or None
    return len(list(devices.glob("nvidia[0-9]*"))) or None


def any_driver(devices: Path = _DEVICES) -> bool:
    """Whether any vendor's driver is here, for processes to be kept from or not."""
    return any((devices / name).exists() for name in (_CONTROL, *_OTHERS))
