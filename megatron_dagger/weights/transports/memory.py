"""Memory that two processes of the same host map: anonymous shared memory, or a GPU's memory through CUDA IPC."""

from __future__ import annotations

import base64
import contextlib
import mmap
import os
from typing import Any

import torch


def allocate(
    size: int, device: torch.device, stack: contextlib.ExitStack
) -> tuple[torch.Tensor, dict[str, Any], list[int]]:
    """Allocate ``size`` bytes on ``device`` that another process can map with ``map_memory``.

    Return the memory, (size,) uint8, a handle that can be written as JSON, and the file descriptors to pass with the
    handle, which ``stack`` closes.
    """
    if device.type == "cuda":
        tensor = torch.empty(size, dtype=torch.uint8, device=device)
        shared = tensor.untyped_storage()._share_cuda_()
        parts = [{"bytes": base64.b64encode(x).decode()} if isinstance(x, bytes) else x for x in shared]
        return tensor, {"bytes": size, "cuda": parts}, []
    descriptor = os.memfd_create("megatron-dagger-weights")
    stack.callback(os.close, descriptor)
    os.ftruncate(descriptor, size)
    return _mapped(descriptor, size), {"bytes": size}, [descriptor]


def map_memory(handle: dict[str, Any], descriptors: list[int], device: torch.device) -> torch.Tensor:
    """Map another process's memory, (size,) uint8. Closes the descriptors."""
    size = int(handle["bytes"])
    if "cuda" not in handle:
        (descriptor,) = descriptors
        try:
            return _mapped(descriptor, size)
        finally:
            os.close(descriptor)
    _, *rest = (base64.b64decode(x["bytes"]) if isinstance(x, dict) else x for x in handle["cuda"])
    # Each process numbers the GPUs itself, so the sender's number is replaced by this process's.
    storage = torch.UntypedStorage._new_shared_cuda(device.index or 0, *rest)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (size,))


def _mapped(descriptor: int, size: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
