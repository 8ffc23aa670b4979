"""A packed row as a micro-batch: the label positions, and the RoPE table's length."""

import numpy as np
import pytest
import torch

from megatron_dagger.training.batch import micro_batch
from megatron_dagger.training.data.packing import pack
from megatron_dagger.types import LabelledEpisode, StateLabel
from tests.unit.training.sample_rows import dataset

CPU = torch.device("cpu")


def test_selected_positions_hold_every_label_and_their_number_is_rounded_up():
    data = dataset()
    for index in range(len(data.rows)):
        row = data.row(index)
        batch = micro_batch(row, 1.0, CPU, labels_only=True)
        assert batch.label_places is not None
        chosen = batch.label_places.numpy()
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
