"""Megatron checkpoints for tests that need one on disk."""

import math
from pathlib import Path

from megatron_dagger.config import ModelConfig
from megatron_dagger.store.atomic import write_json
from megatron_dagger.weights import families
from megatron_dagger.weights.checkpoints import HF_FILES
from megatron_dagger.weights.layouts import SourceLayout, padded_vocab_size
from megatron_dagger.weights.torch_dist.metadata import METADATA_FILE
from megatron_dagger.weights.torch_dist.stacking import stacked
from megatron_dagger.weights.torch_dist.writer import write_megatron


def write_checkpoint(folder: Path, model: ModelConfig) -> Path:
    """Write a checkpoint of zeros with its model's config.json, as the converter does; return the folder."""
    import torch

    rows, table = padded_vocab_size(model, 1), families.lookup(model).megatron_tensors(model)
    (folder / HF_FILES).mkdir(parents=True)
    write_json(folder / HF_FILES / "config.json", model.hf_config())

    def zeros(name: str) -> torch.Tensor:
        entry = table[name]
        return torch.zeros((rows, *entry.tail) if entry.padded else entry.shape)

    write_megatron(folder, model, zeros, SourceLayout(padded_vocab_size=rows), "bfloat16")
    return folder


def write_index(folder: Path, model: ModelConfig) -> Path:
    """Write a checkpoint of any size whose one file has no content, only a length; return the folder."""
    import pickle

    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    shapes: dict[str, tuple[int, ...]] = {}
    for name, entry in families.lookup(model).megatron_tensors(model).items():
        key, lead = stacked(name)
        leading = tuple(max(old, new + 1) for old, new in zip(shapes.get(key, lead), lead, strict=False))
        shape = (padded_vocab_size(model, 1), *entry.tail) if entry.padded else entry.shape
        shapes[key] = (*leading, *shape)
    entries, storage, end = {}, {}, 0
    for key, shape in shapes.items():
        zero = torch.Size([0] * len(shape))
        chunk = ChunkStorageMetadata(offsets=zero, sizes=torch.Size(shape))
        properties = TensorProperties(dtype=torch.bfloat16)
        entries[key] = TensorStorageMetadata(properties=properties, size=torch.Size(shape), chunks=[chunk])
        storage[MetadataIndex(key, zero, 0)] = _StorageInfo("__0_0.distcp", end, 2 * math.prod(shape))
        end += 2 * math.prod(shape)
    (folder / HF_FILES).mkdir(parents=True)
    write_json(folder / HF_FILES / "config.json", model.hf_config())
    index = Metadata(state_dict_metadata=entries, planner_data={}, storage_data=storage)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(index))
    with open(folder / "__0_0.distcp", "wb") as file:
        file.truncate(end)
    return folder
