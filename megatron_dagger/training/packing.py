"""From labelled episodes to samples, and from samples to packed rows: pure numpy, no engine.

Invariants: every label token is a target exactly once, after exactly the tokens at which the label was
given; segments of a row see nothing of each other; the same input gives the same rows. How an
episode's labels share the computing of their prefix is decided here and nowhere else: now the labels
on an episode's trunk share one sample, and each branching label is a sample of its own.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_dagger.types import LabelledEpisode, StateLabel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Tokens to train on: ``prefix`` (a view of the episode's) and then ``suffix``, both 1-D int32.

    ``spans`` are (start, stop, weight): tokens start..stop-1 are targets of the loss, times weight.
    """

    prefix: np.ndarray
    suffix: np.ndarray
    spans: tuple[tuple[int, int, float], ...]

    @property
    def length(self) -> int:
        """Tokens of a row that the sample takes: all but the last, which is only a target."""
        return len(self.prefix) + len(self.suffix) - 1

    @property
    def weight(self) -> float:
        """The sum of the weights of the label tokens."""
        return sum((stop - start) * weight for start, stop, weight in self.spans)

    def tokens(self) -> np.ndarray:
        return np.concatenate([self.prefix, self.suffix])

    def token_weights(self) -> np.ndarray:
        """(n,) float32: the weight of each token as a target; where spans overlap, they add up."""
        weights = np.zeros(len(self.prefix) + len(self.suffix), np.float32)
        for start, stop, weight in self.spans:
            weights[start:stop] += weight
        return weights


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """One micro-batch of ``sequence_length`` tokens, in Megatron's THD form.

    ``tokens``, ``targets``, ``position_ids`` are (s,) int64, ``weights`` (s,) float32, and
    ``cu_seqlens`` (segments + 1,) int32 from 0 to s. What is left over is a segment of its own.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray


@dataclass(frozen=True, kw_only=True)
class PackedDataset:
    """Samples and the rows they were packed into (each a tuple of sample indices)."""

    samples: tuple[Sample, ...]
    rows: tuple[tuple[int, ...], ...]
    sequence_length: int
    too_long: int  # labels dropped because their sample exceeds sequence_length

    @cached_property
    def tokens(self) -> int:
        """Tokens of all samples, each counted once."""
        return sum(sample.length for sample in self.samples)

    @cached_property
    def row_label_tokens(self) -> np.ndarray:
        """(rows,) int64: the targets of each row that are label tokens."""
        counts = [int(np.count_nonzero(sample.token_weights())) for sample in self.samples]
        return np.array([sum(counts[i] for i in row) for row in self.rows], np.int64)

    @property
    def label_tokens(self) -> int:
        return int(self.row_label_tokens.sum())

    @property
    def fill(self) -> float:
        """The share of the rows' places that hold a token."""
        return self.tokens / (len(self.rows) * self.sequence_length) if self.rows else 0.0

    @cached_property
    def row_weights(self) -> np.ndarray:
        """(rows,) float64: the sum of the label tokens' weights of each row."""
        return np.array([sum(self.samples[i].weight for i in row) for row in self.rows], np.float64)

    @cached_property
    def row_tokens(self) -> np.ndarray:
        """(rows,) int64: the tokens of each row that are no padding."""
        return np.array([sum(self.samples[i].length for i in row) for row in self.rows], np.int64)

    def row(self, index: int) -> PackedRow:
        """The arrays of row ``index``; -1 is a row of nothing but padding."""
        size = self.sequence_length
        tokens, targets = np.zeros(size, np.int64), np.zeros(size, np.int64)
        weights, positions = np.zeros(size, np.float32), np.zeros(size, np.int64)
        ends = [0]
        for sample in [self.samples[i] for i in (self.rows[index] if index >= 0 else ())]:
            start, stop = ends[-1], ends[-1] + sample.length
            everything = sample.tokens()
            tokens[start:stop], targets[start:stop] = everything[:-1], everything[1:]
            weights[start:stop] = sample.token_weights()[1:]
            positions[start:stop] = np.arange(sample.length)
            ends.append(stop)
        if ends[-1] < size:
            positions[ends[-1] :] = np.arange(size - ends[-1])
            ends.append(size)
        return PackedRow(
            tokens=tokens,
            targets=targets,
            weights=weights,
            position_ids=positions,
            cu_seqlens=np.array(ends, np.int32),
        )


def pack(
    episodes: Sequence[LabelledEpisode], sequence_length: int, *, one_sample_per_row: bool = False
) -> PackedDataset:
    """Make samples of ``episodes`` and pack them into rows of ``sequence_length`` tokens."""
    samples: list[Sample] = []
    too_long = 0
    for episode in episodes:
        made, dropped = samples_of(episode, sequence_length)
        samples += made
        too_long += dropped
    if too_long:
        logger.warning("too_long: %d labels exceed sequence_length=%d, dropped", too_long, sequence_length)
    lengths = [sample.length for sample in samples]
    rows = [(i,) for i in range(len(samples))] if one_sample_per_row else best_fit(lengths, sequence_length)
    return PackedDataset(
        samples=tuple(samples), rows=tuple(rows), sequence_length=sequence_length, too_long=too_long
    )


def samples_of(episode: LabelledEpisode, sequence_length: int) -> tuple[list[Sample], int]:
    """The samples of one episode, and how many labels were too long for any.

    Raises ValueError for a label outside the episode or without a token before it.
    """
    nothing = np.zeros(0, np.int32)
    trunk: list[tuple[int, int, float]] = []
    branches: list[Sample] = []
    dropped = 0
    for label in episode.labels:
        start, stop = label.position, label.position + len(label.tokens)
        if not 1 <= start <= len(episode.tokens):
            raise ValueError(
                f"label at position {start} of an episode of {len(episode.tokens)} tokens; "
                f"positions go from 1 (a label needs a token before it) to {len(episode.tokens)}"
            )
        if not len(label.tokens):
            continue
        if stop - 1 > sequence_length:
            dropped += 1
        elif _on_trunk(episode, label):
            trunk.append((start, stop, label.weight))
        else:
            span = (start, stop, label.weight)
            branches.append(Sample(prefix=episode.tokens[:start], suffix=label.tokens, spans=(span,)))
    if not trunk:
        return branches, dropped
    end = max(stop for _, stop, _ in trunk)  # behind the last label there is nothing to learn
    return [Sample(prefix=episode.tokens[:end], suffix=nothing, spans=tuple(trunk)), *branches], dropped


def _on_trunk(episode: LabelledEpisode, label: StateLabel) -> bool:
    executed = episode.tokens[label.position : label.position + len(label.tokens)]
    return np.array_equal(executed, label.tokens)


def best_fit(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Pack items into bins: longest first, each into the fullest bin that has room for it.

    Deterministic, O(n log n) comparisons. At most 11/9 of the best number of bins, plus one.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free places, bin), ascending
    for item in order:
        at = bisect.bisect_left(room, (lengths[item], -1))
        if at < len(room):
            free, chosen = room.pop(at)
        else:
            free, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        if free > lengths[item]:
            bisect.insort(room, (free - lengths[item], chosen))
    return [tuple(items) for items in bins]
