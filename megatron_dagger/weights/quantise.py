"""Block-wise FP8 quantisation of sharded weights: maxima first, then scales, then values.

A block's scale is its largest absolute value divided by e4m3's largest value (448), as in DeepSeek-V3 (arXiv
2412.19437, section 3.3) and Qwen3's FP8 checkpoints. Ranks that hold parts of a block take the maximum over the ranks;
then each quantises its own part, with the same result as quantising the full tensor. All arithmetic is in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.blocks import Block, Box
from megatron_dagger.weights.families.fp8 import BLOCK, scales_name, scales_shape, scales_shapes, source_name

LARGEST = torch.finfo(torch.float8_e4m3fn).max
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # for a block of zeros


class BlockScales:
    """The scales of all of a model's matrices, computed by the trainer's ranks together.

    Each rank calls ``add`` for the tensors it holds. The caller then all-reduces ``maxima``, a single vector of all
    blocks' maxima, with MAX, and calls ``finish``, which turns it into scales.
    """

    def __init__(self, model: ModelConfig, device: torch.device):
        shapes = scales_shapes(model)
        sizes = [math.prod(shape) for shape in shapes.values()]
        self.maxima = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        parts = self.maxima.split(sizes)
        self._tables = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def add(self, blocks: Iterable[Block], tensor: torch.Tensor) -> None:
        """Add a rank's own tensor, made up of ``blocks``, to the maxima."""
        for block, values in _parts(blocks, tensor):
            if (table := self._tables.get(scales_name(block.name))) is not None:
                fold_maxima(table, values, block.canonical)

    def finish(self) -> None:
        """Turn the maxima, which must be the same on all ranks by now, into scales."""
        self.maxima.copy_(scales_of(self.maxima))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the scales by their names in a plan's source, each (rows, columns) of blocks, float32."""
        return {source_name(name): table for name, table in self._tables.items()}

    def canonical(self) -> Mapping[str, torch.Tensor]:
        """Return the scales by their canonical names."""
        return self._tables

    def quantised(self, blocks: Iterable[Block], tensor: torch.Tensor) -> torch.Tensor:
        """Return a rank's own tensor quantised to e4m3 if the engine quantises it, else unchanged."""
        parts = list(_parts(blocks, tensor))
        if not parts or scales_name(parts[0][0].name) not in self._tables:
            return tensor
        result = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn, device=tensor.device)
        for block, values in parts:
            box = Box(block.start, block.canonical.shape)
            result[box.slices] = quantise(values, self._tables[scales_name(block.name)], block.canonical)
        return result


def quantise_matrix(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a full matrix. Return its values, (rows, columns) float8_e4m3fn, and its blocks' scales, float32."""
    box = Box((0, 0), (matrix.shape[0], matrix.shape[1]))
    maxima = torch.zeros(scales_shape(box.shape), dtype=torch.float32, device=matrix.device)
    fold_maxima(maxima, matrix, box)
    scales = scales_of(maxima)
    return quantise(matrix, scales, box), scales


def fold_maxima(maxima: torch.Tensor, values: torch.Tensor, box: Box) -> None:
    """Raise the ``maxima`` of a matrix's blocks, in place, to the largest absolute values of its part ``box``.

    ``maxima`` is (block rows, block columns) float32; ``values`` are the values of ``box``, of its shape.
    """
    first = [start // BLOCK for start in box.start]
    before = [start % BLOCK for start in box.start]
    rows, columns = scales_shape((before[0] + box.shape[0], before[1] + box.shape[1]))
    padding = (
        before[1],
        columns * BLOCK - before[1] - box.shape[1],
        before[0],
        rows * BLOCK - before[0] - box.shape[0],
    )
    whole = torch.nn.functional.pad(values.abs(), padding) if any(padding) else values.abs()
    block_maxima = whole.reshape(rows, BLOCK, columns, BLOCK).amax((1, 3)).float()
    part = maxima[first[0] : first[0] + rows, first[1] : first[1] + columns]
    torch.maximum(part, block_maxima, out=part)


def scales_of(maxima: torch.Tensor) -> torch.Tensor:
    """Return the blocks' scales from their largest absolute values, float32 of the same shape."""
    return (maxima / LARGEST).clamp(min=_SMALLEST_SCALE)


def quantise(values: torch.Tensor, scales: torch.Tensor, box: Box) -> torch.Tensor:
    """Quantise the part ``box`` of a matrix, ``values``, to float8_e4m3fn. ``scales`` are those of all its blocks."""
    rows, columns = (
        torch.arange(start, start + extent, device=scales.device) // BLOCK
        for start, extent in zip(box.start, box.shape, strict=True)
    )
    return (values.float() / scales[rows][:, columns]).to(torch.float8_e4m3fn)


def _parts(blocks: Iterable[Block], tensor: torch.Tensor) -> Iterable[tuple[Block, torch.Tensor]]:
    """Yield each block with its values."""
    for block in blocks:
        yield block, tensor[Box(block.start, block.canonical.shape).slices]
