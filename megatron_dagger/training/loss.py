"""Token-weighted cross-entropy, normalised over the global batch.

The loss of a step is ``sum(w * ce) / sum(w)`` over the label tokens of all micro-batches on all ranks. The normaliser
is known before the step (the sum of the batch's label weights), so each micro-batch divides by it at once. Hence the
loss does not depend on how rows are packed or distributed, weights may be fractions (Megatron counts tokens in
integers), and a micro-batch without a label contributes zero.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_dagger.training.batch import MicroBatch


def weighted_loss(losses: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Return this micro-batch's part of the step's loss, in the form that Megatron's schedules take.

    ``losses`` are the cross-entropies of ``batch.targets``, of the same shape. The result is (scalar loss, number of
    label tokens, metrics).
    """
    loss = (losses.float() * batch.weights).sum() / batch.normaliser
    count = torch.count_nonzero(batch.weights).to(torch.int)
    return loss, count, {"loss": loss.detach()}
