"""A packed row as a micro-batch: the label positions, and the RoPE table's length."""

import numpy as np
import pytest
import torch

from megatron_dagger.training.batch import micro_batch
from megatron_dagger.training.data.packing import pack
from megatron_dagger.types import LabelledEpisode, StateLabel

CPU = torch.device("cpu")


def dataset(weights=(1.0, 0.25, 1.5)):
    rng = np.random.default_rng(0)
    episodes = []
    for weight in weights:
        tokens = rng.integers(0, 50, 20).astype(np.int32)
        branch = StateLabel(position=6, tokens=rng.integers(50, 60, 3).astype(np.int32), weight=weight / 3)
        episodes.append(
            LabelledEpisode(tokens=tokens, labels=(StateLabel(position=8, tokens=tokens[8:13], weight=weight), branch))
        )
    return pack(episodes, 32)


def test_selected_positions_hold_every_label_and_their_number_is_rounded_up():
    data = dataset()
    for index in range(len(data.rows)):
        row = data.row(index)
        batch = micro_batch(row, 1.0, CPU, labels_only=True)
        assert batch.positions is not None
        chosen = batch.positions.numpy()
        assert set(np.flatnonzero(row.weights)) <= set(chosen)
        assert len(chosen) % 8 == 0
        assert np.array_equal(batch.targets.numpy()[0], row.targets[chosen])
        assert float(batch.weights.sum()) == pytest.approx(float(row.weights.sum()))


def test_the_rope_table_is_never_as_long_as_a_row_of_several_segments():
    """Megatron takes such a table for positions that run on from segment to segment."""
    for length in (3, 31, 32, 60, 100, 120):
        tokens = np.arange(length, dtype=np.int32) % 50
        label = StateLabel(position=length - 1, tokens=tokens[length - 1 :])
        data = pack([LabelledEpisode(tokens=tokens, labels=(label,))], 128)
        batch = micro_batch(data.row(0), 1.0, CPU, labels_only=True, attention="segments")
        assert length - 1 <= batch.packed.max_seqlen_q < 128
