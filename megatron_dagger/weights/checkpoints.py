"""Checkpoints of any kind, looked at alike: Megatron's and Hugging Face's, as canonical tensors."""

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

MARKER = "complete.json"  # of our trainer's checkpoints
HF_FILES = "hf"  # config.json, tokenizer: what a converted Megatron checkpoint carries along


class Checkpoint(Protocol):
    """A model's weights on disk."""

    directory: Path
    model: ModelConfig

    def read(self, name: str) -> torch.Tensor:
        """One canonical tensor."""
        ...

    def canonical_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All of them, in the model's order."""
        ...

    def dtype(self) -> str:
        """By torch's name."""
        ...


class MegatronFiles:
    """A Megatron checkpoint as a Checkpoint; ``model`` is found beside the weights unless it is given."""

    def __init__(self, directory: Path, model: ModelConfig | None = None):
        self.directory = Path(directory)
        self.weights = MegatronCheckpoint(self.directory)
        self.model = model or model_of(self.directory)
        self._sources = self.weights.sources(self.model)
        layouts = families.lookup(self.model).layouts(self.model).values()
        self._places = {
            part.name: source for layout, source in zip(layouts, self._sources, strict=True) for part in layout.parts
        }

    def read(self, name: str) -> torch.Tensor:
        source = self._places[name]
        parts = families.to_canonical(source.name, self.weights.read(source), self.model)
        return next(tensor for part, tensor in parts if part == name)

    def canonical_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.weights.canonical_tensors(self.model)

    def dtype(self) -> str:
        return self._sources[0].stored.dtype


def open_checkpoint(directory: Path, model: ModelConfig | None = None) -> Checkpoint:
    """The checkpoint in ``directory``, of whatever kind. Reads no weights.

    ``model`` is for a Megatron checkpoint without our trainer's complete.json or a config.json beside it.
    """
    if (directory / METADATA_FILE).exists():
        return MegatronFiles(directory, model)
    if (directory / CONFIG).exists():
        return HfCheckpoint(directory)
    raise CheckpointReadError(f"{directory} holds neither {METADATA_FILE} (Megatron) nor {CONFIG} (Hugging Face)")


def model_of(directory: Path) -> ModelConfig:
    """What a Megatron checkpoint says it is of. Raises CheckpointReadError if it does not say."""
    marker, config = directory / MARKER, directory / HF_FILES / CONFIG
    if marker.is_file():
        return build(ModelConfig, json.loads(marker.read_text())["model"])
    if config.is_file():
        return ModelConfig.from_hf(json.loads(config.read_text()))
    raise CheckpointReadError(
        f"{directory} does not say what model it is of ({MARKER}, {HF_FILES}/{CONFIG}); name its config.json"
    )
