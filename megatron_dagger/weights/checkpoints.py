"""Megatron's and Hugging Face's checkpoints behind one interface: canonical tensors by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_dagger.config.base import build
from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights import families
from megatron_dagger.weights.errors import CheckpointReadError
from megatron_dagger.weights.hf_files import CONFIG, HfCheckpoint
from megatron_dagger.weights.torch_dist.metadata import METADATA_FILE
from megatron_dagger.weights.torch_dist.reader import MegatronCheckpoint

if TYPE_CHECKING:
    import torch

MARKER = "complete.json"  # in the trainer's checkpoints; contains the model's settings
HF_FILES = "hf"  # directory in a converted Megatron checkpoint with config.json and the tokenizer


class Checkpoint(Protocol):
    """A model's weights on disk."""

    directory: Path
    model: ModelConfig

    def read(self, name: str) -> torch.Tensor:
        """Return a canonical tensor."""
        ...

    def canonical_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) for all canonical tensors, in the model's order."""
        ...

    def dtype(self) -> str:
        """Return torch's name of the weights' dtype."""
        ...


class MegatronFiles:
    """A Megatron checkpoint as a Checkpoint. Without ``model`` the settings are read from beside the weights."""

    def __init__(self, directory: Path, model: ModelConfig | None = None):
        self.directory = Path(directory)
        self.weights = MegatronCheckpoint(self.directory)
        self.model = model or model_of(self.directory)
        self._sources = self.weights.sources(self.model)
        entries = families.lookup(self.model).megatron_tensors(self.model).values()
        self._source_of = {
            part.name: source for entry, source in zip(entries, self._sources, strict=True) for part in entry.parts
        }

    def read(self, name: str) -> torch.Tensor:
        source = self._source_of[name]
        parts = families.to_canonical(source.name, self.weights.read(source), self.model)
        return next(tensor for part, tensor in parts if part == name)

    def canonical_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.weights.canonical_tensors(self.model)

    def dtype(self) -> str:
        return self._sources[0].stored.dtype


def open_checkpoint(directory: Path, model: ModelConfig | None = None) -> Checkpoint:
    """Open the checkpoint in ``directory``, of either kind. Reads no weights.

    A Megatron checkpoint that has neither the trainer's complete.json nor hf/config.json needs ``model``. Raises
    CheckpointReadError if ``directory`` holds no checkpoint, or a damaged one.
    """
    if (directory / METADATA_FILE).exists():
        return MegatronFiles(directory, model)
    if (directory / CONFIG).exists():
        return HfCheckpoint(directory)
    raise CheckpointReadError(f"{directory} holds neither {METADATA_FILE} (Megatron) nor {CONFIG} (Hugging Face)")


def model_of(directory: Path) -> ModelConfig:
    """Return the model's settings stored beside a Megatron checkpoint. Raises CheckpointReadError if there are none."""
    marker, config = directory / MARKER, directory / HF_FILES / CONFIG
    if marker.is_file():
        return build(ModelConfig, json.loads(marker.read_text())["model"])
    if config.is_file():
        return ModelConfig.from_hf(json.loads(config.read_text()))
    raise CheckpointReadError(
        f"{directory} has no settings of its model ({MARKER} or {HF_FILES}/{CONFIG}); name its config.json"
    )
