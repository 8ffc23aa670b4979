"""Weights straight out of a Megatron checkpoint: no Megatron process, no Hugging Face files.

The files are mapped into memory, and each rank touches only the blocks that its copies want. What the
engine holds in FP8 it quantises itself: it has whole blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Self

from megatron_dagger.weights.blocks import Box
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.families import lookup
from megatron_dagger.weights.families.fp8 import VALUES, scales_name, vllm_table
from megatron_dagger.weights.torch_dist.reader import MegatronCheckpoint
from megatron_dagger.weights.transfer_plan import Copy
from megatron_dagger.weights.transports import TransferSpec
from megatron_dagger.weights.transports.buckets import cut

if TYPE_CHECKING:
    import torch


class CheckpointTransport:
    """A target rank's WeightTransport; the plan's source is ``checkpoint.source_layout``."""

    def __init__(self, checkpoint: MegatronCheckpoint, agreement: TransferSpec, target_rank: int):
        self._checkpoint, self._agreement, self._rank = checkpoint, agreement, target_rank
        model = agreement.model
        self._table = vllm_table(model, agreement.quantization)
        self._sources = dict(zip(lookup(model).layouts(model), checkpoint.sources(model), strict=True))
        stored = {source.stored.dtype for source in self._sources.values()}
        if stored != {agreement.dtype}:
            raise WeightSyncError(
                f"{checkpoint.directory} holds {' and '.join(sorted(stored))}, the engine wants {agreement.dtype}: "
                "set rollout.engine.dtype (vLLM's own --dtype) to what is trained, or convert the checkpoint"
            )

    def receive(self, copies: Sequence[Copy]) -> Iterator[tuple[Copy, torch.Tensor]]:
        wire = self._agreement.wire
        scales: dict[str, torch.Tensor] = {}  # of the parameter before
        for name, of_parameter in itertools.groupby(cut(copies, wire), key=lambda copy: copy.target_parameter):
            if name in scales:
                yield from ((copy, scales[name][copy.target.slices]) for copy in of_parameter)
            elif wire.dtypes[name] == VALUES:
                parts = list(of_parameter)
                scales = {scales_name(name): self._scales(name, parts)}
                yield from self._quantised(parts, scales[scales_name(name)])
            else:
                yield from self._read(of_parameter)

    def _scales(self, name: str, copies: Sequence[Copy]) -> torch.Tensor:
        """The scales of this rank's parameter. Its values are read twice, from the same memory."""
        import torch

        from megatron_dagger.weights.quantise import fold_maxima, scales_of

        shape = self._table[scales_name(name)].shape(self._agreement.target.shard(self._rank, experts=False))
        maxima = torch.zeros(shape, dtype=torch.float32)  # the default dtype is the engine's
        for copy, values in self._read(copies):
            fold_maxima(maxima, values, copy.target)
        return scales_of(maxima)

    def _quantised(self, copies: Sequence[Copy], scales: torch.Tensor) -> Iterator[tuple[Copy, torch.Tensor]]:
        from megatron_dagger.weights.quantise import quantise

        for copy, values in self._read(copies):
            yield copy, quantise(values, scales, copy.target)

    def _read(self, copies: Iterable[Copy]) -> Iterator[tuple[Copy, torch.Tensor]]:
        """The parts of the copies that the files have in one piece; putting them together is left to who copies."""
        for copy in copies:
            name, box = copy.source_tensor, copy.source
            if "{}" not in name:
                for place, values in self._checkpoint.parts(self._sources[name], box):
                    yield copy.part(place), values
                continue
            inner = Box(box.start[1:], box.shape[1:])
            for number in range(box.shape[0]):
                expert = self._sources[name.format(box.start[0] + number)]
                for place, values in self._checkpoint.parts(expert, inner):
                    yield copy.part(Box((number, *place.start), (1, *place.shape))), values[None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """The maps end with the checkpoint."""
