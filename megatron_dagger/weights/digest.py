"""One digest per tensor, the same on the trainer's side and on the engine's.

A digest covers a tensor's dtype, shape and values (as contiguous little-endian bytes), so that a
wrong cast, a transposition and a wrong value all show. Names are not part of it: they are its key.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from typing import Any


def tensor_digest(tensor: Any) -> str:
    """The sha256 (hex) of a tensor: torch or numpy, any dtype (bfloat16 too), any device."""
    hasher = hashlib.sha256()
    if type(tensor).__module__.partition(".")[0] == "numpy":
        dtype, shape, data = str(tensor.dtype), tensor.shape, _numpy_bytes(tensor)
    else:
        dtype, shape, data = str(tensor.dtype).removeprefix("torch."), tensor.shape, _torch_bytes(tensor)
    hasher.update(f"{dtype} {tuple(shape)}\n".encode())
    hasher.update(data)
    return hasher.hexdigest()


def digests(tensors: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """The digest of every ``(name, tensor)``; a name that comes twice is a ValueError."""
    result: dict[str, str] = {}
    for name, tensor in tensors:
        if name in result:
            raise ValueError(f"tensor {name!r} comes twice")
        result[name] = tensor_digest(tensor)
    return result


def compare(expected: dict[str, str], received: dict[str, str]) -> str | None:
    """What differs between two sets of digests, in words that name the tensor; None if nothing does."""
    for name in expected:
        if name not in received:
            return f"tensor {name!r} was not received"
        if expected[name] != received[name]:
            return f"tensor {name!r} differs: sent {expected[name][:12]}, received {received[name][:12]}"
    extra = [name for name in received if name not in expected]
    return f"tensor {extra[0]!r} was received but never sent" if extra else None


def _torch_bytes(tensor: Any) -> Any:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    assert sys.byteorder == "little", "digests are defined on little-endian bytes"
    return flat.view(torch.uint8).numpy()


def _numpy_bytes(array: Any) -> Any:
    import numpy as np

    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8)
