"""The GPUs of this host, found without importing an engine and without asking a driver."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from megatron_dagger.config.base import ConfigError

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


def check_torch(torch: ModuleType, environ: Mapping[str, str], *, needed: bool, devices: Path = _DEVICES) -> None:
    """Raise ConfigError if this host has GPUs that ``torch`` cannot use, instead of computing on the CPU for days.

    A build of torch for the CPU is an error only where a GPU is ``needed``.
    """
    if torch.cuda.is_available() or visible_gpus(environ, devices) is None or not (needed or torch.version.cuda):
        return
    problem = (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and cannot use them: the driver "
        f"({driver_version()}) may be too old for it, or a GPU may have failed (see nvidia-smi)"
        if torch.version.cuda
        else f"torch {torch.__version__} is built for the CPU: use an environment with CUDA (slurm/README.md)"
    )
    raise ConfigError(f"this host has NVIDIA GPUs, but {problem}. To compute on the CPU, set CUDA_VISIBLE_DEVICES=''")


def any_driver(devices: Path = _DEVICES) -> bool:
    """Return whether any vendor's GPU driver is loaded, whatever the environment hides."""
    return any((devices / name).exists() for name in (_NVIDIA, *_OTHER_DRIVERS))


def driver_version() -> str:
    """Return the version of NVIDIA's driver, in words."""
    try:
        match = re.search(r"(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        match = None
    return f"version {match[1]}" if match else "of unknown version"
