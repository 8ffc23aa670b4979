"""From the episodes of all rounds to what one round trains on, and to the numbers that describe a round.

Pure functions over trajectories in (round, task, attempt) order, which is how the store yields them
round after round; they are read once, and kept of them are the tokens and labels that are trained on.
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
    """Which of the rounds that hold data round ``current`` trains on, in order; later rounds never count."""
    first = {"all": 0, "last": current - config.last_rounds + 1, "current": current}[config.window]
    return sorted(index for index in available if first <= index <= current)


def aggregate(trajectories: Iterable[Trajectory], config: AggregationConfig) -> list[LabelledEpisode]:
    """What to train on: each episode that passes the filter, with those labels that count.

    A label belongs to the state it was given in: all tokens of the episode before the action. With
    ``config.deduplicate`` the same label after exactly the same tokens counts once, where it came
    first in (round, task, attempt, turn) order. An episode of which no label is left is dropped.
    ValueError if the trajectories are out of that order: then "first" would mean nothing.
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
        tokens, labels = labels_of(trajectory)
        if config.deduplicate:
            labels = _first_seen(tokens, labels, seen)
        if labels:
            episode = LabelledEpisode(tokens=tokens, labels=tuple(labels))
            by_round.setdefault(trajectory.round_index, []).append(episode)
    if config.max_labels_per_round is not None:
        most = config.max_labels_per_round
        by_round = {index: _drawn(episodes, most, seed=index) for index, episodes in by_round.items()}
    return [episode for episodes in by_round.values() for episode in episodes]


def _drawn(episodes: list[LabelledEpisode], most: int, *, seed: int) -> list[LabelledEpisode]:
    """The episodes with at most ``most`` of their labels, drawn from all alike."""
    places = [(episode, label) for episode, found in enumerate(episodes) for label in range(len(found.labels))]
    chosen = set(random.Random(seed).sample(places, min(most, len(places))))
    kept = []
    for number, episode in enumerate(episodes):
        labels = tuple(label for place, label in enumerate(episode.labels) if (number, place) in chosen)
        if labels:
            kept.append(replace(episode, labels=labels))
    return kept


def passes(trajectory: Trajectory, name: str) -> bool:
    """Whether the filter (none, finished, solved) keeps the episode."""
    if name == "none":
        return True
    return trajectory.solved if name == "solved" else trajectory.stop_reason.is_finished


def labels_of(trajectory: Trajectory) -> tuple[np.ndarray, list[StateLabel]]:
    """The episode's token stream, (n,) int32, and the labels given in it, each at its position."""
    parts: list[np.ndarray] = [np.zeros(0, np.int32)]
    labels: list[StateLabel] = []
    position = 0
    for turn in trajectory.turns:
        position += len(turn.prompt_tokens)
        if turn.label is not None and len(turn.label.tokens):
            labels.append(StateLabel(position=position, tokens=turn.label.tokens))
        position += len(turn.action.tokens)
        parts += [turn.prompt_tokens, turn.action.tokens]
    return np.concatenate(parts, dtype=np.int32), labels


def summarise(trajectories: Iterable[Trajectory]) -> dict[str, Any]:
    """The numbers of a collection for its ``collect.json``.

    ``agreement`` is the share of student-executed, labelled turns in which the student did, token for
    token, what the teacher would have done (None if there are none): where the teacher acted there is
    nothing to compare. ``agreement_by_depth`` has [first turn of the bucket, turns, agreeing turns].
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
    """Those labels whose (state tokens, label tokens) are not in ``seen``, which they join."""
    kept, state, hashed = [], hashlib.sha256(), 0
    for label in labels:  # positions ascend, so each token of the stream is hashed once
        state.update(np.ascontiguousarray(tokens[hashed : label.position], "<i4").tobytes())
        hashed = label.position
        together = state.copy()
        together.update(b"label" + np.ascontiguousarray(label.tokens, "<i4").tobytes())
        # the position keeps apart a state's end and a label's beginning
        name = together.digest() + label.position.to_bytes(8, "little")
        if name not in seen:
            seen.add(name)
            kept.append(label)
    return kept
