"""Where the bytes of a tensor lie in an archive that torch.save wrote, found without running any code.

Such an archive is a zip file without compression: a pickle that says what the tensor is, and its bytes. The
pickle is read by an unpickler that knows the few names of a plain tensor and refuses all others.
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
_LOCAL_HEADER = struct.Struct("<26xHH")  # the lengths of name and extra field, which the data follows


class ArchiveError(ValueError):
    """The archive is damaged, or holds something other than one contiguous tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Archived:
    """A contiguous tensor: its dtype by torch's name, its shape, and where its bytes begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def locate(file: BinaryIO) -> Archived:
    """The tensor of an archive that is all of ``file``; ArchiveError if there is none. Reads no values."""
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
        raise ArchiveError("its tensor is a part of a larger one")
    return Archived(dtype=dtype, shape=shape, start=start)


class _Unpickler(pickle.Unpickler):
    """Reads a tensor as (dtype, shape, its storage's key, its first element)."""

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
            raise ArchiveError(f"refused: it wants to load {module}.{name}, which is no part of a plain tensor")
        return known[module, name]

    def persistent_load(self, parts: Any) -> tuple[str, str]:
        what, dtype, key, *_ = parts
        if what != "storage" or dtype not in _DTYPES:
            raise ArchiveError(f"it refers to {what!r}")
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
