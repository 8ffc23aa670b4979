"""Megatron-Core's side of a family: how its tensors are made of canonical (Hugging Face) tensors.

The rows (dimension 0) of a Megatron tensor are ``groups`` repetitions of the concatenation of its parts. Each part is a
fixed number of rows of a canonical tensor. That covers plain tensors (one part, one group), gate and up fused (two
parts, one group) and QKV interleaved by query group (three parts, one group per query group). Tensors are never
transposed, scaled or cast here, so round trips are bit-exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_dagger.weights.blocks import Block, Box, Shard, ShardDim, Span, share
from megatron_dagger.weights.errors import WeightMapError

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FusedPart:
    """``rows`` rows per group of the canonical tensor ``name``."""

    name: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class MegatronTensor:
    """The parts of a Megatron tensor. ``tail`` is its shape after dimension 0.

    ``shard_dim``: the dimension that tensor parallelism splits. ``padded``: Megatron may append rows (vocabulary
    padding), which are not transferred. ``experts``: if not 0, the entry stands for this many tensors, one per expert
    of the layer, and the names contain ``{}`` in place of the expert's number.
    """

    parts: tuple[FusedPart, ...]
    tail: Shape = ()
    groups: int = 1
    shard_dim: ShardDim = ShardDim.NONE
    padded: bool = False
    experts: int = 0

    @property
    def shape(self) -> Shape:
        """The global shape (of a single expert's tensor), without padding."""
        return (self.groups * sum(part.rows for part in self.parts), *self.tail)

    def canonical_shapes(self) -> dict[str, Shape]:
        """Return the shape of each canonical tensor in it."""
        return {part.name: (self.groups * part.rows, *self.tail) for part in self.parts}

    def of_expert(self, number: int) -> MegatronTensor:
        """Return the entry of a single expert."""
        parts = tuple(replace(part, name=part.name.format(number)) for part in self.parts)
        return replace(self, parts=parts, experts=0)

    def blocks(self, shard: Shard, *, padded_rows: int | None = None) -> list[Block]:
        """Return the blocks that a rank with this shard holds, in the order of its own tensor's rows.

        The rank's experts are stacked in a leading dimension. ``padded_rows`` is the global number of rows including
        padding, for ``padded`` tensors. Raises WeightMapError if the tensor does not split into equal shards.
        """
        first = self.parts[0].name
        columns = (0, self.tail[0]) if self.tail else None
        if self.shard_dim is ShardDim.COLUMNS:
            columns = share(self.tail[0], shard.rank, shard.size, f"the columns of {first!r}")
        experts = None
        if self.experts:
            experts = share(self.experts, shard.expert_rank, shard.expert_size, f"experts {first!r}")
        rows = self._vocabulary(shard, padded_rows or self.shape[0]) if self.padded else self._rows(shard)
        blocks, row = [], 0
        for name, span in rows:
            blocks.append(Block.of(name, span, row, columns, experts))
            row += span[1]
        return blocks

    def shard_boxes(self, shape: Shape, rank: int, size: int) -> list[Box]:
        """Return the boxes of a full tensor of this ``shape`` (a single expert's) that a tensor-parallel rank holds."""
        if self.shard_dim is ShardDim.NONE or size == 1:
            return [Box((0,) * len(shape), shape)]
        axis = 1 if self.shard_dim is ShardDim.COLUMNS else 0
        extents = [shape[axis]]
        if self.shard_dim is ShardDim.ROWS and not self.padded:  # gate and up are split separately
            extents = [part.rows for part in self.parts]
        boxes, first = [], 0
        for total in extents:
            start, extent = share(total, rank, size, f"{self.parts[0].name!r}")
            box_start, box_shape = [0] * len(shape), list(shape)
            box_start[axis], box_shape[axis] = first + start, extent
            boxes.append(Box(tuple(box_start), tuple(box_shape)))
            first += total
        return boxes

    def _vocabulary(self, shard: Shard, padded_rows: int) -> Iterator[tuple[str, Span]]:
        (part,) = self.parts
        if padded_rows < part.rows:
            raise WeightMapError(f"{part.name!r} has {part.rows} rows, more than the {padded_rows} with padding")
        start, rows = share(padded_rows, shard.rank, shard.size, f"the padded rows of {part.name!r}")
        if start < part.rows:
            yield part.name, (start, min(rows, part.rows - start))

    def _rows(self, shard: Shard) -> Iterator[tuple[str, Span]]:
        """Yield the canonical rows that make up the rank's rows, in order."""
        first, groups = 0, self.groups
        if self.shard_dim is ShardDim.GROUPS:
            first, groups = share(self.groups, shard.rank, shard.size, f"the query groups of {self.parts[0].name!r}")
        for group in range(first, first + groups):
            for part in self.parts:
                start, rows = 0, part.rows
                if self.shard_dim is ShardDim.ROWS:
                    start, rows = share(part.rows, shard.rank, shard.size, f"the rows of {part.name!r}")
                yield part.name, (group * part.rows + start, rows)
