"""The GPUs of this host, found without importing an engine and without asking a driver."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

_DEVICES = Path("/dev")
_NVIDIA = "nvidiactl"
_OTHER_DRIVERS = ("kfd", "dxg")  # AMD's, and a Windows host's


def has_gpus(environ: Mapping[str, str], devices: Path = _DEVICES) -> bool:
    """Return whether NVIDIA's driver is loaded and ``environ`` does not hide all GPUs from a process."""
    return (devices / _NVIDIA).exists() and environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def visible_gpus(environ: Mapping[str, str], devices: Path = _DEVICES) -> int | None:
    """Return how many NVIDIA GPUs a process with the environment ``environ`` sees; None if it sees none."""
    if not (devices / _NVIDIA).exists():
        return None
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return sum(re.match(r"\d|GPU-|MIG-", name.strip()) is not None for name in visible.split(",")) or None
    return len(list(devices.glob("nvidia[0-9]*"))) or None


def any_driver(devices: Path = _DEVICES) -> bool:
    """Return whether any vendor's GPU driver is loaded, whatever the environment hides."""
    return any((devices / name).exists() for name in (_NVIDIA, *_OTHER_DRIVERS))
