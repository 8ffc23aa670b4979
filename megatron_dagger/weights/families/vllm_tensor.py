"""vLLM's side of a family: how its parameters are made of canonical (Hugging Face) tensors.

Read off vLLM 0.32 (``model_executor/``), as the parameters are before ``process_weights_after_loading``
packs them for a device:

- ``QKVParallelLinear`` and ``MergedColumnParallelLinear`` (``layers/linear.py``) stack a rank's rows of
  Q, K and V, or of gate and up. Q is cut by heads; so are K and V, until there are more ranks than KV
  heads: then each head is on ``tp / heads`` ranks that follow each other.
- ``RowParallelLinear`` cuts columns; ``ReplicatedLinear`` (the router) and the norms are whole everywhere.
- ``VocabParallelEmbedding`` and ``ParallelLMHead`` (``layers/vocab_parallel_embedding.py``) fill the
  vocabulary up with zero rows to a multiple of 64 and cut that.
- ``RoutedExperts`` (``layers/fused_moe/``) stacks the rank's experts in a leading dimension: ``w13_weight``
  has gate above up, ``w2_weight`` down. With expert parallelism a rank has whole experts, consecutive
  ones (``linear`` placement); without it, a share of the rows, or columns, of every expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dagger.weights.blocks import Block, Box, Cut, Shard, Span, share
from megatron_dagger.weights.families.megatron_tensor import Shape

VOCAB_MULTIPLE = 64  # vLLM's DEFAULT_VOCAB_PADDING_SIZE


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A canonical tensor of ``rows`` rows in a parameter.

    ``heads``: cut between heads of equal size only. ``replicated``: with more ranks than heads, a
    head is on several ranks.
    """

    name: str
    rows: int
    heads: int | None = None
    replicated: bool = False

    def share(self, rank: int, size: int) -> Span:
        """The rank's rows."""
        units = self.heads or self.rows
        what = f"the {'heads' if self.heads else 'rows'} of {self.name!r}"
        if self.replicated and size > units:
            _, copies = share(size, 0, units, f"the tensor-parallel ranks that share {what}")
            start, extent = rank // copies, 1
        else:
            start, extent = share(units, rank, size, what)
        unit = self.rows // units
        return start * unit, extent * unit


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of vLLM: its pieces stacked, each cut by tensor parallelism on its own.

    ``tail`` is the shape after the rows. ``heads``: columns are cut between heads of equal size only. ``padded``:
    filled up with zero rows. ``experts``: if not 0, the number of experts that are stacked in a leading
    dimension; the pieces' names have ``{}`` in the place of the expert's number.
    """

    pieces: tuple[Piece, ...]
    tail: Shape = ()
    cut: Cut = Cut.NONE
    heads: int | None = None
    padded: bool = False
    experts: int = 0

    def shape(self, shard: Shard) -> Shape:
        """The shape of the parameter on a rank with this share."""
        rows = self._padded_rows(shard) if self.padded else sum(self._rows(piece, shard)[1] for piece in self.pieces)
        shape = (rows, *self._columns(shard)[1:]) if self.tail else (rows,)
        return (self._experts(shard)[1], *shape) if self.experts else shape

    def blocks(self, shard: Shard) -> list[Block]:
        """What the rank's parameter is made of, in the order of its rows.

        Raises WeightMapError if the shares are not equal.
        """
        blocks, row = [], 0
        columns = self._columns(shard) if self.tail else None
        experts = self._experts(shard) if self.experts else None
        for piece in self.pieces:
            rows = self._rows(piece, shard)
            if rows[1] > 0:  # else nothing but padding
                blocks.append(Block.of(piece.name, rows, row, columns, experts))
                row += rows[1]
        return blocks

    def padding(self, shard: Shard) -> Box | None:
        """The zero rows at the end of the rank's parameter, if it has any."""
        if not self.padded:
            return None
        rows, *columns = self.shape(shard)
        used = sum(block.canonical.shape[0] for block in self.blocks(shard))
        if used == rows:
            return None
        return Box((used, *(0 for _ in columns)), (rows - used, *columns))

    def _rows(self, piece: Piece, shard: Shard) -> Span:
        if self.padded:
            rows = self._padded_rows(shard)
            start = shard.rank * rows
            return start, min(start + rows, piece.rows) - start
        return piece.share(shard.rank, shard.size) if self.cut is Cut.ROWS else (0, piece.rows)

    def _padded_rows(self, shard: Shard) -> int:
        (piece,) = self.pieces
        padded = math.ceil(piece.rows / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        return share(padded, shard.rank, shard.size, f"the padded rows of {piece.name!r}")[1]

    def _columns(self, shard: Shard) -> Span:
        if self.cut is not Cut.COLUMNS:
            return 0, self.tail[0]
        units, what = self.heads or self.tail[0], "heads" if self.heads else "columns"
        start, extent = share(units, shard.rank, shard.size, f"the {what} of {self.pieces[0].name!r}")
        unit = self.tail[0] // units
        return start * unit, extent * unit

    def _experts(self, shard: Shard) -> Span:
        return share(self.experts, shard.expert_rank, shard.expert_size, f"experts {self.pieces[0].name!r}")
