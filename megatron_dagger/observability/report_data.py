"""The data of the report page, as JSON values: rounds, losses, and an even selection of episodes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from megatron_dagger.observability.episode_source import EpisodeSource
from megatron_dagger.observability.rundir import RoundFiles, RunFiles
from megatron_dagger.observability.sanitize import sanitize
from megatron_dagger.types import ActedBy, Trajectory

MAX_LOSS_POINTS = 800
MAX_TEXT = 2400  # characters of one observation or action
MAX_EPISODES_CHARACTERS = 8 << 20  # of the texts of all embedded episodes

Key = tuple[str, int]
Slot = tuple[str, EpisodeSource, int, Key]  # kind, source, round, key


def gather(
    run: RunFiles, data: EpisodeSource | None, evaluations: EpisodeSource | None, *, max_episodes: int
) -> dict[str, Any]:
    """Return the page's data. Its size is bounded, whatever the size of the run."""
    slots = list(_slots(run, data, evaluations))
    episodes = _episodes(choose_evenly(slots, max_episodes))
    losses, steps = _losses(run.rounds)
    return {
        "name": str(run.config.get("name") or run.path.resolve().name),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "planned_rounds": run.planned_rounds,
        "rounds": [_round(files) for files in run.rounds if files.collect or files.train or files.evaluate],
        "losses": losses,
        "loss_steps": steps,
        "episodes": episodes,
        "episodes_in_all": len(slots),
    }


def choose_evenly(slots: list[Slot], limit: int) -> list[Slot]:
    """Return at most ``limit`` slots, shared equally between the (kind, round) groups and evenly spread in each."""
    groups: dict[tuple[str, int], list[Slot]] = {}
    for slot in slots:
        groups.setdefault((slot[0], slot[2]), []).append(slot)
    quota, remaining = dict.fromkeys(groups, 0), limit
    while remaining > 0:  # deal one to each group in turn: small groups leave their share to large ones
        open_groups = [name for name in groups if quota[name] < len(groups[name])]
        if not open_groups:
            break
        for name in open_groups[:remaining]:
            quota[name] += 1
        remaining -= len(open_groups[:remaining])
    chosen = []
    for name, members in groups.items():
        chosen += [members[i * len(members) // quota[name]] for i in range(quota[name])]
    return chosen


def describe(trajectory: Trajectory, kind: str) -> dict[str, Any]:
    """Return one episode for the page, its texts sanitized and clipped."""
    turns = []
    for turn in trajectory.turns:
        shown: dict[str, Any] = {
            "by": "teacher" if turn.acted_by is ActedBy.TEACHER else "student",
            "saw": clip(sanitize(turn.observation)),
            "did": clip(sanitize(turn.action.text)),
            "labelled": turn.label is not None,
        }
        if turn.label is not None and not turn.agrees:
            shown["would"] = clip(sanitize(turn.label.text))
        turns.append(shown)
    return {
        "kind": kind,
        "round": trajectory.round_index,
        "task": sanitize(trajectory.task_id),
        "attempt": trajectory.attempt,
        "solved": trajectory.solved,
        "stop": trajectory.stop_reason.value,
        "beta": trajectory.beta,
        "seconds": round(trajectory.duration_s, 1),
        "turns": turns,
    }


def clip(text: str) -> str:
    """Return ``text`` or, if it is long, its beginning and end with a note of how much is left out."""
    if len(text) <= MAX_TEXT:
        return text
    head, tail = MAX_TEXT * 2 // 3, MAX_TEXT // 3
    return f"{text[:head]}\n… {len(text) - head - tail} characters left out …\n{text[-tail:]}"


def _slots(run: RunFiles, data: EpisodeSource | None, evaluations: EpisodeSource | None) -> Iterator[Slot]:
    for source, collected in ((evaluations, False), (data, True)):
        if source is None:
            continue
        for index in source.rounds():
            for key in sorted(source.committed(index)):
                kind = "collected" if collected else ("heldout" if key[0] in run.heldout_tasks else "train")
                yield kind, source, index, key


def _episodes(slots: list[Slot]) -> list[dict[str, Any]]:
    """Return the episodes of ``slots`` or, if they are too large together, an even part of them."""
    episodes = [describe(source.read(index, key), kind) for kind, source, index, key in slots]
    sizes = [sum(len(t["saw"]) + len(t["did"]) + len(t.get("would", "")) for t in e["turns"]) for e in episodes]
    keep = min(len(episodes), max(1, len(episodes) * MAX_EPISODES_CHARACTERS // max(1, sum(sizes))))
    return [episodes[i * len(episodes) // keep] for i in range(keep)] if episodes else []


def _round(files: RoundFiles) -> dict[str, Any]:
    train = {k: v for k, v in (files.train or {}).items() if k not in ("digests", "canary")}
    return {
        "index": files.index,
        "collect": files.collect,
        "train": train or None,
        "evaluate": files.evaluate,
    }


def _losses(rounds: list[RoundFiles]) -> tuple[list[list[float]], int]:
    """Return [step over all rounds, mean loss, round] of intervals of equal length, and the number of steps."""
    points: list[tuple[int, float, int]] = []
    first = 0
    for files in rounds:
        for line in files.steps:
            if isinstance(line.get("loss"), int | float) and isinstance(line.get("step"), int):
                points.append((first + line["step"], float(line["loss"]), files.index))
        first += int((files.train or {}).get("steps") or len(files.steps))
    stride = -(-len(points) // MAX_LOSS_POINTS) or 1
    curve = []
    for index in sorted({p[2] for p in points}):
        own = [p for p in points if p[2] == index]
        for start in range(0, len(own), stride):
            part = own[start : start + stride]
            curve.append([part[-1][0], round(sum(p[1] for p in part) / len(part), 5), index])
    return curve, len(points)
