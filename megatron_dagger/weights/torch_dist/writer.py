"""Writes Megatron's distributed checkpoints (torch_dist) without Megatron. They contain weights only.

The format is that of ``torch.distributed.checkpoint``: files of torch.save archives, and an index of the chunks of each
tensor. The chunks are those that the ranks of a ``SourceLayout`` would write, with each pipeline stage in files of its
own, so such a rank reads each of its shards in one piece; any other layout can load the checkpoint too. One tensor is
in memory at a time. A file gets its name when it is complete, and a list of its chunks beside it; an interrupted
conversion resumes with the first missing file.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.store import atomic
from megatron_dagger.weights import families
from megatron_dagger.weights.blocks import ShardDim
from megatron_dagger.weights.families.megatron_tensor import MegatronTensor
from megatron_dagger.weights.layouts import SourceLayout
from megatron_dagger.weights.torch_dist.metadata import METADATA_FILE
from megatron_dagger.weights.torch_dist.stacking import stacked

if TYPE_CHECKING:
    import torch

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_MAX_BYTES = 4 << 30  # of a file, which its last tensor may exceed


def write_megatron(
    directory: Path,
    model: ModelConfig,
    read: Callable[[str], torch.Tensor],
    source: SourceLayout,
    dtype: str | Callable[[str], str],
    *,
    max_bytes: int = _MAX_BYTES,
) -> None:
    """Write the checkpoint into ``directory``, its index last, resuming an interrupted call.

    Files already in ``directory`` must be of the same weights and arguments, which ``store.resumable`` ensures.
    ``read(name)`` returns a full Megatron tensor by global name (``WeightMap.megatron_tensors``), including padding
    rows, cast to ``dtype``: torch's name, or a function of a canonical tensor's name. Tensors that Megatron stores
    as one, such as those of all layers, get the dtype that holds them all. Raises ConfigError or WeightMapError if the
    model does not fit the layout ``source``.
    """
    import torch

    source.check_model(model)
    dtypes = _dtypes(model, dtype if callable(dtype) else lambda name: dtype)
    for number, names in enumerate(_files(model, source, dtypes, max_bytes)):
        stage = source.stage(names[0], model)
        path = directory / f"__{stage}_{number}.distcp"
        if not _chunk_list(path).exists():
            _write_file(path, names, model, read, source, dtypes)
    _write_index(directory, dtypes)
    torch.save({}, directory / "common.pt")
    atomic.write_json(directory / "metadata.json", _FORMAT)
    for path in directory.glob("__*.json"):
        path.unlink()


def _dtypes(model: ModelConfig, dtype: Callable[[str], str]) -> dict[str, torch.dtype]:
    """Return the dtype of every stored tensor."""
    import torch

    dtypes: dict[str, torch.dtype] = {}
    for name, entry in families.lookup(model).megatron_tensors(model).items():
        key, _ = stacked(name)
        for part in entry.parts:
            of_part = getattr(torch, dtype(part.name))
            dtypes[key] = torch.promote_types(dtypes.get(key, of_part), of_part)
    return dtypes


def _shape(entry: MegatronTensor, source: SourceLayout) -> tuple[int, ...]:
    return (source.padded_vocab_size, *entry.tail) if entry.padded else entry.shape


def _files(
    model: ModelConfig, source: SourceLayout, dtypes: Mapping[str, torch.dtype], max_bytes: int
) -> list[list[str]]:
    """Return the names of the tensors in each file, ordered by pipeline stage."""
    table = families.lookup(model).megatron_tensors(model)
    files: list[list[str]] = []
    for stage in range(source.pipeline_model_parallel_size):
        bytes_free = 0
        for name, entry in table.items():
            if source.stage(name, model) != stage:
                continue
            if bytes_free <= 0:
                files.append([])
                bytes_free = max_bytes
            files[-1].append(name)
            bytes_free -= math.prod(_shape(entry, source)) * dtypes[stacked(name)[0]].itemsize
    return files


def _write_file(
    path: Path,
    names: list[str],
    model: ModelConfig,
    read: Callable[[str], torch.Tensor],
    source: SourceLayout,
    dtypes: Mapping[str, torch.dtype],
) -> None:
    import torch

    table, chunks = families.lookup(model).megatron_tensors(model), []
    temporary = path.parent / atomic.temporary_name(path.name)
    with open(temporary, "wb") as file:
        for name in names:
            entry, shape = table[name], _shape(table[name], source)
            key, lead = stacked(name)
            tensor = read(name).to(dtypes[key])
            assert tuple(tensor.shape) == shape, (name, tuple(tensor.shape), shape)
            size = source.tensor_model_parallel_size if entry.shard_dim is not ShardDim.NONE else 1
            for box in [box for rank in range(size) for box in entry.shard_boxes(shape, rank, size)]:
                start = file.tell()
                torch.save(tensor[box.slices].contiguous().clone()[(None,) * len(lead)], file)
                chunks.append([key, [*lead, *box.start], [*[1] * len(lead), *box.shape], start, file.tell() - start])
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    atomic.write_json(_chunk_list(path), chunks)


def _chunk_list(path: Path) -> Path:
    return path.with_suffix(".json")


def _write_index(directory: Path, dtypes: Mapping[str, torch.dtype]) -> None:
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for file, key, offsets, sizes, start, length in _chunks(directory):
        entry = entries.get(key)
        if entry is None:
            entry = TensorStorageMetadata(
                properties=TensorProperties(dtype=dtypes[key]), size=torch.Size(()), chunks=[]
            )
            entries[key] = entry
        entry.size = torch.Size(
            max(a, b)
            for a, b in zip(entry.size or [0] * len(sizes), map(sum, zip(offsets, sizes, strict=True)), strict=True)
        )
        entry.chunks.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)))
        storage[MetadataIndex(key, torch.Size(offsets), len(entry.chunks) - 1)] = _StorageInfo(file, start, length)
    data = pickle.dumps(Metadata(state_dict_metadata=entries, planner_data={}, storage_data=storage))
    atomic.write_bytes(directory / METADATA_FILE, data)


def _chunks(directory: Path) -> Iterator[tuple[str, str, list[int], list[int], int, int]]:
    """Yield (file, stored name, offsets, sizes, start, length) for all chunks."""
    for path in sorted(directory.glob("__*.json")):
        for chunk in json.loads(path.read_text()):
            yield (path.with_suffix(".distcp").name, *chunk)
