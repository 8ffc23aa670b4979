"""Megatron-Core's side of a family: how its tensors are made of canonical (Hugging Face) tensors.

A Megatron tensor is described by a Layout: its rows (dimension 0) are ``groups`` repetitions of the
concatenation of its parts, each part a fixed number of rows of one canonical tensor. That covers
plain tensors (one part, one group), gate and up fused (two parts, one group) and QKV interleaved by
query group (three parts, one group per query group). Nothing else is done to a tensor on its way: no
transposition, no scaling, no change of dtype, so round trips are bit-exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_dagger.weights.blocks import Block, Box, Cut, Shard, Span, share
from megatron_dagger.weights.errors import WeightMapError

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """``rows`` rows per group of the canonical tensor ``name``."""

    name: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The rows of one Megatron tensor; ``tail`` is its shape after dimension 0.

    ``cut`` is how tensor parallelism cuts it. ``padded``: Megatron may have appended rows (vocabulary
    padding), which are cut off. ``experts``: if not 0, this stands for one such tensor per expert of
    the layer, and the names have ``{}`` in the place of the expert's number.
    """

    parts: tuple[Part, ...]
    tail: Shape = ()
    groups: int = 1
    cut: Cut = Cut.NONE
    padded: bool = False
    experts: int = 0

    @property
    def shape(self) -> Shape:
        """The global shape (of one expert's tensor), without padding."""
        return (self.groups * sum(part.rows for part in self.parts), *self.tail)

    def canonical_shapes(self) -> dict[str, Shape]:
        return {part.name: (self.groups * part.rows, *self.tail) for part in self.parts}

    def of_expert(self, number: int) -> Layout:
        """One expert's tensor out of the layer's."""
        parts = tuple(replace(part, name=part.name.format(number)) for part in self.parts)
        return replace(self, parts=parts, experts=0)

    def blocks(self, shard: Shard, *, padded_rows: int | None = None) -> list[Block]:
        """What a rank with this share holds, in the order of its own tensor's rows.

        Experts are stacked in a leading dimension, the rank's own from 0 on. ``padded_rows`` is the
        global number of rows with padding, for ``padded`` tensors. Raises WeightMapError if the
        shares are not equal.
        """
        first = self.parts[0].name
        columns = (0, self.tail[0]) if self.tail else None
        if self.cut is Cut.COLUMNS:
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

    def pieces(self, shape: Shape, rank: int, size: int) -> list[Box]:
        """The boxes of a whole Megatron tensor of this ``shape`` (one expert's) that a tensor-parallel rank holds."""
        if self.cut is Cut.NONE or size == 1:
            return [Box((0,) * len(shape), shape)]
        axis = 1 if self.cut is Cut.COLUMNS else 0
        parts = [shape[axis]]
        if self.cut is Cut.ROWS and not self.padded:  # gate and up: each is cut for itself
            parts = [part.rows for part in self.parts]
        found, first = [], 0
        for total in parts:
            start, extent = share(total, rank, size, f"{self.parts[0].name!r}")
            at, sizes = [0] * len(shape), list(shape)
            at[axis], sizes[axis] = first + start, extent
            found.append(Box(tuple(at), tuple(sizes)))
            first += total
        return found

    def _vocabulary(self, shard: Shard, padded_rows: int) -> Iterator[tuple[str, Span]]:
        (part,) = self.parts
        if padded_rows < part.rows:
            raise WeightMapError(f"{part.name!r} has {part.rows} rows, more than the {padded_rows} with padding")
        start, rows = share(padded_rows, shard.rank, shard.size, f"the padded rows of {part.name!r}")
        if start < part.rows:
            yield part.name, (start, min(rows, part.rows - start))

    def _rows(self, shard: Shard) -> Iterator[tuple[str, Span]]:
        """The canonical rows that the rank's rows are, one after the other."""
        first, groups = 0, self.groups
        if self.cut is Cut.GROUPS:
            first, groups = share(self.groups, shard.rank, shard.size, f"the query groups of {self.parts[0].name!r}")
        for group in range(first, first + groups):
            for part in self.parts:
                start, rows = 0, part.rows
                if self.cut is Cut.ROWS:
                    start, rows = share(part.rows, shard.rank, shard.size, f"the rows of {part.name!r}")
                yield part.name, (group * part.rows + start, rows)
