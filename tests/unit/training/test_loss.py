"""The weighted loss of one micro-batch, and the normaliser that it shares with the others of its step."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from megatron_dagger.training.batch import micro_batch
from megatron_dagger.training.loss import weighted_loss
from tests.unit.training.sample_rows import dataset

CPU = torch.device("cpu")


def token_losses(logits, batch):
    chosen = logits if batch.label_places is None else logits[:, batch.label_places]
    return functional.cross_entropy(chosen[0], batch.targets[0], reduction="none")[None]


@pytest.mark.parametrize("labels_only", [True, False])
def test_micro_batches_add_up_to_the_weighted_mean(labels_only):
    data = dataset()
    total, weights = 0.0, 0.0
    sums = torch.zeros(())
    for index in range(len(data.rows)):
        row = data.row(index)
        logits = torch.from_numpy(np.random.default_rng(index).normal(size=(1, 32, 60))).float()
        batch = micro_batch(row, float(data.row_weights.sum()), CPU, labels_only=labels_only)
        loss, count, _ = weighted_loss(token_losses(logits, batch), batch)
        sums += loss
        assert int(count) == data.row_label_tokens[index]
        ce = functional.cross_entropy(logits[0], torch.from_numpy(row.targets), reduction="none").numpy()
        total += float((ce * row.weights).sum())
        weights += float(row.weights.sum())
    assert float(sums) == pytest.approx(total / weights, rel=1e-5)


@pytest.mark.parametrize("labels_only", [True, False])
def test_a_micro_batch_without_labels_is_zero_and_has_a_zero_gradient(labels_only):
    batch = micro_batch(dataset().row(-1), 5.0, CPU, labels_only=labels_only)
    logits = torch.randn(1, 32, 60, requires_grad=True)
    loss, count, _ = weighted_loss(token_losses(logits, batch), batch)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert int(count) == 0
    assert logits.grad is not None
    assert not logits.grad.any()
