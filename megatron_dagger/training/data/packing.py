"""From labelled episodes to samples, and from samples to packed rows: pure numpy, no engine.

A sample is a tree. Its trunk is the executed episode; a label that was not executed is a branch that
leaves the trunk where the label was given. A branch sees the trunk up to there and itself, nothing
else, and its positions go on from there: all labels of an episode share the computing of its prefix,
and what is computed grows with the tokens written, not with labels times prefix. Where the layers
cannot attend so, each branch becomes a sample of its own, after a copy of its prefix ("separate").

Invariants: every label token is a target exactly once, after exactly the tokens at which the label was
given; trees of a row see nothing of each other; the same input gives the same rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron_dagger.config import Packing
from megatron_dagger.training.data.bin_packing import pack_bins
from megatron_dagger.types import LabelledEpisode, StateLabel

logger = logging.getLogger(__name__)

_PADDING = 256  # tokens of a tree of padding: a long one's attention would cost as much as an episode's


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One tree: ``trunk`` (n,) int32 and the ``branches`` that leave it.

    ``spans`` are (start, stop, weight): trunk tokens start..stop-1 are targets of the loss, times
    weight. All tokens of a branch are targets; its ``position`` is that of its first token.
    """

    trunk: np.ndarray
    spans: tuple[tuple[int, int, float], ...] = ()
    branches: tuple[StateLabel, ...] = ()

    @property
    def trunk_length(self) -> int:
        """Tokens of a row that the trunk takes: all but the last, which is only a target."""
        return len(self.trunk) - 1

    @property
    def length(self) -> int:
        """Tokens of a row that the sample takes. A branch starts with a copy of the token before it."""
        return self.trunk_length + sum(len(branch.tokens) for branch in self.branches)

    @property
    def weight(self) -> float:
        """The sum of the weights of the label tokens."""
        on_trunk = sum((stop - start) * weight for start, stop, weight in self.spans)
        return on_trunk + sum(len(branch.tokens) * branch.weight for branch in self.branches)

    @property
    def label_tokens(self) -> int:
        """Different targets with a weight."""
        on_trunk = int(np.count_nonzero(self.trunk_weights()))
        return on_trunk + sum(len(branch.tokens) for branch in self.branches if branch.weight)

    @property
    def pairs(self) -> int:
        """Of a token and one that it sees."""
        trunk = self.trunk_length * (self.trunk_length + 1) // 2
        own = [(branch.position - 1, len(branch.tokens)) for branch in self.branches]
        return trunk + sum(size * before + size * (size + 1) // 2 for before, size in own)

    def trunk_weights(self) -> np.ndarray:
        """(n,) float32: the weight of each trunk token as a target; where spans overlap, they add up."""
        weights = np.zeros(len(self.trunk), np.float32)
        for start, stop, weight in self.spans:
            weights[start:stop] += weight
        return weights


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """One micro-batch of s tokens: trees one after the other, each trunk first.

    ``tokens``, ``targets``, ``position_ids`` are (s,) int64 and ``weights`` (s,) float32. ``trees``
    (trees + 1,) int32 are the trees' bounds, from 0 to s; what is left over is cut into short trees.
    Place i of a tree that starts at t sees the places t..prefix_stops[i]-1 and run_starts[i]..i (both
    (s,) int32). Without branches these are the segments of Megatron's THD form, and ``trees`` is its
    ``cu_seqlens``.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    position_ids: np.ndarray
    trees: np.ndarray
    prefix_stops: np.ndarray
    run_starts: np.ndarray


@dataclass(frozen=True, kw_only=True)
class PackedDataset:
    """Samples and the rows they were packed into (each a tuple of sample indices)."""

    samples: tuple[Sample, ...]
    rows: tuple[tuple[int, ...], ...]
    sequence_length: int
    too_long: int  # labels dropped because their sample exceeds sequence_length
    cut: int  # episodes that these are of: each ends with the turn before

    @cached_property
    def tokens(self) -> int:
        """Tokens of all samples, each counted once."""
        return sum(sample.length for sample in self.samples)

    @cached_property
    def row_label_tokens(self) -> np.ndarray:
        """(rows,) int64: the targets of each row that are label tokens."""
        counts = [sample.label_tokens for sample in self.samples]
        return np.array([sum(counts[i] for i in row) for row in self.rows], np.int64)

    @property
    def label_tokens(self) -> int:
        return int(self.row_label_tokens.sum())

    def fill(self, multiple: int) -> float:
        """The share of the places that hold a token, of rows that end at a ``multiple`` of tokens."""
        places = sum(padded_length(int(tokens), multiple, self.sequence_length) for tokens in self.row_tokens)
        return self.tokens / places if places else 0.0

    @property
    def bin_fill(self) -> float:
        """The same where every row has ``sequence_length`` places."""
        return self.tokens / (len(self.rows) * self.sequence_length) if self.rows else 0.0

    @cached_property
    def row_weights(self) -> np.ndarray:
        """(rows,) float64: the sum of the label tokens' weights of each row."""
        return np.array([sum(self.samples[i].weight for i in row) for row in self.rows], np.float64)

    @cached_property
    def row_tokens(self) -> np.ndarray:
        """(rows,) int64: the tokens of each row that are no padding."""
        return np.array([sum(self.samples[i].length for i in row) for row in self.rows], np.int64)

    @cached_property
    def row_pairs(self) -> np.ndarray:
        """(rows,) int64: pairs of a token and one that it sees, over which attention is computed."""
        return np.array([sum(self.samples[i].pairs for i in row) for row in self.rows], np.int64)

    def row(self, index: int, length: int | None = None) -> PackedRow:
        """The arrays of row ``index``, padded to ``length`` (None: ``sequence_length``); -1 is nothing but padding."""
        size = length or self.sequence_length
        row = PackedRow(
            tokens=np.zeros(size, np.int64),
            targets=np.zeros(size, np.int64),
            weights=np.zeros(size, np.float32),
            position_ids=np.zeros(size, np.int64),
            trees=np.zeros(0, np.int32),
            prefix_stops=np.zeros(size, np.int32),
            run_starts=np.zeros(size, np.int32),
        )
        bounds = [0]
        for sample in [self.samples[i] for i in (self.rows[index] if index >= 0 else ())]:
            bounds.append(_write(row, bounds[-1], sample))
        while bounds[-1] < size:
            padding = Sample(trunk=np.zeros(min(size - bounds[-1], _PADDING) + 1, np.int32))
            bounds.append(_write(row, bounds[-1], padding))
        return replace(row, trees=np.array(bounds, np.int32))


def padded_length(tokens: int, multiple: int, sequence_length: int) -> int:
    """The length of a row that holds so many tokens, and at least one."""
    return min(max(1, -(-tokens // multiple)) * multiple, sequence_length)


def _write(row: PackedRow, start: int, sample: Sample) -> int:
    """Write a sample's places into a row, from ``start`` on; where they end."""

    def run(at: int, tokens: np.ndarray, weights: np.ndarray | float, first_position: int, prefix_stop: int) -> int:
        stop = at + len(tokens) - 1
        row.tokens[at:stop], row.targets[at:stop] = tokens[:-1], tokens[1:]
        row.weights[at:stop] = weights
        row.position_ids[at:stop] = np.arange(first_position, first_position + stop - at)
        row.prefix_stops[at:stop], row.run_starts[at:stop] = prefix_stop, at
        return stop

    at = run(start, sample.trunk, sample.trunk_weights()[1:], 0, start)
    for branch in sample.branches:
        before = branch.position - 1  # the token that predicts the branch's first: its prefix ends in front of it
        tokens = np.concatenate([sample.trunk[before : branch.position], branch.tokens])
        at = run(at, tokens, branch.weight, before, start + before)
    return at


def pack(
    episodes: Sequence[LabelledEpisode],
    sequence_length: int,
    *,
    packing: Packing = "shared_prefix",
    one_sample_per_row: bool = False,
) -> PackedDataset:
    """Make samples of ``episodes`` and pack them into rows of ``sequence_length`` tokens."""
    samples: list[Sample] = []
    too_long = cut = 0
    for episode in episodes:
        made, dropped = samples_of(episode, sequence_length, packing)
        samples += made
        too_long += dropped
        cut += dropped > 0
    if too_long:
        logger.warning(
            "too_long: %d labels exceed sequence_length=%d, dropped; %d episodes cut at the turn before",
            *(too_long, sequence_length, cut),
        )
    lengths = [sample.length for sample in samples]
    rows = [(i,) for i in range(len(samples))] if one_sample_per_row else pack_bins(lengths, sequence_length)
    return PackedDataset(
        samples=tuple(samples), rows=tuple(rows), sequence_length=sequence_length, too_long=too_long, cut=cut
    )


def samples_of(
    episode: LabelledEpisode, sequence_length: int, packing: Packing = "shared_prefix"
) -> tuple[list[Sample], int]:
    """The samples of one episode, and how many labels were too long for any.

    An episode of more than ``sequence_length`` tokens is cut after the last turn whose label fits.
    Branches that do not fit into a row beside their trunk go into another row with a copy of it, the
    earliest ones, whose prefix is the shortest.
    Raises ValueError for a label outside the episode or without a token before it.
    """
    trunk: list[StateLabel] = []
    branches: list[StateLabel] = []
    dropped = 0
    for label in episode.labels:
        start, size = label.position, len(label.tokens)
        if not 1 <= start <= len(episode.tokens):
            raise ValueError(
                f"label at position {start} of an episode of {len(episode.tokens)} tokens; "
                f"positions go from 1 (a label needs a token before it) to {len(episode.tokens)}"
            )
        if size and start + size - 1 > sequence_length:
            dropped += 1
        elif size:
            (trunk if _on_trunk(episode, label) else branches).append(label)
    if packing == "separate":
        return [*_tree(episode, trunk, []), *(_alone(episode, label) for label in branches)], dropped
    samples: list[Sample] = []
    branches.sort(key=lambda label: label.position)
    while trunk or branches:
        fitting: list[StateLabel] = []
        others: list[StateLabel] = []
        for label in reversed(branches):
            fits = _length(trunk, [*fitting, label]) <= sequence_length
            (fitting if fits else others).insert(0, label)
        samples += _tree(episode, trunk, fitting)
        trunk, branches = [], others
    return samples, dropped


def _length(trunk: Sequence[StateLabel], branches: Sequence[StateLabel]) -> int:
    """The length of the sample that ``_tree`` makes."""
    ends = [label.position + len(label.tokens) for label in trunk] + [label.position for label in branches]
    return max(ends, default=1) - 1 + sum(len(label.tokens) for label in branches)


def _tree(episode: LabelledEpisode, trunk: Sequence[StateLabel], branches: Sequence[StateLabel]) -> list[Sample]:
    """The sample of these labels (none without any); behind the last one there is nothing to learn."""
    spans = tuple((label.position, label.position + len(label.tokens), label.weight) for label in trunk)
    end = max([stop for _, stop, _ in spans] + [label.position for label in branches], default=0)
    return [Sample(trunk=episode.tokens[:end], spans=spans, branches=tuple(branches))] if end else []


def _alone(episode: LabelledEpisode, label: StateLabel) -> Sample:
    tokens = np.concatenate([episode.tokens[: label.position], label.tokens])
    return Sample(trunk=tokens, spans=((label.position, len(tokens), label.weight),))


def _on_trunk(episode: LabelledEpisode, label: StateLabel) -> bool:
    executed = episode.tokens[label.position : label.position + len(label.tokens)]
    return np.array_equal(executed, label.tokens)
