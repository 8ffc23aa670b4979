"""Synthetic labelled episodes with the lengths of agent runs, for benchmarks and checks of training."""

from __future__ import annotations

import numpy as np

from megatron_dagger.types import LabelledEpisode, StateLabel


def make(count: int, *, seed: int, vocab_size: int, longest: int, branches: float = 0.1) -> list[LabelledEpisode]:
    """Return ``count`` episodes of ``longest`` / 12 to ``longest`` tokens, most of them short.

    A turn is an observation of 15 to 80 tokens and an action of 12 to 32. Every turn has a label; a share ``branches``
    of the labels differs from the executed action. The tokens follow a noisy rule that a small model learns in a few
    hundred steps, so losses fall.
    """
    rng = np.random.default_rng(seed)
    return [_episode(rng, vocab_size, longest, branches) for _ in range(count)]


def _episode(rng: np.random.Generator, vocab_size: int, longest: int, branches: float) -> LabelledEpisode:
    length = int(np.clip(rng.lognormal(np.log(longest / 4), 0.7), longest / 12, longest))
    steps = rng.integers(1, 4, length + 64)
    text = (rng.integers(vocab_size) + np.cumsum(steps)) % vocab_size
    tokens = text.astype(np.int32)
    labels, end = [], min(90, length // 2)
    while True:
        start = end + int(rng.integers(15, 80))
        end = start + int(rng.integers(12, 32))
        if end > length:
            break
        label = tokens[start:end]
        if rng.random() < branches:
            label = ((label[: max(4, len(label) // 2)] + 7) % vocab_size).astype(np.int32)
        labels.append(StateLabel(position=start, tokens=label))
    return LabelledEpisode(tokens=tokens[:length], labels=tuple(labels))
