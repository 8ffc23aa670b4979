"""Writes Megatron's distributed checkpoints (torch_dist) without Megatron: the weights alone.

The form is that of ``torch.distributed.checkpoint``: files of torch.save archives, and an index of which
chunk of which tensor lies where. The chunks are those that the ranks of a ``SourceLayout`` would write, a
pipeline stage a file (or several), so that each such rank finds its part in one piece; any other
layout can read them too. One tensor is in memory at a time. A file gets its name when it is whole; with its
list beside it, a conversion that was interrupted goes on with the first file that is missing.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.store import atomic
from megatron_dagger.weights import families
from megatron_dagger.weights.blocks import Box, Cut
from megatron_dagger.weights.families.megatron_tensor import Layout
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
_MOST_BYTES = 4 << 30  # of a file; the last tensor may exceed it


def write_megatron(
    directory: Path,
    model: ModelConfig,
    read: Callable[[str], torch.Tensor],
    source: SourceLayout,
    dtype: str,
    *,
    most_bytes: int = _MOST_BYTES,
) -> None:
    """Write the checkpoint into ``directory``, its index last; goes on where it was.

    What is in ``directory`` must be of the same weights and arguments (``store.resumable`` sees to it).
    ``read`` gives a whole Megatron tensor by its global name (as in ``Family.layouts``), padding rows
    included; it is cast to ``dtype``.
    """
    import torch

    source.check_model(model)
    for number, names in enumerate(_files(model, source, getattr(torch, dtype).itemsize, most_bytes)):
        stage = source.stage(names[0], model)
        path = directory / f"__{stage}_{number}.distcp"
        if not _list_of(path).exists():
            _write_file(path, names, model, read, source, dtype)
    _write_index(directory, model, source, dtype)
    torch.save({}, directory / "common.pt")
    atomic.write_json(directory / "metadata.json", _FORMAT)
    for path in directory.glob("__*.json"):
        path.unlink()


def _shape(layout: Layout, source: SourceLayout) -> tuple[int, ...]:
    return (source.padded_vocab_size, *layout.tail) if layout.padded else layout.shape


def _files(model: ModelConfig, source: SourceLayout, itemsize: int, most_bytes: int) -> list[list[str]]:
    """The names of the tensors in each file, by pipeline stage."""
    layouts = families.lookup(model).layouts(model)
    files: list[list[str]] = []
    for stage in range(source.pipeline_model_parallel_size):
        room = 0
        for name, layout in layouts.items():
            if source.stage(name, model) != stage:
                continue
            if room <= 0:
                files.append([])
                room = most_bytes
            files[-1].append(name)
            room -= Box((), _shape(layout, source)).elements * itemsize
    return files


def _write_file(
    path: Path,
    names: list[str],
    model: ModelConfig,
    read: Callable[[str], torch.Tensor],
    source: SourceLayout,
    dtype: str,
) -> None:
    import torch

    layouts, chunks = families.lookup(model).layouts(model), []
    temporary = path.parent / atomic.temporary_name(path.name)
    with open(temporary, "wb") as file:
        for name in names:
            shape = _shape(layouts[name], source)
            tensor = read(name).to(getattr(torch, dtype))
            assert tuple(tensor.shape) == shape, (name, tuple(tensor.shape), shape)
            key, lead = stacked(name)
            size = source.tensor_model_parallel_size if layouts[name].cut is not Cut.NONE else 1
            for box in [box for rank in range(size) for box in layouts[name].pieces(shape, rank, size)]:
                start = file.tell()
                torch.save(tensor[box.slices].contiguous().clone()[(None,) * len(lead)], file)
                chunks.append([key, [*lead, *box.start], [*[1] * len(lead), *box.shape], start, file.tell() - start])
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    atomic.write_json(_list_of(path), chunks)


def _list_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _write_index(directory: Path, model: ModelConfig, source: SourceLayout, dtype: str) -> None:
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
    places: dict[Any, Any] = {}
    for file, key, offsets, sizes, start, length in _chunks(directory):
        entry = entries.get(key)
        if entry is None:
            entry = TensorStorageMetadata(
                properties=TensorProperties(dtype=getattr(torch, dtype)), size=torch.Size(()), chunks=[]
            )
            entries[key] = entry
        entry.size = torch.Size(
            max(a, b)
            for a, b in zip(entry.size or [0] * len(sizes), map(sum, zip(offsets, sizes, strict=True)), strict=True)
        )
        entry.chunks.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes)))
        places[MetadataIndex(key, torch.Size(offsets), len(entry.chunks) - 1)] = _StorageInfo(file, start, length)
    data = pickle.dumps(Metadata(state_dict_metadata=entries, planner_data={}, storage_data=places))
    atomic.write_bytes(directory / METADATA_FILE, data)


def _chunks(directory: Path) -> Iterator[tuple[str, str, list[int], list[int], int, int]]:
    for path in sorted(directory.glob("__*.json")):
        for chunk in json.loads(path.read_text()):
            yield (path.with_suffix(".distcp").name, *chunk)
