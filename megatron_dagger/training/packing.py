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

import bisect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron_dagger.config import Packing
from megatron_dagger.types import LabelledEpisode, StateLabel

logger = logging.getLogger(__name__)

_CANDIDATES = 128  # at most, for one bin
_SLACKS = (0.02, 0.06)  # of a bin
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

    def trunk_weights(self) -> np.ndarray:
        """(n,) float32: the weight of each trunk token as a target; where spans overlap, they add up."""
        weights = np.zeros(len(self.trunk), np.float32)
        for start, stop, weight in self.spans:
            weights[start:stop] += weight
        return weights


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """One micro-batch of ``sequence_length`` tokens: trees one after the other, each trunk first.

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
    rows = [(i,) for i in range(len(samples))] if one_sample_per_row else fullest_fit(lengths, sequence_length)
    return PackedDataset(samples=tuple(samples), rows=tuple(rows), sequence_length=sequence_length, too_long=too_long)


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


def fullest_fit(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Pack items into bins: by ``best_fit``, or by ``subset_fit`` where that needs fewer bins."""
    bins = best_fit(lengths, capacity)
    if (len(bins) - 1) * capacity < sum(lengths):
        return bins  # no packing needs fewer
    return min(bins, *(subset_fit(lengths, capacity, int(capacity * slack)) for slack in _SLACKS), key=len)


def subset_fit(lengths: Sequence[int], capacity: int, slack: int) -> list[tuple[int, ...]]:
    """Pack items into bins: the longest one left, and then others that fill up its bin but for ``slack``.

    These are as long as can be, so that short items are left for the bins that need them. Deterministic.
    """
    left = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[tuple[int, ...]] = []
    while left:
        longest = left.pop(0)
        room = capacity - lengths[longest]
        fitting = left[bisect.bisect_left(left, -room, key=lambda i: -lengths[i]) :]
        candidates = fitting[:: -(-len(fitting) // _CANDIDATES) or 1]
        chosen = _subset([lengths[i] for i in candidates], room, room - slack)
        taken = {candidates[i] for i in chosen}
        left = [i for i in left if i not in taken]
        bins.append((longest, *(candidates[i] for i in chosen)))
    return bins


def _subset(sizes: Sequence[int], room: int, enough: int) -> list[int]:
    """Which of ``sizes`` sum up to at least ``enough``, else to as much as can be, but at most ``room``.

    Of the first sizes that can.
    """
    sums = [1]  # bit n: some of the sizes so far have the sum n
    for size in sizes:
        if sums[-1] >> max(enough, 0):
            break
        sums.append((sums[-1] | sums[-1] << size) & ((2 << room) - 1))
    total, chosen = sums[-1].bit_length() - 1, []
    for i in reversed(range(len(sums) - 1)):
        if not sums[i] >> total & 1:
            chosen.append(i)
            total -= sizes[i]
    return chosen[::-1]


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
