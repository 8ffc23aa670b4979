"""The weighted loss of one micro-batch, and what it shares with the others of its step."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from megatron_dagger.training.data.packing import pack
from megatron_dagger.training.loss import micro_batch, weighted_loss
from megatron_dagger.types import LabelledEpisode, StateLabel

CPU = torch.device("cpu")


def dataset(weights=(1.0, 0.25, 1.5)):
    rng = np.random.default_rng(0)
    made = []
    for weight in weights:
        tokens = rng.integers(0, 50, 20).astype(np.int32)
        branch = StateLabel(position=6, tokens=rng.integers(50, 60, 3).astype(np.int32), weight=weight / 3)
        made.append(
            LabelledEpisode(tokens=tokens, labels=(StateLabel(position=8, tokens=tokens[8:13], weight=weight), branch))
        )
    return pack(made, 32)


def token_losses(logits, batch):
    chosen = logits if batch.positions is None else logits[:, batch.positions]
    return functional.cross_entropy(chosen[0], batch.targets[0], reduction="none")[None]


@pytest.mark.parametrize("select", [True, False])
def test_micro_batches_add_up_to_the_weighted_mean(select):
    data = dataset()
    total, weights = 0.0, 0.0
    sums = torch.zeros(())
    for index in range(len(data.rows)):
        row = data.row(index)
        logits = torch.from_numpy(np.random.default_rng(index).normal(size=(1, 32, 60))).float()
        batch = micro_batch(row, float(data.row_weights.sum()), CPU, select=select)
        loss, count, _ = weighted_loss(token_losses(logits, batch), batch)
        sums += loss
        assert int(count) == data.row_label_tokens[index]
        ce = functional.cross_entropy(logits[0], torch.from_numpy(row.targets), reduction="none").numpy()
        total += float((ce * row.weights).sum())
        weights += float(row.weights.sum())
    assert float(sums) == pytest.approx(total / weights, rel=1e-5)


def test_selected_positions_hold_every_label_and_their_number_is_rounded_up():
    data = dataset()
    for index in range(len(data.rows)):
        row = data.row(index)
        batch = micro_batch(row, 1.0, CPU, select=True)
        assert batch.positions is not None
        chosen = batch.positions.numpy()
        assert set(np.flatnonzero(row.weights)) <= set(chosen)
        assert len(chosen) % 8 == 0
        assert np.array_equal(batch.targets.numpy()[0], row.targets[chosen])
        assert float(batch.weights.sum()) == pytest.approx(float(row.weights.sum()))


@pytest.mark.parametrize("select", [True, False])
def test_a_micro_batch_without_labels_is_zero_and_has_a_zero_gradient(select):
    batch = micro_batch(dataset().row(-1), 5.0, CPU, select=select)
    logits = torch.randn(1, 32, 60, requires_grad=True)
    loss, count, _ = weighted_loss(token_losses(logits, batch), batch)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert int(count) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_the_rope_table_is_never_as_long_as_a_row_of_several_segments():
    """Megatron takes such a table for positions that run on from segment to segment."""
    for length in (3, 31, 32, 60, 100, 120):
        tokens = np.arange(length, dtype=np.int32) % 50
        label = StateLabel(position=length - 1, tokens=tokens[length - 1 :])
        data = pack([LabelledEpisode(tokens=tokens, labels=(label,))], 128)
        batch = micro_batch(data.row(0), 1.0, CPU, select=True, attention="segments")
        assert length - 1 <= batch.packed.max_seqlen_q < 128
