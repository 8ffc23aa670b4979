"""RMSNorm, RoPE and core attention for Megatron's local layer spec: the CPU, and fp32 on a GPU.

Megatron's own local norm refuses sequence parallelism, its local attention refuses packed rows, and its
RoPE knows no positions but those counted from a segment's start. These take all that. Transformer
Engine's modules are used wherever it runs (see ``model``).
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

ROUND_TABLE = 64  # lets Megatron's RoPE table be reused between rows


class RMSNorm(torch.nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, as Qwen3 has it."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Tells Megatron that each tensor-parallel rank has the gradient of its own tokens only.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        if torch.cuda.is_available() and not config.use_cpu_initialization:
            self.weight.data = self.weight.data.cuda()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class TokenRope:
    """Turns each token by its own position: hooks on a GPTModel and its RoPE table.

    A branch's positions go on from its prefix, wherever in the row it stands.
    """

    def __init__(self, model: Any) -> None:
        self._positions: torch.Tensor | None = None
        model.register_forward_pre_hook(self._remember)
        model.rotary_pos_emb.register_forward_hook(self._gather)

    def _remember(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self._positions = args[1][0]  # position_ids (1, s)

    def _gather(self, module: torch.nn.Module, args: Any, table: Any) -> Any:
        if isinstance(table, tuple):  # YaRN's comes with the scale of its sines and cosines
            return table[0][self._positions], table[1]
        return table[self._positions]


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The tokens of a trunk; of each branch, how many of these it sees and how many it has itself."""

    trunk: int
    branches: tuple[tuple[int, int], ...]

    @property
    def runs(self) -> list[int]:
        """The tokens of the trunk and of each branch, as they stand in the row."""
        return [self.trunk, *(own for _, own in self.branches)]


@dataclass
class TreeParams(PackedSeqParams):
    """What the layers are told of a packed row: its trees, in order, and what masks their branches.

    The keys of a branch are its own, the last first, and then those of its prefix. What is added to the
    scores of its place i is -inf for the first own - 1 - i of them, and 0 for the others: each place's is
    the one before moved on by one, so that the masks of all branches are views of one vector, ``ramp``
    (``longest`` - 1 times -inf, then s times 0).
    """

    trees: tuple[Tree, ...] = ()
    longest: int = 1  # branch
    ramp: torch.Tensor | None = None
    block_mask: Any = None  # FlexAttention's, where that attends

    def mask(self, seen: int, own: int, dtype: torch.dtype) -> torch.Tensor:
        """(own, own + seen), for a branch of ``own`` tokens that sees ``seen`` of its trunk."""
        assert self.ramp is not None
        view = self.ramp.to(dtype).as_strided((own, own + seen), (1, 1), self.longest - own)
        return view.contiguous() if view.is_cuda else view  # the CUDA kernels want aligned rows


def tree_params(row: PackedRow, device: torch.device) -> TreeParams:
    """The TreeParams of a packed row."""
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
    positions = -(-(int(row.position_ids.max()) + 1) // ROUND_TABLE) * ROUND_TABLE
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

    Takes query (s, 1, heads, d) and key, value (s, 1, groups, d) with TreeParams; returns
    (s, 1, heads x d). One kernel call for each trunk and each branch, over exactly the keys that it
    sees: nothing is computed between trees, or between branches.
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
        # Split once: the gradient of many slices would be as many tensors of the whole row.
        sizes = [size for tree in params.trees for size in tree.runs]
        runs = zip(*(x.permute(1, 2, 0, 3).split(sizes, dim=2) for x in (query, key, value)), strict=True)
        parts = []
        for tree in params.trees:
            q, *trunk = next(runs)
            parts.append(self._attend(q, *trunk, mask=None))
            for seen, own in tree.branches:
                q, *branch = next(runs)
                keys = [torch.cat([x.flip(2), y[:, :, :seen]], dim=2) for x, y in zip(branch, trunk, strict=True)]
                parts.append(self._attend(q, *keys, mask=params.mask(seen, own, q.dtype)))
        attended = torch.cat(parts, dim=2).permute(2, 0, 1, 3)
        return attended.reshape(attended.size(0), 1, -1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        )

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {}
