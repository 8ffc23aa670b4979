"""Locates a tensor's bytes in a torch.save archive without running any code from it.

Such an archive is an uncompressed zip file with a pickle that describes the tensor, and the tensor's bytes. The pickle
is read by an unpickler that knows only the names a plain tensor needs and rejects all others.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

_STORAGES = {
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ShortStorage": "int16",
    "UntypedStorage": "uint8",
}
_DTYPES = {*_STORAGES.values(), "float8_e4m3fn", "float8_e5m2"}
_LOCAL_HEADER = struct.Struct("<26xHH")  # the lengths of the name and the extra field before the data


class ArchiveError(ValueError):
    """The archive is damaged or holds something other than a contiguous tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Archived:
    """A contiguous tensor: torch's name of its dtype, its shape, and the offset of its bytes in the archive."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def locate(file: BinaryIO) -> Archived:
    """Locate the tensor in an archive that spans ``file``. Reads no values. Raises ArchiveError if it has none."""
    try:
        with zipfile.ZipFile(file) as archive:
            (index,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            dtype, shape, key, first = _Unpickler(BytesIO(archive.read(index))).load()
            entry = archive.getinfo(f"{index.removesuffix('/data.pkl')}/data/{key}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ArchiveError("its values are compressed")
            file.seek(entry.header_offset)
            lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    except ArchiveError:
        raise
    except Exception as error:  # a damaged zip or pickle can raise anything
        raise ArchiveError(f"{type(error).__name__}: {error}") from error
    start = entry.header_offset + _LOCAL_HEADER.size + sum(lengths)
    if first != 0:
        raise ArchiveError("its tensor is a view into a larger one")
    return Archived(dtype=dtype, shape=shape, start=start)


class _Unpickler(pickle.Unpickler):
    """Reads a tensor as (dtype, shape, key of its storage, offset of its first element)."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): dict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_tensor_v3"): _tensor,
        }
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch.storage" and name == "UntypedStorage":
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return name
        if (module, name) not in known:
            raise ArchiveError(f"refused: it loads {module}.{name}, which is not part of a plain tensor")
        return known[module, name]

    def persistent_load(self, parts: Any) -> tuple[str, str]:
        kind, dtype, key, *_ = parts
        if kind != "storage" or dtype not in _DTYPES:
            raise ArchiveError(f"it refers to {kind!r}")
        return dtype, str(key)


def _tensor(
    storage: tuple[str, str],
    first: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    dtype: str | None = None,
    *metadata: Any,
) -> tuple[str, tuple[int, ...], str, int]:
    expected = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if any(n > 1 and stride != right for n, stride, right in zip(shape, strides, expected, strict=True)):
        raise ArchiveError(f"its tensor of shape {shape} is not contiguous: strides {strides}")
    return dtype or storage[0], tuple(shape), storage[1], first
