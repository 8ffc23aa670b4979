"""Megatron's and Hugging Face's checkpoints behind one interface: canonical tensors by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_dagger.config.base import build
from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights import families
from megatron_dagger.weights.companions import ADAPTER, CONFIG, read_config
from megatron_dagger.weights.errors import CheckpointReadError
from megatron_dagger.weights.hf_files import HfCheckpoint
from megatron_dagger.weights.torch_dist.metadata import METADATA_FILE
from megatron_dagger.weights.torch_dist.reader import MegatronCheckpoint

if TYPE_CHECKING:
    import torch

MARKER = "complete.json"  # in the trainer's checkpoints; contains the model's settings
HF_FILES = "hf"  # directory in a converted Megatron checkpoint with config.json and the tokenizer
_LATEST = "latest_checkpointed_iteration.txt"  # Megatron's
_WITHIN = ("iter_*", "release", "weights", "snapshots/*", "checkpoint-*")


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

    def dtype(self, name: str = ...) -> str:
        """Return torch's name of a canonical tensor's dtype (default: the embedding's)."""
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

    def dtype(self, name: str = "") -> str:
        return (self._source_of[name] if name else self._sources[0]).stored.dtype


def open_checkpoint(directory: Path, model: ModelConfig | None = None) -> Checkpoint:
    """Open the checkpoint in ``directory`` (``find_checkpoint``), of either kind. Reads no weights.

    A Megatron checkpoint that has neither the trainer's complete.json nor hf/config.json needs ``model``. Raises
    CheckpointReadError if ``directory`` holds no checkpoint, or a damaged one.
    """
    directory = find_checkpoint(directory)
    return MegatronFiles(directory, model) if (directory / METADATA_FILE).exists() else HfCheckpoint(directory)


def find_checkpoint(directory: Path) -> Path:
    """Return ``directory`` if a checkpoint is in it, or else the folder within it that holds one.

    Megatron keeps each iteration in a folder of its own and the last one's name beside them, NeMo the weights in
    ``weights``, the hub's client each revision in ``snapshots``, Transformers' trainer each step in ``checkpoint-N``.
    Raises CheckpointReadError if there is none, or if there are several.
    """
    if _is_checkpoint(directory):
        return directory
    latest = directory / _LATEST
    if latest.is_file():
        name = latest.read_text(errors="replace").strip()
        folder = directory / (f"iter_{int(name):07d}" if name.isdecimal() else "release")
        if not _is_checkpoint(folder):
            _refuse_old_format(folder)
            raise CheckpointReadError(f"{latest} names iteration {name!r}, but {folder} holds no checkpoint")
        return folder
    within = [path for pattern in _WITHIN for path in sorted(directory.glob(pattern)) if _is_checkpoint(path)]
    if len(within) == 1:
        return within[0]
    if within:
        raise CheckpointReadError(f"{directory} holds several checkpoints: name one, such as {within[-1]}")
    if (directory / ADAPTER).exists():
        raise CheckpointReadError(f"{directory} holds an adapter, not a model: merge it into its model first")
    _refuse_old_format(directory)
    raise CheckpointReadError(f"{directory} holds neither {METADATA_FILE} (Megatron) nor {CONFIG} (Hugging Face)")


def _refuse_old_format(directory: Path) -> None:
    if any(directory.glob("mp_rank_0*")) or any(directory.glob("*/mp_rank_0*")):
        raise CheckpointReadError(
            f"{directory} is in Megatron-LM's old format, pickles that may run any code and are never read: save it in "
            "the format torch_dist (--ckpt-convert-format)"
        )


def _is_checkpoint(directory: Path) -> bool:
    return (directory / METADATA_FILE).exists() or (directory / CONFIG).exists()


def model_of(directory: Path) -> ModelConfig:
    """Return the model's settings stored beside a Megatron checkpoint. Raises CheckpointReadError if there are none."""
    marker, config = directory / MARKER, directory / HF_FILES / CONFIG
    if marker.is_file():
        return build(ModelConfig, read_config(marker).get("model"))
    if config.is_file():
        return ModelConfig.from_hf(read_config(config))
    raise CheckpointReadError(
        f"{directory} has no settings of its model ({MARKER} or {HF_FILES}/{CONFIG}); name its config.json with --model"
    )
