"""MicroBatch: a packed row on the device, in the form that the layers and the loss take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_dagger.config.training import LABEL_MULTIPLE
from megatron_dagger.training.data.packing import PackedRow
from megatron_dagger.training.megatron_config import Attention
from megatron_dagger.training.tree_attention import ROPE_TABLE_MULTIPLE, tree_params


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A packed row of s tokens on this rank's device, and the normaliser of its step.

    ``tokens`` and ``position_ids`` are (1, s) int64. ``label_places`` (k,) int64 are the places in the row whose target
    is a label token, and a few others; ``targets`` (1, k) int64 and ``weights`` (1, k) float32 are of those places. If
    ``label_places`` is None, both are (1, s).
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    packed: PackedSeqParams  # for the core attention
    label_places: torch.Tensor | None
    targets: torch.Tensor
    weights: torch.Tensor
    normaliser: float


def micro_batch(
    row: PackedRow, normaliser: float, device: torch.device, *, labels_only: bool, attention: Attention = "trees"
) -> MicroBatch:
    """Move ``row`` to ``device``; with ``labels_only`` the output layer gets the label places only."""
    chosen = _label_places(row.weights) if labels_only else np.arange(len(row.tokens))

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device).unsqueeze(0)

    return MicroBatch(
        tokens=put(row.tokens),
        position_ids=put(row.position_ids),
        packed=_packed(row, device, attention),
        label_places=torch.from_numpy(chosen).to(device) if labels_only else None,
        targets=put(row.targets[chosen]),
        weights=put(row.weights[chosen]),
        normaliser=normaliser,
    )


def _packed(row: PackedRow, device: torch.device, attention: Attention) -> PackedSeqParams:
    if attention == "segments":
        return _segments(row, device)
    params = tree_params(row, device)
    if attention == "blocks":
        from megatron_dagger.training.flex_attention import block_mask

        params.block_mask = block_mask(row, device)
    return params


def _segments(row: PackedRow, device: torch.device) -> PackedSeqParams:
    size, cu_seqlens = len(row.tokens), torch.from_numpy(row.trees).to(device)
    longest = int(np.diff(row.trees).max())
    padded = -(-longest // ROPE_TABLE_MULTIPLE) * ROPE_TABLE_MULTIPLE
    # If the RoPE table is as long as the row, Megatron assumes that positions continue from segment to segment.
    longest = padded if padded < size else longest
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _label_places(weights: np.ndarray) -> np.ndarray:
    """Return the places with a weight, and enough others, whose loss has weight zero, to round their number up."""
    labels = np.flatnonzero(weights)
    missing = -len(labels) % LABEL_MULTIPLE or (LABEL_MULTIPLE if not len(labels) else 0)
    return np.sort(np.concatenate([labels, np.flatnonzero(weights == 0)[:missing]]))
