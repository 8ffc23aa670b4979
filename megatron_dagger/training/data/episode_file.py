"""Labelled episodes in one .npz file of plain arrays, without pickle: how tools and tests hand data to the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_dagger.types import LabelledEpisode, StateLabel


def save_episodes(path: Path, episodes: Sequence[LabelledEpisode]) -> None:
    """Write ``episodes`` to ``path``: all token arrays concatenated, with their lengths beside them."""
    labels = [label for episode in episodes for label in episode.labels]
    np.savez(
        path,
        tokens=_concatenate([episode.tokens for episode in episodes]),
        lengths=np.array([len(episode.tokens) for episode in episodes], np.int64),
        labels=np.array([len(episode.labels) for episode in episodes], np.int64),
        label_tokens=_concatenate([label.tokens for label in labels]),
        label_lengths=np.array([len(label.tokens) for label in labels], np.int64),
        positions=np.array([label.position for label in labels], np.int64),
        weights=np.array([label.weight for label in labels], np.float64),
    )


def load_episodes(path: Path) -> list[LabelledEpisode]:
    """Return the episodes that ``save_episodes`` wrote to ``path``."""
    with np.load(path, allow_pickle=False) as file:
        streams = np.split(file["tokens"], np.cumsum(file["lengths"])[:-1])
        targets = np.split(file["label_tokens"], np.cumsum(file["label_lengths"])[:-1])
        labels = [
            StateLabel(position=int(position), tokens=tokens, weight=float(weight))
            for position, tokens, weight in zip(file["positions"], targets, file["weights"], strict=False)
        ]
        ends = np.cumsum(file["labels"])
        return [
            LabelledEpisode(tokens=tokens, labels=tuple(labels[end - count : end]))
            for tokens, count, end in zip(streams, file["labels"], ends, strict=False)
        ]


def _concatenate(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *arrays]).astype(np.int32)
