"""Attention over trees with a block mask (FlexAttention), as the core attention of Transformer Engine's layers.

One kernel call computes a whole row. Blocks of 128 x 128 (query, key) pairs in which no query attends to any key are
skipped, blocks in which every query attends to every key need no mask, and in the other blocks each query's two ranges
of keys are compared. Attention itself is BF16, even if the linear layers are FP8. The kernel is compiled on a
GPU; on the CPU it has no backward pass and is only used by tests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_dagger.training.data.packing import PackedRow
from megatron_dagger.training.tree_attention import TreeAttention, TreeParams

BLOCK = 128  # places
_RECOMPILE_LIMIT = 32


class TreeFlexAttention(TreeAttention):
    """TreeAttention in one kernel call per row; the TreeParams must have a ``block_mask``."""

    def over_trees(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: TreeParams
    ) -> torch.Tensor:
        attended = _kernel(query.is_cuda)(
            *(x.permute(1, 2, 0, 3) for x in (query, key, value)),
            block_mask=params.block_mask,
            scale=self.softmax_scale,
            enable_gqa=key.size(2) != query.size(2),
        )
        attended = attended.permute(2, 0, 1, 3)
        return attended.reshape(attended.size(0), 1, -1)


@cache
def _kernel(compiled: bool) -> Any:
    """Return FlexAttention, compiled for rows of any length.

    Dynamo compiles it three times (for the first row's length, for a single block, for all other lengths), and as
    often again without gradients if layers are recomputed. Beyond its limit of 8 it would silently fall back to an
    implementation that holds all scores in memory: the limit is raised, and ``fullgraph`` makes exceeding it an error.
    """
    if not compiled:
        return flex_attention
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def block_mask(row: PackedRow, device: torch.device) -> BlockMask:
    """Return the BlockMask of a packed row: place i attends to start..prefix_stops[i]-1 and run_starts[i]..i."""
    partial, full = blocks(row)
    bounds = (np.repeat(row.trees[:-1], np.diff(row.trees)), row.prefix_stops, row.run_starts)
    start, prefix_stop, run_start = (torch.from_numpy(x.astype(np.int32)).to(device) for x in bounds)

    def attends(batch: Any, head: Any, query: Any, key: Any) -> Any:
        in_prefix = (key >= start[query]) & (key < prefix_stop[query])
        return in_prefix | ((key >= run_start[query]) & (key <= query))

    indices = [x for blocks_of_kind in (partial, full) for x in _kv_indices(blocks_of_kind, device)]
    return BlockMask.from_kv_blocks(
        *indices, BLOCK_SIZE=BLOCK, mask_mod=attends, seq_lengths=(len(row.tokens), len(row.tokens))
    )


def blocks(row: PackedRow) -> tuple[np.ndarray, np.ndarray]:
    """Return (partial, full), (n, n) bool each: where a block of queries attends to part, or all, of a block of keys.

    The places of one run within one block have the same prefix and run start, so it suffices to compare the first
    and the last of them.
    """
    size = len(row.tokens)
    count = -(-size // BLOCK)
    first = np.union1d(np.flatnonzero(np.diff(row.run_starts, prepend=-1)), np.arange(0, size, BLOCK))
    last = np.append(first[1:], size) - 1
    start = np.repeat(row.trees[:-1], np.diff(row.trees))[first, None]
    prefix_stop, run_start = row.prefix_stops[first, None], row.run_starts[first, None]
    low = np.arange(count)[None] * BLOCK
    high = np.minimum(low + BLOCK, size)
    run_any = (np.maximum(start, low) < np.minimum(prefix_stop, high)) | ((run_start < high) & (low <= last[:, None]))
    run_all = ((start <= low) & (high <= prefix_stop)) | ((run_start <= low) & (high <= first[:, None] + 1))
    first_run = np.searchsorted(first, low[0])  # of each block: runs are split at the blocks' bounds
    block_any, block_all = np.logical_or.reduceat(run_any, first_run), np.logical_and.reduceat(run_all, first_run)
    return block_any & ~block_all, block_all


def _kv_indices(chosen: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each query block's number of chosen key blocks (1, 1, n) and their indices (1, 1, n, n), int32."""
    order = np.argsort(~chosen, axis=1, kind="stable")  # the chosen ones come first
    counts, indices = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (chosen.sum(1), order))
    return counts[None, None], indices[None, None]
