"""A row's FLOPs, against a count by hand."""

import numpy as np

from megatron_dagger.config import ModelConfig
from megatron_dagger.training.data.flops import row_flops
from megatron_dagger.training.data.packing import pack
from megatron_dagger.types import LabelledEpisode, StateLabel


def test_attention_is_counted():
    tokens = np.arange(64, dtype=np.int32)
    whole = LabelledEpisode(tokens=tokens, labels=(StateLabel(position=63, tokens=tokens[63:]),))
    half = LabelledEpisode(tokens=tokens[:33], labels=(StateLabel(position=32, tokens=tokens[32:33]),))
    model = ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=16, kv_channels=4, num_attention_heads=2)
    (long,), (short,) = (row_flops(pack([episode], 64), model) for episode in (whole, half))
    matrices = 8 * (2 * 8 + 2 * 8 + 3 * 16)
    head = 6 * 8 * model.vocab_size
    assert long == 6 * 63 * matrices + 12 * 8 * (63 * 64 / 2) + head
    assert short == 6 * 32 * matrices + 12 * 8 * (32 * 33 / 2) + head
