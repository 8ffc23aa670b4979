"""Attention and RoPE over packed rows of trees.

``TreeAttention`` is the core attention of Megatron's local layers. ``flex_attention`` does the same for Transformer
Engine's layers, from the same ``TreeParams``. ``TokenRope`` serves both.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional

from megatron_dagger.training.data.packing import PackedRow

ROPE_TABLE_MULTIPLE = 64  # table lengths are rounded up to it, so Megatron's cached table serves more rows


class TokenRope:
    """Hooks on a GPTModel and its RoPE table that rotate each token by its own position.

    Megatron rotates by the place in the row. A branch's positions continue from its prefix, wherever in the row the
    branch stands.
    """

    def __init__(self, model: Any) -> None:
        self._positions: torch.Tensor | None = None
        model.register_forward_pre_hook(self._remember)
        model.rotary_pos_emb.register_forward_hook(self._gather)

    def _remember(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self._positions = args[1][0]  # position_ids (1, s)

    def _gather(self, module: torch.nn.Module, args: Any, table: Any) -> Any:
        if isinstance(table, tuple):  # YaRN's table comes with the scale of its sines and cosines
            return table[0][self._positions], table[1]
        return table[self._positions]


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The shape of a tree: the trunk's tokens and, for each branch, (prefix tokens it attends to, own tokens)."""

    trunk: int
    branches: tuple[tuple[int, int], ...]

    @property
    def runs(self) -> list[int]:
        """The tokens of the trunk and of each branch, in the order of the row."""
        return [self.trunk, *(own for _, own in self.branches)]


@dataclass
class TreeParams(PackedSeqParams):
    """What the attention layers need to know of a packed row: its trees in order, and the masks of their branches.

    A branch attends to its own tokens (reversed) followed by its prefix. In that order row i of the causal mask is
    ``[-inf] * (own - 1 - i) + [0] * ...``: every row is the previous one shifted by one. All masks are therefore
    strided views of a single vector, ``ramp = [-inf] * (longest - 1) + [0] * s``; no mask is materialised.
    """

    trees: tuple[Tree, ...] = ()
    longest: int = 1  # tokens of the longest branch
    ramp: torch.Tensor | None = None  # (longest - 1 + s,) float32
    block_mask: Any = None  # FlexAttention's BlockMask, if that computes the attention

    def mask(self, seen: int, own: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the additive mask (own, own + seen) of a branch of ``own`` tokens with a prefix of ``seen``."""
        assert self.ramp is not None, "tree_params sets the ramp"
        view = self.ramp.to(dtype).as_strided((own, own + seen), (1, 1), self.longest - own)
        return view.contiguous() if view.is_cuda else view  # the CUDA kernels want aligned rows


def tree_params(row: PackedRow, device: torch.device) -> TreeParams:
    """Return the TreeParams of a packed row, without a block mask."""
    trees = []
    for start, stop in itertools.pairwise(row.trees.tolist()):
        starts = np.unique(row.run_starts[start:stop])
        (_, trunk), *branches = zip(
            (row.prefix_stops[starts] - start).tolist(), np.diff(starts, append=stop).tolist(), strict=True
        )
        trees.append(Tree(trunk=trunk, branches=tuple(branches)))
    longest = max((own for tree in trees for _, own in tree.branches), default=1)
    ramp = torch.zeros(longest - 1 + len(row.tokens), device=device)
    ramp[: longest - 1] = -math.inf
    positions = -(-(int(row.position_ids.max()) + 1) // ROPE_TABLE_MULTIPLE) * ROPE_TABLE_MULTIPLE
    return TreeParams(
        qkv_format="sbhd",
        max_seqlen_q=positions,
        max_seqlen_kv=positions,
        trees=tuple(trees),
        longest=longest,
        ramp=ramp,
    )


class TreeAttention(MegatronModule):
    """Attention within each tree of a packed row, by PyTorch's fused kernel.

    Takes query (s, 1, heads, d) and key, value (s, 1, groups, d) with TreeParams; returns (s, 1, heads x d). One
    kernel call per trunk and per branch, over exactly the keys that its tokens attend to: no score between two trees
    or two branches is computed.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        assert isinstance(packed_seq_params, TreeParams), "rows are always packed"
        return self.over_trees(query, key, value, packed_seq_params)

    def over_trees(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: TreeParams
    ) -> torch.Tensor:
        """Return the attention output of all trees, with shapes as for the class."""
        # Split once: each slice's gradient would be a tensor of the whole row.
        sizes = [size for tree in params.trees for size in tree.runs]
        runs = zip(*(x.permute(1, 2, 0, 3).split(sizes, dim=2) for x in (query, key, value)), strict=True)
        outputs = []
        for tree in params.trees:
            q, *trunk = next(runs)
            outputs.append(self._attend(q, *trunk, mask=None))
            for seen, own in tree.branches:
                q, *branch = next(runs)
                keys = [torch.cat([x.flip(2), y[:, :, :seen]], dim=2) for x, y in zip(branch, trunk, strict=True)]
                outputs.append(self._attend(q, *keys, mask=params.mask(seen, own, q.dtype)))
        attended = torch.cat(outputs, dim=2).permute(2, 0, 1, 3)
        return attended.reshape(attended.size(0), 1, -1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        )

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Return nothing: core attention has no parameters."""
        return {}
