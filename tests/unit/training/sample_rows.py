"""Packed rows of a few small labelled episodes."""

import numpy as np

from megatron_dagger.training.data.packing import PackedDataset, pack
from megatron_dagger.types import LabelledEpisode, StateLabel


def dataset(weights: tuple[float, ...] = (1.0, 0.25, 1.5)) -> PackedDataset:
    """Return rows of 32 tokens with an episode per weight, each with a label on the trunk and a branch."""
    rng = np.random.default_rng(0)
    episodes = []
    for weight in weights:
        tokens = rng.integers(0, 50, 20).astype(np.int32)
        branch = StateLabel(position=6, tokens=rng.integers(50, 60, 3).astype(np.int32), weight=weight / 3)
        episodes.append(
            LabelledEpisode(tokens=tokens, labels=(StateLabel(position=8, tokens=tokens[8:13], weight=weight), branch))
        )
    return pack(episodes, 32)
