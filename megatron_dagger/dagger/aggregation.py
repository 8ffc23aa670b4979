"""Aggregate the episodes of all rounds into one round's training data, and summarise a round in numbers.

These are pure functions over trajectories in (round, task, attempt) order, which is the store's order. Each
trajectory is read once; only the tokens and labels that are trained on stay in memory.
"""

from __future__ import annotations

import hashlib
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_dagger.config.dagger import AggregationConfig
from megatron_dagger.types import ActedBy, LabelledEpisode, StateLabel, Trajectory

DEPTH_BUCKET_TURNS = 4


def select_rounds(config: AggregationConfig, current: int, available: Sequence[int]) -> list[int]:
    """Return the rounds that round ``current`` trains on, ascending, out of ``available``; never a later one."""
    first = {"all": 0, "last": current - config.last_rounds + 1, "current": current}[config.window]
    return sorted(index for index in available if first <= index <= current)


def aggregate(trajectories: Iterable[Trajectory], config: AggregationConfig) -> list[LabelledEpisode]:
    """Return the episodes that pass the filter, each with the labels to train on.

    A label belongs to the state in which it was given: all tokens of the episode before the action. With
    ``config.deduplicate``, the same label after exactly the same tokens counts once: its first occurrence in
    (round, task, attempt, turn) order. An episode without a remaining label is dropped. Raises ValueError if
    the trajectories are not in that order, because then "first" would mean nothing.
    """
    by_round: dict[int, list[LabelledEpisode]] = {}
    seen: set[bytes] = set()
    previous: tuple[int, str, int] | None = None
    for trajectory in trajectories:
        if previous is not None and trajectory.key <= previous:
            raise ValueError(
                f"episode {trajectory.key} comes after {previous}: aggregate() needs trajectories in "
                "(round, task_id, attempt) order, each once"
            )
        previous = trajectory.key
        if not passes(trajectory, config.filter):
            continue
        tokens, labels = labels_of(trajectory, config.disagreement_weight)
        if config.deduplicate:
            labels = _first_seen(tokens, labels, seen)
        if labels:
            episode = LabelledEpisode(tokens=tokens, labels=tuple(labels))
            by_round.setdefault(trajectory.round_index, []).append(episode)
    for index, episodes in by_round.items():
        if (limit := config.max_labels(index)) is not None:
            by_round[index] = _sample_labels(episodes, limit, seed=index)
    return [episode for episodes in by_round.values() for episode in episodes]


def _sample_labels(episodes: list[LabelledEpisode], limit: int, *, seed: int) -> list[LabelledEpisode]:
    """Return the episodes with at most ``limit`` of their labels in all, every label with the same probability."""
    indices = [(row, column) for row, episode in enumerate(episodes) for column in range(len(episode.labels))]
    chosen = set(random.Random(seed).sample(indices, min(limit, len(indices))))
    kept = []
    for row, episode in enumerate(episodes):
        labels = tuple(label for column, label in enumerate(episode.labels) if (row, column) in chosen)
        if labels:
            kept.append(replace(episode, labels=labels))
    return kept


def passes(trajectory: Trajectory, name: str) -> bool:
    """Return whether the filter (none, finished or solved) keeps the episode."""
    if name == "none":
        return True
    return trajectory.solved if name == "solved" else trajectory.stop_reason.is_finished


def labels_of(trajectory: Trajectory, disagreement_weight: float = 1.0) -> tuple[np.ndarray, list[StateLabel]]:
    """Return the episode's token stream, (n,) int32, and its labels, each with its position in the stream.

    A label counts ``disagreement_weight`` in the loss if another action than the teacher's was executed, else 1.
    """
    parts: list[np.ndarray] = [np.zeros(0, np.int32)]
    labels: list[StateLabel] = []
    position = 0
    for turn in trajectory.turns:
        position += len(turn.prompt_tokens)
        if turn.label is not None and len(turn.label.tokens):
            weight = 1.0 if turn.agrees else disagreement_weight
            labels.append(StateLabel(position=position, tokens=turn.label.tokens, weight=weight))
        position += len(turn.action.tokens)
        parts += [turn.prompt_tokens, turn.action.tokens]
    return np.concatenate(parts, dtype=np.int32), labels


def summarise(trajectories: Iterable[Trajectory]) -> dict[str, Any]:
    """Return a collection's numbers for its ``collect.json``.

    ``agreement`` is the share of the student's labelled turns in which it did, token for token, what the teacher
    would have done (None if there are none; turns of the teacher have nothing to compare).
    ``agreement_by_depth`` has rows of [first turn of the bucket, turns, agreeing turns].
    """
    turns_by_episode: list[int] = []
    reasons: Counter[str] = Counter()
    compared: Counter[int] = Counter()
    agreeing: Counter[int] = Counter()
    teacher_turns = labelled_turns = solved = finished = 0
    for trajectory in trajectories:
        turns_by_episode.append(len(trajectory.turns))
        reasons[str(trajectory.stop_reason)] += 1
        solved += trajectory.solved
        finished += trajectory.stop_reason.is_finished
        for depth, turn in enumerate(trajectory.turns):
            teacher_turns += turn.acted_by is ActedBy.TEACHER
            labelled_turns += turn.label is not None
            if turn.acted_by is ActedBy.STUDENT and turn.label is not None:
                bucket = depth - depth % DEPTH_BUCKET_TURNS
                compared[bucket] += 1
                agreeing[bucket] += turn.agrees
    episodes, turns = len(turns_by_episode), sum(turns_by_episode)
    return {
        "episodes": episodes,
        "turns": turns,
        "labelled_turns": labelled_turns,
        "teacher_turn_share": teacher_turns / turns if turns else None,
        "agreement": agreeing.total() / compared.total() if compared else None,
        "agreement_by_depth": [[bucket, compared[bucket], agreeing[bucket]] for bucket in sorted(compared)],
        "solved": solved,
        "finished": finished,
        "truncated": episodes - finished,
        "stop_reasons": dict(sorted(reasons.items())),
        "median_turns": statistics.median(turns_by_episode) if turns_by_episode else None,
    }


def _first_seen(tokens: np.ndarray, labels: list[StateLabel], seen: set[bytes]) -> list[StateLabel]:
    """Return the labels whose (state tokens, label tokens) are not in ``seen`` yet, and add them to it."""
    kept, state, hashed = [], hashlib.sha256(), 0
    for label in labels:  # positions ascend, so each token of the stream is hashed once
        state.update(np.ascontiguousarray(tokens[hashed : label.position], "<i4").tobytes())
        hashed = label.position
        pair = state.copy()
        pair.update(b"label" + np.ascontiguousarray(label.tokens, "<i4").tobytes())
        # the position tells where the state ends and the label begins
        key = pair.digest() + label.position.to_bytes(8, "little")
        if key not in seen:
            seen.add(key)
            kept.append(label)
    return kept
