"""The tiles of canonical tensors: blocks that tensor parallelism never cuts, on which digests stand.

A canonical (Hugging Face) tensor is cut along one axis into equal tiles, the same for every layout: a
head of attention's projections, a few rows of a vocabulary, elsewhere the largest shares that are
whole in every layout of up to 16 ranks (and 32). A rank's share is then some whole tiles, so its digests can
be compared with, or put together with, those of any other layout (see ``digest.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.blocks import Block, Cut
from megatron_dagger.weights.errors import WeightMapError
from megatron_dagger.weights.families import canonical_names, lookup
from megatron_dagger.weights.families.fp8 import SCALES, scales_shapes
from megatron_dagger.weights.families.megatron_tensor import Shape
from megatron_dagger.weights.families.vllm_tensor import Parameter, Piece

_PARALLEL_SIZES = (*range(1, 17), 32)
# vLLM cuts a vocabulary of whole 64s, Megatron one of whole 128s per rank.
_VOCABULARY_ROWS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """How a canonical tensor is cut: ``count`` tiles of ``extent`` along ``axis``, the last maybe smaller."""

    shape: Shape
    axis: int
    extent: int

    @property
    def count(self) -> int:
        return math.ceil(self.shape[self.axis] / self.extent)

    def within(self, block: Block) -> range:
        """The tiles that make up a block of the tensor (without a dimension of stacked experts).

        Raises WeightMapError if the block's ends are not tiles' ends.
        """
        start, extent = block.canonical.start[self.axis], block.canonical.shape[self.axis]
        stop = start + extent
        if start % self.extent or (stop % self.extent and stop != self.shape[self.axis]):
            raise WeightMapError(
                f"{block.name!r}: a share from {start} to {stop} cuts a tile of {self.extent} along dimension "
                f"{self.axis}; use a tensor-parallel size of up to 16, or 32"
            )
        return range(start // self.extent, math.ceil(stop / self.extent))


@lru_cache(maxsize=16)
def hash_tiles(model: ModelConfig) -> dict[str, Tiles]:
    """The tiles of every canonical tensor of a model, and of the scales that it has in FP8. Not to be changed."""
    found = {}
    shapes = canonical_names(model)
    for parameter in lookup(model).vllm(model).values():
        for piece in parameter.pieces:
            for number in range(parameter.experts or 1):
                name = piece.name.format(number)
                axis, extent = _cut(parameter, piece)
                found[name] = Tiles(shape=shapes[name], axis=axis, extent=extent)
    table = {name: found[name] for name in shapes}
    if model.num_moe_experts is None:
        for name, shape in scales_shapes(model).items():
            weight = table[name.removesuffix(SCALES)]
            table[name] = Tiles(shape=shape, axis=weight.axis, extent=1)
    return table


def _cut(parameter: Parameter, piece: Piece) -> tuple[int, int]:
    if parameter.padded:
        return 0, _VOCABULARY_ROWS
    if piece.heads:
        return 0, piece.rows // piece.heads
    if parameter.cut is Cut.COLUMNS:
        columns = parameter.tail[0]
        return 1, columns // parameter.heads if parameter.heads else _finest_share(columns)
    if parameter.cut is Cut.NONE:
        return 0, piece.rows
    return 0, _finest_share(piece.rows)


def _finest_share(total: int) -> int:
    return total // math.lcm(*(size for size in _PARALLEL_SIZES if total % size == 0))
