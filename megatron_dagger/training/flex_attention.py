"""Attention over trees by a block mask (FlexAttention), in the place of Transformer Engine's.

One kernel call for a whole row: blocks of 128 x 128 places that see nothing of each other are left out,
those that see all of each other need no mask, and in the others each place's own two ranges of keys are
compared. Layers are Transformer Engine's otherwise, and their linears FP8; attention itself is BF16.
The kernel is compiled on a GPU. On the CPU, where it has no backward pass, it only serves to be tested.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_dagger.training.data.packing import PackedRow
from megatron_dagger.training.local_modules import TreeAttention, TreeParams

BLOCK = 128
_MOST_COMPILED = 32


class TreeFlexAttention(TreeAttention):
    """As TreeAttention; the TreeParams must have a ``block_mask``."""

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
    """FlexAttention; compiled for rows of all lengths.

    Three times, in fact (the first row's length, one block alone, all others), and as often again without
    gradients, where layers are recomputed: two short of what Dynamo allows, beyond which it silently computes
    with all scores in memory. Hence the limit, and an error beyond it.
    """
    if not compiled:
        return flex_attention
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_COMPILED)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def block_mask(row: PackedRow, device: torch.device) -> BlockMask:
    """The BlockMask of a packed row: place i sees start..prefix_stops[i]-1 and run_starts[i]..i."""
    partial, full = blocks(row)
    bounds = (np.repeat(row.trees[:-1], np.diff(row.trees)), row.prefix_stops, row.run_starts)
    start, prefix_stop, run_start = (torch.from_numpy(x.astype(np.int32)).to(device) for x in bounds)

    def sees(batch: Any, head: Any, place: Any, other: Any) -> Any:
        in_prefix = (other >= start[place]) & (other < prefix_stop[place])
        return in_prefix | ((other >= run_start[place]) & (other <= place))

    counted = [x for some in (partial, full) for x in _counted(some, device)]
    return BlockMask.from_kv_blocks(
        *counted, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(len(row.tokens), len(row.tokens))
    )


def blocks(row: PackedRow) -> tuple[np.ndarray, np.ndarray]:
    """Of which blocks of places (rows) see some, and which all, of which blocks (columns): (n, n) bool each.

    Places of one run within one block see the same prefix and begin at the same place, so it is enough to look
    at the first and the last of them.
    """
    size = len(row.tokens)
    count = -(-size // BLOCK)
    first = np.union1d(np.flatnonzero(np.diff(row.run_starts, prepend=-1)), np.arange(0, size, BLOCK))
    last = np.append(first[1:], size) - 1
    start = np.repeat(row.trees[:-1], np.diff(row.trees))[first, None]
    prefix_stop, run_start = row.prefix_stops[first, None], row.run_starts[first, None]
    low = np.arange(count)[None] * BLOCK
    high = np.minimum(low + BLOCK, size)
    some = (np.maximum(start, low) < np.minimum(prefix_stop, high)) | ((run_start < high) & (low <= last[:, None]))
    every = ((start <= low) & (high <= prefix_stop)) | ((run_start <= low) & (high <= first[:, None] + 1))
    block = np.searchsorted(first, low[0])  # where a block's runs begin: each block begins one
    any_of, all_of = np.logical_or.reduceat(some, block), np.logical_and.reduceat(every, block)
    return any_of & ~all_of, all_of


def _counted(chosen: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each block of queries has, (1, 1, n), and which, first of all, (1, 1, n, n); int32."""
    order = np.argsort(~chosen, axis=1, kind="stable")
    counts, indices = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (chosen.sum(1), order))
    return counts[None, None], indices[None, None]
