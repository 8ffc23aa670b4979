"""Reads the index of a torch_dist checkpoint (its ``.metadata`` file) without trusting it.

The file is a pickle, which may run any code when loaded. Here every class in it is replaced by an inert record created
for this reading, so nothing of torch is imported, called or changed. A class that does not belong in such a file is
refused by name.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dagger.weights.errors import CheckpointReadError

METADATA_FILE = ".metadata"
_DCP = "torch.distributed.checkpoint"
_RECORDS = {
    f"{_DCP}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    f"{_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}
_INTEGERS = {"bool", "uint8", "int8", "int16", "int32", "int64"}
_DTYPES = _INTEGERS | {"float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A block of a tensor, stored as a torch.save archive of ``length`` bytes at ``start`` in ``file``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A global tensor and the chunks that make it up. ``dtype`` is torch's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def read_metadata(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the checkpoint in ``directory`` by its stored name.

    Raises CheckpointReadError if the index is missing, damaged or incomplete, or refers to an unexpected class.
    """
    path = directory / METADATA_FILE
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
    except OSError as error:
        raise CheckpointReadError(
            f"{directory} is not a complete Megatron checkpoint: its {METADATA_FILE} cannot be read ({error.strerror})"
        ) from None
    except CheckpointReadError as error:
        raise CheckpointReadError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointReadError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    try:
        return _tensors(metadata)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointReadError(f"{path} does not describe the checkpoint's tensors: {error!r}") from error


class _Record:
    """Stands for an object in the file: its constructor's arguments and its state."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Record:
        self = object.__new__(cls)
        self.args, self.state = args, {}
        return self

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Any:
        return self.state[name]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any):
        super().__init__(file)
        self._classes: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return name
        if (module, name) == ("torch", "Size"):
            return _size
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if name not in _RECORDS.get(module, ()):
            raise CheckpointReadError(
                f"refused: the file loads {module}.{name}, which does not belong in the index of a checkpoint; "
                "do not use this file unless you know who wrote it"
            )
        key = (module, name)
        if key not in self._classes:
            self._classes[key] = type(name, (_Record,), {})
        return self._classes[key]


def _size(values: Any) -> tuple[int, ...]:
    return tuple(values)


def _layout(name: str) -> str:
    return name


def _tensors(metadata: Any) -> dict[str, StoredTensor]:
    storage: dict[tuple[str, tuple[int, ...]], Any] = {}
    for index, info in metadata["storage_data"].items():
        offset = index.state.get("offset")  # entries of bytes (extra states) have none
        if offset is not None:
            storage[index["fqn"], offset] = info
    tensors = {}
    for name, entry in metadata["state_dict_metadata"].items():
        if type(entry).__name__ != "TensorStorageMetadata":
            continue
        chunks = tuple(_chunk(name, chunk, storage) for chunk in entry["chunks"])
        shape, stored = entry["size"], sum(math.prod(chunk.sizes) for chunk in chunks)
        if stored != math.prod(shape):
            raise ValueError(f"tensor {name!r} of shape {shape} has chunks for {stored} elements")
        dtype = entry["properties"].state[0]
        tensors[name] = StoredTensor(name=name, dtype=_checked_dtype(dtype), shape=shape, chunks=chunks)
    return tensors


def _chunk(name: str, chunk: Any, storage: dict[tuple[str, tuple[int, ...]], Any]) -> Chunk:
    info = storage.get((name, chunk["offsets"]))
    if info is None:
        raise ValueError(f"tensor {name!r} has no stored chunk at {chunk['offsets']}")
    file = info["relative_path"]
    if not isinstance(file, str) or Path(file).name != file:
        raise ValueError(f"tensor {name!r} points outside the checkpoint, to {file!r}")
    if info.state.get("transform_descriptors"):
        raise ValueError(f"tensor {name!r} is stored compressed, which is not supported")
    return Chunk(
        offsets=chunk["offsets"],
        sizes=chunk["sizes"],
        file=file,
        start=int(info["offset"]),
        length=int(info["length"]),
    )


def _checked_dtype(dtype: Any) -> str:
    if dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    return str(dtype)
