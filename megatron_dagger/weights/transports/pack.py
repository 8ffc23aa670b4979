"""Packs a source rank's tensors into buckets: cast, or quantised if the engine holds FP8."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.families.fp8 import scales_name, source_name, vllm_table
from megatron_dagger.weights.quantise import quantise
from megatron_dagger.weights.transfer_plan import Copy
from megatron_dagger.weights.transports import TransferSpec


class Packer:
    """Writes the blocks of copies into buffers.

    ``tensors``: by global Megatron name. A copy whose name stands for a layer's experts (``…{}``) is looked up for each
    local expert. If the engine quantises, the tensors of scales are among them (``BlockScales.tensors``).
    """

    def __init__(self, spec: TransferSpec, tensors: Mapping[str, torch.Tensor]):
        self._tensors, self._target = tensors, spec.target
        self._table = vllm_table(spec.model, spec.quantization)
        self._scales: dict[tuple[int, str], torch.Tensor] = {}

    def __call__(self, copy: Copy, into: torch.Tensor) -> None:
        """Write the copy's block into ``into``, in its dtype. Raises WeightSyncError if a tensor is missing."""
        try:
            self._pack(copy, into)
        except KeyError as error:
            raise WeightSyncError(f"source rank {copy.source_rank} has no tensor {error.args[0]!r}") from None

    def _pack(self, copy: Copy, into: torch.Tensor) -> None:
        name, box = copy.source_tensor, copy.source
        if "{}" in name:
            for index, expert in enumerate(range(box.start[0], box.start[0] + box.shape[0])):
                into[index].copy_(self._tensors[name.format(expert)][box.slices[1:]])
        elif into.dtype is torch.float8_e4m3fn:
            scales = self._scales_of(copy.target_rank, copy.target_parameter)
            into.copy_(quantise(self._tensors[name][box.slices], scales, copy.target))
        else:
            into.copy_(self._tensors[name][box.slices])

    def _scales_of(self, target_rank: int, parameter: str) -> torch.Tensor:
        """Return the scales of a target rank's parameter, assembled from those of the canonical tensors."""
        cached = self._scales.get((target_rank, parameter))
        if cached is None:
            scales, shard = self._table[scales_name(parameter)], self._target.shard(target_rank, experts=False)
            parts = [self._tensors[source_name(b.name)][b.canonical.slices] for b in scales.blocks(shard)]
            cached = self._scales[target_rank, parameter] = torch.cat(parts)
        return cached
