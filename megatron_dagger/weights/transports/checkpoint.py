"""Weights straight out of a Megatron checkpoint: no Megatron process, no Hugging Face files.

The files are mapped into memory, and each rank touches only the blocks that its copies want.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Self

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.blocks import Box
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.families import lookup
from megatron_dagger.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_dagger.weights.plan import Copy
from megatron_dagger.weights.transports.buckets import cut

if TYPE_CHECKING:
    import torch


class CheckpointTransport:
    """A WeightTransport; the plan's source is ``checkpoint.source_layout``."""

    def __init__(self, checkpoint: MegatronCheckpoint, model: ModelConfig, dtype: torch.dtype, most_elements: int):
        self._checkpoint, self._most_elements = checkpoint, most_elements
        self._sources = dict(zip(lookup(model).layouts(model), checkpoint.sources(model), strict=True))
        stored = {source.stored.dtype for source in self._sources.values()}
        wanted = str(dtype).removeprefix("torch.")
        if stored != {wanted}:
            raise WeightSyncError(
                f"{checkpoint.directory} holds {' and '.join(sorted(stored))}, the engine wants {wanted}: "
                "set rollout.engine.dtype to what is trained, or convert the checkpoint"
            )

    def receive(self, copies: Sequence[Copy]) -> Iterator[tuple[Copy, torch.Tensor]]:
        for copy in cut(copies, self._most_elements):
            yield copy, self._read(copy)

    def _read(self, copy: Copy) -> torch.Tensor:
        name, box = copy.source_tensor, copy.source
        if "{}" not in name:
            return self._checkpoint.read(self._sources[name], box)
        import torch

        inner = Box(box.start[1:], box.shape[1:])
        numbers = range(box.start[0], box.start[0] + box.shape[0])
        return torch.stack([self._checkpoint.read(self._sources[name.format(i)], inner) for i in numbers])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """The maps end with the checkpoint."""
