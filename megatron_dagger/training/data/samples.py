"""From a labelled episode to samples, each one a tree of tokens. Pure numpy.

The trunk of a tree is the executed episode. A label that the episode did not follow is a branch, which leaves the
trunk at the state that was labelled. A branch attends to the trunk before that state and to itself, and its positions
continue from there. All labels of an episode thus share one computation of their prefix: the cost grows with the
tokens written, not with labels times prefix. ``separated`` makes each branch a sample of its own, with a copy of its
prefix, for attention kernels that know only plain segments.

Invariant: every label token is a target exactly once, after exactly the tokens at which the label was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dagger.types import LabelledEpisode, StateLabel


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One tree: ``trunk`` (n,) int32 and the ``branches`` that leave it.

    ``spans`` are (start, stop, weight): the trunk tokens start..stop-1 are targets of the loss, times weight. All
    tokens of a branch are targets; the ``position`` of a branch is that of its first token.
    """

    trunk: np.ndarray
    spans: tuple[tuple[int, int, float], ...] = ()
    branches: tuple[StateLabel, ...] = ()

    @property
    def trunk_length(self) -> int:
        """The trunk's tokens in a row: all but the last, which is only a target."""
        return len(self.trunk) - 1

    @property
    def length(self) -> int:
        """The sample's tokens in a row. A branch starts with a copy of the token before it, and drops its last."""
        return self.trunk_length + sum(len(branch.tokens) for branch in self.branches)

    @property
    def weight(self) -> float:
        """The sum of the label tokens' weights."""
        on_trunk = sum((stop - start) * weight for start, stop, weight in self.spans)
        return on_trunk + sum(len(branch.tokens) * branch.weight for branch in self.branches)

    @property
    def label_tokens(self) -> int:
        """The number of targets with a weight; a trunk token that two spans cover counts once."""
        on_trunk = int(np.count_nonzero(self.trunk_weights()))
        return on_trunk + sum(len(branch.tokens) for branch in self.branches if branch.weight)

    @property
    def pairs(self) -> int:
        """The number of (query, key) pairs of attention."""
        trunk = self.trunk_length * (self.trunk_length + 1) // 2
        own = [(branch.position - 1, len(branch.tokens)) for branch in self.branches]
        return trunk + sum(size * before + size * (size + 1) // 2 for before, size in own)

    def trunk_weights(self) -> np.ndarray:
        """Return the weight of each trunk token as a target, (n,) float32; overlapping spans add up."""
        weights = np.zeros(len(self.trunk), np.float32)
        for start, stop, weight in self.spans:
            weights[start:stop] += weight
        return weights


def build_samples(episode: LabelledEpisode, sequence_length: int) -> tuple[list[Sample], int]:
    """Return the samples of one episode, and the number of labels that are too long for any.

    An episode of more than ``sequence_length`` tokens is cut after the last turn whose label fits. Branches that do
    not fit into a row beside their trunk, those with the shortest prefixes, go into another sample with a copy of
    that prefix. Linear in the branches for each sample made.
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
            (trunk if _is_on_trunk(episode, label) else branches).append(label)
    samples: list[Sample] = []
    branches.sort(key=lambda label: label.position)
    while trunk or branches:
        fitting, branches = _split_fitting(trunk, branches, sequence_length)
        samples += _tree(episode, trunk, fitting)
        trunk = []
    return samples, dropped


def separated(sample: Sample) -> list[Sample]:
    """Return samples without branches that have the labels of ``sample``: its trunk, if it has any, and each branch."""
    stop = max((stop for _, stop, _ in sample.spans), default=0)
    trunk = [Sample(trunk=sample.trunk[:stop], spans=sample.spans)] if stop else []
    return [*trunk, *(_segment(sample.trunk, branch) for branch in sample.branches)]


def _split_fitting(
    trunk: Sequence[StateLabel], branches: Sequence[StateLabel], sequence_length: int
) -> tuple[list[StateLabel], list[StateLabel]]:
    """Return the ``branches`` that fit into one sample beside the ``trunk`` labels, and the others.

    Branches are taken from the last to the first: those with a long prefix share it with the trunk.
    """
    trunk_stop = max((label.position + len(label.tokens) for label in trunk), default=1)
    branch_tokens = 0
    fitting: list[StateLabel] = []
    others: list[StateLabel] = []
    for label in reversed(branches):
        stop, tokens = max(trunk_stop, label.position), branch_tokens + len(label.tokens)
        if stop - 1 + tokens <= sequence_length:
            fitting.append(label)
            trunk_stop, branch_tokens = stop, tokens
        else:
            others.append(label)
    return fitting[::-1], others[::-1]


def _tree(episode: LabelledEpisode, trunk: Sequence[StateLabel], branches: Sequence[StateLabel]) -> list[Sample]:
    """Return the sample of these labels in a list, empty without labels; the trunk ends with the last label."""
    spans = tuple((label.position, label.position + len(label.tokens), label.weight) for label in trunk)
    end = max([stop for _, stop, _ in spans] + [label.position for label in branches], default=0)
    return [Sample(trunk=episode.tokens[:end], spans=spans, branches=tuple(branches))] if end else []


def _segment(trunk: np.ndarray, label: StateLabel) -> Sample:
    """Return a sample without branches: the label after a copy of its prefix."""
    tokens = np.concatenate([trunk[: label.position], label.tokens])
    return Sample(trunk=tokens, spans=((label.position, len(tokens), label.weight),))


def _is_on_trunk(episode: LabelledEpisode, label: StateLabel) -> bool:
    executed = episode.tokens[label.position : label.position + len(label.tokens)]
    return np.array_equal(executed, label.tokens)
