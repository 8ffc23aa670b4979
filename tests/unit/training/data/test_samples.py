"""From an episode to samples: the trunk, its branches, and where it is cut."""

import numpy as np
import pytest

from megatron_dagger.training.data.samples import build_samples, separated
from megatron_dagger.types import LabelledEpisode, StateLabel


def test_tokens_behind_the_last_label_are_cut():
    tokens = np.arange(20, dtype=np.int32)
    episode = LabelledEpisode(tokens=tokens, labels=(StateLabel(position=5, tokens=tokens[5:8]),))
    (sample,), dropped = build_samples(episode, 48)
    assert list(sample.trunk) == list(range(8))
    assert (sample.length, sample.weight, dropped) == (7, 3.0, 0)


def test_a_label_that_runs_past_the_episodes_end_is_a_branch():
    tokens = np.arange(6, dtype=np.int32)
    label = StateLabel(position=4, tokens=np.array([4, 5, 6], np.int32))
    episode = LabelledEpisode(tokens=tokens, labels=(label,))
    (sample,), _ = build_samples(episode, 48)
    assert (list(sample.trunk), sample.branches, sample.length) == ([0, 1, 2, 3], (label,), 6)
    (alone,) = separated(sample)
    assert (list(alone.trunk), alone.branches) == ([0, 1, 2, 3, 4, 5, 6], ())


def test_two_labels_of_the_same_tokens_add_their_weights():
    tokens = np.arange(6, dtype=np.int32)
    labels = tuple(StateLabel(position=3, tokens=tokens[3:], weight=w) for w in (0.25, 0.5))
    (sample,), _ = build_samples(LabelledEpisode(tokens=tokens, labels=labels), 48)
    assert list(sample.trunk_weights()) == [0, 0, 0, 0.75, 0.75, 0.75]
    assert sample.weight == pytest.approx(sample.trunk_weights().sum())


@pytest.mark.parametrize("position", [0, 7, -1])
def test_a_label_outside_the_episode_is_an_error_that_names_it(position):
    label = StateLabel(position=position, tokens=np.array([1], np.int32))
    with pytest.raises(ValueError, match=f"position {position} of an episode of 6 tokens"):
        build_samples(LabelledEpisode(tokens=np.arange(6, dtype=np.int32), labels=(label,)), 48)
