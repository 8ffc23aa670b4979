"""Weights out of a Megatron checkpoint, without a Megatron process or Hugging Face files.

The files are mapped into memory, and each rank reads only the blocks of its copies. For an engine in FP8 each rank
quantises its own parameters: its shards are whole FP8 blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from megatron_dagger.weights.blocks import Box
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.families import lookup
from megatron_dagger.weights.families.fp8 import VALUES, scales_name, vllm_table
from megatron_dagger.weights.torch_dist.reader import MegatronCheckpoint
from megatron_dagger.weights.transfer_plan import Copy
from megatron_dagger.weights.transports import TransferSpec
from megatron_dagger.weights.transports.buckets import split_large

if TYPE_CHECKING:
    import torch


class CheckpointTransport:
    """A target rank's WeightTransport. Raises WeightSyncError if the checkpoint has another dtype than the engine."""

    def __init__(self, checkpoint: MegatronCheckpoint, spec: TransferSpec, target_rank: int):
        self._checkpoint, self._spec, self._rank = checkpoint, spec, target_rank
        model = spec.model
        self._table = vllm_table(model, spec.quantization)
        self._sources = dict(zip(lookup(model).megatron_tensors(model), checkpoint.sources(model), strict=True))
        stored = {source.stored.dtype for source in self._sources.values()}
        if stored != {spec.dtype}:
            raise WeightSyncError(
                f"{checkpoint.directory} holds {' and '.join(sorted(stored))}, but the engine needs {spec.dtype}: "
                "set rollout.engine.dtype (vLLM's own --dtype) to the checkpoint's, or convert the checkpoint"
            )

    def receive(self, copies: Sequence[Copy]) -> Iterator[tuple[Copy, torch.Tensor]]:
        bucket_spec = self._spec.bucket_spec
        scales: dict[str, torch.Tensor] = {}  # of the previous parameter
        for name, of_parameter in itertools.groupby(
            split_large(copies, bucket_spec), key=lambda copy: copy.target_parameter
        ):
            if name in scales:
                yield from ((copy, scales[name][copy.target.slices]) for copy in of_parameter)
            elif bucket_spec.dtypes[name] == VALUES:
                parts = list(of_parameter)
                scales = {scales_name(name): self._scales(name, parts)}
                yield from self._quantised(parts, scales[scales_name(name)])
            else:
                yield from self._read(of_parameter)

    def _scales(self, name: str, copies: Sequence[Copy]) -> torch.Tensor:
        """Read this rank's parameter and return its scales. The values are read again when they are quantised."""
        import torch

        from megatron_dagger.weights.quantise import fold_maxima, scales_of

        shape = self._table[scales_name(name)].shape(self._spec.target.shard(self._rank, experts=False))
        maxima = torch.zeros(shape, dtype=torch.float32)  # the engine changes torch's default dtype
        for copy, values in self._read(copies):
            fold_maxima(maxima, values, copy.target)
        return scales_of(maxima)

    def _quantised(self, copies: Sequence[Copy], scales: torch.Tensor) -> Iterator[tuple[Copy, torch.Tensor]]:
        from megatron_dagger.weights.quantise import quantise

        for copy, values in self._read(copies):
            yield copy, quantise(values, scales, copy.target)

    def _read(self, copies: Iterable[Copy]) -> Iterator[tuple[Copy, torch.Tensor]]:
        """Yield (copy, values) for each part of the copies that is contiguous in a file."""
        for copy in copies:
            name, box = copy.source_tensor, copy.source
            if "{}" not in name:
                for part, values in self._checkpoint.parts(self._sources[name], box):
                    yield copy.part(part), values
                continue
            inner = Box(box.start[1:], box.shape[1:])
            for index in range(box.shape[0]):
                expert = self._sources[name.format(box.start[0] + index)]
                for part, values in self._checkpoint.parts(expert, inner):
                    yield copy.part(Box((index, *part.start), (1, *part.shape))), values[None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Do nothing: the files are unmapped with the checkpoint."""


def open_transport(spec: TransferSpec, target_rank: int, device: torch.device) -> CheckpointTransport:
    """Open the checkpoint. Raises CheckpointReadError or WeightSyncError. The blocks are on the CPU."""
    return CheckpointTransport(MegatronCheckpoint(Path(spec.source.address)), spec, target_rank)
