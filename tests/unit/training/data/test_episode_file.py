"""The file of labelled episodes."""

import numpy as np

from megatron_dagger.training.data.episode_file import load_episodes, save_episodes
from megatron_dagger.types import LabelledEpisode, StateLabel


def test_episodes_are_unchanged_after_a_round_trip_through_their_file(tmp_path):
    rng = np.random.default_rng(0)
    episodes = []
    for labels in (2, 0, 1):
        tokens = rng.integers(0, 9, 12).astype(np.int32)
        episode_labels = tuple(StateLabel(position=3 + i, tokens=tokens[:2], weight=0.3 + i) for i in range(labels))
        episodes.append(LabelledEpisode(tokens=tokens, labels=episode_labels))
    save_episodes(tmp_path / "e.npz", episodes)
    loaded_episodes = load_episodes(tmp_path / "e.npz")
    assert len(loaded_episodes) == 3
    for loaded, saved in zip(loaded_episodes, episodes, strict=True):
        assert np.array_equal(loaded.tokens, saved.tokens)
        assert [(x.position, x.weight, list(x.tokens)) for x in loaded.labels] == [
            (x.position, x.weight, list(x.tokens)) for x in saved.labels
        ]
