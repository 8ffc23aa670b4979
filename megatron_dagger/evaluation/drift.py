"""Drift: how often an evaluated student leaves the teacher's path, and what it meets there.

These are pure functions over episodes of the student alone, in which the teacher labelled the states. A turn is on the
teacher's path if no earlier action of its episode differed from the teacher's label, token for token. An error is an
action that differs from its label. A turn without a label ends what is known of an episode's path: it and the turns
after it count nowhere. The questions are those of Ross and Bagnell (AISTATS 2010): the bound of imitation's cost grows
with the square of the horizon, because an error may lead to states in which only errors follow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megatron_dagger.evaluation.success import wilson_interval
from megatron_dagger.types import ActedBy, Trajectory

VisitedState = tuple[str | None, str]  # the last executed action, None before the first; the observation


def known_path(episode: Trajectory) -> Iterator[tuple[int, bool, bool]]:
    """Yield (turn from 0, whether it is on the teacher's path, whether its action is an error) while that is known."""
    on_path = True
    for depth, turn in enumerate(episode.turns):
        if turn.label is None:
            return
        yield depth, on_path, not turn.agrees
        on_path = on_path and turn.agrees


def states_off_path(episode: Trajectory) -> list[int]:
    """Return the turns, from 0, that are known to be off the teacher's path."""
    return [depth for depth, on_path, _ in known_path(episode) if not on_path]


def errors(episodes: Iterable[Trajectory], *, bucket_turns: int) -> dict[str, Any]:
    """Return the errors on and off the teacher's path.

    ``on_path`` and ``off_path`` have turns, errors and their share in [0, 1], None without a turn. ``by_depth`` has
    rows of [first turn of a bucket of ``bucket_turns``, turns on the path, errors there, turns off it, errors there].
    """
    turns: Counter[tuple[int, bool]] = Counter()
    wrong: Counter[tuple[int, bool]] = Counter()
    for episode in episodes:
        for depth, on_path, error in known_path(episode):
            place = (depth - depth % bucket_turns, on_path)
            turns[place] += 1
            wrong[place] += error

    def total(on_path: bool) -> dict[str, Any]:
        counts = [sum(n for (_, on), n in counter.items() if on is on_path) for counter in (turns, wrong)]
        return {"turns": counts[0], "errors": counts[1], "share": _share(counts[1], counts[0])}

    buckets = sorted({bucket for bucket, _ in turns})
    by_depth = [[b, turns[b, True], wrong[b, True], turns[b, False], wrong[b, False]] for b in buckets]
    return {"on_path": total(True), "off_path": total(False), "by_depth": by_depth}


def new_states(episodes: Iterable[Trajectory], teacher_alone: Mapping[str, Trajectory]) -> dict[str, Any]:
    """Return how many of the visited states the teacher's own episode of the same task never holds.

    ``teacher_alone``: by task; tasks without such an episode are left out. A state is identified by its newest
    exchange, that is the last executed action and the observation (the opening has no action before it), and counts
    once an episode. This understates what is new, since a known exchange in a changed world counts as known. Keys:
    visited_states, new_states, new_states_share in [0, 1] or None.
    """
    visited = new = 0
    for episode in episodes:
        if episode.task_id in teacher_alone:
            states = visited_states(episode)
            visited += len(states)
            new += len(states - visited_states(teacher_alone[episode.task_id]))
    return {"visited_states": visited, "new_states": new, "new_states_share": _share(new, visited)}


def visited_states(episode: Trajectory) -> set[VisitedState]:
    """Return the states in which an action was chosen, each identified by its newest exchange."""
    before = [None, *(turn.action.text for turn in episode.turns)]
    return {(action, turn.observation) for action, turn in zip(before, episode.turns, strict=False)}


def expert_success(episodes: Sequence[Trajectory], *, given_up: int = 0) -> dict[str, Any]:
    """Return tried, solved, given_up, and success in [0, 1] or None with Wilson's 95% interval.

    ``given_up`` further tasks have no clean episode: they count as tried and not solved.
    """
    tried, solved = len(episodes) + given_up, sum(episode.solved for episode in episodes)
    low, high = wilson_interval(solved, tried)
    return {
        "tried": tried,
        "solved": solved,
        "given_up": given_up,
        "success": _share(solved, tried),
        "ci_low": low,
        "ci_high": high,
    }


def expert_from_student_states(
    takeovers: Sequence[Trajectory], students: Mapping[str, Trajectory], *, given_up: int = 0
) -> dict[str, Any]:
    """Return ``expert_success`` of episodes that the student began and the expert finished.

    The student's turns in ``takeovers`` repeat its own episodes, which are ``students``, by task. The further key
    replayed_exactly counts those in which the environment gave every observation again.
    """
    exact = sum(_replayed_exactly(episode, students[episode.task_id]) for episode in takeovers)
    return {**expert_success(takeovers, given_up=given_up), "replayed_exactly": exact}


def _replayed_exactly(takeover: Trajectory, student: Trajectory) -> bool:
    acted_by = [turn.acted_by for turn in takeover.turns]
    if ActedBy.TEACHER not in acted_by:  # the replay ended before the state
        return False
    first = acted_by.index(ActedBy.TEACHER)
    pairs = zip(takeover.turns[: first + 1], student.turns[: first + 1], strict=True)
    return all(again.observation == turn.observation for again, turn in pairs)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
