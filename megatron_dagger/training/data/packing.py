"""From labelled episodes to packed rows of trees (see ``samples``). Pure numpy, no engine.

Invariants: trees of one row do not attend to each other; the same episodes give the same rows. Rows come in groups,
which are trained in the same step. A group has the labels of one row of trees, however they are packed: so a label has
the same weight in the same step with either packing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megatron_dagger.config import Packing
from megatron_dagger.training.data.bin_packing import pack_bins
from megatron_dagger.training.data.samples import Sample, build_samples, separated
from megatron_dagger.types import LabelledEpisode

logger = logging.getLogger(__name__)

_PADDING_TREE = 256  # tokens; attention over one long tree of padding would cost as much as over an episode


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """One micro-batch of s tokens: trees one after the other, in each the trunk first and then the branches.

    ``tokens``, ``targets`` and ``position_ids`` are (s,) int64, ``weights`` (s,) float32. ``trees`` (trees + 1,) int32
    are the bounds of the trees, from 0 to s; padding is cut into short trees. Place i of a tree that starts at t
    attends to the places t..prefix_stops[i]-1 (its prefix) and run_starts[i]..i (its own run); both arrays are (s,)
    int32. Without branches the trees are the segments of Megatron's THD form, and ``trees`` is its ``cu_seqlens``.
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
    """Samples, the rows that they are packed into, each a tuple of sample indices, and the groups of rows, likewise."""

    samples: tuple[Sample, ...]
    rows: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    sequence_length: int
    too_long: int  # labels dropped because their sample would exceed sequence_length
    cut: int  # episodes that lost a label for that reason

    @cached_property
    def tokens(self) -> int:
        """The tokens of all samples, each counted once."""
        return sum(sample.length for sample in self.samples)

    @property
    def labels(self) -> int:
        """The number of labels that are trained on."""
        return sum(len(sample.spans) + len(sample.branches) for sample in self.samples)

    def rows_of(self, groups: np.ndarray) -> np.ndarray:
        """Return the indices of the rows of ``groups``, (rows,) int64."""
        return np.array([row for group in groups for row in self.groups[group]], np.int64)

    @cached_property
    def row_label_tokens(self) -> np.ndarray:
        """The label tokens among each row's targets, (rows,) int64."""
        counts = [sample.label_tokens for sample in self.samples]
        return np.array([sum(counts[i] for i in row) for row in self.rows], np.int64)

    @property
    def label_tokens(self) -> int:
        """The label tokens of all rows."""
        return int(self.row_label_tokens.sum())

    def fill(self, multiple: int) -> float:
        """Return the share of places that hold a token when each row's length is rounded up to ``multiple``."""
        places = sum(padded_length(int(tokens), multiple, self.sequence_length) for tokens in self.row_tokens)
        return self.tokens / places if places else 0.0

    @property
    def bin_fill(self) -> float:
        """The share of places that hold a token when every row has ``sequence_length`` places."""
        return self.tokens / (len(self.rows) * self.sequence_length) if self.rows else 0.0

    @cached_property
    def row_weights(self) -> np.ndarray:
        """The sum of the label tokens' weights of each row, (rows,) float64."""
        return np.array([sum(self.samples[i].weight for i in row) for row in self.rows], np.float64)

    @cached_property
    def row_tokens(self) -> np.ndarray:
        """The tokens of each row without its padding, (rows,) int64."""
        return np.array([sum(self.samples[i].length for i in row) for row in self.rows], np.int64)

    @cached_property
    def row_pairs(self) -> np.ndarray:
        """The (query, key) pairs of attention of each row, (rows,) int64."""
        return np.array([sum(self.samples[i].pairs for i in row) for row in self.rows], np.int64)

    def row(self, index: int, length: int | None = None) -> PackedRow:
        """Return row ``index`` padded to ``length`` (None: ``sequence_length``); index -1 is a row of padding only."""
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
            padding = Sample(trunk=np.zeros(min(size - bounds[-1], _PADDING_TREE) + 1, np.int32))
            bounds.append(_write(row, bounds[-1], padding))
        return replace(row, trees=np.array(bounds, np.int32))


def padded_length(tokens: int, multiple: int, sequence_length: int) -> int:
    """Return ``tokens`` (at least 1) rounded up to a multiple of ``multiple``, at most ``sequence_length``."""
    return min(max(1, -(-tokens // multiple)) * multiple, sequence_length)


def _write(row: PackedRow, start: int, sample: Sample) -> int:
    """Write the sample into the row from place ``start``; return the place after it."""

    def run(at: int, tokens: np.ndarray, weights: np.ndarray | float, first_position: int, prefix_stop: int) -> int:
        stop = at + len(tokens) - 1
        row.tokens[at:stop], row.targets[at:stop] = tokens[:-1], tokens[1:]
        row.weights[at:stop] = weights
        row.position_ids[at:stop] = np.arange(first_position, first_position + stop - at)
        row.prefix_stops[at:stop], row.run_starts[at:stop] = prefix_stop, at
        return stop

    at = run(start, sample.trunk, sample.trunk_weights()[1:], 0, start)
    for branch in sample.branches:
        # A branch begins with a copy of the trunk token that predicts its first token: its prefix stops before that.
        before = branch.position - 1
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
    """Build samples from ``episodes`` and pack them into rows of ``sequence_length`` tokens.

    ``packing="separate"`` makes a sample of each branch, and packs those of each row of trees into rows of their own.
    ``one_sample_per_row`` is for comparisons. Labels that fit into no row are dropped, counted and logged. Raises what
    ``build_samples`` raises.
    """
    trees: list[Sample] = []
    too_long = cut = 0
    for episode in episodes:
        episode_trees, dropped = build_samples(episode, sequence_length)
        trees += episode_trees
        too_long += dropped
        cut += dropped > 0
    if too_long:
        logger.warning(
            "too_long: %d labels of %d episodes exceed training.sequence_length=%d and were dropped",
            too_long,
            cut,
            sequence_length,
        )

    def bins(items: Sequence[Sample]) -> list[tuple[int, ...]]:
        if one_sample_per_row:
            return [(index,) for index in range(len(items))]
        return pack_bins([item.length for item in items], sequence_length)

    samples, rows = trees, bins(trees)
    groups: list[tuple[int, ...]] = [(index,) for index in range(len(rows))]
    if packing == "separate":
        rows_of_trees, samples, rows, groups = rows, [], [], []
        for row in rows_of_trees:
            parts = [part for index in row for part in separated(trees[index])]
            own = [tuple(len(samples) + index for index in members) for members in bins(parts)]
            groups.append(tuple(range(len(rows), len(rows) + len(own))))
            samples, rows = samples + parts, rows + own
    return PackedDataset(
        samples=tuple(samples),
        rows=tuple(rows),
        groups=tuple(groups),
        sequence_length=sequence_length,
        too_long=too_long,
        cut=cut,
    )
