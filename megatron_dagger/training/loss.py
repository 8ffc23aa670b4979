"""Token-weighted cross-entropy, normalised over the global batch, on the label positions only.

The loss of a step is ``sum(w * ce) / sum(w)`` over the label tokens of all micro-batches on all ranks.
The normaliser is known before the step (see ``batches``), so each micro-batch divides by it at once:
results do not depend on how rows are packed or spread, weights may be fractions (Megatron counts
tokens in integers), and a micro-batch without any label contributes zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_dagger.training import local_modules
from megatron_dagger.training.data.packing import PackedRow
from megatron_dagger.training.model import Attention, bare

_ROUND_POSITIONS = 8  # label positions are filled up to a multiple, which GEMMs like


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A packed row on this rank's device, and the normaliser of its step.

    ``positions`` (k,) are where a target is a label token; ``targets`` and ``weights`` (1, k) are
    those positions' only. With ``positions`` None they are (1, s), all of them.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    packed: Any
    positions: torch.Tensor | None
    targets: torch.Tensor
    weights: torch.Tensor
    normaliser: float


def micro_batch(
    row: PackedRow, normaliser: float, device: torch.device, *, select: bool, attention: Attention = "trees"
) -> MicroBatch:
    """Move a row to the device.

    ``select`` keeps only the label positions for the output layer; ``attention``: what the layers' takes.
    """
    where = _label_positions(row.weights) if select else np.arange(len(row.tokens))

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device).unsqueeze(0)

    return MicroBatch(
        tokens=put(row.tokens),
        position_ids=put(row.position_ids),
        packed=_packed(row, device, attention),
        positions=torch.from_numpy(where).to(device) if select else None,
        targets=put(row.targets[where]),
        weights=put(row.weights[where]),
        normaliser=normaliser,
    )


def _packed(row: PackedRow, device: torch.device, attention: Attention) -> PackedSeqParams:
    if attention == "segments":
        return _segments(row, device)
    params = local_modules.tree_params(row, device)
    if attention == "blocks":
        from megatron_dagger.training.flex_attention import block_mask

        params.block_mask = block_mask(row, device)
    return params


def _segments(row: PackedRow, device: torch.device) -> PackedSeqParams:
    size, cu_seqlens = len(row.tokens), torch.from_numpy(row.trees).to(device)
    longest = int(np.diff(row.trees).max())
    padded = -(-longest // local_modules.ROUND_TABLE) * local_modules.ROUND_TABLE
    # Megatron takes a RoPE table as long as the row for positions that run on across segments.
    longest = padded if padded < size else longest
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _label_positions(weights: np.ndarray) -> np.ndarray:
    """Where the weights are not zero, filled up with other positions (their loss is weighted zero)."""
    labels = np.flatnonzero(weights)
    missing = -len(labels) % _ROUND_POSITIONS or (_ROUND_POSITIONS if not len(labels) else 0)
    return np.sort(np.concatenate([labels, np.flatnonzero(weights == 0)[:missing]]))


class LabelLogits:
    """Two corrections of a model chunk's output layer, as hooks on it.

    It computes the logits of ``positions`` only (all, where that is None): most of an agent's episode
    is no label, and its logits would be multiplied by zero. And the rows that pad the vocabulary get
    no probability, as in every engine that serves the model; Megatron would let them take part.
    """

    def __init__(self, chunk: Any, vocab_size: int) -> None:
        self.positions: torch.Tensor | None = None
        head = bare(chunk).output_layer
        here = bare(chunk).vocab_size // parallel_state.get_tensor_model_parallel_world_size()
        self.real_columns = min(max(0, vocab_size - here * parallel_state.get_tensor_model_parallel_rank()), here)
        head.register_forward_pre_hook(self._select)
        if self.real_columns < here:
            head.register_forward_hook(self._mask_padding)

    def _select(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        return (hidden if self.positions is None else hidden[self.positions], *rest)

    def _mask_padding(self, module: torch.nn.Module, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        logits, *rest = output
        padding = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        padding[self.real_columns :] = torch.finfo(logits.dtype).min / 2
        return (logits + padding, *rest)


def forward_step(selectors: dict[int, LabelLogits]) -> Callable[[Iterator[MicroBatch], Any], Any]:
    """Megatron's forward step; ``selectors`` has the LabelLogits of the chunks with an output layer."""

    def step(batches: Iterator[MicroBatch], chunk: Any) -> Any:
        batch = next(batches)
        selector = selectors.get(id(bare(chunk)))
        if selector is not None:
            selector.positions = batch.positions
        losses = chunk(batch.tokens, batch.position_ids, None, labels=batch.targets, packed_seq_params=batch.packed)
        return losses, lambda output: weighted_loss(output, batch)

    return step


def weighted_loss(losses: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """This micro-batch's part of the step's loss, in the form that Megatron's schedules take."""
    loss = (losses.float() * batch.weights).sum() / batch.normaliser
    count = torch.count_nonzero(batch.weights).to(torch.int)
    return loss, count, {"loss": loss.detach()}
