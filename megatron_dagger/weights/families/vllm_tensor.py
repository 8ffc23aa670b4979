"""vLLM's side of a family: how its parameters are made of canonical (Hugging Face) tensors.

From the sources of vLLM 0.32 (``model_executor/``), before ``process_weights_after_loading`` packs the parameters for
a device:

- ``QKVParallelLinear`` and ``MergedColumnParallelLinear`` (``layers/linear.py``) stack a rank's rows of Q, K and V, or
  of gate and up. Q, K and V are split by heads. With more ranks than KV heads, each KV head is replicated on
  ``tp / heads`` consecutive ranks.
- ``RowParallelLinear`` splits columns. ``ReplicatedLinear`` (the router) and norms are replicated.
- ``VocabParallelEmbedding`` and ``ParallelLMHead`` (``layers/vocab_parallel_embedding.py``) pad the vocabulary with
  zero rows to a multiple of 64 and split the result.
- ``RoutedExperts`` (``layers/fused_moe/``) stacks the rank's experts in a leading dimension: ``w13_weight`` holds gate
  above up, ``w2_weight`` holds down. With expert parallelism a rank has consecutive whole experts (``linear``
  placement), otherwise a shard of the rows or columns of every expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dagger.config.model import VLLM_VOCAB_MULTIPLE
from megatron_dagger.weights.blocks import Block, Box, Shard, ShardDim, Span, share
from megatron_dagger.weights.families.megatron_tensor import Shape


@dataclass(frozen=True, kw_only=True)
class StackedPart:
    """A canonical tensor of ``rows`` rows in a parameter.

    ``heads``: the rows are split only between heads of equal size. ``replicated``: with more ranks than heads, several
    ranks hold the same head.
    """

    name: str
    rows: int
    heads: int | None = None
    replicated: bool = False

    def share(self, rank: int, size: int) -> Span:
        """Return the rank's rows. Raises WeightMapError if the ranks' shares are not equal."""
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
class VllmTensor:
    """The parts of a vLLM parameter, stacked along the rows. Tensor parallelism splits each part separately.

    ``tail`` is the shape after the rows. ``heads``: columns are split only between heads of equal size. ``padded``:
    zero rows are appended. ``experts``: if not 0, the number of experts stacked in a leading dimension; the parts'
    names contain ``{}`` in place of the expert's number.
    """

    parts: tuple[StackedPart, ...]
    tail: Shape = ()
    shard_dim: ShardDim = ShardDim.NONE
    heads: int | None = None
    padded: bool = False
    experts: int = 0

    def shape(self, shard: Shard) -> Shape:
        """Return the shape of the parameter on a rank with this shard."""
        rows = self._padded_rows(shard) if self.padded else sum(self._rows(part, shard)[1] for part in self.parts)
        shape = (rows, *self._columns(shard)[1:]) if self.tail else (rows,)
        return (self._experts(shard)[1], *shape) if self.experts else shape

    def blocks(self, shard: Shard) -> list[Block]:
        """Return the blocks that make up the rank's parameter, in the order of its rows.

        Raises WeightMapError if the parameter does not split into equal shards.
        """
        blocks, row = [], 0
        columns = self._columns(shard) if self.tail else None
        experts = self._experts(shard) if self.experts else None
        for part in self.parts:
            rows = self._rows(part, shard)
            if rows[1] > 0:  # otherwise the shard is all padding
                blocks.append(Block.of(part.name, rows, row, columns, experts))
                row += rows[1]
        return blocks

    def padding(self, shard: Shard) -> Box | None:
        """Return the box of zero rows at the end of the rank's parameter, or None."""
        if not self.padded:
            return None
        rows, *columns = self.shape(shard)
        used = sum(block.canonical.shape[0] for block in self.blocks(shard))
        if used == rows:
            return None
        return Box((used, *(0 for _ in columns)), (rows - used, *columns))

    def _rows(self, part: StackedPart, shard: Shard) -> Span:
        if self.padded:
            rows = self._padded_rows(shard)
            start = shard.rank * rows
            return start, min(start + rows, part.rows) - start
        return part.share(shard.rank, shard.size) if self.shard_dim is ShardDim.ROWS else (0, part.rows)

    def _padded_rows(self, shard: Shard) -> int:
        (part,) = self.parts
        padded = math.ceil(part.rows / VLLM_VOCAB_MULTIPLE) * VLLM_VOCAB_MULTIPLE
        return share(padded, shard.rank, shard.size, f"the padded rows of {part.name!r}")[1]

    def _columns(self, shard: Shard) -> Span:
        if self.shard_dim is not ShardDim.COLUMNS:
            return 0, self.tail[0]
        units, what = self.heads or self.tail[0], "heads" if self.heads else "columns"
        start, extent = share(units, shard.rank, shard.size, f"the {what} of {self.parts[0].name!r}")
        unit = self.tail[0] // units
        return start * unit, extent * unit

    def _experts(self, shard: Shard) -> Span:
        return share(self.experts, shard.expert_rank, shard.expert_size, f"experts {self.parts[0].name!r}")
