"""The tiles of canonical tensors that digests hash: blocks that tensor parallelism never splits.

A canonical (Hugging Face) tensor is divided along an axis into equal tiles, the same under every layout: a head of the
attention projections, a few rows of a vocabulary, otherwise the largest extent that divides every shard for up to 16
ranks (and 32). A rank's shard is then a number of whole tiles, so the hashes of different layouts can be compared and
combined (``digest.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.blocks import Block, ShardDim
from megatron_dagger.weights.errors import WeightMapError
from megatron_dagger.weights.families import canonical_names, lookup
from megatron_dagger.weights.families.fp8 import SCALES, scales_shapes
from megatron_dagger.weights.families.megatron_tensor import Shape
from megatron_dagger.weights.families.vllm_tensor import StackedPart, VllmTensor

_PARALLEL_SIZES = (*range(1, 17), 32)
# Divides the shards of a vocabulary that is padded to a multiple of 64 (vLLM) or 128 (Megatron).
_VOCABULARY_ROWS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """The tiles of a canonical tensor: ``count`` of ``extent`` along ``axis``. The last may be smaller."""

    shape: Shape
    axis: int
    extent: int

    @property
    def count(self) -> int:
        return math.ceil(self.shape[self.axis] / self.extent)

    def within(self, block: Block) -> range:
        """Return the tiles that make up a block of the tensor (without a dimension of stacked experts).

        Raises WeightMapError if the block starts or ends within a tile.
        """
        start, extent = block.canonical.start[self.axis], block.canonical.shape[self.axis]
        stop = start + extent
        if start % self.extent or (stop % self.extent and stop != self.shape[self.axis]):
            raise WeightMapError(
                f"{block.name!r}: a shard from {start} to {stop} cuts a tile of {self.extent} along dimension "
                f"{self.axis}; use a tensor-parallel size of up to 16, or 32"
            )
        return range(start // self.extent, math.ceil(stop / self.extent))


@lru_cache(maxsize=16)
def hash_tiles(model: ModelConfig) -> dict[str, Tiles]:
    """Return the tiles of every canonical tensor and of its scales in FP8. The result is shared: do not change it."""
    tiles = {}
    shapes = canonical_names(model)
    for parameter in lookup(model).vllm(model).values():
        for part in parameter.parts:
            for number in range(parameter.experts or 1):
                name = part.name.format(number)
                axis, extent = _axis_and_extent(parameter, part)
                tiles[name] = Tiles(shape=shapes[name], axis=axis, extent=extent)
    table = {name: tiles[name] for name in shapes}  # in the model's order
    if model.num_moe_experts is None:
        for name, shape in scales_shapes(model).items():
            weight = table[name.removesuffix(SCALES)]
            table[name] = Tiles(shape=shape, axis=weight.axis, extent=1)
    return table


def _axis_and_extent(parameter: VllmTensor, part: StackedPart) -> tuple[int, int]:
    if parameter.padded:
        return 0, _VOCABULARY_ROWS
    if part.heads:
        return 0, part.rows // part.heads
    if parameter.shard_dim is ShardDim.COLUMNS:
        columns = parameter.tail[0]
        return 1, columns // parameter.heads if parameter.heads else _smallest_shard(columns)
    if parameter.shard_dim is ShardDim.NONE:
        return 0, part.rows
    return 0, _smallest_shard(part.rows)


def _smallest_shard(total: int) -> int:
    """Return the largest extent that divides the equal shards of ``total`` for every supported number of ranks."""
    return total // math.lcm(*(size for size in _PARALLEL_SIZES if total % size == 0))
